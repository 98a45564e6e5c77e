"""Folders of images, one per frame: finds the frames among the images, their order, and the time of the last change.

Names that differ only in their numbers form a series (img_00001.jpg, img_00002.jpg, …). Optical flow, thumbnails and
masks in the same folder form separate series, which are not frames.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
FRAME_WORDS = frozenset(("frame", "frames", "im", "image", "img", "rgb"))
"""Words in the names of frames: among equally long series, the one with such a word holds the frames."""
OTHER_WORDS = frozenset(
    (
        *("alpha", "cover", "depth", "disparity", "flow", "flowx", "flowy", "heatmap", "icon", "label", "labels"),
        *("mask", "masks", "matte", "poster", "preview", "seg", "thumb", "thumbnail", "thumbnails", "thumbs"),
    )
)
"""Words in the names of files that accompany frames. A series with such a word counts only if there is no other."""


class AmbiguousFrames(ValueError):
    """Raised if it is not clear which images are the frames; the message is a short reason without the folder."""


def frame_names(names: Iterable[str]) -> list[str]:
    """Returns the frames among the files of a folder, in the order of their numbers (10 after 9).

    Images without a number count only if no image has a number. Raises AmbiguousFrames for two equally long series.
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
        raise AmbiguousFrames(f"images {first} and {second}, {length} each: a folder must hold only one series")
    return sorted(candidates[longest[0]], key=_natural)


def holds_frames(names: Iterable[str]) -> bool:
    """Returns whether a folder with these files is a video: a series of several images. A single image is a poster."""
    counts: dict[str, int] = {}
    for name in names:
        if name.lower().endswith(IMAGE_SUFFIXES) and "#" in (key := _series(name)):
            counts[key] = counts.get(key, 0) + 1
    return max(counts.values(), default=0) > 1


def folder_status(folder: str) -> tuple[int, int]:
    """Returns the bytes of all images of a folder, and the time in ns of the last change of the folder or an image."""
    size, latest = 0, os.stat(folder).st_mtime_ns
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.lower().endswith(IMAGE_SUFFIXES) and not entry.name.startswith("."):
                status = entry.stat()
                size += status.st_size
                latest = max(latest, status.st_mtime_ns)
    return size, latest


def _series(name: str) -> str:
    """Returns the name with each number replaced by #; .jpg and .jpeg are equivalent."""
    stem, suffix = os.path.splitext(name.lower())
    suffix = {".jpeg": ".jpg", ".tiff": ".tif"}.get(suffix, suffix)
    return re.sub(r"\d+", "#", stem) + suffix


def _words(key: str) -> set[str]:
    return set(re.split(r"[^a-z]+", os.path.splitext(key)[0]))


def _natural(name: str) -> list[str | int]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
