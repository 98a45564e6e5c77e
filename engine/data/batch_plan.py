"""The plan of a loader's batches: which samples, drawn by which rules, decoded in which chunks."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from mam2.engine.data.manifest import Manifest
from mam2.engine.data.renderer import Job
from mam2.engine.data.sample_order import SampleOrder
from mam2.engine.data.sampling import ClipRequest
from mam2.engine.data.video import Video
from mam2.engine.errors import UserError

BatchPlan = tuple[int, list[tuple[int, int]]]
"""A step and its samples: epoch and index among the usable videos."""


@dataclass(frozen=True)
class DrawRules:
    """How planned samples become clips."""

    draw: Callable[[int, Video, int, int], ClipRequest]
    """Draws a clip from the index in the manifest, the video, the epoch and the attempt."""
    views: int
    replace: bool
    """Replace a video that cannot be decoded by another one, instead of leaving it out."""
    period: int = 0
    """Number of recorded augmentations; 0: every epoch draws new ones."""


@dataclass(frozen=True)
class PlannedSample:
    """A clip being prepared."""

    epoch: int
    place: int
    """Index among the usable videos, from the order of the epoch; a replacement does not change it."""
    attempt: int
    job: Job


@dataclass(frozen=True)
class Chunk:
    """Samples of one batch that are decoded and resized together."""

    step: int
    clip: torch.Tensor
    """The batch, uint8 [S, R, T, H, W, C] of S samples and R views; its chunks share it."""
    shown: list[PlannedSample | None]
    """For each sample of the batch, the one that was finally decoded; None if it was left out."""
    samples: list[PlannedSample]
    last: bool


def order_of(manifest: Manifest, usable: list[int], weights: Sequence[float], seed: int) -> SampleOrder:
    """Returns the order of the samples in training. Raises UserError if no video of a data set has a decoder."""
    if weights and len(weights) != len(manifest.sets):
        raise UserError(
            f"data.weights: expected one number per data set, {len(manifest.sets) or 1}; found {len(weights)}"
        )
    ends = list(itertools.accumulate(each.videos for each in manifest.sets)) or [len(manifest.videos)]
    places = [bisect_left(usable, end) for end in ends]
    sizes = [place - before for place, before in zip(places, [0, *places], strict=False)]
    if 0 in sizes:
        raise UserError(f"{manifest.sets[sizes.index(0)].source}: none of its videos can be decoded here")
    return SampleOrder(sizes, weights, seed)


def in_batches(samples: Iterator[tuple[int, int]], size: int) -> Iterator[BatchPlan]:
    """Yields the plans of batches of `size` given samples, the last of which may be short."""
    return enumerate(iter(lambda: list(itertools.islice(samples, size)), []))


def for_all_views(values: list[int], views: int) -> torch.Tensor:
    """Returns int64 [S * views]: each value repeated for all views of its sample."""
    return torch.tensor(values).repeat_interleave(views)
