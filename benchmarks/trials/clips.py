"""The synthetic motion classes made hard: moving camera, flicker, strong compression, and a tint that gives the class
away in the training clips alone.

A shape moves before a textured background as in `mam2.engine.data.synthetic`; the class is its motion relative to the
background. In `NUISANCE` of the training clips the background has its class's tint, in all others, and in all
validation and test clips, one drawn at random: what reads the tint does well on the training clips only.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mam2.engine.data.synthetic import (
    FRAMES,
    MOTIONS,
    SHAPES,
    SIZE,
    as_pixels,
    bright_colour,
    draw_coverage,
    write_clips,
)

STREAMS = {"train": 10, "validation": 11, "test": 12}
NUISANCE = 0.3
"""Share of the training clips whose tint is their class's."""
WAVES = 6
"""Of a background's texture."""


def render_hard_clip(motion: str, split: str, rng: np.random.Generator, *, size: int = SIZE) -> np.ndarray:
    """One clip of a motion: uint8 [FRAMES, size, size, 3], RGB."""
    shape = SHAPES[rng.integers(len(SHAPES))]
    tint = rng.uniform(0, 1)
    if split == "train" and rng.uniform() < NUISANCE:
        tint = (MOTIONS.index(motion) + rng.uniform(0.25, 0.75)) / len(MOTIONS)
    camera = _camera(rng)
    background = _texture(camera, rng, size) * _hue(tint)
    coverage = draw_coverage(motion, shape, rng, camera=camera, size=size)
    clip = background * (1 - coverage) + bright_colour(rng) * coverage
    flicker = 1 + 0.08 * rng.standard_normal((FRAMES, 1, 1, 1))
    return as_pixels(clip * np.clip(flicker, 0.7, 1.3))


def _camera(rng: np.random.Generator) -> np.ndarray:
    """A steady pan in a random direction with a shake on it: [FRAMES, 2] pixels of a frame of SIZE."""
    angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(0, 24)
    pan = np.linspace(-0.5, 0.5, FRAMES)[:, None] * distance * np.array([np.cos(angle), np.sin(angle)])
    return pan + rng.normal(0, 0.2, size=(FRAMES, 2))


def _texture(camera: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    """Waves that repeat after SIZE pixels, shifted with the camera: [FRAMES, size, size, 1], 0 to 0.4."""
    y, x = np.mgrid[:size, :size] * (SIZE / size)
    total = np.zeros((FRAMES, size, size))
    for _ in range(WAVES):
        # whole numbers of waves a frame: what leaves on one side comes back on the other
        across, down = rng.integers(-3, 4, size=2)
        shifted = across * (x - camera[:, 0, None, None]) + down * (y - camera[:, 1, None, None])
        total += np.cos(2 * np.pi * shifted / SIZE + rng.uniform(0, 2 * np.pi))
    return (0.2 + 0.2 * np.tanh(total / 2))[..., None]


def _hue(tint: float) -> np.ndarray:
    """RGB of a hue, 0 to 1 around the circle, of middling saturation."""
    return 0.7 + 0.3 * np.cos(2 * np.pi * (tint - np.array([0, 1, 2]) / 3))


def _render(size: int, split: str, motion: str, index: int) -> tuple[np.ndarray, int]:
    rng = np.random.default_rng([0, STREAMS[split], index])
    return render_hard_clip(motion, split, rng, size=size), int(rng.integers(20, 34))


def write_hard_dataset(folder: Path, counts: Mapping[str, int], *, size: int = SIZE) -> None:
    """Writes `folder/<split>/<motion>/*`, frames of size² pixels; see `mam2.engine.data.synthetic.write_clips`."""
    write_clips(folder, counts, functools.partial(_render, size))
