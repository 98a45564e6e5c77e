"""Which clip and which crops a step sees: pure functions of (seed, step), so any rank can start anywhere.

Every draw comes from Philox, a counter-based generator, keyed by what is drawn. No draw depends on an earlier one:
a resumed run, another number of threads or ranks, or a skipped file changes nothing else.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mam2.engine.config import DataConfig
from mam2.engine.data.manifest import Video

CROP_TRIES = 10
_ORDER, _CLIP, _REPLACEMENT = range(3)


class View(NamedTuple):
    """A crop of the frame as it is shown: corners as shares of its width and height, 0 to 1, mirrored or not."""

    x0: float
    y0: float
    x1: float
    y1: float
    flip: bool


@dataclass(frozen=True)
class ClipRequest:
    """Frames start, start + stride, … of a video, by its place in the manifest, seen in one or more crops."""

    video: int
    start: int
    stride: int
    views: tuple[View, ...]


def sample_at(counter: int, n: int, seed: int) -> tuple[int, int]:
    """Epoch and video (0 to n - 1) of the sample `counter` of an endless stream of shuffled passes over n videos.

    The stream runs on over the end of a pass, so no batch is ever short and no video is ever left out.
    """
    epoch, place = divmod(counter, n)
    return epoch, int(_order(n, seed, epoch)[place])


def replacement(video: int, n: int, epoch: int, seed: int, attempt: int) -> int:
    """The video (0 to n - 1) shown instead of one that cannot be decoded, at the attempt 1, 2, …"""
    return int(_generator(_REPLACEMENT, seed, epoch, video, attempt).integers(n))


def draw_clip(
    index: int, video: Video, epoch: int, config: DataConfig, seed: int, *, train: bool = True, attempt: int = 0
) -> ClipRequest:
    """A random clip with `config.views` random resized crops; with train=False the middle clip, its centre square.

    Clips lie evenly over the whole video. In one shorter than the clip the start is 0; decoding repeats its last frame.
    """
    spare = max(video.frames - ((config.frames - 1) * config.stride + 1), 0)
    width, height = video.shown_size
    if not train:
        return ClipRequest(index, spare // 2, config.stride, (_centre_crop(width, height, 1.0),))
    generator = _generator(_CLIP, seed, epoch, index, attempt)
    start = int(generator.integers(spare + 1))
    views = tuple(_random_view(generator, width, height, config) for _ in range(config.views))
    return ClipRequest(index, start, config.stride, views)


def _random_view(generator: np.random.Generator, width: int, height: int, config: DataConfig) -> View:
    """Random resized crop, area uniform, aspect ratio log-uniform; a centre crop if none fits in ten tries."""
    flip = bool(generator.random() < 0.5) and config.flip
    limit = math.log(config.max_aspect)
    for _ in range(CROP_TRIES):
        area = generator.uniform(config.min_area, config.max_area)
        shape = math.exp(generator.uniform(-limit, limit)) * height / width
        wide, high = math.sqrt(area * shape), math.sqrt(area / shape)
        if wide <= 1 and high <= 1:
            x, y = generator.random() * (1 - wide), generator.random() * (1 - high)
            return View(x, y, x + wide, y + high, flip)
    return _centre_crop(width, height, config.max_aspect)._replace(flip=flip)


def _centre_crop(width: int, height: int, max_aspect: float) -> View:
    """The largest centre crop with an aspect ratio from 1/max_aspect to max_aspect."""
    wide, high = min(1.0, height * max_aspect / width), min(1.0, width * max_aspect / height)
    return View((1 - wide) / 2, (1 - high) / 2, (1 + wide) / 2, (1 + high) / 2, False)


@functools.lru_cache(maxsize=4)
def _order(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return _generator(_ORDER, seed, epoch).permutation(n)


def _generator(purpose: int, seed: int, epoch: int, video: int = 0, attempt: int = 0) -> np.random.Generator:
    # The first counter word is Philox's own: it counts the numbers drawn here.
    counter = np.array([0, epoch, video, attempt], np.uint64)
    return np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, purpose], np.uint64), counter=counter))
