"""Folders of clips in many formats: that of the repository, and a larger one of real footage."""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass
from pathlib import Path

from mam2.engine.data.manifest import Manifest, read_manifest


@dataclass(frozen=True)
class ClipSet:
    folder: Path

    @functools.cached_property
    def listed(self) -> dict[str, dict[str, str]]:
        """Rows of manifest.csv by the file's path below `folder`."""
        with (self.folder / "manifest.csv").open(encoding="utf-8", newline="") as file:
            return {row["file"]: row for row in csv.DictReader(file)}

    @functools.cached_property
    def broken(self) -> set[str]:
        """Files without a decodable frame, according to manifest.csv."""
        return {name for name, row in self.listed.items() if row["frames_decoded"] in ("", "0")}

    @functools.cached_property
    def found(self) -> Manifest:
        """The manifest that a scan of the folder returns."""
        return read_manifest(self.folder, progress=False)

    def name(self, path: str | Path) -> str:
        """A file's key in `listed`."""
        return Path(path).relative_to(self.folder).as_posix()
