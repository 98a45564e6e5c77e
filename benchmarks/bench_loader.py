"""The loader: clips a second from encoded files to uint8 on the device, for each decoder that runs here."""

from __future__ import annotations

import dataclasses
import importlib.util
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

FRONT_ENDS = ("nvdec", "dali-cpu", "pyav")
SETTINGS: dict[str, dict[str, Any]] = {
    "cuda": {"files": 16, "frames": 80, "extent": (256, 340), "batch": 32, "seconds": 6.0, "data": {}},
    "cpu": {
        "files": 4,
        "frames": 24,
        "extent": (48, 64),
        "batch": 4,
        "seconds": 0.5,
        "data": {"frames": 4, "size": 32},
    },
}
SUFFIX = {"nvdec": ".mp4", "dali-cpu": ".webm", "pyav": ".mp4"}
"""H.264 where the decoder takes it; DALI's CPU decoder takes VP9."""


def moving_noise(frames: int, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [T,H,W,3]: coarse noise that drifts, so that the encoder has motion to code."""
    coarse = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    picture = coarse.repeat(8, 0).repeat(8, 1)[:height, :width]
    return np.stack([np.roll(picture, (t, 2 * t), (0, 1)) for t in range(frames)])


def rows(device: torch.device, deadline: float) -> Iterator[dict[str, Any]]:
    """A row for each decoder; says so where a package is missing or the decoder cannot run here."""
    for package in ("av", "nvidia.dali"):
        try:
            missing = importlib.util.find_spec(package) is None
        except ModuleNotFoundError:  # the parent of a dotted name
            missing = True
        if missing:
            yield {"front_end": "all", "verdict": "skipped", "reason": f"{package} is not installed"}
            return
    from mam2.engine.data.manifest import read_manifest
    from mam2.engine.data.synthetic import write_clip

    settings, rng = SETTINGS[device.type], np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for suffix in sorted(set(SUFFIX.values())):
            (Path(folder) / suffix[1:]).mkdir()
            for number in range(settings["files"]):
                clip = moving_noise(settings["frames"], *settings["extent"], rng)
                write_clip(Path(folder) / suffix[1:] / f"{number:03d}{suffix}", clip)
        for front_end in FRONT_ENDS:
            row = {
                "front_end": front_end,
                "files": SUFFIX[front_end][1:],
                "clips_px": settings["data"].get("size", 224),
            }
            manifest = read_manifest(Path(folder) / SUFFIX[front_end][1:], progress=False)
            try:
                yield row | measure(manifest, front_end, settings, device, deadline)
            except Exception as problem:
                yield row | {"verdict": "skipped", "reason": str(problem)[:300]}


def measure(
    manifest: Any, front_end: str, settings: dict[str, Any], device: torch.device, deadline: float
) -> dict[str, Any]:
    """Clips and decoded frames a second once the batches prepared ahead are used up."""
    from mam2.engine.config import load_recipe
    from mam2.engine.data.decoding import available_cores
    from mam2.engine.data.loader import ClipLoader

    data = dataclasses.replace(load_recipe("mam2-fast").data, front_end=front_end, **settings["data"])
    with ClipLoader(manifest, data, batch=settings["batch"], device=device, seed=0) as loader:
        stream = loader.stream()
        for _ in range(data.prefetch + 2):
            next(stream)
        start, before, batches = time.perf_counter(), loader.decoded_frames, 0
        while time.perf_counter() - start < settings["seconds"] and time.monotonic() < deadline:
            next(stream)
            batches += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        if not batches or loader.skipped:
            return {"verdict": "failed", "reason": f"{batches} batches; unusable: {loader.skipped[:1]}"}
        return {
            "clips_per_s": batches * settings["batch"] / seconds,
            "frames_per_s": (loader.decoded_frames - before) / seconds,
            "cores": available_cores(),
        }
