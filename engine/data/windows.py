"""Sliding windows over a whole video in one pass over its file: each window becomes a clip with start and end time.

A window has W frames of the file; the next one starts H frames later. The first starts at frame 0; the last is the
first one that reaches the end of the video, and repeats the last frame if it exceeds the end. The T frames of a clip
are evenly spaced in its window. The memory holds only the frames of incomplete windows.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from av.video.frame import VideoFrame
from numpy.typing import NDArray
from torch import Tensor

from mam2.engine.data.arrays import is_array, read_frames
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
from mam2.engine.data.values import PixelValues
from mam2.engine.data.video import Video
from mam2.engine.errors import UserError

CROPPED_AT_ONCE = 32
"""Number of frames that are cropped and resized together."""
_SPAN = re.compile(r"(\d+(?:\.\d*)?|\.\d+) *(s?)")


class Span(NamedTuple):
    """A duration: frames of the file, or seconds."""

    value: float
    seconds: bool

    def __str__(self) -> str:
        return f"{self.value:g}{'s' if self.seconds else ''}"

    def frames(self, video: Video) -> int:
        """Returns the number of frames in a video, at least 1. Raises UserError for seconds if the rate is unknown."""
        if not self.seconds:
            return int(self.value)
        if not video.fps:
            raise UserError(f"unknown frame rate, so {self} cannot be converted to frames; pass a number of frames")
        return max(round(self.value * video.fps), 1)


def parse_span(text: str | float, argument: str) -> Span:
    """Parses `16` or 16 as frames of the file, `2s` or `0.5s` as seconds. Raises UserError with the argument's name."""
    match = _SPAN.fullmatch(str(text).strip())
    if not match or not float(match[1]) or (not match[2] and not float(match[1]).is_integer()):
        raise UserError(f"{argument} {text}: expected an integer number of frames (16) or seconds (2s, 0.5s), above 0")
    return Span(float(match[1]), bool(match[2]))


@dataclass(frozen=True, eq=False)
class Window:
    """A part of a video as a clip."""

    first: int
    """Number of the window's first frame."""
    stop: int
    """Number of the frame after its last one, at most the number of frames of the video."""
    start_s: float
    """Seconds from the video's first frame to the window's; NaN if neither timestamps nor a rate are known."""
    end_s: float
    """Seconds from the video's first frame to the end of the window's last frame."""
    clip: Tensor
    """uint8 or float32 [T, H, W, C] as in `Batch`, the center square of the frames."""


def sliding_windows(
    video: Video,
    *,
    frames: int,
    size: int,
    window: int,
    hop: int,
    values: PixelValues | None = None,
    threads: int = 1,
    timeout_s: float = TIMEOUT_S,
) -> Iterator[Window]:
    """Yields the windows of a video in order.

    Args:
        video: a file or a folder of images.
        frames, size: T of a clip, and its height and width in pixels.
        window, hop: W and H, in frames of the file.
        values: of the clips; None: 8-bit RGB.
        threads: decoding threads.
        timeout_s: limit in seconds for opening the file, and for a read.

    Raises:
        DecodeError: the file cannot be read, or contains no decodable frame.
    """
    offsets = [k * window // frames for k in range(frames)]
    offset_set = frozenset(offsets)
    values = values or PixelValues()
    crops = _Crops(video, size, values)
    kept: dict[int, Tensor] = {}
    times: dict[int, float] = {}
    start, count, last_time, interval = 0, 0, math.nan, math.nan
    last: Callable[[], NDArray[Any]] | None = None

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

    for number, (time_s, image) in enumerate(_all_frames(video, crops.least_size, values, threads, timeout_s)):
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
    """Crops frames to their center square and resizes them, several at a time; filters are computed only once."""

    def __init__(self, video: Video, size: int, values: PixelValues) -> None:
        self._view, self._size, self._values = middle_square(video), size, values
        self.least_size = least_size([self._view], size)
        self._waiting: dict[int, NDArray[Any]] = {}

    def add(self, number: int, image: NDArray[Any]) -> dict[int, Tensor]:
        """Adds a frame [h, w, C]; returns finished frames [size, size, C]."""
        self._waiting[number] = image
        return self.flush() if len(self._waiting) >= CROPPED_AT_ONCE else {}

    def flush(self) -> dict[int, Tensor]:
        """Returns all frames that were added since the last result."""
        if not self._waiting:
            return {}
        images = torch.from_numpy(np.stack(list(self._waiting.values())))
        clips = crop(images, self._view, self._size, self._values.range_of(images.dtype))
        done = dict(zip(self._waiting, clips.unbind(0), strict=True))
        self._waiting = {}
        # copied, because a row would keep the memory of the whole batch
        return {number: image.clone() for number, image in done.items()}


def _all_frames(
    video: Video, least: tuple[float, float], values: PixelValues, threads: int, timeout_s: float
) -> Iterator[tuple[float, Callable[[], NDArray[Any]]]]:
    """Yields every frame's time in seconds from the first frame, and a function that converts it to [h, w, C]."""
    if is_array(video.path):
        yield from _array_frames(video, values)
        return
    read = _image_frames(video.path, timeout_s) if os.path.isdir(video.path) else None
    convert: FrameConverter | None = None
    first_s: float | None = None
    for number, (frame, stamp_s) in enumerate(read or _file_frames(video.path, threads, timeout_s)):
        convert = convert or FrameConverter(frame, least, values.channels)
        if number == 0:
            first_s = stamp_s
        if first_s is not None and stamp_s is not None:
            time_s = stamp_s - first_s
        else:
            time_s = number / video.fps if video.fps else math.nan
        yield time_s, functools.partial(convert, frame)


def _array_frames(video: Video, values: PixelValues) -> Iterator[tuple[float, Callable[[], NDArray[Any]]]]:
    def read(number: int) -> NDArray[Any]:
        return values.check(read_frames(video.path, [number], channels=values.channels))[0]

    for number in range(video.frames):
        yield number / video.fps if video.fps else math.nan, functools.partial(read, number)


def _file_frames(path: str, threads: int, timeout_s: float) -> Iterator[tuple[VideoFrame, float | None]]:
    """Yields the frames of a file in display order, with their timestamps in seconds if they have one."""
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
