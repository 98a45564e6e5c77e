"""The list of videos a run uses: found in a folder or an annotation list, each opened once and counted.

Four forms of input:
- a folder with a folder a class: the labels are the class folders in the order of their names;
- any other folder: every video in it, at any depth, without labels;
- a list of lines `path label`, the form of VideoMAE: the last space, tab or comma parts them, so paths may hold
  spaces, and the label (a whole number) may be missing;
- a list with a header, parted by tabs or commas: the path under "path", "file", "filename" or "video", the label, if
  any, under "label", "class" or "target", as a number or a name.
Relative paths in a list start at the list's folder. A single video is a data set of one.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from mam2.engine.config import UserError
from mam2.engine.data.decoding import DecodeError, available_cores, decode_packet, open_video, quarter_turns

VIDEO_SUFFIXES = (
    *(".3g2", ".3gp", ".asf", ".avi", ".divx", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg"),
    *(".mpg", ".mts", ".ogv", ".ts", ".vob", ".webm", ".wmv"),
)
PATH_COLUMNS = ("path", "file", "filename", "video")
LABEL_COLUMNS = ("label", "class", "target")
MOST_CLASSES = 1_000_000


@dataclass(frozen=True)
class Video:
    """A video that opens: its frames are counted without decoding them, so a damaged one may have fewer."""

    path: str
    label: int
    """Class, 0 and up; -1 where there is none."""
    frames: int
    width: int
    """Of the stored frame in pixels; see `shown_size`."""
    height: int
    codec: str
    """FFmpeg's name: h264, hevc, vp9, …"""
    fps: float
    """Average frames per second, 0 where the file does not say."""
    rotation: int
    """Degrees by which a player turns the frames counter-clockwise: 0, 90, 180 or 270."""
    pixel_format: str = "yuv420p"
    """FFmpeg's name."""

    @property
    def shown_size(self) -> tuple[int, int]:
        """Width and height in pixels after the rotation."""
        return (self.height, self.width) if self.rotation % 180 else (self.width, self.height)


@dataclass(frozen=True)
class Skipped:
    """A video that cannot be used, and why in a few words."""

    path: str
    reason: str


@dataclass(frozen=True)
class Manifest:
    videos: tuple[Video, ...]
    skipped: tuple[Skipped, ...] = ()
    classes: tuple[str, ...] = ()
    """Name of each label; empty where there are no labels."""


def read_manifest(source: str | Path, *, threads: int = 0, progress: bool = True) -> Manifest:
    """The usable videos of a folder, an annotation list or a single file, in a fixed order.

    threads: files opened at once, 0 for twice the cores. progress: draw a bar when the output is a terminal.
    Raises UserError when there is nothing to use; single files that cannot be used are in `skipped`.
    """
    source = Path(source)
    if source.is_dir():
        entries, classes = _read_folder(source)
    elif source.suffix.lower() in VIDEO_SUFFIXES and source.is_file():
        entries, classes = [(str(source), -1)], ()
    elif source.is_file():
        entries, classes = _read_list(source)
    else:
        raise UserError(f"{source}: no such file or folder; expected a folder of videos or an annotation list")
    # Absolute, so that a saved manifest holds in any working directory, and no name is taken for a URL by FFmpeg.
    entries = [(os.path.abspath(path), label) for path, label in entries]
    pool = ThreadPoolExecutor(threads or 2 * available_cores())
    try:
        found = pool.map(lambda entry: probe(*entry), entries)
        # disable=None: no bar where the output is not a terminal.
        results = list(tqdm(found, "reading videos", len(entries), unit="file", disable=None if progress else True))
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupted scan does not go on to its end
    videos = tuple(result for result in results if isinstance(result, Video))
    skipped = tuple(result for result in results if isinstance(result, Skipped))
    if not videos and all(entry.reason == "does not exist" for entry in skipped):
        raise UserError(
            f"{source}: none of the {len(skipped)} listed videos exists, the first is {skipped[0].path}; "
            f"relative paths start at the list's folder"
        )
    if not videos:
        reason = f"the first, {skipped[0].path}: {skipped[0].reason}"
        raise UserError(f"{source}: none of the {len(skipped)} videos can be used; {reason}")
    return Manifest(videos, skipped, tuple(classes))


def probe(path: str, label: int = -1) -> Video | Skipped:
    """Open a video, decode its first frame and count the packets of the rest."""
    if not os.path.exists(path):
        return Skipped(path, "does not exist")
    try:
        with open_video(path) as (container, stream):
            count, first = 0, None
            for packet in container.demux(stream):
                if packet.size and not packet.is_discard:
                    count += 1
                if first is None:
                    # The flush packet that ends the demuxing brings out a frame that the decoder held back.
                    first = next(iter(decode_packet(stream, packet if packet.size else None)), None)
            if first is None:
                return Skipped(path, "no decodable frame")
            return Video(
                path=path,
                label=label,
                frames=max(count, 1),
                width=first.width,
                height=first.height,
                codec=stream.codec_context.codec.canonical_name,
                fps=float(stream.average_rate or 0),
                rotation=quarter_turns(first.rotation) * 90,
                pixel_format=first.format.name,
            )
    except DecodeError as error:
        return Skipped(path, str(error))
    except Exception as error:  # one strange file must not end the scan of a data set: it is named and left out
        return Skipped(path, f"{type(error).__name__}: {error}")


def write_manifest(manifest: Manifest, path: str | Path) -> None:
    """JSON lines: the class names, then a line a video, then a line a skipped file. Replaces the file at once."""
    entries: tuple[Video | Skipped, ...] = (*manifest.videos, *manifest.skipped)
    records = [{"classes": manifest.classes}, *(dataclasses.asdict(entry) for entry in entries)]
    partial = Path(f"{path}.partial")
    # ASCII escapes carry every path, also one that is not UTF-8.
    partial.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="ascii")
    partial.replace(path)


def read_saved_manifest(path: str | Path) -> Manifest:
    """What `write_manifest` wrote. Raises UserError for anything else."""
    try:
        header, *records = [json.loads(line) for line in Path(path).read_text(encoding="ascii").splitlines()]
        videos = tuple(Video(**record) for record in records if "reason" not in record)
        skipped = tuple(Skipped(**record) for record in records if "reason" in record)
        return Manifest(videos, skipped, tuple(header["classes"]))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: not a saved manifest ({error})") from error


def _read_folder(folder: Path) -> tuple[list[tuple[str, int]], Sequence[str]]:
    paths = sorted(_find_videos(folder))
    if not paths:
        raise UserError(f"{folder}: no videos in this folder (looked for {', '.join(VIDEO_SUFFIXES)})")
    parts = [path.relative_to(folder).parts for path in paths]
    if any(len(part) != 2 for part in parts):
        return [(str(path), -1) for path in paths], ()
    classes = sorted({part[0] for part in parts})
    labels = {name: label for label, name in enumerate(classes)}
    return [(str(path), labels[part[0]]) for path, part in zip(paths, parts, strict=True)], classes


def _find_videos(folder: Path) -> Iterator[Path]:
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        if os.path.realpath(parent) in seen:  # a link back to a folder above
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES and not name.startswith("."):
                yield Path(parent, name)


def _read_list(source: Path) -> tuple[list[tuple[str, int]], Sequence[str]]:
    # File names need not be UTF-8; surrogates carry their bytes back to the file system.
    with open(source, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        text = file.read()
    if "\0" in text:
        raise UserError(f"{source}: not a text file; expected a folder of videos or an annotation list")
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{source}: the list is empty; expected lines of `path label`")
    rows = _read_table(source, lines) or [_split_line(line) for line in lines]
    labels, classes = _number_labels(source, [label for _, label in rows])
    return [(os.path.join(source.parent, path), label) for (path, _), label in zip(rows, labels, strict=True)], classes


def _read_table(source: Path, lines: list[str]) -> list[tuple[str, str]] | None:
    """Paths and labels of a list with a header, None for one without."""
    delimiter = "\t" if "\t" in lines[0] else ","
    header = [name.strip().lower() for name in next(csv.reader([lines[0]], delimiter=delimiter))]
    path_column = next((header.index(name) for name in PATH_COLUMNS if name in header), None)
    if path_column is None:
        return None
    label_column = next((header.index(name) for name in LABEL_COLUMNS if name in header), None)
    rows = []
    for number, row in enumerate(csv.reader(lines[1:], delimiter=delimiter), 2):
        if len(row) != len(header):
            raise UserError(f"{source}: row {number} has {len(row)} columns, the header has {len(header)}")
        rows.append((row[path_column], "" if label_column is None else row[label_column].strip()))
    if not rows:
        raise UserError(f"{source}: a header but no videos")
    return rows


def _split_line(line: str) -> tuple[str, str]:
    match = re.fullmatch(r"(.*\S)(?:[ \t]+|,[ \t]*)(-?\d+)\s*", line)
    return (match[1], match[2]) if match else (line.strip(), "")


def _number_labels(source: Path, labels: list[str]) -> tuple[list[int], Sequence[str]]:
    """Labels as numbers and the name of each: numbers stay what they are, names count in alphabetical order."""
    names = sorted({label for label in labels if label})
    if all(re.fullmatch(r"-?\d+", name) for name in names):
        numbers = [max(int(label or -1), -1) for label in labels]
        if max(numbers) >= MOST_CLASSES:
            raise UserError(f"{source}: label {max(numbers)} is not a class; labels are numbers from 0, without gaps")
        return numbers, [str(number) for number in range(max(numbers) + 1)]
    places = {name: place for place, name in enumerate(names)}
    return [places.get(label, -1) for label in labels], names
