"""From a video file to RGB frames: which decoder takes which file, and PyAV, the one that takes them all.

Frames are counted in the order in which they are shown. Counting, not timestamps, decides which frame is which, so
variable frame rates, gaps and wrong clocks do no harm; the timestamps only tell where decoding may start.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

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

FRONT_ENDS = ("nvdec", "dali-cpu", "pyav")
DALI_CPU_CODECS = ("vp8", "vp9", "mjpeg")
NVDEC_CODECS = ("h264", "hevc", "vp8", "vp9", "mjpeg")
"""DALI's list for NVDEC without AV1, which Ampere's and Hopper's data-centre chips do not decode, and MPEG-4, whose
packed AVIs (HMDB51) hold another number of frames than packets."""
NVDEC_PIXELS = ("yuv420p", "yuvj420p", "nv12")
NVDEC_TEN_BIT = ("hevc", "vp9")
MAX_SIDE = 8192
"""Larger frames are damaged headers; a clip of them would not fit into memory either."""
TIMEOUT_S = 60.0
"""For one open or read, so that a dead network drive is an error and not a hang."""
REORDER = 32
"""More packets than any decoder holds back before the frame it was given comes out."""

# From version 17 on PyAV starts a thread for every core at each conversion: too dear for small frames.
_ONE_THREAD = {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}


class DecodeError(Exception):
    """A video cannot be decoded; the message is the reason in a few words, without the path."""


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_front_end(
    codec: str, device: torch.device | str, forced: str = "auto", *, pixel_format: str = "yuv420p", rotation: int = 0
) -> str:
    """The decoder for a video: "nvdec" on a GPU, "dali-cpu" or "pyav" on a CPU, or the forced one.

    codec and pixel_format are FFmpeg's names, rotation is in degrees. Raises UserError where the forced one cannot.
    """
    problems = {
        "nvdec": _nvdec_problem(codec, pixel_format, rotation, torch.device(device)),
        "dali-cpu": _dali_cpu_problem(codec, rotation),
        "pyav": "",
    }
    if forced == "auto":
        return next(front_end for front_end in FRONT_ENDS if not problems[front_end])
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
def open_video(path: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its video stream, ready to decode on one thread; FFmpeg's errors become DecodeError."""
    try:
        # Without "ignore", names and titles that are not UTF-8 (HMDB51) raise.
        with av.open(path, metadata_errors="ignore", timeout=TIMEOUT_S) as container:
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
        if isinstance(error, av.error.InvalidDataError):
            raise DecodeError("damaged, or not a video") from error
        raise DecodeError(getattr(error, "strerror", None) or str(error).splitlines()[0]) from error


def decode_packet(stream: VideoStream, packet: Packet | None) -> list[VideoFrame]:
    """The frames that come out when a packet goes in; none for a damaged one. None as packet flushes the decoder."""
    try:
        return stream.codec_context.decode(packet)
    except av.error.FFmpegError:
        return []


def decode_frames(path: str, start: int, count: int, stride: int) -> NDArray[np.uint8]:
    """Frames start, start + stride, … of a video, uint8 [T, H, W, C], RGB, upright.

    A frame past the end is the last one there is. Reads the file from its beginning and decodes from the last
    key frame at or before `start` where the timestamps allow no doubt, otherwise from the first frame.
    Raises DecodeError when there is no frame at all.
    """
    clip = _decode(path, start, count, stride, may_skip=True)
    if clip is None:
        clip = _decode(path, start, count, stride, may_skip=False)
    if clip is None:
        raise DecodeError("no decodable frame")
    return clip


def _decode(path: str, start: int, count: int, stride: int, *, may_skip: bool) -> NDArray[np.uint8] | None:
    """The clip, or None when no frame came or decoding did not begin where it was meant to."""
    with open_video(path) as (container, stream):
        # MPEG-4 in an AVI packs a B-frame and the next frame into one packet, and its timestamps do not tell.
        packed = stream.codec_context.name == "mpeg4" and stream.codec_context.has_b_frames
        cut = start if may_skip and not packed else 0
        packets, index, first_pts = _packets_for(container, stream, cut, start + count * stride)
        convert: _Converter | None = None
        images: list[NDArray[np.uint8]] = []
        for frame in _frames(stream, packets):
            if convert is None:
                if first_pts is not None and frame.pts != first_pts:
                    return None
                convert = _Converter(frame)
            if index == start + len(images) * stride:
                images.append(convert(frame))
                if len(images) == count:
                    break
            index += 1
        if convert is None:
            return None
        if len(images) < count:
            images += [convert(frame)] * (count - len(images))
        # DALI takes dense arrays only, and left alone NumPy keeps the memory order of a turned image.
        return np.stack(images, out=np.empty((count, *images[0].shape), np.uint8))


def _frames(stream: VideoStream, packets: list[Packet]) -> Iterator[VideoFrame]:
    for packet in packets:
        yield from decode_packet(stream, packet)
    yield from decode_packet(stream, None)


def _packets_for(
    container: InputContainer, stream: VideoStream, start: int, stop: int
) -> tuple[list[Packet], int, int | None]:
    """The packets to decode for the frames from `start` to `stop`, the index of the first frame, and its timestamp.

    A key frame cuts the video cleanly where all packets before it are shown before it and all after it after it: then
    it is frame number "packets before it" and needs none of them. Key frames that are followed by frames shown
    earlier (open groups of pictures), and streams without timestamps, have no such cut; index 0 and None then.
    """
    packets: list[Packet] = []
    count = 0  # packets that give a frame
    newest = -math.inf
    cuts: list[tuple[int, int, int]] = []  # place in packets, frame index, timestamp
    timed = True
    for packet in container.demux(stream):
        if not packet.size:
            continue
        if packet.pts is None:
            timed = False
        elif timed:
            while cuts and packet.pts <= cuts[-1][2]:
                cuts.pop()
            if packet.is_keyframe and not packet.is_discard and packet.pts > newest and 0 < count <= start:
                cuts.append((len(packets), count, packet.pts))
            newest = max(newest, packet.pts)
        packets.append(packet)
        count += not packet.is_discard
        if count >= stop + REORDER:
            break
    if not cuts or not timed:
        return packets, 0, None
    place, index, pts = cuts[-1]
    return packets[place:], index, pts


class _Converter:
    """Frame to upright RGB uint8 [H, W, C], in the size and rotation of the first; one swscale context for all."""

    def __init__(self, first: VideoFrame) -> None:
        if max(first.width, first.height) > MAX_SIDE:
            raise DecodeError(f"frames of {first.width}x{first.height} pixels, more than {MAX_SIDE} a side")
        self._width, self._height = first.width, first.height
        self._turns = quarter_turns(first.rotation)
        self._reformatter = VideoReformatter()

    def __call__(self, frame: VideoFrame) -> NDArray[np.uint8]:
        rgb = self._reformatter.reformat(frame, self._width, self._height, "rgb24", **_ONE_THREAD)
        image = np.asarray(rgb.to_ndarray(), np.uint8)
        return np.rot90(image, self._turns) if self._turns else image


def quarter_turns(rotation: float) -> int:
    """Counter-clockwise quarter turns, 0 to 3, that come nearest to a rotation in degrees."""
    return round(rotation / 90) % 4
