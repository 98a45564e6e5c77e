"""Times the codes of a batch: milliseconds per clip from the tokenizer in the step, and from a cache."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import elapsed_ms, summary
from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.config.recipe import load_recipe
from mam2.engine.data.batch import channels_first
from mam2.engine.runtime.device import compiler
from mam2.engine.tokenizer.compiled import compiled_network
from mam2.engine.tokenizer.tokenizer import Tokenizer
from mam2.engine.tokenizer.vqgan import CONFIGS, VQGAN, small

MODELS = {"cuda": ("gumbel-f8-8192", "f16-1024"), "cpu": ("small",)}
"""The method's default first, because a time limit cuts off the end."""
BATCH = {"cuda": 64, "cpu": 4}
SIZE = {"cuda": 224, "cpu": 64}
VIDEOS = {"cuda": 4096, "cpu": 256}
SMALL = small(32, 1024, 16)
"""A tokenizer of the size that a run trains by default."""
CACHE_NEEDS = ("av", "tqdm")
"""Packages that the code cache imports."""


def rows(device: torch.device, deadline: float) -> Iterator[dict[str, Any]]:
    """Yields rows per tokenizer, online (on a GPU also in CUDA graphs) and cached.

    Random weights, random codes, the clips of `mam2-fast`.
    """
    config = load_recipe("mam2-fast")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, recorded=1, size=SIZE[device.type]))
    for name in MODELS[device.type]:
        row = {"tokenizer": name, "batch": BATCH[device.type], "clip_px": config.data.size}
        if time.monotonic() > deadline:
            yield row | {"verdict": "skipped", "reason": "out of time"}
            continue
        vqgan = VQGAN(CONFIGS.get(name, SMALL)).to(device)
        yield row | {"codes": "online"} | measure_online(vqgan, config, device)
        if device.type == "cuda":  # as in a run, where they are queued next to a step
            yield row | {"codes": "online, in CUDA graphs"} | measure_online(vqgan, config, device, captured=True)
        missing = [package for package in CACHE_NEEDS if importlib.util.find_spec(package) is None]
        if missing:
            yield row | {"codes": "cached", "verdict": "skipped", "reason": f"not installed: {', '.join(missing)}"}
        else:
            yield row | {"codes": "cached", **measure_cached(vqgan.config.codes, config, device)}


def measure_online(
    vqgan: VQGAN, config: PretrainConfig, device: torch.device, *, captured: bool = False
) -> dict[str, Any]:
    """Returns milliseconds per clip for the tokenizer, compiled and in bfloat16 on a GPU, and those of the host."""
    precision = "bfloat16" if device.type == "cuda" else "float32"
    compiled: Any = compiler(config.run, device)[0] if device.type == "cuda" else None
    if captured:
        compiled = functools.partial(compiled_network, run=config.run, device=device, info=print)
    tokenizer = Tokenizer(vqgan, config.grid, precision, compiled=compiled)  # type: ignore[arg-type]
    extent = (BATCH[device.type], config.data.frames, config.data.size, config.data.size, 3)
    video = channels_first(torch.randint(0, 256, extent, dtype=torch.uint8, device=device))
    found = _ms_per_clip(lambda: tokenizer.codes(video), device)
    began = time.perf_counter()
    tokenizer.codes(video)
    host_ms = 1000 * (time.perf_counter() - began) / len(video)
    return {"precision": precision, **found, "host_ms_per_clip": host_ms}


def measure_cached(codes: int, config: PretrainConfig, device: torch.device) -> dict[str, Any]:
    """Returns milliseconds per clip to read codes of random clips to the device; the files are in the page cache."""
    from mam2.engine.data.manifest import Manifest, Video
    from mam2.engine.tokenizer.cache import CodeCache, CodeCacheWriter

    videos = VIDEOS[device.type]
    manifest = Manifest(tuple(Video(f"{n}.mp4", -1, 300, 340, 256, "h264", 30.0, 0) for n in range(videos)))
    tokens = config.grid[0] * config.grid[1] * config.grid[2]
    with tempfile.TemporaryDirectory() as folder:
        writer = CodeCacheWriter(
            folder, manifest, config, tokenizer="random", codebook_size=codes, precision="float32", progress=False
        )
        places = torch.arange(videos)
        for part in places.split(256):
            none = torch.zeros_like(part)
            writer.add(part, none, none, torch.randint(codes, (len(part), tokens)))
        writer.finish()
        cache = CodeCache(Path(folder), progress=False)

        def read() -> Tensor:
            chosen = torch.randint(videos, (BATCH[device.type],))
            none = torch.zeros_like(chosen)
            return cache.codes(chosen, none, none).to(device)

        return _ms_per_clip(read, device)


def _ms_per_clip(run: Any, device: torch.device) -> dict[str, float]:
    for _ in range(3):
        run()
    timing = summary([elapsed_ms(run, device) / BATCH[device.type] for _ in range(10)])
    return {"median_ms_per_clip": timing.median_ms, "p20_ms": timing.p20_ms, "p80_ms": timing.p80_ms}
