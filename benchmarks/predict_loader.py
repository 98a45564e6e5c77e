"""The part of the prediction for an H200 that is about decoding: NVDEC's clips per second against those of a step.

Frames per clip are counted with the draws of a run. NVIDIA's rate for large frames is scaled by macroblocks and clock.
What is not known is the time that an engine needs for a small frame beyond its share of pixels, and what the host and
DALI need around it. Therefore the table gives the time per frame at which decoding would be as slow as the step.
"""

import math
from typing import NamedTuple

from benchmarks.h200 import CLIPS, NVDEC_CLOCK, NVDEC_ENGINES, NVDEC_FPS, VIDEO_CLOCK, step_seconds
from benchmarks.predict_steps import BEST
from benchmarks.step_sizes import sized
from mam2.engine.data.sampling import draw_clip
from mam2.engine.data.video import Video

KINETICS = Video("clip.mp4", -1, frames=300, width=336, height=256, codec="h264", fps=30.0, rotation=0)
"""Ten seconds in the size of VideoMAE's Kinetics, 340x256, with sides rounded as `mam2 transcode` rounds them: DALI
keeps a decoder for the next clip only if both are multiples of 16."""
KEY_FRAMES = (12, 30, 250)
"""Frames between key frames; 250 is x264's default."""
DRAWS = 2000
VIEWS = 4
CORES = 16
"""CPU cores of the measured machine."""
MACROBLOCK = 16


class Decoding(NamedTuple):
    """NVDEC for videos with one distance of key frames."""

    frames: float
    """Frames that are decoded per clip, on average."""
    rate: float
    """Clips per second if an engine's time is proportional to the pixels."""


def macroblocks(width: int, height: int) -> int:
    return math.ceil(width / MACROBLOCK) * math.ceil(height / MACROBLOCK)


def frame_seconds() -> float:
    """Returns the seconds of an engine per frame of KINETICS if they are proportional to its macroblocks."""
    share = macroblocks(KINETICS.width, KINETICS.height) / macroblocks(1920, 1080)
    return share / (NVDEC_FPS * VIDEO_CLOCK / NVDEC_CLOCK)


def decoded_frames(key_frames: int) -> float:
    """Returns the mean number of frames from the last key frame before a clip to its last frame."""
    config = sized("mam2-fast", None, "bfloat16").data
    clips = [draw_clip(0, KINETICS, epoch, config, seed=0).frames for epoch in range(DRAWS)]
    return sum(clip[-1] + 1 - clip[0] // key_frames * key_frames for clip in clips) / DRAWS


def decoding(key_frames: int) -> Decoding:
    frames = decoded_frames(key_frames)
    return Decoding(frames, NVDEC_ENGINES / (frames * frame_seconds()))


def needed() -> dict[str, float]:
    """Returns the decoded clips per second that the fastest measured steps take."""
    file, objective, way = BEST
    whole = CLIPS / step_seconds(file, objective, way)
    half = CLIPS / step_seconds(file, f"{objective} half decoded", way)
    return {
        "1 view": whole,
        f"{VIEWS} views": whole / VIEWS,
        f"{VIEWS} views, half decoded": half / VIEWS,
    }


def report() -> list[str]:
    """Returns the lines of this part."""
    takes, config = needed(), sized("mam2-fast", None, "bfloat16").data
    of_views = takes[f"{VIEWS} views"]
    lines = [
        f"Decoding by NVDEC for mam2-fast: H.264 videos of {KINETICS.frames} frames of"
        f" {KINETICS.width}x{KINETICS.height}, {config.frames} frames per clip, every {config.stride}th.",
        f"Known: {NVDEC_ENGINES} engines; {NVDEC_FPS} frames of 1920x1080 per second and engine at"
        f" {NVDEC_CLOCK / 1e9:.2f} GHz; a video clock of up to {VIDEO_CLOCK / 1e9:.3f} GHz.",
        f"Assumed: an engine's time is proportional to the macroblocks, {1e6 * frame_seconds():.0f} µs per frame. Small"
        " frames take longer, and nobody",
        "has published by how much. The last column has the time of an engine per frame at which decoding is as fast",
        "as the step. Opening files, copies and resizing come on top; so does making a decoder for each clip, as DALI",
        "does for sides that are no multiples of 16.",
        "Measured: the clips per second of the fastest step of each kind.",
        "",
        "| key frame every | frames decoded per clip | clips per second at best | "
        + " | ".join(f"of the step's, {what}" for what in takes)
        + f" | µs per frame allowed, {VIEWS} views |",
        "|" + "---|" * (4 + len(takes)),
    ]
    for distance in KEY_FRAMES:
        found = decoding(distance)
        shares = " | ".join(f"{found.rate / rate:.1f} times" for rate in takes.values())
        allowed = NVDEC_ENGINES / (found.frames * of_views)
        lines.append(f"| {distance} | {found.frames:.0f} | {found.rate:.0f} | {shares} | {1e6 * allowed:.0f} |")
    lines += [
        "",
        f"Without NVDEC, {CORES} cores must decode {of_views:.0f} clips per second for {VIEWS} views:"
        f" {1e3 * CORES / of_views:.0f} ms of a core per clip.",
    ]
    return lines
