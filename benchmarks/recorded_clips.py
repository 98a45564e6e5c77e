"""Rows of the loader benchmark for recorded clips: read instead of decoding the videos, in turns with decoding them.

python -m benchmarks.recorded_clips     # only these rows
"""

from __future__ import annotations

import dataclasses
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.loader_settings import (
    CODES,
    SETTINGS,
    TOLERANCE,
    Row,
    Settings,
    Unmeasured,
    write_files,
)
from benchmarks.report import table
from benchmarks.timing import percentile

COLUMNS = (
    *("decoder", "files", "threads", "ratio_to_decoding", "ratio_of_processor_time", "kb_per_clip", "psnr_db"),
    "clips_per_s",
)


def recorded_rows(
    folder: Path, settings: Settings, device: torch.device, deadline: float, data: Path | None = None
) -> Iterator[Row]:
    """Yields a row for decoding videos and one per way of storing recorded clips, measured in turns.

    Ratios are of clips per second, and of processor time per clip, which other programs of the machine do not change.
    data: videos; None: synthetic ones. Raises Unmeasured if the clips are not those of the videos.
    """
    from mam2.engine.config.recipe import load_recipe
    from mam2.engine.data.manifest import read_manifest

    label: Row = {"files": "own" if data else "h264", "threads": settings.recorded.get("threads") or "one per core"}
    if time.monotonic() > deadline:
        yield label | {"decoder": "recorded clips", "verdict": "skipped", "reason": "out of time"}
        return
    config = load_recipe("mam2-fast")
    options = dataclasses.replace(config.data, recorded=1, **settings.recorded)
    config = dataclasses.replace(config, data=options)
    if data:
        manifest = read_manifest(data, progress=False)
    else:
        height, width = settings.recorded_videos
        (folder / "recorded").mkdir()
        larger = dataclasses.replace(settings, height=height, width=width)
        manifest = write_files(folder / "recorded", "h264", 30, larger)
    caches = {coding: record(folder / coding, manifest, config, coding, settings, device) for coding in ("jpeg", "raw")}
    sources = {"decoded": None} | {coding: cache.clips for coding, cache in caches.items()}
    clips, rates = {}, {coding: ([], []) for coding in sources}
    for _ in range(settings.turns):
        for coding, source in sources.items():
            clips[coding], rate, processor_ms = one_pass(manifest, options, settings, device, source)
            rates[coding][0].append(rate)
            rates[coding][1].append(processor_ms)
    medians = {coding: [percentile(found, 50) for found in both] for coding, both in rates.items()}
    for coding, source in sources.items():
        squared = float((clips[coding].float() - clips["decoded"].float()).square().mean())
        if squared > (TOLERANCE**2 if coding == "jpeg" else 0):
            raise Unmeasured("wrong", f"{coding} clips differ from the decoded ones by {squared**0.5:.1f} gray levels")
        rate, processor_ms = medians[coding]
        row = {
            "decoder": f"recorded clips, {coding}" if source else "videos of recorded clips",
            "ratio_to_decoding": rate / medians["decoded"][0],
            "ratio_of_processor_time": medians["decoded"][1] / processor_ms,
            **({"clips_per_s": rate} if device.type == "cuda" else {}),
        }
        if source:
            row["kb_per_clip"] = source.bytes / (1000 * len(manifest.videos))
        if squared:
            row["psnr_db"] = 10 * math.log10(255**2 / squared)
        yield label | row


def one_pass(
    manifest: Any, data: Any, settings: Settings, device: torch.device, source: Any
) -> tuple[torch.Tensor, float, float]:
    """Loads CLIPS clips; returns the first batch, clips per second, and processor time per clip in milliseconds.

    source: recorded clips; None: decode the videos.
    """
    from mam2.engine.data.loader import ClipLoader

    with ClipLoader(manifest, data, batch=settings.batch, device=device, seed=0) as loader:
        if source:
            loader.fetch_clips(source)
        places = [(0, number % len(manifest.videos)) for number in range(settings.recorded_clips)]
        next(iter(loader.recorded(places[: settings.batch])))  # builds graphs and filters
        start, processor = time.perf_counter(), time.process_time()
        batches = [batch.clip for batch in loader.recorded(places)]
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds, processor = time.perf_counter() - start, time.process_time() - processor
        if loader.skipped:
            raise Unmeasured("failed", f"unusable: {loader.skipped[0]}")
    return batches[0].cpu(), len(places) / seconds, 1000 * processor / len(places)


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


def main() -> None:
    data = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        found = list(recorded_rows(Path(folder), SETTINGS[device.type], device, math.inf, data))
    print(table(found, COLUMNS))


if __name__ == "__main__":
    main()
