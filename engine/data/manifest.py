"""The manifest of a run's videos, each opened once, and the index that stores it for later runs.

`DATA.index.jsonl`, next to a folder or list DATA, is its index. `mam2 index` writes it; later reads of DATA open only
files whose size or modification time differs from the index. Only `mam2 index` writes next to the data.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from mam2.engine.data.decoding import available_cores
from mam2.engine.data.frame_folders import folder_status
from mam2.engine.data.sources import list_and_split, read_source
from mam2.engine.data.storage import Status, as_address, as_member, status
from mam2.engine.data.tar_shards import as_tar_source
from mam2.engine.data.video import Skipped, Video, probe_file
from mam2.engine.errors import UserError
from mam2.engine.files import one_line, whole_file
from mam2.engine.runtime.progress import Progress
from mam2.engine.units import counted

INDEX_SUFFIX = ".index.jsonl"
MANIFEST = "manifest.jsonl"
"""Name of a manifest in the folder of a run or of a cache of codes."""
DERIVED = ("duration_s", "front_ends")
"""Fields written for human readers; they follow from the other fields."""
AT_ONCE = 4096
"""Files passed to the threads at a time: one future per file would waste memory for millions of files."""


class VideoSet(NamedTuple):
    """One of several data sets in a manifest; its videos and skipped files follow those of the set before it."""

    source: str
    """The folder or list, as the user passed it."""
    videos: int
    """Number of its videos in `Manifest.videos`."""
    skipped: int
    """Number of its files in `Manifest.skipped`."""


@dataclass(frozen=True)
class Manifest:
    videos: tuple[Video, ...]
    skipped: tuple[Skipped, ...] = ()
    classes: tuple[str, ...] = ()
    """Name of each label; empty without labels."""
    sets: tuple[VideoSet, ...] = ()
    """The data sets in their order; empty if there is only one."""


class Changes(NamedTuple):
    """Changes of the files since the index was written; new and changed files were opened."""

    unchanged: int
    new: int
    changed: int
    removed: int


def read_manifest(source: str | Path, *, threads: int = 0, progress: bool = True) -> Manifest:
    """Returns the usable videos of a folder, an annotation list or a single file, in a fixed order.

    source: see `mam2.engine.data.sources`. If it has an index, only files that changed since are opened; LIST:SPLIT
    uses the index of LIST. `source` may also be an index (.jsonl), which is read without checking any file.
    threads: files opened at once, 0 for twice the cores. progress: draw a bar if the output is a terminal.
    Raises UserError if no video is usable; single unusable files are listed in `skipped`.
    """
    if Path(source).suffix == ".jsonl" and Path(source).is_file():
        return read_saved_manifest(source)
    place = list_and_split(source)[0]
    places = () if as_address(place) else (index_path(source), index_path(place))
    index = next((path for path in places if path.exists()), None)
    try:
        known = read_saved_manifest(index) if index else Manifest(())
    except UserError as error:
        raise UserError(f"{error}; `mam2 index {source}` writes it again") from error
    return scan(source, known, threads=threads, progress=progress)[0]


def index_path(source: str | Path) -> Path:
    """Returns the path of the index of a folder, a list, a video or tar shards: next to it.

    Raises UserError for an address, next to which nothing is written.
    """
    tar = as_tar_source(source)
    place = tar.pattern if tar else source
    if as_address(place):
        raise UserError(f"{place}: an index cannot be written there; pass a file with --out, and it as --data later")
    return Path(os.path.abspath(place) + INDEX_SUFFIX)


def scan(source: str | Path, known: Manifest, *, threads: int = 0, progress: bool = True) -> tuple[Manifest, Changes]:
    """Does the work of `read_manifest`, with an earlier scan `known`; also returns the changes since then."""
    listing = read_source(source)
    paths = list(dict.fromkeys(entry.path for entry in listing.entries))  # a list may contain a video twice
    earlier: tuple[Video | Skipped, ...] = (*known.videos, *known.skipped)
    before = {entry.path: entry for entry in earlier}
    found: dict[str, Video | Skipped] = {}
    status_of = functools.cache(status)  # thousands of videos share a tar, which may be remote
    pool = ThreadPoolExecutor(threads or 2 * available_cores())
    with Progress(desc="reading videos", total=len(paths), unit="file", shown=progress) as bar:
        try:
            for start in range(0, len(paths), AT_ONCE):
                for result in pool.map(lambda path: _look(path, before, status_of), paths[start : start + AT_ONCE]):
                    found[result.path] = result
                    bar.update()
        finally:
            pool.shutdown(cancel_futures=True)  # an interrupted scan stops here
    changes = Changes(
        unchanged=sum(found[path] is before.get(path) for path in paths),
        new=sum(path not in before for path in paths),
        changed=sum(path in before and found[path] is not before[path] for path in paths),
        removed=sum(path not in found for path in before),
    )
    for note in listing.notes:
        tqdm.write(one_line(note), file=sys.stderr)
    results = [_labeled(found[entry.path], entry.label) for entry in listing.entries]
    videos = tuple(result for result in results if isinstance(result, Video))
    skipped = tuple(dict.fromkeys(result for result in results if isinstance(result, Skipped)))
    if not videos and all(entry.reason == "does not exist" for entry in skipped):
        raise UserError(
            f"{source}: no listed video exists ({counted(len(skipped), 'line')}); the first is {skipped[0].path}. "
            "Relative paths start at the folder of the list"
        )
    if not videos:
        reason = f"the first, {skipped[0].path}: {skipped[0].reason}"
        raise UserError(f"{source}: no video can be used ({counted(len(skipped), 'file')}); {reason}")
    return Manifest(videos, skipped, listing.classes), changes


def _look(path: str, before: Mapping[str, Video | Skipped], status_of: Callable[[str], Status]) -> Video | Skipped:
    """Returns the known entry of a file if the file is unchanged, else opens the file."""
    earlier = before.get(path)
    # An index of an earlier version lacks some of today's fields.
    if earlier is None or (isinstance(earlier, Video) and not _complete(earlier)):
        return probe_file(path)
    try:
        if member := as_member(path):
            now = member.size, status_of(member.tar).mtime_ns
        else:
            now = folder_status(path) if os.path.isdir(path) else status(path)
    except OSError:
        return probe_file(path)
    return earlier if now == (earlier.bytes, earlier.mtime_ns) else probe_file(path)


def _complete(video: Video) -> bool:
    return bool(video.content and video.transfer) and video.trimmed >= 0


def _labeled(result: Video | Skipped, label: int) -> Video | Skipped:
    if isinstance(result, Skipped) or result.label == label:
        return result
    return dataclasses.replace(result, label=label)


def write_manifest(manifest: Manifest, path: str | Path) -> None:
    """Writes JSON lines: the class names and data sets, one line per video, one line per skipped file.

    Replaces the file atomically.
    """
    with whole_file(Path(path)) as file:

        def write(record: dict[str, Any]) -> None:
            # ASCII escapes represent every path, also one that is not UTF-8.
            file.write(json.dumps(record).encode("ascii") + b"\n")

        sets = {"sets": [each._asdict() for each in manifest.sets]} if manifest.sets else {}
        write({"classes": manifest.classes, **sets})
        for video in manifest.videos:
            derived = {"duration_s": round(video.duration_s, 3), "front_ends": video.decoders}
            write(dataclasses.asdict(video) | derived)
        for skipped in manifest.skipped:
            write(dataclasses.asdict(skipped))


def read_saved_manifest(path: str | Path) -> Manifest:
    """Reads a file of `write_manifest`; raises UserError for any other file."""
    try:
        with open(path, encoding="ascii") as file:
            head = json.loads(next(file))
            classes = head["classes"]
            sets = tuple(VideoSet(**each) for each in head.get("sets", ()))
            videos, skipped = [], []
            for line in file:
                record = json.loads(line)
                if "reason" in record:
                    skipped.append(Skipped(**record))
                else:
                    videos.append(Video(**{key: value for key, value in record.items() if key not in DERIVED}))
            return Manifest(tuple(videos), tuple(skipped), tuple(classes), sets)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, StopIteration) as error:
        raise UserError(f"{path}: not a saved manifest ({type(error).__name__}: {error})") from error
