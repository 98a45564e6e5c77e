"""Reads a folder, an annotation list or a single video into paths and labels; opens no video.

Folders:
- a folder with one folder per class: the labels are the class folders in the order of their names, or of their numbers
  if all names are numbers;
- any other folder: every video in it, at any depth, without labels;
- a folder with tar files and neither videos nor folders: tar shards, see `mam2.engine.data.tar_shards`, which also
  describes patterns of them.

Which files of a folder are videos: see `mam2.engine.data.folders`.
Lists: see `mam2.engine.data.lists`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from mam2.engine.data.folders import CLIP_SUFFIXES, find_videos
from mam2.engine.data.lists import Row, number_labels, read_rows
from mam2.engine.data.storage import absolute, as_address
from mam2.engine.data.tar_shards import TarSource, as_tar_source, read_samples, tar_files
from mam2.engine.errors import UserError
from mam2.engine.units import counted


class Entry(NamedTuple):
    path: str
    """Absolute path of the video."""
    label: int
    """Class number from 0; -1 without a label."""
    split: str = ""
    """Split from the list's column; empty without such a column."""


class Listing(NamedTuple):
    entries: list[Entry]
    """Videos in a fixed order; a list may contain a video more than once."""
    classes: tuple[str, ...]
    """Name of each label; empty without labels."""
    notes: tuple[str, ...] = ()
    """Remarks for the user on how the source was read, one per line."""


def list_and_split(source: str | Path) -> tuple[Path, str]:
    """Splits LIST:SPLIT into the list and the split, and the place of labels from tar shards; returns any other source
    unchanged, with an empty split."""
    if tar := as_tar_source(source):
        return Path(tar.pattern), tar.field
    path = Path(source)
    before, _, split = str(source).rpartition(":")
    return (Path(before), split) if split and not path.exists() and Path(before).is_file() else (path, "")


def check_source(source: str | Path) -> None:
    """Raises UserError if a source does not exist; call it before expensive work."""
    if tar := as_tar_source(source):
        tar_files(tar)
    elif not list_and_split(source)[0].exists():
        raise UserError(f"{source}: no such file or folder; expected a folder of videos or an annotation list")


def read_source(source: str | Path) -> Listing:
    """Returns the videos of a folder, an annotation list or a single file. A UserError for a list names the line.

    source: LIST:SPLIT selects the rows of a list with SPLIT in their split column.
    """
    if tar := as_tar_source(source):
        return _read_tars(tar)
    check_source(source)
    source, split = list_and_split(source)
    if source.is_dir():
        listing = _read_folder(source)
    elif source.suffix.lower() in CLIP_SUFFIXES and source.is_file():
        listing = Listing([Entry(str(source), -1)], ())
    else:
        notes: list[str] = []
        rows = read_rows(source, split, notes)
        labels, classes = number_labels(source, rows, notes)
        paths = [as_address(row.path) or os.path.join(source.parent, row.path) for row in rows]
        entries = [Entry(path, label, row.split) for path, row, label in zip(paths, rows, labels, strict=True)]
        listing = Listing(entries, classes, tuple(notes))
    # Absolute, so that a saved manifest is valid in any working directory, and FFmpeg does not read a name as a URL.
    return listing._replace(entries=[entry._replace(path=absolute(entry.path)) for entry in listing.entries])


def _read_tars(source: TarSource) -> Listing:
    notes: list[str] = []
    samples = read_samples(source, notes)
    if not source.field:
        return Listing([Entry(sample.path, -1) for sample in samples], (), tuple(notes))
    rows = [Row(number, sample.path, sample.label) for number, sample in enumerate(samples, 1)]
    labels, classes = number_labels(Path(source.pattern), rows, notes)
    unlabeled = sum(not row.label for row in rows)
    if unlabeled:
        notes.append(f"{source.pattern}:{source.field}: {unlabeled} of {counted(len(rows), 'video')} without a label")
    entries = [Entry(row.path, label) for row, label in zip(rows, labels, strict=True)]
    return Listing(entries, classes, tuple(notes))


def _read_folder(folder: Path) -> Listing:
    twins: list[tuple[Path, Path]] = []
    # Code caches and runs number the videos in this order, the order of their paths.
    paths = sorted(find_videos(folder, twins))
    if not paths:
        raise UserError(
            f"{folder}: no videos in this folder (expected {', '.join(CLIP_SUFFIXES)} and folders of numbered images)"
        )
    parts = [path.relative_to(folder).parts for path in paths]
    if any(len(part) != 2 for part in parts):
        return Listing([Entry(str(path), -1) for path in paths], ())
    for other, first in twins:
        if other.parent == first.parent == folder:
            raise UserError(f"{folder}: the class folders {first.name} and {other.name} are one folder; remove one")
    classes = sorted({part[0] for part in parts})
    if all(name.isdecimal() for name in classes):
        classes.sort(key=lambda name: (int(name), name))
    labels = {name: label for label, name in enumerate(classes)}
    entries = [Entry(str(path), labels[part[0]]) for path, part in zip(paths, parts, strict=True)]
    return Listing(entries, tuple(classes))
