"""Settings of the loader benchmark, the videos that it writes, and what its measurements share."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]
CODES = 8192
"""Codebook size of the random codes."""
TOLERANCE = 4.0
"""Largest mean difference to PyAV's frames, in gray levels; the next frame of these files differs by far more."""


class Unmeasured(Exception):
    """Raised with the verdict and reason of a decoder that gets no number."""


@dataclass(frozen=True)
class Settings:
    files: int
    frames: int
    height: int
    width: int
    batch: int
    data: Row
    """Keys of the config's `data` table that differ from `mam2-fast`."""
    model: Row
    """Keys of the `model` table that differ from `mam2-fast`; regressor and decoders get the same width and depth."""
    turns: int
    seconds: float
    """Duration of each turn."""
    steps: int
    loaders: tuple[tuple[str, str, int, int], ...]
    """Decoder, codec, frames between key frames, threads (0: one per core). "shared": NVDEC and PyAV at the same time,
    by their measured rates. The files of the first are measured first, also with a step."""
    views: tuple[int, ...]
    recorded: Row
    """Keys of the config's `data` table for recorded clips that differ from `mam2-fast`."""
    recorded_clips: int
    """Clips per turn of recorded clips."""
    recorded_videos: tuple[int, int]
    """Height and width of the videos of recorded clips in pixels."""
    odd_width: int = 0
    """Width that is no multiple of 16, in which the first loader is measured again; 0: none."""


SETTINGS = {
    "cuda": Settings(
        files=16,
        frames=240,
        height=256,
        width=336,
        odd_width=340,
        batch=32,
        data={},
        model={},
        turns=1,
        seconds=1.0,
        steps=6,
        loaders=(
            *((decoder, "h264", 30, 0) for decoder in ("nvdec", "pyav", "shared")),
            *(("nvdec", "h264", 12, 0), ("nvdec", "h264", 250, 0), ("nvdec", "vp9", 30, 0)),
        ),
        views=(1, 2, 4, 8),
        recorded={},
        recorded_clips=512,
        recorded_videos=(256, 340),
    ),
    "cpu": Settings(
        files=3,
        frames=120,
        height=120,
        width=160,
        batch=4,
        data={"frames": 8, "size": 64},
        model={"patch": 8, "width": 48, "depth": 2, "heads": 3},
        turns=3,
        seconds=0.3,
        steps=8,
        loaders=(
            *(("pyav", "h264", 30, threads) for threads in (1, 2, 0)),
            *(("pyav", "h264", 12, 1), ("pyav", "h264", 250, 1), ("pyav", "vp9", 30, 1), ("dali-cpu", "vp9", 30, 1)),
        ),
        views=(1, 2, 4),
        recorded={"threads": 1},
        recorded_clips=16,
        recorded_videos=(256, 340),
    ),
}
DRY_RUN = dataclasses.replace(
    SETTINGS["cpu"],
    files=2,
    frames=24,
    height=48,
    width=64,
    data={"frames": 4, "size": 32, "stride": 2},
    turns=1,
    seconds=0.01,
    steps=2,
    loaders=(("pyav", "h264", 30, 1), ("dali-cpu", "vp9", 30, 1)),
    views=(1,),
    recorded={"frames": 4, "size": 32, "stride": 2, "threads": 1},
    recorded_clips=8,
    recorded_videos=(48, 64),
)
"""Settings that run every part on a CPU in seconds."""
ENCODERS: dict[str, tuple[str, str, dict[str, str]]] = {
    "h264": ("mp4", "libx264", {"preset": "veryfast", "crf": "23"}),
    "vp9": ("webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "crf": "30", "b:v": "0"}),
}


def moving_noise(frames: int, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Returns uint8 [T,H,W,3]: coarse noise that drifts, so that the video encoder has motion to code."""
    coarse = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    picture = coarse.repeat(8, 0).repeat(8, 1)[:height, :width]
    return np.stack([np.roll(picture, (t, 2 * t), (0, 1)) for t in range(frames)])


def write_files(folder: Path, codec: str, gop: int, settings: Settings) -> Any:
    """Writes videos with a key frame every `gop` frames; returns their manifest."""
    from mam2.engine.data.manifest import read_manifest

    place = folder / f"{codec}-{gop}"
    place.mkdir()

    def write(number: int) -> None:
        from mam2.engine.data.encoding import encode_frames

        suffix, encoder, options = ENCODERS[codec]
        noise = moving_noise(settings.frames, settings.height, settings.width, np.random.default_rng(number))
        path = place / f"{number:03d}.{suffix}"
        encode_frames(path, noise, encoder, (settings.width, settings.height), gop=gop, options=options)

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, range(settings.files)))
    return read_manifest(place, progress=False)
