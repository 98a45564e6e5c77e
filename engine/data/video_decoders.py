"""Chooses the decoder of a video: NVDEC, DALI on the CPU, or PyAV, which decodes all videos."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mam2.engine.data.decoding import FORMATS
from mam2.engine.errors import UserError

VIDEO_DECODERS = ("nvdec", "dali-cpu", "pyav")
AUTOMATIC = ("nvdec", "pyav")
"""In order of preference. DALI's CPU decoder is not faster than PyAV and less robust to damaged files."""
DALI_CPU_CODECS = ("vp8", "vp9", "mjpeg")
NVDEC_SIZES = {
    "h264": ((48, 16), (4096, 4096)),
    "hevc": ((144, 144), (8192, 8192)),
    "vp8": ((48, 16), (4096, 4096)),
    "vp9": ((128, 128), (8192, 8192)),
    "mjpeg": ((64, 64), (32768, 16384)),
}
"""Codecs that NVDEC decodes, each with the smallest and the largest width and height in pixels (NVIDIA's NVDEC
application note, Ampere to Hopper). Two codecs of DALI's list are left out: AV1, which the data-center chips of Ampere
and Hopper do not decode, and MPEG-4, whose packed AVIs (HMDB51) have different numbers of frames and packets."""
NVDEC_PIXELS = ("yuv420p", "yuvj420p", "nv12")
NVDEC_TEN_BIT = ("hevc", "vp9")
MOST_BYTES_READ = 64 * 2**20
"""Maximum file size in bytes for DALI, which reads the whole file for each clip. In larger files PyAV seeks."""
MOST_FRAMES_READ = 9000
"""Maximum number of frames for the same reason, five minutes at 30 per second: an hour of small frames is no large
file, but DALI would read it and list its packets for each clip."""


def choose_decoder(
    codec: str,
    device: torch.device | str,
    forced: str = "auto",
    *,
    pixel_format: str = "yuv420p",
    rotation: int = 0,
    size: tuple[int, int] | None = None,
    interlaced: bool = False,
    bytes: int = 0,
    frames: int = 0,
    trimmed: int = 0,
    dali: bool = True,
    channels: int = 3,
    stored_channels: int = 0,
    broken: Mapping[str, str] | None = None,
) -> str:
    """Returns the decoder of a video: "nvdec" if a GPU can decode it, else "pyav", or the forced one; "array" for one.

    Args:
        codec: FFmpeg's name.
        device: the run's device.
        forced: one of VIDEO_DECODERS, or "auto".
        pixel_format: FFmpeg's name.
        rotation: in degrees.
        size: width and height of the stored frame in pixels; None if unknown.
        interlaced: frames consist of two fields.
        bytes: size of the file; 0 if unknown.
        frames: their number; 0 if unknown.
        trimmed: number of packets that an edit list hides, or whose time is negative; see `Video`.
        dali: whether the nvidia.dali package is installed.
        channels: of the clips; only PyAV decodes others than RGB.
        stored_channels: of an array, which is read without a decoder, whatever is forced; 0 for a video.
        broken: codecs that NVDEC does not decode on this machine, with the reasons.

    Raises:
        UserError: the forced decoder cannot decode the video, or no decoder can.
    """
    if stored_channels:
        if stored_channels != channels:
            raise UserError(
                f"{stored_channels} channel{'s' * (stored_channels > 1)}, data.channels is {channels}; "
                f"set --data.channels {stored_channels}"
            )
        return "array"
    problems = {
        "nvdec": _nvdec_problem(codec, pixel_format, rotation, size, interlaced, torch.device(device), broken or {}),
        "dali-cpu": _dali_cpu_problem(codec, rotation),
        "pyav": "",
    }
    if channels not in FORMATS:
        raise UserError(f"a video file is decoded to 1 or 3 channels, not {channels} (data.channels)")
    if channels != 3:
        problems |= {name: f"{name} decodes RGB, data.channels is {channels}" for name in ("nvdec", "dali-cpu")}
    if trimmed > 0:  # DALI's index leaves out packets with a negative time, but not those that an edit list hides
        hidden = f"an edit list hides {trimmed} of its frames, which DALI may count"
        problems |= {name: problems[name] or hidden for name in ("nvdec", "dali-cpu")}
    if not dali:  # last, because it would not help to install DALI for a video that it cannot decode
        absent = "needs NVIDIA DALI, which is not installed"
        problems |= {name: problems[name] or f"{name} {absent}" for name in ("nvdec", "dali-cpu")}
    if forced == "auto":
        if bytes > MOST_BYTES_READ or frames > MOST_FRAMES_READ:
            return "pyav"
        return next(decoder for decoder in AUTOMATIC if not problems[decoder])
    if forced not in problems:
        raise UserError(f"data.decoder: expected auto, {', '.join(VIDEO_DECODERS)}; found {forced}")
    if problems[forced]:
        raise UserError(f"{problems[forced]}: use data.decoder=pyav or auto")
    return forced


def _nvdec_problem(
    codec: str,
    pixel_format: str,
    rotation: int,
    size: tuple[int, int] | None,
    interlaced: bool,
    device: torch.device,
    broken: Mapping[str, str],
) -> str:
    if device.type != "cuda":
        return f"nvdec needs an NVIDIA GPU, the device is {device.type}"
    if codec not in NVDEC_SIZES:
        return f"codec {codec} cannot be decoded by nvdec (only {', '.join(NVDEC_SIZES)})"
    if codec in broken:
        return f"codec {codec} cannot be decoded by nvdec on this machine ({broken[codec]})"
    if pixel_format not in NVDEC_PIXELS and not (pixel_format == "yuv420p10le" and codec in NVDEC_TEN_BIT):
        return f"pixel format {pixel_format} of codec {codec} cannot be decoded by nvdec"
    if interlaced:
        return "nvdec decodes interlaced frames field by field"
    (least_width, least_height), (most_width, most_height) = NVDEC_SIZES[codec]
    if size and not (least_width <= size[0] <= most_width and least_height <= size[1] <= most_height):
        return (
            f"frames of {size[0]}x{size[1]} pixels cannot be decoded by nvdec "
            f"({codec}: {least_width}x{least_height} to {most_width}x{most_height})"
        )
    return f"nvdec does not turn a video rotated by {rotation} degrees upright" if rotation else ""


def _dali_cpu_problem(codec: str, rotation: int) -> str:
    if codec not in DALI_CPU_CODECS:
        return f"codec {codec} cannot be decoded by dali-cpu (only VP8, VP9, MJPEG)"
    return f"dali-cpu does not turn a video rotated by {rotation} degrees upright" if rotation else ""
