"""Finds the videos in a folder.

Arrays (.npy, .npz) count as videos, except in a folder with a video of the same name.
A folder without subfolders and videos that holds numbered images (img_00001.jpg …) is one video of these frames.
A folder that can be reached through several links is read once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from mam2.engine.data.arrays import ARRAY_SUFFIXES, is_array
from mam2.engine.data.frame_folders import holds_frames

VIDEO_SUFFIXES = (
    *(".3g2", ".3gp", ".asf", ".avi", ".divx", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg"),
    *(".mpg", ".mts", ".ogv", ".ts", ".vob", ".webm", ".wmv"),
)
CLIP_SUFFIXES = (*VIDEO_SUFFIXES, *ARRAY_SUFFIXES)


def find_videos(folder: Path, twins: list[tuple[Path, Path]]) -> Iterator[Path]:
    """Finds videos at any depth. A folder identical to an earlier one is added to `twins`, together with that one."""
    seen: dict[str, str] = {}
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # two links to one folder, or a link to a parent folder
            twins.append((Path(parent), Path(seen[real])))
            folders.clear()
            continue
        seen[real] = parent
        # Links come after folders, so that of a folder and a link to it the folder is kept.
        folders.sort(key=lambda name: (os.path.islink(os.path.join(parent, name)), name))
        folders[:] = [name for name in folders if not name.startswith(".")]
        files = [name for name in files if not name.startswith(".")]
        videos = [name for name in files if os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES]
        stems = {os.path.splitext(name)[0] for name in videos}  # an array with the name of a video describes the video
        videos += [name for name in files if is_array(name) and os.path.splitext(name)[0] not in stems]
        yield from (Path(parent, name) for name in videos)
        # Images next to other folders are not frames.
        if not videos and not folders and holds_frames(files):
            yield Path(parent)
