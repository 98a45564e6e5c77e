"""From a video file to RGB frames: which decoder takes which file, and PyAV, the one that takes them all.

Frames are counted in the order in which they are shown. Counting, not timestamps, decides which frame is which, so
variable frame rates, gaps and wrong clocks do no harm; the timestamps only tell where decoding may start.

A time limit is looked at between packets and frames, and by FFmpeg while it reads. It cannot end the decoding of a
single packet, nor a system call on a drive that never answers.
"""

from __future__ import annotations

import math
import os
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import av
import numpy as np
import torch
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from mam2.engine.config import UserError
from mam2.engine.data.frame_folders import IMAGE_SUFFIXES, AmbiguousFrames, frame_names

FRONT_ENDS = ("nvdec", "dali-cpu", "pyav")
AUTOMATIC = ("nvdec", "pyav")
"""In order of preference. DALI's decoder on the CPU is no faster than PyAV, and no match for damaged files."""
DALI_CPU_CODECS = ("vp8", "vp9", "mjpeg")
NVDEC_CODECS = ("h264", "hevc", "vp8", "vp9", "mjpeg")
"""DALI's list for NVDEC without AV1, which Ampere's and Hopper's data-centre chips do not decode, and MPEG-4, whose
packed AVIs (HMDB51) hold another number of frames than packets."""
NVDEC_PIXELS = ("yuv420p", "yuvj420p", "nv12")
NVDEC_TEN_BIT = ("hevc", "vp9")
MAX_SIDE = 8192
"""Larger frames are damaged headers; a clip of them would not fit into memory either."""
TIMEOUT_S = 60.0
"""Default limit for an open, a read, or a whole clip."""
REORDER = 32
"""More packets than any decoder holds back before the frame it was given comes out."""
CUTS_HELD = 3
"""Key frames to fall back on; the packets before them are forgotten, or an hour of video would be held in memory."""
FRAMES = "frames"
"""In the place of a codec's name: the path is a folder that holds an image a frame."""

# From version 17 on PyAV starts a thread for every core at each conversion: too dear for small frames.
ONE_THREAD = {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}


Item = TypeVar("Item")


class DecodeError(Exception):
    """A video cannot be decoded; the message is the reason in a few words, without the path."""


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_front_end(
    codec: str, device: torch.device | str, forced: str = "auto", *, pixel_format: str = "yuv420p", rotation: int = 0
) -> str:
    """The decoder for a video: "nvdec" on a GPU where it can, else "pyav"; or the forced one.

    codec and pixel_format are FFmpeg's names, rotation is in degrees. Raises UserError where the forced one cannot.
    """
    problems = {
        "nvdec": _nvdec_problem(codec, pixel_format, rotation, torch.device(device)),
        "dali-cpu": _dali_cpu_problem(codec, rotation),
        "pyav": "",
    }
    if forced == "auto":
        return next(front_end for front_end in AUTOMATIC if not problems[front_end])
    if forced not in problems:
        raise UserError(f"data.front_end: expected auto, {', '.join(FRONT_ENDS)}; found {forced}")
    if problems[forced]:
        raise UserError(f"{problems[forced]}: use front_end=pyav, or auto")
    return forced


def _nvdec_problem(codec: str, pixel_format: str, rotation: int, device: torch.device) -> str:
    if device.type != "cuda":
        return f"nvdec needs an NVIDIA GPU, the device is {device.type}"
    if codec not in NVDEC_CODECS:
        return f"codec {codec} cannot be decoded by nvdec ({', '.join(NVDEC_CODECS)} only)"
    if pixel_format not in NVDEC_PIXELS and not (pixel_format == "yuv420p10le" and codec in NVDEC_TEN_BIT):
        return f"pixel format {pixel_format} of codec {codec} cannot be decoded by nvdec"
    return f"a video rotated by {rotation} degrees is not turned upright by nvdec" if rotation else ""


def _dali_cpu_problem(codec: str, rotation: int) -> str:
    if codec not in DALI_CPU_CODECS:
        return f"codec {codec} cannot be decoded by dali-cpu (VP8, VP9, MJPEG only)"
    return f"a video rotated by {rotation} degrees is not turned upright by dali-cpu" if rotation else ""


@contextmanager
def open_video(path: str, timeout_s: float = TIMEOUT_S) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its video stream, ready to decode on one thread; FFmpeg's errors become DecodeError."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise DecodeError("not a file")  # to open a pipe would wait for ever
        # Without "ignore", names and titles that are not UTF-8 (HMDB51) raise. A playlist under a video's name must
        # not reach the network.
        only_files = {"protocol_whitelist": "file"}
        with av.open(path, metadata_errors="ignore", timeout=timeout_s, options=only_files) as container:
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


def frame_files(folder: str) -> list[str]:
    """Paths of the frames in a folder of images, in order; see `frame_names`. Raises DecodeError."""
    try:
        return [os.path.join(folder, name) for name in frame_names(os.listdir(folder))]
    except AmbiguousFrames as error:
        raise DecodeError(str(error)) from error


def decode_frames(path: str, frames: Sequence[int], *, timeout_s: float = TIMEOUT_S) -> NDArray[np.uint8]:
    """Frames of a video, or of a folder of images, by their numbers: uint8 [T, H, W, C], RGB, upright.

    frames: ascending, repeats allowed; one past the end is the last one there is. A video is read from its beginning
    and decoded from the last key frame at or before the first of them where the timestamps allow no doubt, otherwise
    from its first frame. Raises DecodeError when there is no frame at all, when an image of a folder cannot be
    decoded, and when it takes longer than timeout_s.
    """
    limit = _Limit(timeout_s)
    if os.path.isdir(path):
        return _decode_images(path, frames, limit)
    clip = _decode(path, frames, limit, may_skip=True)
    if clip is None:
        clip = _decode(path, frames, limit, may_skip=False)
    if clip is None:
        raise DecodeError("no decodable frame")
    return clip


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


def _decode_images(folder: str, frames: Sequence[int], limit: _Limit) -> NDArray[np.uint8]:
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
        convert = convert or _Converter(image)
        images.append(convert(image))
    return _stack(images)


def _decode(path: str, wanted: Sequence[int], limit: _Limit, *, may_skip: bool) -> NDArray[np.uint8] | None:
    """The clip, or None when no frame came or decoding did not begin where it was meant to."""
    with open_video(path, limit.seconds) as (container, stream):
        packets: Iterable[Packet] = limit(read_packets(container, stream))
        index, first_pts = 0, None
        # MPEG-4 in an AVI packs a B-frame and the next frame into one packet, and its timestamps do not tell.
        packed = stream.codec_context.name == "mpeg4" and stream.codec_context.has_b_frames
        if may_skip and not packed:
            packets, index, first_pts = _packets_for(packets, wanted[0], wanted[-1])
        convert: _Converter | None = None
        images: list[NDArray[np.uint8]] = []
        for frame in limit(_frames(stream, packets)):
            if convert is None:
                if first_pts is not None and frame.pts != first_pts:
                    return None
                convert = _Converter(frame)
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
        return _stack(images)


def _stack(images: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    # DALI takes dense arrays only, and left alone NumPy keeps the memory order of a turned image.
    return np.stack(images, out=np.empty((len(images), *images[0].shape), np.uint8))


def _frames(stream: VideoStream, packets: Iterable[Packet]) -> Iterator[VideoFrame]:
    for packet in packets:
        if packet.size:
            yield from decode_packet(stream, packet)
    yield from decode_packet(stream, None)


def _packets_for(packets: Iterable[Packet], first: int, last: int) -> tuple[list[Packet], int, int | None]:
    """The packets to decode for the frames from `first` to `last`, the index of the first frame, and its timestamp.

    A key frame cuts the video cleanly where all packets before it are shown before it and all after it after it: then
    it is frame number "packets before it" and needs none of them. Key frames that are followed by frames shown
    earlier (open groups of pictures), and streams without timestamps, have no such cut: all packets, 0 and None then,
    or none at all where the video was too long to hold them.
    """
    kept: list[Packet] = []
    count = 0  # packets that give a frame
    newest = -math.inf
    cuts: list[tuple[int, int, int]] = []  # place in kept, frame index, timestamp
    timed, forgot = True, False
    for packet in packets:
        if not packet.size:
            continue
        if packet.pts is None:
            timed = False
        elif timed:
            while cuts and packet.pts <= cuts[-1][2]:
                cuts.pop()
            if packet.is_keyframe and not packet.is_discard and packet.pts > newest and 0 < count <= first:
                cuts.append((len(kept), count, packet.pts))
                if len(cuts) > CUTS_HELD:
                    forgot = True
                    gone = cuts[1][0]
                    del kept[:gone]
                    cuts = [(place - gone, index, pts) for place, index, pts in cuts[1:]]
            newest = max(newest, packet.pts)
        kept.append(packet)
        count += not packet.is_discard
        if count > last + REORDER:
            break
    if not cuts or not timed:
        return [] if forgot else kept, 0, None
    place, index, pts = cuts[-1]
    return kept[place:], index, pts


class _Converter:
    """Frame to upright RGB uint8 [H, W, C], in the size and rotation of the first; one swscale context for all."""

    def __init__(self, first: VideoFrame) -> None:
        if max(first.width, first.height) > MAX_SIDE:
            raise DecodeError(f"frames of {first.width}x{first.height} pixels, more than {MAX_SIDE} a side")
        self._width, self._height = first.width, first.height
        self._turns = quarter_turns(first.rotation)
        self._reformatter = VideoReformatter()

    def __call__(self, frame: VideoFrame) -> NDArray[np.uint8]:
        rgb = self._reformatter.reformat(frame, self._width, self._height, "rgb24", **ONE_THREAD)
        image = np.asarray(rgb.to_ndarray(), np.uint8)
        return np.rot90(image, self._turns) if self._turns else image


def quarter_turns(rotation: float) -> int:
    """Counter-clockwise quarter turns, 0 to 3, that come nearest to a rotation in degrees."""
    return round(rotation / 90) % 4
