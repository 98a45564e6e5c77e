"""Decodes RGB or gray frames from a video file with PyAV.

Frames are numbered in display order by counting, not by timestamps, so that variable frame rates, gaps and wrong clocks
do no harm. Timestamps only determine where decoding may start.

The time limit is checked between packets and frames, and by FFmpeg while it reads. It cannot interrupt the decoding of
a single packet, or a system call on a drive that never answers.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import DTypeLike, NDArray

from mam2.engine.data.cuts import packets_for
from mam2.engine.data.frame_folders import IMAGE_SUFFIXES, AmbiguousFrames, frame_names
from mam2.engine.data.storage import BLOCK, is_plain, opened_for_ffmpeg, status

MAX_SIDE = 8192
"""Maximum frame side in pixels: larger values come from damaged headers, and such a clip would not fit into memory."""
TIMEOUT_S = 60.0
"""Default limit in seconds for opening, for a read, and for a whole clip."""
SHRINK_FROM = 1.5
"""Frames at least this many times larger than needed are scaled down first, which saves more than half the memory."""
FORMATS = {1: "gray", 3: "rgb24"}
"""FFmpeg's pixel format of decoded frames by their channels."""
DEEP_GRAY = re.compile(r"gray(9|10|12|14|16)(le|be)")
FRAMES = "frames"
"""Used as the codec's name for a folder of images, one per frame."""

PYAV = int(av.__version__.split(".")[0])
# From version 17 on, PyAV starts a thread per core at each conversion, which is too expensive for small frames.
ONE_THREAD = {"threads": 1} if PYAV >= 17 else {}
READ_OPTIONS: dict[str, Any] = {"metadata_errors": "ignore"} if PYAV < 19 else {}
"""Options of `av.open`, so that metadata that is not UTF-8 (HMDB51) does not raise; version 19 never raises for it."""
FILE_ERRORS = (
    *(av.error.FFmpegError, OSError),
    *(ArithmeticError, LookupError, MemoryError, RuntimeError, ValueError),
)
"""Exceptions that FFmpeg, PyAV and NumPy raise for an unreadable file. Others (TypeError, AttributeError, ImportError)
are errors of a program or its packages and must never count as a bad file."""


Item = TypeVar("Item")
Empty = Callable[[tuple[int, ...], DTypeLike], NDArray[Any]]
"""Returns an array of a shape and type whose values are not set, such as `np.empty`."""


class DecodeError(Exception):
    """Raised if a video cannot be decoded; the message is a short reason without the path."""


class TooSlow(DecodeError):
    """Raised at a time limit. Clocks go on while a process is stopped (Ctrl-Z, a scheduler), so that the cause may not
    be the file; see `Patience`."""


def available_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def open_video(path: str, timeout_s: float = TIMEOUT_S) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Opens a video; yields the container and its video stream, set to one thread.

    FFmpeg's errors become DecodeError.
    """
    try:
        if is_plain(path) and not stat.S_ISREG(os.stat(path).st_mode):
            raise DecodeError("not a file")  # opening a pipe would wait forever
        only_files = {"protocol_whitelist": "file"}  # a playlist named like a video must not use the network
        with (
            opened_for_ffmpeg(path) as file,
            av.open(file, timeout=timeout_s, buffer_size=BLOCK, options=only_files, **READ_OPTIONS) as container,
        ):
            stream = container.streams.best("video")
            if not isinstance(stream, VideoStream):
                raise DecodeError("no video stream")
            if stream.codec_context is None:
                raise DecodeError("no decoder for its codec")
            if max(stream.codec_context.width, stream.codec_context.height) > MAX_SIDE:
                size = f"{stream.codec_context.width}x{stream.codec_context.height}"
                raise DecodeError(f"frames of {size} pixels; the limit is {MAX_SIDE} per side")
            stream.codec_context.thread_count = (
                1  # clips are decoded in parallel; threads inside one decoder only add cost
            )
            yield container, stream
    except (av.error.FFmpegError, OSError) as error:
        if _is_empty(path):
            raise DecodeError("empty file") from error
        if isinstance(error, av.error.ExitError):
            raise TooSlow(f"not read within {timeout_s:g} s") from error
        if isinstance(error, av.error.InvalidDataError):
            raise DecodeError("damaged, or not a video") from error
        raise DecodeError(getattr(error, "strerror", None) or str(error).splitlines()[0]) from error


def _is_empty(path: str) -> bool:
    try:
        return status(path).size == 0
    except OSError:
        return False


def read_packets(container: InputContainer, stream: VideoStream) -> Iterator[Packet]:
    """Yields all packets of the stream; the last one is empty and flushes the decoder."""
    try:
        yield from container.demux(stream)
    except IndexError as error:  # PyAV raises it if a damaged transport stream announces a new stream in its middle
        raise DecodeError("damaged: a stream without a beginning") from error


def decode_packet(stream: VideoStream, packet: Packet | None) -> list[VideoFrame]:
    """Yields the frames that a packet completes; none for a damaged packet. Packet None flushes the decoder."""
    try:
        return stream.codec_context.decode(packet)
    except av.error.FFmpegError:
        return []
    except ValueError as error:  # PyAV 19's, from the second packet on, where the decoder refused the stream's header
        raise DecodeError("damaged: its decoder does not start") from error


def frame_files(folder: str) -> list[str]:
    """Returns the paths of the frames in a folder of images, in order; see `frame_names`. Raises DecodeError."""
    try:
        return [os.path.join(folder, name) for name in frame_names(os.listdir(folder))]
    except AmbiguousFrames as error:
        raise DecodeError(str(error)) from error


def decode_frames(
    path: str,
    frames: Sequence[int],
    *,
    timeout_s: float = TIMEOUT_S,
    seek_points: Sequence[tuple[int, int]] = (),
    least_size: tuple[float, float] | None = None,
    empty: Empty = np.empty,
    channels: int = 3,
) -> NDArray[Any]:
    """Decodes frames of a video, or of a folder of images, by their numbers: [T, H, W, C], upright.

    Values are uint8, but uint16 if C is 1 and the file is gray with more than 8 bits (10 to 14 bits become 16).

    Decoding starts at the last key frame at or before the first frame if the timestamps are unambiguous, otherwise at
    the first frame of the video. The file is read from its beginning, or from the last seek point before these frames.

    Args:
        path: path of the video, or of the folder of images.
        frames: frame numbers, ascending, repeats allowed; a number past the end returns the last frame.
        timeout_s: limit in seconds for opening, for a read, and for the whole clip.
        seek_points: `Video.seek_points`, frame numbers and timestamps of key frames, ascending.
        least_size: sufficient width and height in pixels; frames more than SHRINK_FROM times as large are scaled down
            to it during the conversion to RGB, with their aspect ratio. None for the stored size.
        empty: allocates the result.
        channels: C: 3 for RGB, 1 for gray, the luma of a color video.

    Raises:
        DecodeError: no frame, an image of a folder cannot be decoded, or decoding takes longer than timeout_s.
    """
    limit = _Limit(timeout_s)
    target = _Target(least_size, empty, channels)
    if os.path.isdir(path):
        return _decode_images(path, frames, limit, target)
    point = next((point for point in reversed(seek_points) if point[0] <= frames[0]), None)
    clip = _decode(path, frames, limit, target, point=point) if point else None
    if clip is None:
        clip = _decode(path, frames, limit, target)
    if clip is None:
        clip = _decode(path, frames, limit, target, may_skip=False)
    if clip is None:
        raise DecodeError("no decodable frame")
    return clip


class _Target(NamedTuple):
    """Destination of decoded frames; see `decode_frames`."""

    least_size: tuple[float, float] | None
    empty: Empty
    channels: int


class _Limit:
    """A time limit for iterations."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def __call__(self, items: Iterable[Item]) -> Iterator[Item]:
        for item in items:
            if time.monotonic() > self._end:
                raise TooSlow(f"not decoded within {self.seconds:g} s")
            yield item


def _decode_images(folder: str, frames: Sequence[int], limit: _Limit, target: _Target) -> NDArray[Any]:
    files = frame_files(folder)
    if not files:
        raise DecodeError(f"no images in this folder ({', '.join(IMAGE_SUFFIXES)})")
    convert: FrameConverter | None = None
    images: list[NDArray[Any]] = []
    for file in limit(files[min(number, len(files) - 1)] for number in frames):
        try:
            with open_video(file, limit.seconds) as (container, stream):
                image = next(decoded_frames(stream, read_packets(container, stream)), None)
        except DecodeError as error:
            raise type(error)(f"{os.path.basename(file)}: {error}") from error
        if image is None:
            raise DecodeError(f"{os.path.basename(file)}: no decodable image")
        convert = convert or FrameConverter(image, target.least_size, target.channels)
        images.append(convert(image))
    return _stack(images, target.empty)


def _decode(
    path: str,
    wanted: Sequence[int],
    limit: _Limit,
    target: _Target,
    *,
    may_skip: bool = True,
    point: tuple[int, int] | None = None,
) -> NDArray[Any] | None:
    """Returns the clip, or None if there was no frame, or if reading or decoding did not start at the intended place.

    may_skip: decoding may start at a later key frame than the first. point: the seek point where reading starts.
    """
    with open_video(path, limit.seconds) as (container, stream):
        packets: Iterable[Packet] = limit(read_packets(container, stream))
        index, first_pts = 0, None
        if point:
            found = _packets_from(container, stream, limit, point[1])
            if found is None:
                return None
            packets = found
        if may_skip and not is_packed(stream):
            packets, index, first_pts = packets_for(packets, wanted[0], wanted[-1], point[0] if point else 0)
        convert: FrameConverter | None = None
        images: list[NDArray[Any]] = []
        for frame in limit(decoded_frames(stream, packets)):
            if convert is None:
                if first_pts is not None and frame.pts != first_pts:
                    return None
                convert = FrameConverter(frame, target.least_size, target.channels)
            if index == wanted[len(images)]:
                image = convert(frame)
                while len(images) < len(wanted) and wanted[len(images)] == index:
                    images.append(image)
                if len(images) == len(wanted):
                    break
            index += 1
        if convert is None:
            return None
        if len(images) < len(wanted):
            images += [convert(frame)] * (len(wanted) - len(images))
        return _stack(images, target.empty)


def is_packed(stream: VideoStream) -> bool:
    """Returns whether packets hold several frames without separate timestamps, as B-frames of MPEG-4 in an AVI."""
    return stream.codec_context.name == "mpeg4" and bool(stream.codec_context.has_b_frames)


def _packets_from(container: InputContainer, stream: VideoStream, limit: _Limit, pts: int) -> Iterator[Packet] | None:
    """Yields the packets from the key frame with timestamp `pts` on; returns None if seeking does not reach it."""
    try:
        container.seek(pts, stream=stream)
    except av.error.FFmpegError:
        return None
    packets = iter(limit(read_packets(container, stream)))
    for packet in packets:
        if packet.size and packet.is_keyframe and packet.pts == pts:
            return itertools.chain([packet], packets)
        if not packet.size or packet.pts is None or packet.pts > pts:
            break
    return None


def _stack(images: list[NDArray[Any]], empty: Empty) -> NDArray[Any]:
    # DALI accepts only dense arrays, and by default NumPy keeps the memory order of a rotated image.
    return np.stack(images, out=empty((len(images), *images[0].shape), images[0].dtype))


def decoded_frames(stream: VideoStream, packets: Iterable[Packet]) -> Iterator[VideoFrame]:
    """Every frame that comes out of the packets, in the order in which they are shown."""
    for packet in packets:
        if packet.size:
            yield from decode_packet(stream, packet)
    yield from decode_packet(stream, None)


class FrameConverter:
    """Converts frames to upright [H, W, C] with the first frame's size, rotation and depth; one swscale context."""

    def __init__(self, first: VideoFrame, least_size: tuple[float, float] | None = None, channels: int = 3) -> None:
        """least_size, channels: see `decode_frames`."""
        if max(first.width, first.height) > MAX_SIDE:
            raise DecodeError(f"frames of {first.width}x{first.height} pixels; the limit is {MAX_SIDE} per side")
        self._width, self._height = first.width, first.height
        self._turns = quarter_turns(first.rotation)
        self._format = "gray16le" if channels == 1 and is_deep_gray(first.format.name) else FORMATS[channels]
        self._reformatter = VideoReformatter()
        if least_size:
            least_width, least_height = reversed(least_size) if self._turns % 2 else least_size
            scale = max(least_width / first.width, least_height / first.height)
            if SHRINK_FROM * scale < 1:
                self._width, self._height = math.ceil(first.width * scale), math.ceil(first.height * scale)

    def __call__(self, frame: VideoFrame) -> NDArray[Any]:
        pixels = self._reformatter.reformat(frame, self._width, self._height, self._format, **ONE_THREAD)
        image = pixels.to_ndarray()
        image = image[..., None] if image.ndim == 2 else image
        return np.rot90(image, self._turns) if self._turns else image


def is_deep_gray(pixel_format: str) -> bool:
    """Returns whether an FFmpeg pixel format is gray with 9 to 16 bits."""
    return bool(DEEP_GRAY.fullmatch(pixel_format))


def quarter_turns(rotation: float) -> int:
    """Returns the number of counterclockwise quarter turns, 0 to 3, nearest to a rotation in degrees."""
    return round(rotation / 90) % 4
