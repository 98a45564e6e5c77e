"""Draws several views (clips and crops) per video, and averages a classifier's predictions over them.

It follows VideoMAE's test: dense clips evenly from the start of a video to its end, or uniform clips interleaved (of
two, one has the first frames of the parts, the other those in the middle); each in square crops with the full shorter
side, evenly along the longer side; the softmax outputs of all views are averaged. A single clip or crop is the middle
one.

Shapes: B clips, V classes, n videos.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from mam2.engine.config.training import DataConfig
from mam2.engine.data.loader import ClipLoader
from mam2.engine.data.manifest import Manifest
from mam2.engine.data.sampling import ClipRequest, View, frame_step
from mam2.engine.data.video import Video
from mam2.engine.runtime.distributed import World
from mam2.engine.runtime.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Predictions for the videos with at least one decodable view."""

    videos: Tensor
    """int64 [n], indices in the manifest, ascending."""
    probabilities: Tensor
    """float64 [n, V], the mean over a video's views; in regression the values."""
    views: Tensor
    """int64 [n], the number of views."""


def view_clip(place: int, video: Video, number: int, data: DataConfig, *, temporal: int, spatial: int) -> ClipRequest:
    """Returns clip `number` of `temporal` of the video with index `place` in its manifest, in `spatial` crops."""
    width, height = video.shown_size
    wide, high = min(1.0, height / width), min(1.0, width / height)
    views = []
    for crop in range(spatial):
        share = crop / (spatial - 1) if spatial > 1 else 0.5
        x, y = share * (1 - wide), share * (1 - high)
        views.append(View(x, y, x + wide, y + high, False))
    return ClipRequest(place, _frames(video, number, data, temporal), tuple(views))


def _frames(video: Video, number: int, data: DataConfig, temporal: int) -> tuple[int, ...]:
    if data.sampling == "uniform":
        part = video.frames / data.frames
        shift = part * number / temporal if temporal > 1 else part / 2
        return tuple(int(shift + part * k) for k in range(data.frames))
    step = frame_step(video, data)
    offsets = [round(k * step) for k in range(data.frames)]
    spare = max(video.frames - 1 - offsets[-1], 0)
    start = spare * number // (temporal - 1) if temporal > 1 else spare // 2
    return tuple(start + offset for offset in offsets)


def softmax(logits: Tensor) -> Tensor:
    """Probabilities of a video's only class, float64, from logits [..., V]."""
    return logits.double().softmax(-1)


@torch.no_grad()
def classify_views(
    classify: Callable[[Tensor], Tensor],
    loader: ClipLoader,
    places: Sequence[int],
    data: DataConfig,
    *,
    temporal: int,
    spatial: int,
    precision: Callable[[], AbstractContextManager[object]],
    scores: Callable[[Tensor], Tensor] = softmax,
) -> Iterator[tuple[int, Tensor, int]]:
    """Classifies the videos `places`, in this order, and yields each result as soon as its views are classified.

    classify: clips [B, C, T, H, W] uint8 -> logits [B, V]. loader: its batch is at least `spatial`. places: indices in
    the loader's manifest, without repeats. precision: returns the autocast context for `classify`. scores: logits
    [B, V] -> what is averaged over the views, float64 [B, V].

    Yields a video's index, the sum of its views' probabilities (float64 [V], on the CPU) and the number of views. A
    video without any decodable view is left out.
    """

    def draw(place: int, video: Video, number: int) -> ClipRequest:
        return view_clip(place, video, number, data, temporal=temporal, spatial=spatial)

    current, total, count = -1, torch.empty(0), 0
    for batch in loader.chosen(((place, number) for place in places for number in range(temporal)), draw, spatial):
        with precision():
            logits = classify(batch.video)
        shares = scores(logits).unflatten(0, (-1, spatial)).sum(1).cpu()
        # in the order of the views, independent of the batch
        for place, share in zip(batch.index[::spatial].tolist(), shares, strict=True):
            if place == current:
                total, count = total + share, count + spatial
                continue
            if count:
                yield current, total, count
            current, total, count = place, share, spatial
    if count:
        yield current, total, count


def classify_videos(
    classify: Callable[[Tensor], Tensor],
    loader: ClipLoader,
    manifest: Manifest,
    data: DataConfig,
    *,
    temporal: int,
    spatial: int,
    world: World,
    precision: Callable[[], AbstractContextManager[object]],
    progress: bool = True,
    scores: Callable[[Tensor], Tensor] = softmax,
) -> Predictions:
    """Classifies all videos of a manifest; each rank classifies every `world.size`-th video, all get all results.

    classify, precision, scores: as in `classify_views`. loader: of this manifest, its batch at least `spatial`.
    """
    mine = range(world.rank, len(manifest.videos), world.size)
    sums: dict[int, tuple[Tensor, int]] = {}
    with Progress(total=len(mine), desc="evaluation", unit="video", leave=False, shown=progress) as bar:
        for place, total, count in classify_views(
            classify, loader, mine, data, temporal=temporal, spatial=spatial, precision=precision, scores=scores
        ):
            sums[place] = total, count
            bar.update()
    found: dict[int, tuple[Tensor, int]] = {}
    for part in world.all_gather({place: (total.numpy(), count) for place, (total, count) in sums.items()}):
        found |= {place: (torch.from_numpy(total), count) for place, (total, count) in part.items()}
    places = sorted(found)
    views = torch.tensor([found[place][1] for place in places])
    totals = torch.stack([found[place][0] for place in places]) if places else torch.empty(0, 0)
    return Predictions(videos=torch.tensor(places), probabilities=totals / views[:, None], views=views)
