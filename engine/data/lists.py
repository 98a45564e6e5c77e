"""From what a user has, a folder, an annotation list or a single video, to paths and labels; no video is opened.

Folders:
- a folder with a folder a class: the labels are the class folders in the order of their names;
- any other folder: every video in it, at any depth, without labels.
A folder with nothing below it that holds numbered images (img_00001.jpg …) and no videos is one video of these frames.

Lists, a line a video; relative paths start at the list's folder:
- `path label`, VideoMAE's, parted by the last space, tab or comma, so paths may hold spaces; a label may be missing;
- `folder frames label`, VideoMAE's for folders of images, and `path 0 -1` of its second version: a whole number between
  path and label is left out, images are counted;
- `"path" label`, quoted as CSV files are;
- `path::label`, V-JEPA's;
- a header, columns parted by tabs or commas: the path under "path", "file", "filename" or "video", the label, if any,
  under "label", "class" or "target".
A label is a number from 0 or a name; -1 and nothing stand for none. Names count in alphabetical order.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mam2.engine.config import UserError
from mam2.engine.data.decoding import IMAGE_SUFFIXES

VIDEO_SUFFIXES = (
    *(".3g2", ".3gp", ".asf", ".avi", ".divx", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg"),
    *(".mpg", ".mts", ".ogv", ".ts", ".vob", ".webm", ".wmv"),
)
PATH_COLUMNS = ("path", "file", "filename", "video")
LABEL_COLUMNS = ("label", "class", "target")
MOST_CLASSES = 1_000_000

_QUOTED = re.compile(r'"(?:[^"]|"")+"([ \t,])')
_NUMBERED = re.compile(r"(.*[^ ,])?(?: *, *| +)(-?\d+)")
_NAMED = re.compile(rf"(.*(?:{'|'.join(map(re.escape, VIDEO_SUFFIXES))}))(?: *, *| +)(\S.*)", re.IGNORECASE)
_NUMBERED_IMAGE = re.compile(rf".*\d(?:{'|'.join(map(re.escape, IMAGE_SUFFIXES))})", re.IGNORECASE)


class Entry(NamedTuple):
    path: str
    """Absolute."""
    label: int
    """Class, 0 and up; -1 where there is none."""


class Listing(NamedTuple):
    entries: list[Entry]
    """In a fixed order; a list may name a video more than once."""
    classes: tuple[str, ...]
    """Name of each label; empty where there are no labels."""


class _Row(NamedTuple):
    number: int
    """Of the line, from 1."""
    path: str
    label: str
    """Empty where there is none."""


def read_source(source: str | Path) -> Listing:
    """The videos of a folder, an annotation list or a single file. Raises UserError, for a list with the line."""
    source = Path(source)
    if source.is_dir():
        listing = _read_folder(source)
    elif source.suffix.lower() in VIDEO_SUFFIXES and source.is_file():
        listing = Listing([Entry(str(source), -1)], ())
    elif source.is_file():
        listing = _read_list(source)
    else:
        raise UserError(f"{source}: no such file or folder; expected a folder of videos or an annotation list")
    # Absolute, so that a saved manifest holds in any working directory, and no name is taken for a URL by FFmpeg.
    return Listing([Entry(os.path.abspath(path), label) for path, label in listing.entries], listing.classes)


def _read_folder(folder: Path) -> Listing:
    paths = sorted(_find_videos(folder))
    if not paths:
        raise UserError(
            f"{folder}: no videos in this folder (looked for {', '.join(VIDEO_SUFFIXES)} "
            "and folders of numbered images)"
        )
    parts = [path.relative_to(folder).parts for path in paths]
    if any(len(part) != 2 for part in parts):
        return Listing([Entry(str(path), -1) for path in paths], ())
    classes = sorted({part[0] for part in parts})
    labels = {name: label for label, name in enumerate(classes)}
    entries = [Entry(str(path), labels[part[0]]) for path, part in zip(paths, parts, strict=True)]
    return Listing(entries, tuple(classes))


def _find_videos(folder: Path) -> Iterator[Path]:
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        if os.path.realpath(parent) in seen:  # a link back to a folder above
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        folders[:] = [name for name in folders if not name.startswith(".")]
        files = [name for name in files if not name.startswith(".")]
        videos = [name for name in files if os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES]
        yield from (Path(parent, name) for name in videos)
        # One image is a poster, images above other folders are no frames; several with numbers are.
        if not videos and not folders and sum(_NUMBERED_IMAGE.fullmatch(name) is not None for name in files) > 1:
            yield Path(parent)


def _read_list(source: Path) -> Listing:
    # File names need not be UTF-8; surrogates carry their bytes back to the file system.
    with open(source, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        text = file.read()
    if "\0" in text:
        raise UserError(f"{source}: not a text file; expected a folder of videos or an annotation list")
    lines = [(number, line.strip()) for number, line in enumerate(re.split(r"\r\n?|\n", text), 1) if line.strip()]
    if not lines:
        raise UserError(f"{source}: the list is empty; expected lines of `path label`")
    rows = _read_table(source, text)
    if rows is None:
        split = _split_colons if all("::" in line for _, line in lines) else _split_line
        rows = [_Row(number, *split(line, source.parent)) for number, line in lines]
    for row in rows:
        if not row.path:
            raise UserError(f"{source}: line {row.number} names no video; expected `path label`")
    labels, classes = _number_labels(source, rows)
    entries = [Entry(os.path.join(source.parent, row.path), label) for row, label in zip(rows, labels, strict=True)]
    return Listing(entries, classes)


def _read_table(source: Path, text: str) -> list[_Row] | None:
    """The rows of a list with a header, None for one without."""
    first = text.lstrip().split("\n")[0]
    delimiter = "\t" if "\t" in first else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        table = [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except csv.Error as error:
        raise UserError(f"{source}: line {reader.line_num}: {error}") from error
    header = [name.strip().lower() for name in table[0][1]]
    path_column = next((header.index(name) for name in PATH_COLUMNS if name in header), None)
    if path_column is None:
        return None
    label_column = next((header.index(name) for name in LABEL_COLUMNS if name in header), None)
    for number, cells in table:
        if len(cells) != len(header):
            raise UserError(
                f"{source}: line {number} has {len(cells)} columns, the header has {len(header)}; "
                "a cell that holds the separator needs quotes"
            )
    if len(table) == 1:
        raise UserError(f"{source}: a header but no videos")
    return [
        _Row(number, cells[path_column], "" if label_column is None else cells[label_column].strip())
        for number, cells in table[1:]
    ]


def _split_colons(line: str, folder: Path) -> tuple[str, str]:
    path, _, label = line.rpartition("::")
    return path.strip(), label.strip()


def _split_line(line: str, folder: Path) -> tuple[str, str]:
    """Path and label of a line without a header; the label is empty where there is none."""
    if quoted := _QUOTED.match(line):
        path, *rest = next(csv.reader([line], delimiter=quoted[1], skipinitialspace=True))
        return path, rest[-1].strip() if rest else ""
    if "\t" in line:
        path, *rest = line.split("\t")
        return path.strip(), rest[-1].strip()
    if numbered := _NUMBERED.fullmatch(line):
        path, label = numbered[1] or "", numbered[2]
        between = _NUMBERED.fullmatch(path)
        if between and not os.path.exists(os.path.join(folder, path)):
            path = between[1] or ""
        return path, label
    if named := _NAMED.fullmatch(line):
        return named[1], named[2]
    return line, ""


def _number_labels(source: Path, rows: Sequence[_Row]) -> tuple[list[int], tuple[str, ...]]:
    """Labels as numbers and the name of each: numbers stay what they are, names count in alphabetical order."""
    labelled = [row for row in rows if row.label]
    numbers = [row for row in labelled if re.fullmatch(r"-?\d+", row.label)]
    names = [row for row in labelled if not re.fullmatch(r"-?\d+", row.label)]
    if numbers and names:
        raise UserError(
            f"{source}: line {numbers[0].number} has the label {numbers[0].label}, line {names[0].number} the label "
            f"{names[0].label!r}; expected numbers or names throughout"
        )
    if names:
        classes = tuple(sorted({row.label for row in names}))
        places = {name: place for place, name in enumerate(classes)}
        return [places.get(row.label, -1) for row in rows], classes
    for row in numbers:
        if not -1 <= int(row.label) < MOST_CLASSES:
            raise UserError(
                f"{source}: line {row.number}: label {row.label} is not a class; labels are numbers from 0, "
                "without gaps"
            )
    values = [int(row.label or -1) for row in rows]
    return values, tuple(str(number) for number in range(max(values) + 1))
