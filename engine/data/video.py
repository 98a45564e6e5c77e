"""Metadata of one video: the file is opened once, its packets are counted, its first frame is decoded."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from tqdm import tqdm

from mam2.engine.data.arrays import is_array, open_array
from mam2.engine.data.cuts import CutFinder
from mam2.engine.data.decoding import (
    FILE_ERRORS,
    FRAMES,
    DecodeError,
    decode_packet,
    frame_files,
    is_deep_gray,
    is_packed,
    open_video,
    quarter_turns,
    read_packets,
)
from mam2.engine.data.frame_folders import folder_status
from mam2.engine.data.outage import ALONE_S, Patience
from mam2.engine.data.storage import open_file, status
from mam2.engine.data.video_decoders import VIDEO_DECODERS, choose_decoder
from mam2.engine.errors import UserError

HASH_BLOCK = 2**16
HDR = {16: "pq", 18: "hlg"}
"""Transfer functions of high dynamic range, by their numbers in ITU-T H.273."""
RATE_TOLERANCE = 0.05
"""Stated and measured rates differ by up to this if timestamps are rounded or the last frame is displayed longer."""
INTERVAL_TOLERANCE = 0.4
"""Allowed deviation of an interval, relative to the median. At 240 frames/s, rounding to milliseconds changes an
interval by a quarter, a lost frame by 1."""
SEEK_FROM = 64 * 2**20
"""Minimum bytes of a file with seek points. Smaller files of up to SEEK_FRAMES frames are read from the beginning,
which keeps manifests small."""
SEEK_SPACING = 4 * 2**20
"""Bytes of video between two seek points: the most that is read unnecessarily."""
SEEK_FRAMES = 1500
"""A minute at 25 frames per second: the most frames before a seek point, so that a clip from an hour of small frames
does not read the hour."""
UNEVEN_SHARE = 0.01
"""Share of uneven intervals from which a rate is variable: a single gap in a long video does not count."""
_PATIENCE = Patience(ALONE_S, lambda line: tqdm.write(line, file=sys.stderr))


@dataclass(frozen=True)
class Video:
    """A video that can be opened. Its frames are counted without decoding, so that a damaged video may have fewer.

    A folder of images, one per frame, is a video with the codec "frames"; an array has the codec "npy" or "npz" and the
    type of its values as pixel format.
    """

    path: str
    label: int
    """Class number from 0; -1 without a label."""
    frames: int
    width: int
    """Width of the stored frame in pixels; see `shown_size`."""
    height: int
    codec: str
    """FFmpeg's name: h264, hevc, vp9, …"""
    fps: float
    """Average frames per second; from the timestamps if these contradict the stated rate; 0 if unknown."""
    rotation: int
    """Degrees by which a player rotates the frames counterclockwise: 0, 90, 180 or 270."""
    pixel_format: str = "yuv420p"
    """FFmpeg's name."""
    variable_rate: bool = False
    """More than 1 % of the frames have an irregular duration."""
    keyframe_median: int = 0
    """Median frames from a key frame to the next, or to the end; 0 in manifests saved without it."""
    keyframe_max: int = 0
    """Maximum frames from a key frame to the next, or to the end."""
    bytes: int = 0
    """Size of the file, or of all images of a folder."""
    mtime_ns: int = 0
    """Time of the last change of the file, or of the folder or one of its images."""
    content: str = ""
    """Hash of size, head, middle and tail; see `content_hash`."""
    b_frames: bool = False
    """Frames are decoded in another order than they are displayed."""
    interlaced: bool = False
    """Frames consist of two fields of different times, according to the first frame."""
    transfer: str = ""
    """Transfer function: "pq" and "hlg" are HDR, else "sdr"; empty in manifests saved without it."""
    trimmed: int = -1
    """Packets that an edit list hides, or whose time is negative. DALI may count other frames than PyAV in such a file.
    -1 in manifests saved without it."""
    channels: int = 0
    """Channels of an array; 0 for a file that is decoded to the channels asked for."""
    seek_points: tuple[tuple[int, int], ...] = ()
    """Frame number and timestamp of key frames at which reading may start, SEEK_SPACING bytes or SEEK_FRAMES frames
    apart; empty for files that are read from their beginning: up to SEEK_FROM bytes and SEEK_FRAMES frames, or without
    clean key frames."""

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "seek_points", tuple((index, pts) for index, pts in self.seek_points)
        )  # JSON has lists

    @property
    def shown_size(self) -> tuple[int, int]:
        """Returns width and height in pixels after the rotation."""
        return (self.height, self.width) if self.rotation % 180 else (self.width, self.height)

    @property
    def identity(self) -> str:
        """Returns a text that copies of a video have in common: the hash of its content, or its path without one."""
        return self.content or self.path

    @property
    def duration_s(self) -> float:
        """Returns the duration in seconds; 0 if the rate is unknown."""
        return self.frames / self.fps if self.fps else 0.0

    @property
    def traits(self) -> dict[str, Any]:
        """Returns the arguments of `choose_decoder` other than the codec."""
        return {
            "pixel_format": self.pixel_format,
            "rotation": self.rotation,
            "size": (self.width, self.height),
            "interlaced": self.interlaced,
            "bytes": self.bytes,
            "frames": self.frames,
            "trimmed": self.trimmed,
            "stored_channels": self.channels,
        }

    def value_type(self, channels: int) -> str:
        """Returns the type of the values that are read as clips of C channels: uint8, uint16 or float32."""
        if self.channels:
            return self.pixel_format
        return "uint16" if channels == 1 and is_deep_gray(self.pixel_format) else "uint8"

    @property
    def frame_bytes(self) -> int:
        """Returns the bytes of a decoded frame: of an array as stored, else as 8-bit RGB."""
        values = self.channels * np.dtype(self.pixel_format).itemsize if self.channels else 3
        return self.width * self.height * values

    @property
    def decoders(self) -> tuple[str, ...]:
        """Returns the decoders that can decode the video on a suitable machine."""
        if self.channels:
            return ("array",)
        return tuple(decoder for decoder in VIDEO_DECODERS if self._suits(decoder))

    def _suits(self, decoder: str) -> bool:
        device = "cuda" if decoder == "nvdec" else "cpu"
        try:
            choose_decoder(self.codec, device, decoder, **self.traits)
        except UserError:
            return False
        return True


@dataclass(frozen=True)
class Skipped:
    """A video that cannot be used, with a short reason."""

    path: str
    reason: str
    bytes: int = 0
    mtime_ns: int = 0


def probe_file(path: str, label: int = -1) -> Video | Skipped:
    """Opens a video or a folder of images, decodes its first frame and counts the others."""
    size, mtime_ns = 0, 0

    def look() -> Video | Skipped:
        nonlocal size, mtime_ns
        try:
            size, mtime_ns = status(path)
        except FileNotFoundError:
            return Skipped(path, "does not exist")
        if os.path.isdir(path):
            size, mtime_ns = folder_status(path)
            return _probe_folder(path, label, size, mtime_ns)
        if is_array(path):
            return _probe_array(path, label, size, mtime_ns)
        return _probe_file(path, label, size, mtime_ns)

    try:
        return _PATIENCE(path, look)
    except DecodeError as error:
        found, cause = Skipped(path, str(error), size, mtime_ns), error.__cause__
    except FILE_ERRORS as error:  # one bad file must not end the scan of a data set: it is reported and left out
        found, cause = Skipped(path, f"{type(error).__name__}: {error}", size, mtime_ns), error
    if isinstance(
        cause, (OSError, av.error.ExitError)
    ):  # the file is not the cause: raise, so that the read is retried
        return Skipped(path, found.reason)
    return found


def content_hash(paths: Sequence[str], size: int) -> str:
    """Returns BLAKE2b, 32 hex digits, of the size and of 64 KiB each at the beginning, middle and end of every file.

    It distinguishes videos and finds copies with three reads per file. It does not detect damage between the three.
    """
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    for path in paths:
        with open_file(path) as file:
            length = file.seek(0, os.SEEK_END)
            starts = list(range(0, length, HASH_BLOCK))
            if length > 3 * HASH_BLOCK:
                starts = [0, (length - HASH_BLOCK) // 2, length - HASH_BLOCK]
            for start in starts:
                file.seek(start)
                digest.update(file.read(HASH_BLOCK))
    return digest.hexdigest()


def _probe_file(path: str, label: int, size: int, mtime_ns: int) -> Video:
    with open_video(path) as (container, stream):
        finder, since, since_frame, first, trimmed = CutFinder(), 0, 0, None, 0
        keys: list[int] = []
        times: list[int] = []
        for packet in read_packets(container, stream):
            if not packet.size:
                continue
            if first is None:
                first = next(iter(decode_packet(stream, packet)), None)
            stamp = packet.dts if packet.pts is None else packet.pts
            trimmed += packet.is_discard or (stamp is not None and stamp < 0)
            if not packet.is_discard:
                if packet.is_keyframe:
                    keys.append(finder.index)
                if packet.pts is not None:
                    times.append(packet.pts)
            cuts = len(finder.cuts)
            finder.see(packet, take=since >= SEEK_SPACING or finder.index - since_frame >= SEEK_FRAMES)
            if len(finder.cuts) > cuts:
                since, since_frame = 0, finder.cuts[-1].frame
            since += packet.size
        count = finder.index
        if first is None:  # the decoder may still hold the frame
            first = next(iter(decode_packet(stream, None)), None)
        if first is None:
            raise DecodeError("no decodable frame")
        intervals = np.zeros(0)
        if stream.time_base and len(times) == count:  # if some frames have no timestamp, the others are of no use
            intervals = np.diff(np.sort(times)) * float(stream.time_base)
        may_seek = (size > SEEK_FROM or count > SEEK_FRAMES) and finder.timed and not is_packed(stream)
        gaps = np.diff(sorted({0, *keys, max(count, 1)}))
        return Video(
            path=path,
            label=label,
            frames=max(count, 1),
            width=first.width,
            height=first.height,
            codec=stream.codec_context.codec.canonical_name,
            fps=_average_rate(float(stream.average_rate or 0), intervals),
            rotation=quarter_turns(first.rotation) * 90,
            pixel_format=first.format.name,
            variable_rate=_is_variable(intervals),
            keyframe_median=int(np.median(gaps)),
            keyframe_max=int(gaps.max()),
            bytes=size,
            mtime_ns=mtime_ns,
            content=content_hash([path], size),
            b_frames=bool(stream.codec_context.has_b_frames),
            interlaced=bool(first.interlaced_frame),
            transfer=HDR.get(int(stream.codec_context.color_trc), "sdr"),
            trimmed=trimmed,
            seek_points=tuple((cut.frame, cut.pts) for cut in finder.cuts) if may_seek else (),
        )


def _probe_folder(path: str, label: int, size: int, mtime_ns: int) -> Video:
    images = frame_files(path)
    if not images:
        raise DecodeError("no images in this folder")
    first = _probe_file(images[0], label, size, mtime_ns)
    return Video(
        path=path,
        label=label,
        frames=len(images),
        width=first.width,
        height=first.height,
        codec=FRAMES,
        fps=0.0,
        rotation=first.rotation,
        pixel_format=first.pixel_format,
        keyframe_median=1,
        keyframe_max=1,
        bytes=size,
        mtime_ns=mtime_ns,
        content=content_hash([images[0], images[len(images) // 2], images[-1]], size),
        transfer=first.transfer,
        trimmed=0,
    )


def _probe_array(path: str, label: int, size: int, mtime_ns: int) -> Video:
    with open_array(path) as array:
        array.read([0])
        return Video(
            path=path,
            label=label,
            frames=array.frames,
            width=array.width,
            height=array.height,
            codec=path.lower().rpartition(".")[2],
            fps=array.fps,
            rotation=0,
            pixel_format=array.value_type,
            keyframe_median=1,
            keyframe_max=1,
            bytes=size,
            mtime_ns=mtime_ns,
            content=content_hash([path], size),
            transfer="sdr",
            trimmed=0,
            channels=array.channels,
        )


def _average_rate(stated: float, intervals: np.ndarray) -> float:
    """Returns the stated frames per second, or those of the timestamps if they disagree (Matroska without a rate)."""
    span = float(intervals.sum())
    measured = len(intervals) / span if span > 0 else 0.0
    if not measured or abs(stated - measured) <= RATE_TOLERANCE * measured:
        return stated
    return round(measured, 3)


def _is_variable(intervals: np.ndarray) -> bool:
    if not len(intervals):
        return False
    median = np.median(intervals)
    uneven = np.abs(intervals - median) > INTERVAL_TOLERANCE * median
    return bool(uneven.mean() > UNEVEN_SHARE)
