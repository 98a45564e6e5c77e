"""The videos that cannot be used: each is reported once, and too many of them end the run."""

from __future__ import annotations

from collections.abc import Callable

from mam2.engine.data.manifest import Manifest
from mam2.engine.data.video import Skipped


class UnusableVideos:
    """Videos of a manifest that turned out to be unusable after it was made. Threads may add to it."""

    def __init__(
        self, manifest: Manifest, max_unusable: float, report: Callable[[Skipped], None] | None = None
    ) -> None:
        """max_unusable: largest share of the videos, 0 to 1. report: called once per video, by the adding thread."""
        self._manifest, self._max_unusable, self._report = manifest, max_unusable, report
        self._paths = {skipped.path for skipped in manifest.skipped}
        self.found: list[Skipped] = []
        """In the order in which they were found."""

    def __len__(self) -> int:
        """Of all unusable videos, those that the manifest names included."""
        return len(self._paths)

    @property
    def total(self) -> int:
        """Usable and unusable videos."""
        return len(self._manifest.videos) + len(self._manifest.skipped)

    def add(self, skipped: Skipped) -> None:
        """Reports and keeps a video, unless it is known already."""
        if skipped.path in self._paths:
            return
        self._paths.add(skipped.path)
        self.found.append(skipped)
        if self._report:
            self._report(skipped)

    def too_many(self) -> str | None:
        """The error message where more than `max_unusable` of all videos are unusable."""
        if len(self) <= self._max_unusable * self.total:
            return None
        last = [*self._manifest.skipped, *self.found][-1]
        return (
            f"{len(self)} of {self.total} videos cannot be used, more than data.max_unusable="
            f"{self._max_unusable:g} allows; the last is {last.path}: {last.reason}"
        )
