"""Folders of images, one a frame: which of the images are the frames, in what order, and when one of them changed.

Names that differ only in their numbers are a series (img_00001.jpg, img_00002.jpg, …). Optical flow, thumbnails and
masks beside the frames are series of their own, and no frames.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
FRAME_WORDS = frozenset(("frame", "frames", "im", "image", "img", "rgb"))
"""Words in the names of frames: where other series are as long as theirs, these are the frames."""
OTHER_WORDS = frozenset(
    (
        *("alpha", "cover", "depth", "disparity", "flow", "flowx", "flowy", "heatmap", "icon", "label", "labels"),
        *("mask", "masks", "matte", "poster", "preview", "seg", "thumb", "thumbnail", "thumbnails", "thumbs"),
    )
)
"""Words in the names of what lies beside frames. A series with one of them counts only where there is no other."""


class AmbiguousFrames(ValueError):
    """Images of which nothing says what the frames are; the message says so in a few words, without the folder."""


def frame_names(names: Iterable[str]) -> list[str]:
    """The frames among the files of a folder, in the order of their numbers, where 10 comes after 9.

    Images without a number count only where none has one. Raises AmbiguousFrames for two equally long series.
    """
    images = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")]
    series: dict[str, list[str]] = {}
    for name in images:
        series.setdefault(_series(name), []).append(name)
    numbered = {key: members for key, members in series.items() if "#" in key}
    if not numbered:
        return sorted(images, key=_natural)
    candidates = {key: members for key, members in numbered.items() if not _words(key) & OTHER_WORDS} or numbered
    length = max(map(len, candidates.values()))
    longest = [key for key, members in candidates.items() if len(members) == length]
    if len(longest) > 1:
        longest = [key for key in longest if _words(key) & FRAME_WORDS] or longest
    if len(longest) > 1:
        first, second = sorted(longest)[:2]
        raise AmbiguousFrames(f"images {first} and {second}, {length} each: one of them in a folder is a video")
    return sorted(candidates[longest[0]], key=_natural)


def holds_frames(names: Iterable[str]) -> bool:
    """Whether a folder with these files is a video: several images of a series. One is a poster."""
    counts: dict[str, int] = {}
    for name in names:
        if name.lower().endswith(IMAGE_SUFFIXES) and "#" in (key := _series(name)):
            counts[key] = counts.get(key, 0) + 1
    return max(counts.values(), default=0) > 1


def folder_status(folder: str) -> tuple[int, int]:
    """Bytes of all images of a folder, and the time in ns at which the folder or one of them changed last."""
    size, latest = 0, os.stat(folder).st_mtime_ns
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.lower().endswith(IMAGE_SUFFIXES) and not entry.name.startswith("."):
                status = entry.stat()
                size += status.st_size
                latest = max(latest, status.st_mtime_ns)
    return size, latest


def _series(name: str) -> str:
    """The name with each number as #; JPEGs count alike under both their suffixes."""
    stem, suffix = os.path.splitext(name.lower())
    suffix = {".jpeg": ".jpg", ".tiff": ".tif"}.get(suffix, suffix)
    return re.sub(r"\d+", "#", stem) + suffix


def _words(key: str) -> set[str]:
    return set(re.split(r"[^a-z]+", os.path.splitext(key)[0]))


def _natural(name: str) -> list[str | int]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
