"""Finds the moved videos of a resumed run: the same content at another path is the same data."""

from __future__ import annotations

import dataclasses
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from mam2.engine.data.manifest import Manifest, read_manifest, scan
from mam2.engine.data.sets import join_sets, parts_of, set_names
from mam2.engine.data.sources import read_source
from mam2.engine.data.video import Video
from mam2.engine.errors import UserError
from mam2.engine.units import counted


def follow_sets(
    saved: Manifest, data: Sequence[Path], *, threads: int = 0, progress: bool = True, max_missing: float = 0.0
) -> tuple[Manifest, str]:
    """Runs `follow` for each data set of a run, in their order. Raises UserError if their number differs."""
    parts = parts_of(saved)
    if len(parts) != len(data):
        names = f" ({', '.join(set_names(saved))})" if saved.sets else ""
        raise UserError(
            f"--data: expected the {len(parts)} data sets{names} on which the run was trained, in this order; "
            f"found {len(data)}"
        )
    found = [
        follow(part, source, threads=threads, progress=progress, max_missing=max_missing)
        for part, source in zip(parts, data, strict=True)
    ]
    lines = [line for _, line in found if line]
    return join_sets([part for part, _ in found], data), "; ".join(lines)


def follow(
    saved: Manifest, data: Path, *, threads: int = 0, progress: bool = True, max_missing: float = 0.0
) -> tuple[Manifest, str]:
    """Returns the saved videos in their order with their paths in `data`, and a line for the log, or "".

    If `data` still lists the same paths, no file is opened. Otherwise videos are found by the hash of their content.
    max_missing: share of the videos that `data` may lack; these keep their old paths.
    Raises UserError if `data` lacks more, or cannot be read.
    """
    scanned = read_manifest(data) if data.suffix == ".jsonl" and data.is_file() else None
    entries = scanned.videos if scanned else read_source(data).entries
    listed = {entry.path for entry in entries}
    absent = [video for video in saved.videos if video.path not in listed]
    if not absent:
        return saved, ""
    if scanned is None:
        moved_all = len(absent) == len(saved.videos)
        scanned = (
            read_manifest(data, threads=threads, progress=progress)
            if moved_all  # with an index at the new place, files are not opened
            else scan(data, saved, threads=threads, progress=progress)[0]
        )
    places: dict[str, list[Video]] = defaultdict(list)
    for video in scanned.videos:
        places[video.content].append(video)
    missing: list[Video] = []
    now: dict[str, Video] = {}
    for video in absent:
        copies = places[video.content] if video.content else []
        if not copies:
            missing.append(video)
            continue
        name = os.path.basename(video.path)
        copy = next((copy for copy in copies if os.path.basename(copy.path) == name), copies[0])
        now[video.path] = dataclasses.replace(video, path=copy.path, mtime_ns=copy.mtime_ns)
    if len(missing) > max_missing * len(saved.videos):
        raise UserError(
            f"--data {data} lacks {len(missing)} of the {counted(len(saved.videos), 'video')} on which the run "
            "was trained; "
            f"the first is {missing[0].path}: pass the place where they are now, or start a new run with another --out"
        )
    videos = tuple(now.get(video.path, video) for video in saved.videos)
    lacking = f"; {len(missing)} missing" if missing else ""
    return dataclasses.replace(saved, videos=videos), (
        f"{len(now)} of {counted(len(videos), 'video')} found at other paths by their content{lacking}"
    )
