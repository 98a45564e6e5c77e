"""Draws the clips and crops of a step: pure functions of (seed, step), so that any rank can start at any step.

Every draw comes from Philox, a counter-based generator, with a key that names the draw. No draw depends on an earlier
one: a resumed run, another number of threads or ranks, or a skipped file does not change any other draw.

VideoMAE's options: `--num_frames` is data.frames, `--sampling_rate` is data.stride, `--input_size` is data.size; its
GroupMultiScaleCrop is data.crop = "multi-scale" without mirroring (data.flip = false). Its pre-training samples
densely; the segments by which it samples SSv2 in fine-tuning are data.sampling = "uniform".
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mam2.engine.config.training import DataConfig
from mam2.engine.data.draws import Draw, generator_of
from mam2.engine.data.manifest import Video
from mam2.engine.errors import UserError

CROP_TRIES = 10
CROP_MARGIN = 1.4
"""Ratio of a crop's to the clip's pixels that a pre-scaled frame must keep for the second resampling."""
_SCALES = (1.0, 0.875, 0.75, 0.66)
CROP_SCALES = [(wide, high) for i, high in enumerate(_SCALES) for wide in _SCALES[max(i - 1, 0) : i + 2]]
"""Width and height of a multi-scale crop over the shorter side: at most one step apart (`max_distort` = 1)."""
CROP_PLACES = [
    *((x, y) for x in (0.0, 0.5, 1.0) for y in (0.0, 0.5, 1.0)),
    *((x, y) for x in (0.25, 0.75) for y in (0.25, 0.75)),
]
"""Position of a multi-scale crop in the free space: corners, edges, center, quarters (`fix_crop`, `more_fix_crop`)."""


class View(NamedTuple):
    """A crop of the displayed frame: corners as fractions of its width and height, 0 to 1, mirrored or not."""

    x0: float
    y0: float
    x1: float
    y1: float
    flip: bool


@dataclass(frozen=True)
class ClipRequest:
    """T frames of a video, given by its index in the manifest, in one or more crops."""

    video: int
    frames: tuple[int, ...]
    """Ascending frame numbers. They may repeat and exceed the end: decoding then repeats the last frame."""
    views: tuple[View, ...]


def least_size(views: Sequence[View], size: int) -> tuple[float, float]:
    """The frame width and height at which every crop is at least CROP_MARGIN times as wide and high as a clip."""
    wanted = CROP_MARGIN * size
    return wanted / min(view.x1 - view.x0 for view in views), wanted / min(view.y1 - view.y0 for view in views)


def sample_at(counter: int, n: int, seed: int) -> tuple[int, int]:
    """Returns epoch and video (0 to n - 1) of sample `counter` in an endless stream of shuffled passes over n videos.

    A batch may span the end of a pass, so that no batch is short and no video is left out.
    """
    epoch, place = divmod(counter, n)
    return epoch, int(_order(n, seed, epoch)[place])


def replacement(video: int, n: int, epoch: int, seed: int, attempt: int) -> int:
    """Draws the video (0 to n - 1) that replaces one that cannot be decoded, at attempt 1, 2, …"""
    return int(generator_of(Draw.REPLACEMENT, seed, epoch, video, attempt).integers(n))


def draw_clip(
    index: int, video: Video, epoch: int, config: DataConfig, seed: int, *, train: bool = True, attempt: int = 0
) -> ClipRequest:
    """Draws a random clip in `config.views` random crops.

    With train=False returns the center square of the middle clip. Dense clips start uniformly over the whole video; in
    a video shorter than the clip they start at frame 0. With `config.recorded` the epochs repeat that many draws, also
    if the video replaces another one (attempt > 0), so that cached codes can be found.
    """
    width, height = video.shown_size
    if not train:
        return ClipRequest(index, _frames(video, config, None), (_center_crop(width, height, 1.0),))
    if config.recorded:
        epoch, attempt = epoch % config.recorded, 0
    generator = generator_of(Draw.CLIP, seed, epoch, index, attempt)
    frames = _frames(video, config, generator)
    crop = _multi_scale_crop if config.crop == "multi-scale" else _random_resized_crop
    views = []
    for _ in range(config.views):
        flip = bool(generator.random() < 0.5) and config.flip
        views.append(crop(generator, width, height, config)._replace(flip=flip))
    return ClipRequest(index, frames, tuple(views))


def frame_step(video: Video, config: DataConfig) -> float:
    """Returns the distance of two sampled frames of a dense clip, in frames of the file.

    With `config.fps` it is computed from the file's average rate, also for a variable rate: the frames per second are
    then right on average, not between single frames. Raises UserError for a file without a known rate.
    """
    if not config.fps:
        return config.stride
    if not video.fps:
        raise UserError(f"{video.path}: no frame rate is known, so data.fps cannot be met; use data.stride")
    return video.fps / config.fps


def _frames(video: Video, config: DataConfig, generator: np.random.Generator | None) -> tuple[int, ...]:
    """Returns the frame numbers of a random clip; without a generator those of the middle clip."""
    count = config.frames
    if config.sampling == "uniform":
        # Temporal segment networks: T equal parts of the video, one frame per part; a short video may have empty parts.
        part = video.frames / count
        if generator is None:
            return tuple(int(part / 2 + part * k) for k in range(count))
        first = [int(part * k) for k in range(count)]
        beyond = [max(int(part * (k + 1)), first[k] + 1) for k in range(count)]
        return tuple(generator.integers(first, beyond).tolist())
    step = frame_step(video, config)
    offsets = [round(k * step) for k in range(count)]
    spare = max(video.frames - 1 - offsets[-1], 0)
    start = spare // 2 if generator is None else int(generator.integers(spare + 1))
    return tuple(start + offset for offset in offsets)


def _random_resized_crop(generator: np.random.Generator, width: int, height: int, config: DataConfig) -> View:
    """Draws a crop with uniform area and log-uniform aspect ratio; returns a center crop if none of ten fits."""
    limit = math.log(config.max_aspect)
    for _ in range(CROP_TRIES):
        area = generator.uniform(config.min_area, config.max_area)
        shape = math.exp(generator.uniform(-limit, limit)) * height / width
        wide, high = math.sqrt(area * shape), math.sqrt(area / shape)
        if wide <= 1 and high <= 1:
            x, y = generator.random() * (1 - wide), generator.random() * (1 - high)
            return View(x, y, x + wide, y + high, False)
    return _center_crop(width, height, config.max_aspect)


def _multi_scale_crop(generator: np.random.Generator, width: int, height: int, config: DataConfig) -> View:
    """Draws VideoMAE's `GroupMultiScaleCrop`.

    Two adjacent (or equal) scales of the shorter side, one of 13 positions.
    """
    wide_scale, high_scale = CROP_SCALES[generator.integers(len(CROP_SCALES))]
    x_share, y_share = CROP_PLACES[generator.integers(len(CROP_PLACES))]
    side = min(width, height)
    wide, high = side * wide_scale / width, side * high_scale / height
    x, y = x_share * (1 - wide), y_share * (1 - high)
    return View(x, y, x + wide, y + high, False)


def middle_square(video: Video) -> View:
    """The largest square in the middle of a video's frames."""
    return _center_crop(*video.shown_size, 1.0)


def _center_crop(width: int, height: int, max_aspect: float) -> View:
    """Returns the largest center crop with an aspect ratio from 1/max_aspect to max_aspect."""
    wide, high = min(1.0, height * max_aspect / width), min(1.0, width * max_aspect / height)
    return View((1 - wide) / 2, (1 - high) / 2, (1 + wide) / 2, (1 + high) / 2, False)


def shuffled(n: int, seed: int, epoch: int, part: int = 0) -> NDArray[np.int64]:
    """Returns the order of n videos in a pass, int64 [n]. part: number of their data set in a weighted mixture."""
    return generator_of(Draw.ORDER, seed, epoch, part).permutation(n)


_order = functools.lru_cache(maxsize=4)(shuffled)
