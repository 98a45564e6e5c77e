"""Loaders with small settings and damaged videos, for the tests of the loader."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import torch

from mam2.engine.config.training import DataConfig
from mam2.engine.data.loader import ClipLoader
from mam2.engine.data.manifest import Manifest

CONFIG = DataConfig(frames=4, stride=2, size=32, threads=2)


def open_loader(videos: Manifest, config: DataConfig = CONFIG, batch: int = 4, **options) -> ClipLoader:
    return ClipLoader(videos, config, **{"batch": batch, "device": "cpu", "seed": 5, **options})


def take(videos: Manifest, steps: int, config: DataConfig = CONFIG, *, first_step: int = 0, **options):
    with open_loader(videos, config, **options) as clips:
        return list(itertools.islice(clips.stream(first_step), steps))


def assert_same(one, other) -> None:
    for name in ("clip", "index", "label", "augmentation", "view", "box", "flip"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def damaged(videos: Manifest, folder: Path, *numbers: int) -> Manifest:
    """Returns a scanned manifest with some of its files replaced by noise; it still lists them as usable."""
    changed = list(videos.videos)
    for number in numbers:
        path = folder / f"damaged {number}.mp4"
        path.write_bytes(np.random.default_rng(number).bytes(3000))
        changed[number] = dataclasses.replace(changed[number], path=str(path))
    return dataclasses.replace(videos, videos=tuple(changed))
