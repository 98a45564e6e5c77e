"""Reads annotation lists into rows of path and label, and gives labels their numbers.

One line per video; relative paths are relative to the list's folder:
- `path label`, VideoMAE's format, separated at the last space, tab or comma, so that paths may contain spaces; the
  label is optional;
- `folder frames label`, VideoMAE's format for folders of images, and `path 0 -1` of its second version: an integer
  between path and label is ignored, and the images are counted;
- `"path" label`, quoted as in CSV files;
- `path::label`, V-JEPA's format;
- a header and columns separated by tabs or commas: the path in the column "path", "file", "filename", "video", …, the
  optional label in "label", "class", "category", …; with a column "split" or "subset", LIST:train selects the rows of
  one split;
- Kinetics' official format (label, youtube_id, time_start, time_end, split): the videos are searched below the list's
  folder by their usual names, youtube_id_000010_000020 or youtube_id.
A label is a number from 0 or a name; -1 or an empty label means none. Names are numbered in alphabetical order. Lists
of several classes per video (`run;jump`, `0;3`) and of numbers to predict (`0.5`) keep each label's text as a name, see
`mam2.engine.data.label_texts`.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mam2.engine.data.folders import CLIP_SUFFIXES, find_videos
from mam2.engine.errors import UserError

PATH_COLUMNS = (
    *("path", "file", "filename", "video", "video_path", "file_path", "filepath", "file_name", "video_file"),
    *("video_name", "clip", "clip_path"),
)
LABEL_COLUMNS = ("label", "class", "target", "category", "label_name", "class_name", "action", "label_id", "class_id")
SPLIT_COLUMNS = ("split", "subset")
KINETICS_COLUMNS = ("youtube_id", "time_start", "time_end")
MOST_CLASSES = 1_000_000
MOST_COLUMNS = 20
"""Named in an error."""

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_QUOTED = re.compile(r'"(?:[^"]|"")+"(?:([ \t,])|$)')
_NUMBERED = re.compile(r"(.*[^ ,])?(?: *, *| +)(-?\d+)")
_NAMED = re.compile(rf"(.*(?:{'|'.join(map(re.escape, CLIP_SUFFIXES))}))(?: *, *| +)(\S.*)", re.IGNORECASE)


class Row(NamedTuple):
    number: int
    """Line number, from 1."""
    path: str
    label: str
    """Label as text; empty without a label."""
    split: str = ""


def read_rows(source: Path, split: str, notes: list[str]) -> list[Row]:
    """Returns the rows of a list, those of `split` if it is given; paths are as the list has them.

    Appends remarks for the user to `notes`. Raises UserError, which names the line.
    """
    text = _read_text(source)
    lines = [(number, line.strip()) for number, line in enumerate(re.split(r"\r\n?|\n", text), 1) if line.strip()]
    if not lines:
        raise UserError(f"{source}: the list is empty; expected lines of `path label`")
    rows = _read_table(source, text, notes)
    if rows is None:
        parts = _split_colons if all("::" in line for _, line in lines) else _split_line
        rows = [Row(number, *parts(line, source.parent)) for number, line in lines]
    rows = _of_split(source, rows, split, notes)
    for row in rows:
        if not row.path:
            raise UserError(f"{source}: line {row.number} names no video; expected `path label`")
    return rows


def read_column(table: Path, column: str) -> dict[str, str]:
    """Reads one more column of a list with a header. Returns its cell, which may be empty, for each absolute path.

    Raises UserError if the table, a header with a column of paths, or the column is missing.
    """
    if not table.exists():
        raise UserError(f"{table}: no such file or folder; expected a list with a header")
    if table.is_dir():
        raise UserError(f"{table}: a folder has no columns; expected a list with a header that names {column!r}")
    header, rows, spaced = _read_cells(table, _read_text(table))
    path_column = next((header.index(name) for name in PATH_COLUMNS if name in header), None)
    if path_column is None or column.lower() not in header:
        missing = repr(column) if path_column is not None else f"the paths (expected {', '.join(PATH_COLUMNS[:3])}, …)"
        raise UserError(f"{table}: no column for {missing}; its first line holds {', '.join(header[:MOST_COLUMNS])}")
    _check_widths(table, header, rows)
    place = header.index(column.lower())
    paths = [cells[path_column].strip() if spaced else cells[path_column] for _, cells in rows]
    absolute = [os.path.abspath(os.path.join(table.parent, path)) for path in paths]
    return {path: cells[place].strip() for path, (_, cells) in zip(absolute, rows, strict=True)}


def _are_texts(labels: Sequence[str]) -> bool:
    """Returns whether labels of which some are whole numbers are all numbers, or some of them several classes."""
    return any(";" in label for label in labels) or all(_NUMBER.fullmatch(label) for label in labels)


def number_labels(source: Path, rows: Sequence[Row], notes: list[str]) -> tuple[list[int], tuple[str, ...]]:
    """Returns labels as numbers, and their names: numbers stay unchanged, names are numbered alphabetically."""
    labeled = [row for row in rows if row.label]
    numbers = [row for row in labeled if re.fullmatch(r"-?\d+", row.label)]
    names = [row for row in labeled if not re.fullmatch(r"-?\d+", row.label)]
    if numbers and names and not _are_texts([row.label for row in labeled]):
        raise UserError(
            f"{source}: line {numbers[0].number} has the label {numbers[0].label}, line {names[0].number} the label "
            f"{names[0].label!r}; expected only numbers or only names"
        )
    if names:
        classes = tuple(sorted({row.label for row in labeled}))
        places = {name: place for place, name in enumerate(classes)}
        return [places.get(row.label, -1) for row in rows], classes
    for row in numbers:
        if not -1 <= int(row.label) < MOST_CLASSES:
            raise UserError(
                f"{source}: line {row.number}: label {row.label} is not a class; labels are numbers from 0, "
                f"without gaps; write a number to predict (regression) with a decimal point: {row.label}.0"
            )
    values = [int(row.label or -1) for row in rows]
    present, highest = len(set(values) - {-1}), max(values)
    if highest + 1 > 2 * present > 0:
        notes.append(
            f"{source}: the labels go up to {highest}, of which {present} occur: {highest + 1} classes; "
            "if that is not intended, number them from 0 without gaps"
        )
    return values, tuple(str(number) for number in range(max(values) + 1))


def _read_text(source: Path) -> str:
    # File names need not be UTF-8; surrogates preserve their bytes.
    with open(source, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        text = file.read()
    if "\0" in text:
        raise UserError(f"{source}: not a text file; expected a folder of videos or an annotation list")
    return text


def _of_split(source: Path, rows: list[Row], split: str, notes: list[str]) -> list[Row]:
    """Returns the rows of a split, or all rows without a split; then a note lists the splits."""
    counts = Counter(row.split for row in rows if row.split)
    there = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))
    if split and not counts:
        raise UserError(f"{source}:{split}: the list has no column named {' or '.join(SPLIT_COLUMNS)}")
    if split and split not in counts:
        raise UserError(f"{source}:{split}: no row of this split; the list has {there}")
    if split:
        return [row for row in rows if row.split == split]
    if len(counts) > 1:
        notes.append(f"{source}: rows of all splits are used: {there}; {source}:{min(counts)} selects one split")
    return rows


def _read_cells(source: Path, text: str) -> tuple[list[str], list[tuple[int, list[str]]], bool]:
    """Reads the cells of a table.

    Returns those of its first line in lower case, the others with their line number from 1, and whether spaces around a
    cell are ignored.
    """
    first = text.lstrip().split("\n")[0]
    delimiter = "\t" if "\t" in first else ","
    spaced = delimiter == ","  # "a.mp4", "run": the space is not part of the cell
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=spaced)
    try:
        table = [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except csv.Error as error:
        raise UserError(f"{source}: line {reader.line_num}: {error}") from error
    return [name.strip().lower() for name in table[0][1]] if table else [], table[1:], spaced


def _check_widths(source: Path, header: Sequence[str], rows: Sequence[tuple[int, Sequence[str]]]) -> None:
    for number, cells in rows:
        if len(cells) != len(header):
            raise UserError(
                f"{source}: line {number} has {len(cells)} columns, the header has {len(header)}; "
                "a cell that holds the separator needs quotes"
            )


def _read_table(source: Path, text: str, notes: list[str]) -> list[Row] | None:
    """Returns the rows of a list with a header, None for one without."""
    header, table, spaced = _read_cells(source, text)
    path_column, label_column, split_column = (
        next((header.index(name) for name in names if name in header), None)
        for names in (PATH_COLUMNS, LABEL_COLUMNS, SPLIT_COLUMNS)
    )
    kinetics = path_column is None and all(name in header for name in KINETICS_COLUMNS)
    if path_column is None and not kinetics:
        if _is_header(source.parent, header):
            raise UserError(
                f"{source}: the header ({', '.join(header)}) has no column for the videos; "
                f"expected one named {', '.join(PATH_COLUMNS)}"
            )
        return None
    _check_widths(source, header, table)
    if not table:
        raise UserError(f"{source}: a header but no videos")
    numbers, cells_of = [number for number, _ in table], [cells for _, cells in table]
    if path_column is None:
        paths = _kinetics_paths(source, header, cells_of)
    else:
        paths = [cells[path_column].strip() if spaced else cells[path_column] for cells in cells_of]
    used = {path_column, label_column, split_column}
    others = [name for place, name in enumerate(header) if place not in used]
    if label_column is None and others and not kinetics:
        notes.append(f"{source}: no column for labels; the columns {', '.join(others)} are not used")
    labels, splits = (
        [cells[column].strip() for cells in cells_of] if column is not None else [""] * len(cells_of)
        for column in (label_column, split_column)
    )
    return [Row(*row) for row in zip(numbers, paths, labels, splits, strict=True)]


def _is_header(folder: Path, cells: Sequence[str]) -> bool:
    """Returns whether a first line without a path column is still a header: it names another column and no file."""
    named = set(cells) & {*LABEL_COLUMNS, *SPLIT_COLUMNS, *KINETICS_COLUMNS}
    plain = not any(mark in cell for cell in cells for mark in "./")
    return len(cells) > 1 and bool(named) and plain and not os.path.exists(os.path.join(folder, cells[0]))


def _kinetics_paths(source: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the paths for the rows of an official Kinetics list: videos below its folder with the usual names.

    Many clips are no longer published: a missing one gets its usual name. Raises UserError if all are missing.
    """
    there = {path.stem: path for path in sorted(find_videos(source.parent, []))}
    there |= {path.name: path for path in there.values() if path.is_dir()}
    paths, found = [], 0
    for number, row in enumerate(rows, 2):
        video, *times = (row[header.index(name)].strip() for name in KINETICS_COLUMNS)
        try:
            start, end = (int(float(time)) for time in times)
        except ValueError:
            raise UserError(f"{source}: row {number}: expected numbers as times, found {', '.join(times)}") from None
        usual = f"{video}_{start:06d}_{end:06d}"
        path = there.get(usual) or there.get(f"{video}_{start}_{end}") or there.get(video)
        found += path is not None
        paths.append(str(path) if path else f"{usual}.mp4")
    if not found:
        raise UserError(
            f"{source}: an official Kinetics list without file names; none of its {len(rows)} videos ({paths[0]}, …) "
            f"is below {source.parent}; move the list to the videos' folder, or write lines of `path label`"
        )
    return paths


def _unquoted(cell: str) -> str:
    """Removes the quotes of a CSV cell."""
    return cell[1:-1].replace('""', '"') if len(cell) > 1 and cell[0] == cell[-1] == '"' else cell


def _split_colons(line: str, folder: Path) -> tuple[str, str]:
    path, _, label = line.rpartition("::")
    return _unquoted(path.strip()), _unquoted(label.strip())


def _split_line(line: str, folder: Path) -> tuple[str, str]:
    """Returns path and label of a line in a list without a header; the label may be empty."""
    if quoted := _QUOTED.match(line):
        path, *rest = next(csv.reader([line], delimiter=quoted[1] or ",", skipinitialspace=True))
        return path, rest[-1].strip() if rest else ""
    if "\t" in line:
        path, *rest = line.split("\t")
        return path.strip(), _unquoted(rest[-1].strip())
    if numbered := _NUMBERED.fullmatch(line):
        path, label = numbered[1] or "", numbered[2]
        between = _NUMBERED.fullmatch(path)
        if between and not os.path.exists(os.path.join(folder, path)):
            path = between[1] or ""
        return path, label
    if named := _NAMED.fullmatch(line):
        return named[1], _unquoted(named[2])
    return line, ""
