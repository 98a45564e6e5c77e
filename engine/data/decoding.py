"""From a video file to RGB frames with PyAV.

Frames are counted in the order in which they are shown. Counting, not timestamps, decides which frame is which, so
variable frame rates, gaps and wrong clocks do no harm; the timestamps only tell where decoding may start.

A time limit is looked at between packets and frames, and by FFmpeg while it reads. It cannot end the decoding of a
single packet, nor a system call on a drive that never answers.
"""

from __future__ import annotations

import itertools
import math
import os
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from mam2.engine.data.frame_folders import IMAGE_SUFFIXES, AmbiguousFrames, frame_names

MAX_SIDE = 8192
"""Larger frames are damaged headers; a clip of them would not fit into memory either."""
TIMEOUT_S = 60.0
"""Default limit for an open, a read, or a whole clip."""
REORDER = 32
"""More packets than any decoder holds back before the frame it was given comes out."""
CUTS_HELD = 3
"""Key frames to fall back on; the packets before them are forgotten, or an hour of video would be held in memory."""
SHRINK_FROM = 1.5
"""Frames this many times larger than needed are worth a second resampling: less than half of the memory is left."""
FRAMES = "frames"
"""In the place of a codec's name: the path is a folder that holds an image a frame."""

PYAV = int(av.__version__.split(".")[0])
# From version 17 on PyAV starts a thread for every core at each conversion: too dear for small frames.
ONE_THREAD = {"threads": 1} if PYAV >= 17 else {}
READ_OPTIONS: dict[str, Any] = {"metadata_errors": "ignore"} if PYAV < 19 else {}
"""Of `av.open`, so that names and titles that are not UTF-8 (HMDB51) do not raise; from version 19 on none do."""
FILE_ERRORS = (
    *(av.error.FFmpegError, OSError),
    *(ArithmeticError, LookupError, MemoryError, RuntimeError, ValueError),
)
"""What reading a strange file raises in FFmpeg, PyAV and NumPy. Others (TypeError, AttributeError, ImportError) are
mistakes of a program or its packages: never to be counted as a bad file."""


Item = TypeVar("Item")


class Cut(NamedTuple):
    """A key frame at which decoding may start: all packets before it are shown before it, all after it after it."""

    frame: int
    """Number of its frame."""
    pts: int
    """Its timestamp, in units of the stream."""
    packets: int
    """Number of packets before it."""


class DecodeError(Exception):
    """A video cannot be decoded; the message is the reason in a few words, without the path."""


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def open_video(path: str, timeout_s: float = TIMEOUT_S) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its video stream, ready to decode on one thread; FFmpeg's errors become DecodeError."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise DecodeError("not a file")  # to open a pipe would wait for ever
        only_files = {"protocol_whitelist": "file"}  # a playlist under a video's name must not reach the network
        with av.open(path, timeout=timeout_s, options=only_files, **READ_OPTIONS) as container:
            stream = container.streams.best("video")
            if not isinstance(stream, VideoStream):
                raise DecodeError("no video stream")
            if stream.codec_context is None:
                raise DecodeError("no decoder for its codec")
            if max(stream.codec_context.width, stream.codec_context.height) > MAX_SIDE:
                size = f"{stream.codec_context.width}x{stream.codec_context.height}"
                raise DecodeError(f"frames of {size} pixels, more than {MAX_SIDE} a side")
            stream.codec_context.thread_count = 1  # clips are decoded side by side; threads within one only cost
            yield container, stream
    except (av.error.FFmpegError, OSError) as error:
        if os.path.exists(path) and os.path.getsize(path) == 0:
            raise DecodeError("empty file") from error
        if isinstance(error, av.error.ExitError):
            raise DecodeError(f"not read within {timeout_s:g} s") from error
        if isinstance(error, av.error.InvalidDataError):
            raise DecodeError("damaged, or not a video") from error
        raise DecodeError(getattr(error, "strerror", None) or str(error).splitlines()[0]) from error


def read_packets(container: InputContainer, stream: VideoStream) -> Iterator[Packet]:
    """All packets of the stream; the last one is empty and flushes the decoder."""
    try:
        yield from container.demux(stream)
    except IndexError as error:  # PyAV's, where a damaged transport stream names a new stream in its middle
        raise DecodeError("damaged: a stream without a beginning") from error


def decode_packet(stream: VideoStream, packet: Packet | None) -> list[VideoFrame]:
    """The frames that come out when a packet goes in; none for a damaged one. None as packet flushes the decoder."""
    try:
        return stream.codec_context.decode(packet)
    except av.error.FFmpegError:
        return []
    except ValueError as error:  # PyAV 19's, from the second packet on, where the decoder refused the stream's header
        raise DecodeError("damaged: its decoder does not start") from error


def frame_files(folder: str) -> list[str]:
    """Paths of the frames in a folder of images, in order; see `frame_names`. Raises DecodeError."""
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
    pinned: bool = False,
) -> NDArray[np.uint8]:
    """Frames of a video, or of a folder of images, by their numbers: uint8 [T, H, W, C], RGB, upright.

    A video is decoded from the last key frame at or before the first of the frames where the timestamps allow no doubt,
    otherwise from its first frame. It is read from its beginning, or from the last seek point before them.

    Args:
        path: of the video, or of the folder of images.
        frames: ascending, repeats allowed; one past the end is the last one there is.
        timeout_s: longest time for an open, a read, or the whole clip, in seconds.
        seek_points: `Video.seek_points`, frame numbers and timestamps of key frames, ascending.
        least_size: width and height in pixels that are enough; frames more than SHRINK_FROM times as large are scaled
            down to it while they are converted to RGB. They keep their aspect ratio. None for the stored size.
        pinned: return memory that a GPU copies from without a detour. Needs CUDA.

    Raises:
        DecodeError: there is no frame, an image of a folder cannot be decoded, or it takes longer than timeout_s.
    """
    limit = _Limit(timeout_s)
    target = _Target(least_size, pinned)
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
    """Where decoded frames go; see `decode_frames`."""

    least_size: tuple[float, float] | None
    pinned: bool


class _Limit:
    """Ends iterations that go on for too long."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def __call__(self, items: Iterable[Item]) -> Iterator[Item]:
        for item in items:
            if time.monotonic() > self._end:
                raise DecodeError(f"not decoded within {self.seconds:g} s")
            yield item


def _decode_images(folder: str, frames: Sequence[int], limit: _Limit, target: _Target) -> NDArray[np.uint8]:
    files = frame_files(folder)
    if not files:
        raise DecodeError(f"no images in this folder ({', '.join(IMAGE_SUFFIXES)})")
    convert: _Converter | None = None
    images: list[NDArray[np.uint8]] = []
    for file in limit(files[min(number, len(files) - 1)] for number in frames):
        try:
            with open_video(file, limit.seconds) as (container, stream):
                image = next(_frames(stream, read_packets(container, stream)), None)
        except DecodeError as error:
            raise DecodeError(f"{os.path.basename(file)}: {error}") from error
        if image is None:
            raise DecodeError(f"{os.path.basename(file)}: no decodable image")
        convert = convert or _Converter(image, target.least_size)
        images.append(convert(image))
    return _stack(images, target.pinned)


def _decode(
    path: str,
    wanted: Sequence[int],
    limit: _Limit,
    target: _Target,
    *,
    may_skip: bool = True,
    point: tuple[int, int] | None = None,
) -> NDArray[np.uint8] | None:
    """The clip, or None when no frame came, or reading or decoding did not begin where it was meant to.

    may_skip: begin to decode at a later key frame than the first. point: the seek point to begin to read at.
    """
    with open_video(path, limit.seconds) as (container, stream):
        packets: Iterable[Packet] = limit(read_packets(container, stream))
        index, first_pts = 0, None
        if point:
            sought = _packets_from(container, stream, limit, point[1])
            if sought is None:
                return None
            packets = sought
        if may_skip and not is_packed(stream):
            packets, index, first_pts = _packets_for(packets, wanted[0], wanted[-1], point[0] if point else 0)
        convert: _Converter | None = None
        images: list[NDArray[np.uint8]] = []
        for frame in limit(_frames(stream, packets)):
            if convert is None:
                if first_pts is not None and frame.pts != first_pts:
                    return None
                convert = _Converter(frame, target.least_size)
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
        return _stack(images, target.pinned)


def is_packed(stream: VideoStream) -> bool:
    """Whether packets hold several frames and timestamps do not tell: B-frames of MPEG-4 in an AVI."""
    return stream.codec_context.name == "mpeg4" and bool(stream.codec_context.has_b_frames)


def _packets_from(container: InputContainer, stream: VideoStream, limit: _Limit, pts: int) -> Iterator[Packet] | None:
    """Packets from the key frame with a timestamp on; None where seeking does not lead to it."""
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


def _stack(images: list[NDArray[np.uint8]], pinned: bool) -> NDArray[np.uint8]:
    # DALI takes dense arrays only, and left alone NumPy keeps the memory order of a turned image.
    shape = len(images), *images[0].shape
    if pinned:
        import torch

        return np.stack(images, out=torch.empty(shape, dtype=torch.uint8, pin_memory=True).numpy())
    return np.stack(images, out=np.empty(shape, np.uint8))


def _frames(stream: VideoStream, packets: Iterable[Packet]) -> Iterator[VideoFrame]:
    for packet in packets:
        if packet.size:
            yield from decode_packet(stream, packet)
    yield from decode_packet(stream, None)


class CutFinder:
    """Finds the cuts of a stream in its packets, which it is shown one after the other.

    Key frames that are followed by frames shown earlier (open groups of pictures) are no cuts, and streams in which
    packets have no timestamps have none.
    """

    def __init__(self, index: int = 0) -> None:
        """index: number of the first frame."""
        self.index = index
        """Number of the next frame."""
        self.cuts: list[Cut] = []
        """Ascending; the last ones may yet turn out not to be cuts."""
        self.timed = True
        """Whether every packet had a timestamp."""
        self._packets = 0
        self._newest = -math.inf

    def see(self, packet: Packet, *, take: bool = True) -> None:
        """Looks at the next packet that is not empty. take: whether it may become one of the cuts."""
        if packet.pts is None:
            self.timed = False
        elif self.timed:
            while self.cuts and packet.pts <= self.cuts[-1].pts:
                self.cuts.pop()
            later = packet.pts > self._newest and self.index > 0
            if take and later and packet.is_keyframe and not packet.is_discard:
                self.cuts.append(Cut(self.index, packet.pts, self._packets))
            self._newest = max(self._newest, packet.pts)
        self._packets += 1
        self.index += not packet.is_discard


def _packets_for(
    packets: Iterable[Packet], first: int, last: int, index: int = 0
) -> tuple[list[Packet], int, int | None]:
    """The packets to decode for the frames from `first` to `last`, the number of the first frame, and its timestamp.

    index: number of the frame that the packets begin with. Without a cut the result is all packets, 0 and None, or no
    packet where the first ones are not there: they were not read, or the video was too long to hold them.
    """
    finder = CutFinder(index)
    kept: list[Packet] = []
    dropped = 0
    for packet in packets:
        if not packet.size:
            continue
        finder.see(packet, take=finder.index <= first)
        if len(finder.cuts) > CUTS_HELD:
            del finder.cuts[0]
            gone = finder.cuts[0].packets - dropped
            del kept[:gone]
            dropped += gone
        kept.append(packet)
        if finder.index > last + REORDER:
            break
    if not finder.cuts or not finder.timed:
        return [] if dropped or index else kept, 0, None
    cut = finder.cuts[-1]
    return kept[cut.packets - dropped :], cut.frame, cut.pts


class _Converter:
    """Frame to upright RGB uint8 [H, W, C], in the size and rotation of the first; one swscale context for all."""

    def __init__(self, first: VideoFrame, least_size: tuple[float, float] | None = None) -> None:
        """least_size: see `decode_frames`."""
        if max(first.width, first.height) > MAX_SIDE:
            raise DecodeError(f"frames of {first.width}x{first.height} pixels, more than {MAX_SIDE} a side")
        self._width, self._height = first.width, first.height
        self._turns = quarter_turns(first.rotation)
        self._reformatter = VideoReformatter()
        if least_size:
            least_width, least_height = reversed(least_size) if self._turns % 2 else least_size
            scale = max(least_width / first.width, least_height / first.height)
            if SHRINK_FROM * scale < 1:
                self._width, self._height = math.ceil(first.width * scale), math.ceil(first.height * scale)

    def __call__(self, frame: VideoFrame) -> NDArray[np.uint8]:
        rgb = self._reformatter.reformat(frame, self._width, self._height, "rgb24", **ONE_THREAD)
        image = np.asarray(rgb.to_ndarray(), np.uint8)
        return np.rot90(image, self._turns) if self._turns else image


def quarter_turns(rotation: float) -> int:
    """Counter-clockwise quarter turns, 0 to 3, that come nearest to a rotation in degrees."""
    return round(rotation / 90) % 4
