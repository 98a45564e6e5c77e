"""Unusable videos: each is reported once, and too many of them end the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mam2.engine.data.manifest import Manifest
from mam2.engine.data.video import Skipped
from mam2.engine.units import counted

FIRST_FILES = 16
"""The run ends if this many first files all fail for the same reason and no file was decoded."""


class UnusableVideos:
    """Videos found to be unusable after the manifest was written. Threads may add to it."""

    def __init__(
        self, manifest: Manifest, max_unusable: float, report: Callable[[Skipped], None] | None = None
    ) -> None:
        """max_unusable: largest share of the videos, 0 to 1. report: called once per video, by the adding thread."""
        self._manifest, self._max_unusable, self._report = manifest, max_unusable, report
        self._paths = {skipped.path for skipped in manifest.skipped}
        self.found: list[Skipped] = []
        """Videos in the order in which they were found."""

    def __len__(self) -> int:
        """Returns the number of all unusable videos, including those of the manifest."""
        return len(self._paths)

    def __contains__(self, path: str) -> bool:
        """Returns whether the video of a path is known to be unusable."""
        return path in self._paths

    @property
    def total(self) -> int:
        """Returns the number of usable and unusable videos."""
        return len(self._manifest.videos) + len(self._manifest.skipped)

    def add(self, skipped: Skipped) -> None:
        """Reports and stores a video, unless it is already known."""
        if skipped.path in self._paths:
            return
        self._paths.add(skipped.path)
        self.found.append(skipped)
        if self._report:
            self._report(skipped)

    def too_many(self) -> str | None:
        """Returns the error message if more than `max_unusable` of all videos are unusable, else empty."""
        if len(self) <= self._max_unusable * self.total:
            return None
        last = [*self._manifest.skipped, *self.found][-1]
        return (
            f"{len(self)} of {counted(self.total, 'video')} cannot be used, more than data.max_unusable="
            f"{self._max_unusable:g} allows; the last is {last.path}: {last.reason}"
        )

    def all_alike(self) -> str | None:
        """Returns the error message if many videos failed for the same reason: then the cause is not in the videos.

        Call it only for a loader that has not decoded anything yet.
        """
        reasons = {skipped.reason for skipped in self.found}
        if self._max_unusable >= 1 or len(self.found) < FIRST_FILES or len(reasons) > 1:
            return None
        return (
            f"no video can be decoded: the first {len(self.found)} videos all failed for the same reason, "
            f"{reasons.pop()}; the last is {self.found[-1].path}. mam2 doctor tests each decoder with its own clips"
        )


def none_decoded(source: object, skipped: Sequence[Skipped]) -> str:
    """Returns the error message if no video of a source could be decoded: it names the first with its reason."""
    first = f"; the first of {len(skipped)} is {skipped[0].path}: {skipped[0].reason}" if skipped else ""
    return f"{source}: no video can be decoded{first}. Pass other videos; mam2 index lists what is wrong with each"
