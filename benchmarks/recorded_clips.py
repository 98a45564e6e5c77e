"""Rows of the loader benchmark for recorded clips: read instead of decoding the videos, in turns with decoding them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_loader import CODES, TOLERANCE, Row, Settings, Unmeasured, clips_per_s, first_clips, write_files
from benchmarks.timing import percentile


def recorded_rows(folder: Path, settings: Settings, device: torch.device, deadline: float) -> Iterator[Row]:
    """Yields a row for decoding videos and one per way of storing recorded clips, measured in turns.

    Raises Unmeasured if the clips are not those of the videos.
    """
    from mam2.engine.config.recipe import load_recipe

    label: Row = {"files": "h264", "gop": 30, "threads": settings.recorded.get("threads") or "one per core"}
    if time.monotonic() > deadline:
        yield label | {"front_end": "recorded clips", "verdict": "skipped", "reason": "out of time"}
        return
    config = load_recipe("mam2-fast")
    data = dataclasses.replace(config.data, recorded=1, **settings.recorded)
    config = dataclasses.replace(config, data=data)
    height, width = settings.recorded_videos
    (folder / "recorded").mkdir()
    larger = dataclasses.replace(settings, height=height, width=width)
    manifest = write_files(folder / "recorded", "h264", 30, larger)
    caches = {coding: record(folder / coding, manifest, config, coding, settings, device) for coding in ("jpeg", "raw")}
    clips = {coding: cache.clips for coding, cache in caches.items()} | {"": None}
    expected = first_clips(manifest, data, settings, device).float()
    for coding, source in clips.items():
        difference = float((first_clips(manifest, data, settings, device, source).float() - expected).abs().mean())
        if difference > (TOLERANCE if coding == "jpeg" else 0):
            raise Unmeasured("wrong", f"{coding} clips differ from the decoded ones by {difference:.1f} gray levels")
    rates: dict[str, list[float]] = {coding: [] for coding in clips}
    for _ in range(settings.turns):
        for coding, source in clips.items():
            rates[coding].append(clips_per_s(manifest, data, settings, device, source))
    medians = {coding: percentile(found, 50) for coding, found in rates.items()}
    for coding, source in clips.items():
        rated = {"clips_per_s": medians[coding]} if device.type == "cuda" else {}
        row = label | rated | {"ratio_to_decoding": medians[coding] / medians[""]}
        if source is None:
            yield row | {"front_end": "videos of recorded clips, decoded"}
        else:
            size = source.bytes / (1000 * len(manifest.videos))
            yield row | {"front_end": f"recorded clips, {coding}", "files": "", "gop": "", "kb_per_clip": size}


def record(folder: Path, manifest: Any, config: Any, coding: Any, settings: Settings, device: torch.device) -> Any:
    """Writes one augmentation of every video with random codes; returns the opened cache."""
    from mam2.engine.data.loader import ClipLoader
    from mam2.engine.tokenizer.cache import CodeCache, CodeCacheWriter
    from mam2.engine.tokenizer.clip_files import ClipFormat

    data, slots = config.data, config.grid
    form = ClipFormat(coding, (data.frames, data.size, data.size, data.channels), "uint8")
    options = {"tokenizer": "", "codebook_size": CODES, "precision": "float32", "clips": form, "progress": False}
    with (
        CodeCacheWriter(folder, manifest, config, **options) as writer,
        ClipLoader(manifest, data, batch=settings.batch, device=device, seed=config.run.seed) as loader,
    ):
        for batch in loader.recorded(writer.missing()):
            codes = torch.randint(CODES, (len(batch.clip), slots[0] * slots[1] * slots[2]))
            images = [form.encode(clip) for clip in batch.clip.cpu().numpy()]
            writer.add(batch.index, batch.augmentation, batch.view, codes, images)
        writer.finish()
    return CodeCache(folder, progress=False)
