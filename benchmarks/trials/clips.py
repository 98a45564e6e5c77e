"""The synthetic motion classes made hard: moving camera, flicker, strong compression, and a tint that gives the class
away in the training clips alone.

A shape moves before a textured background as in `mam2.engine.data.synthetic`; the class is its motion relative to the
background. In `NUISANCE` of the training clips the background has its class's tint, in all others, and in all
validation and test clips, one drawn at random: what reads the tint does well on the training clips only.

What a clip shows is known as well, and independent of the motion: the shape, its color and the background's texture.
`write_hard_dataset` writes these labels to FOLDER/labels.csv.
"""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mam2.engine.data.synthetic import (
    FRAMES,
    MOTIONS,
    SHAPES,
    SIZE,
    as_pixels,
    bright_color,
    clip_paths,
    draw_coverage,
    write_clips,
)
from mam2.engine.files import write_whole

STREAMS = {"train": 10, "validation": 11, "test": 12}
NUISANCE = 0.3
"""Share of the training clips whose tint is their class's."""
WAVES = 6
"""Number of waves in the texture of a background."""
COLORS = ("red", "green", "blue")
TEXTURES = {"coarse": 7.0, "medium": 9.0, "fine": np.inf}
"""Mean squared wave number of a background's waves below which its texture has this name: about a third each."""
LABELS = "labels.csv"


class Looks(NamedTuple):
    """What a clip shows, apart from its motion."""

    shape: str
    color: str
    """Channel in which the shape is brightest."""
    texture: str


def render_hard_clip(motion: str, split: str, rng: np.random.Generator, *, size: int = SIZE) -> np.ndarray:
    """One clip of a motion: uint8 [FRAMES, size, size, 3], RGB."""
    return render_with_looks(motion, split, rng, size=size)[0]


def render_with_looks(
    motion: str, split: str, rng: np.random.Generator, *, size: int = SIZE
) -> tuple[np.ndarray, Looks]:
    """`render_hard_clip` with what the clip shows, which does not depend on `size`."""
    shape = SHAPES[rng.integers(len(SHAPES))]
    tint = rng.uniform(0, 1)
    if split == "train" and rng.uniform() < NUISANCE:
        tint = (MOTIONS.index(motion) + rng.uniform(0.25, 0.75)) / len(MOTIONS)
    camera = _camera(rng)
    texture, fineness = _texture(camera, rng, size)
    coverage = draw_coverage(motion, shape, rng, camera=camera, size=size)
    color = bright_color(rng)
    clip = texture * _hue(tint) * (1 - coverage) + color * coverage
    flicker = 1 + 0.08 * rng.standard_normal((FRAMES, 1, 1, 1))
    name = next(name for name, bound in TEXTURES.items() if fineness < bound)
    looks = Looks(shape, COLORS[int(color.argmax())], name)
    return as_pixels(clip * np.clip(flicker, 0.7, 1.3)), looks


def _camera(rng: np.random.Generator) -> np.ndarray:
    """A steady pan in a random direction with a shake on it: [FRAMES, 2] pixels of a frame of SIZE."""
    angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(0, 24)
    pan = np.linspace(-0.5, 0.5, FRAMES)[:, None] * distance * np.array([np.cos(angle), np.sin(angle)])
    return pan + rng.normal(0, 0.2, size=(FRAMES, 2))


def _texture(camera: np.ndarray, rng: np.random.Generator, size: int) -> tuple[np.ndarray, float]:
    """Waves that repeat after SIZE pixels, shifted with the camera: [FRAMES, size, size, 1], 0 to 0.4; and the mean of
    their squared wave numbers, in waves per frame."""
    y, x = np.mgrid[:size, :size] * (SIZE / size)
    total = np.zeros((FRAMES, size, size))
    squares = 0
    for _ in range(WAVES):
        # whole numbers of waves a frame: what leaves on one side comes back on the other
        across, down = rng.integers(-3, 4, size=2)
        squares += int(across**2 + down**2)
        shifted = across * (x - camera[:, 0, None, None]) + down * (y - camera[:, 1, None, None])
        total += np.cos(2 * np.pi * shifted / SIZE + rng.uniform(0, 2 * np.pi))
    return (0.2 + 0.2 * np.tanh(total / 2))[..., None], squares / WAVES


def _hue(tint: float) -> np.ndarray:
    """RGB of a hue, 0 to 1 around the circle, of middling saturation."""
    return 0.7 + 0.3 * np.cos(2 * np.pi * (tint - np.array([0, 1, 2]) / 3))


def _generator(split: str, index: int) -> np.random.Generator:
    return np.random.default_rng([0, STREAMS[split], index])


def _render(size: int, split: str, motion: str, index: int) -> tuple[np.ndarray, int]:
    rng = _generator(split, index)
    return render_hard_clip(motion, split, rng, size=size), int(rng.integers(20, 34))


def write_hard_dataset(folder: Path, counts: Mapping[str, int], *, size: int = SIZE) -> None:
    """Writes `folder/<split>/<motion>/*`, frames of size² pixels, see `mam2.engine.data.synthetic.write_clips`; and
    `folder/labels.csv`, what each clip shows: columns path, shape, color, texture."""
    write_clips(folder, counts, functools.partial(_render, size))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("path", *Looks._fields))
    for path, split, motion, index in clip_paths(folder, counts):
        looks = render_with_looks(motion, split, _generator(split, index), size=2)[1]
        table.writerow((path.relative_to(folder).as_posix(), *looks))
    write_whole(folder / LABELS, text.getvalue())
