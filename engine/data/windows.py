"""Sliding windows over a whole video, from one pass over its file: each becomes a clip with its start and end time.

A window is W frames of the file long, the next one begins H frames later. The first begins at frame 0; the last is the
first one that reaches the end, and repeats the last frame where the video ends before it. The T frames of a clip are
spread evenly over its window. Only frames of windows that are not complete yet are in memory.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from av.video.frame import VideoFrame
from numpy.typing import NDArray
from torch import Tensor

from mam2.engine.data.crops import crop
from mam2.engine.data.decoding import (
    TIMEOUT_S,
    DecodeError,
    FrameConverter,
    decoded_frames,
    frame_files,
    open_video,
    read_packets,
)
from mam2.engine.data.sampling import least_size, middle_square
from mam2.engine.data.video import Video
from mam2.engine.errors import UserError

CROPPED_AT_ONCE = 32
"""Frames that are cropped and resized together."""
_SPAN = re.compile(r"(\d+(?:\.\d*)?|\.\d+) *(s?)")


class Span(NamedTuple):
    """A length of time: frames of the file, or seconds."""

    value: float
    seconds: bool

    def __str__(self) -> str:
        return f"{self.value:g}{'s' if self.seconds else ''}"

    def frames(self, video: Video) -> int:
        """Frames of a video, at least 1. Raises UserError for seconds of a video whose frame rate is not known."""
        if not self.seconds:
            return int(self.value)
        if not video.fps:
            raise UserError(f"no frame rate is known for {self} to be counted in frames; give frames")
        return max(round(self.value * video.fps), 1)


def parse_span(text: str | float, argument: str) -> Span:
    """`16` or 16: frames of the file; `2s` or `0.5s`: seconds. Raises UserError, with the argument's name."""
    match = _SPAN.fullmatch(str(text).strip())
    if not match or not float(match[1]) or (not match[2] and not float(match[1]).is_integer()):
        raise UserError(f"{argument} {text}: expected a whole number of frames (16) or seconds (2s, 0.5s), above 0")
    return Span(float(match[1]), bool(match[2]))


@dataclass(frozen=True, eq=False)
class Window:
    """A part of a video as a clip."""

    first: int
    """Number of its first frame."""
    stop: int
    """Number of the frame after its last one, at most the number of frames there are."""
    start_s: float
    """Seconds from the video's first frame to its own first one; NaN where neither timestamps nor a rate are known."""
    end_s: float
    """Seconds to the end of its last frame."""
    clip: Tensor
    """uint8 [T, H, W, C], the middle square of the frames."""


def sliding_windows(
    video: Video, *, frames: int, size: int, window: int, hop: int, threads: int = 1, timeout_s: float = TIMEOUT_S
) -> Iterator[Window]:
    """The windows of a video in order.

    Args:
        video: a file or a folder of images.
        frames, size: of a clip: T, and its height and width in pixels.
        window, hop: frames of the file; W and H.
        threads: that decode the file.
        timeout_s: longest time to open the file, and for a read from it, in seconds.

    Raises:
        DecodeError: the file cannot be read, or holds no frame that can be decoded.
    """
    offsets = [k * window // frames for k in range(frames)]
    offset_set = frozenset(offsets)
    crops = _Crops(video, size)
    kept: dict[int, Tensor] = {}
    times: dict[int, float] = {}
    start, count, last_time, interval = 0, 0, math.nan, math.nan
    last: Callable[[], NDArray[np.uint8]] | None = None

    def is_wanted(number: int) -> bool:
        begin = number - number % hop
        while begin >= start and number - begin < window:
            if number - begin in offset_set:
                return True
            begin -= hop
        return False

    def finished(end_s: float) -> Window:
        nonlocal start
        kept.update(crops.flush())
        numbers = [min(start + offset, count - 1) for offset in offsets]
        clip = torch.stack([kept[number] for number in numbers])
        made = Window(start, min(start + window, count), times[start], end_s, clip)
        start += hop
        for number in [number for number in kept if number < start]:
            del kept[number]
        for number in [number for number in times if number < start]:
            del times[number]
        return made

    for number, (time_s, image) in enumerate(_all_frames(video, crops.least_size, threads, timeout_s)):
        if number == start + window:
            yield finished(time_s)
        if number % hop == 0:
            times[number] = time_s
        if is_wanted(number):
            kept.update(crops.add(number, image()))
        interval = time_s - last_time if number else math.nan
        last, last_time, count = image, time_s, number + 1
    if last is None:
        raise DecodeError("no decodable frame")
    length = 1 / video.fps if video.fps else interval
    kept.update(crops.flush())
    kept.update(crops.add(count - 1, last()))
    while start < count:
        reaches_end = start + window >= count
        yield finished(last_time + length)
        if reaches_end:
            return


class _Crops:
    """Frames cropped to their middle square and resized, some at a time: filters are computed once for all of them."""

    def __init__(self, video: Video, size: int) -> None:
        self._view, self._size = middle_square(video), size
        self.least_size = least_size([self._view], size)
        self._waiting: dict[int, NDArray[np.uint8]] = {}

    def add(self, number: int, image: NDArray[np.uint8]) -> dict[int, Tensor]:
        """Takes a frame [h, w, C]; frames that are done by now, uint8 [size, size, C]."""
        self._waiting[number] = image
        return self.flush() if len(self._waiting) >= CROPPED_AT_ONCE else {}

    def flush(self) -> dict[int, Tensor]:
        """All frames that were added since the last time."""
        if not self._waiting:
            return {}
        images = torch.from_numpy(np.stack(list(self._waiting.values())))
        done = dict(zip(self._waiting, crop(images, self._view, self._size).unbind(0), strict=True))
        self._waiting = {}
        # a row of the batch would keep the memory of all of it
        return {number: image.clone() for number, image in done.items()}


def _all_frames(
    video: Video, least: tuple[float, float], threads: int, timeout_s: float
) -> Iterator[tuple[float, Callable[[], NDArray[np.uint8]]]]:
    """Every frame with its time in seconds from the first one, and a function that converts it to RGB [h, w, C]."""
    read = _image_frames(video.path, timeout_s) if os.path.isdir(video.path) else None
    convert: FrameConverter | None = None
    first_s: float | None = None
    for number, (frame, stamp_s) in enumerate(read or _file_frames(video.path, threads, timeout_s)):
        convert = convert or FrameConverter(frame, least)
        if number == 0:
            first_s = stamp_s
        if first_s is not None and stamp_s is not None:
            time_s = stamp_s - first_s
        else:
            time_s = number / video.fps if video.fps else math.nan
        yield time_s, functools.partial(convert, frame)


def _file_frames(path: str, threads: int, timeout_s: float) -> Iterator[tuple[VideoFrame, float | None]]:
    """Frames of a file in the order in which they are shown, with their timestamps in seconds where they have one."""
    with open_video(path, timeout_s) as (container, stream):
        stream.codec_context.thread_count = threads
        stream.thread_type = "AUTO"
        unit = float(stream.time_base or 0)
        for frame in decoded_frames(stream, read_packets(container, stream)):
            yield frame, frame.pts * unit if frame.pts is not None and unit else None


def _image_frames(folder: str, timeout_s: float) -> Iterator[tuple[VideoFrame, None]]:
    for file in frame_files(folder):
        with open_video(file, timeout_s) as (container, stream):
            for frame in decoded_frames(stream, read_packets(container, stream)):
                yield frame, None
