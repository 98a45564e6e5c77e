"""Nearest-neighbor retrieval: for each query video, the gallery videos whose features look most like its own.

Labels are only counted with: recall@k is the share of queries that have a video of their class among the k nearest, as
in the field's tables (Xu et al. 2019). m queries, n gallery videos, D values, S the size of a clip in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mam2.engine.config.pretrain import DataConfig
from mam2.engine.data.loader import ClipLoader
from mam2.engine.data.manifest import Manifest, read_manifest
from mam2.engine.errors import UserError
from mam2.engine.evaluation.feature_files import FeatureCache, FeatureSpec
from mam2.engine.evaluation.linear_probe import bootstrap
from mam2.engine.evaluation.report import draw_rows
from mam2.engine.files import printable

RANKS = (1, 5, 10, 20)
"""The k of recall@k."""
CHUNK = 1024
DRAWN_QUERIES, DRAWN_NEIGHBORS = 8, 5
BLACK, GREEN, RED = (0.0, 0.0, 0.0), (0.2, 0.7, 0.3), (0.85, 0.2, 0.15)
NAME_LENGTH = 24
"""Characters of a class name in the picture."""


@dataclass(frozen=True, kw_only=True)
class RetrievalScore:
    """How well one checkpoint's features find videos of the query's class."""

    checkpoint: str
    recall: dict[int, float]
    """recall@k by k: share of the queries, 0 to 1."""
    interval: dict[int, tuple[float, float]]
    """95 % bootstrap interval of it, over the queries."""


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    gallery: int
    """Videos with a label that could be decoded."""
    queries: int
    chance: dict[int, float]
    """recall@k of neighbors drawn at random."""
    scores: tuple[RetrievalScore, ...]


@dataclass(frozen=True)
class _Videos:
    manifest: Manifest
    rows: NDArray[np.int64]
    """Places in the manifest of the videos that have a label and features."""
    features: Mapping[FeatureSpec, NDArray[np.floating]]

    @property
    def names(self) -> list[str]:
        """Class of each video."""
        return [self.manifest.classes[self.manifest.videos[row].label] for row in self.rows]

    @property
    def contents(self) -> list[str]:
        """What tells copies of a video from other videos."""
        videos = [self.manifest.videos[row] for row in self.rows]
        return [video.content or video.path for video in videos]


def retrieve(
    specs: Sequence[FeatureSpec],
    data: Path,
    val: Path | None,
    cache: FeatureCache,
    *,
    batch: int,
    progress: bool = True,
) -> tuple[Retrieval, bytes]:
    """Scores features of several encoders; also a PNG of queries and what was found for them.

    data: labelled folder or list, the gallery. val: the queries; None: each video of `data` is one for the others.
    batch: clips that go through an encoder at once.

    Raises UserError for data without labels, and with fewer than two videos that can be decoded.
    """
    gallery = _videos(data, specs, cache, batch, progress)
    queries = gallery if val is None else _videos(val, specs, cache, batch, progress)
    labels, asked = _numbered(gallery.names, queries.names)
    ids, asked_ids = _numbered(gallery.contents, queries.contents)
    scores: list[RetrievalScore] = []
    found: dict[FeatureSpec, Tensor] = {}
    for spec in specs:
        here, there = (torch.from_numpy(part.features[spec][part.rows]) for part in (gallery, queries))
        found[spec] = nearest(there, here, max(RANKS), query_ids=asked_ids, gallery_ids=ids)
        right = hits(found[spec], asked, labels).double()
        scores.append(
            RetrievalScore(
                checkpoint=spec.frozen.name,
                recall={rank: float(right[:, place].mean()) for place, rank in enumerate(RANKS)},
                interval={rank: bootstrap(right[:, place]) for place, rank in enumerate(RANKS)},
            )
        )
    result = Retrieval(
        gallery=len(gallery.rows),
        queries=len(queries.rows),
        chance=dict(zip(RANKS, chance(asked, labels, asked_ids, ids), strict=True)),
        scores=tuple(scores),
    )
    return result, _draw(gallery, queries, found)


def _videos(source: Path, specs: Sequence[FeatureSpec], cache: FeatureCache, batch: int, progress: bool) -> _Videos:
    manifest = read_manifest(source, progress=progress)
    usable = np.array([video.label >= 0 for video in manifest.videos])
    if not usable.any():
        raise UserError(f"{source}: no labels; expected a folder per class, or a list of `path label`")
    features = cache.get(manifest, specs, batch=batch, progress=progress)
    for rows in features.values():
        usable &= ~np.isnan(rows[:, 0])
    if usable.sum() < 2:
        raise UserError(f"{source}: {usable.sum()} videos with a label could be decoded; expected at least 2")
    return _Videos(manifest, usable.nonzero()[0], features)


def _numbered(*parts: Sequence[str]) -> list[Tensor]:
    """Names as numbers, equal ones alike in all parts: int64 each."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(name for part in parts for name in part))}
    return [torch.tensor([numbers[name] for name in part]) for part in parts]


def nearest(queries: Tensor, gallery: Tensor, k: int, *, query_ids: Tensor, gallery_ids: Tensor) -> Tensor:
    """Places in the gallery of the nearest videos, the nearest first: [m, D], [n, D] -> int64 [m, min(k, n)].

    Cosines are taken after the gallery's mean is subtracted, as in the k-NN probe. A video with the id of the query
    (int64 [m] and [n]: the same video, or a copy) comes last, and its place is -1.
    """
    mean = gallery.float().mean(0)
    queries, gallery = (F.normalize(features.float() - mean, dim=1) for features in (queries, gallery))
    found = []
    for part, ids in zip(queries.split(CHUNK), query_ids.split(CHUNK), strict=True):
        cosines = (part @ gallery.T).masked_fill(ids[:, None] == gallery_ids, -torch.inf)
        values, places = cosines.topk(min(k, len(gallery)), dim=1)
        found.append(places.masked_fill(values == -torch.inf, -1))
    return torch.cat(found)


def hits(neighbors: Tensor, query_labels: Tensor, gallery_labels: Tensor, ranks: Sequence[int] = RANKS) -> Tensor:
    """Whether one of the k nearest has the query's label, for each k of `ranks`: from `nearest`, bool [m, ranks]."""
    same = (gallery_labels[neighbors] == query_labels[:, None]) & (neighbors >= 0)
    return torch.stack([same[:, :rank].any(1) for rank in ranks], 1)


def chance(
    query_labels: Tensor,
    gallery_labels: Tensor,
    query_ids: Tensor,
    gallery_ids: Tensor,
    ranks: Sequence[int] = RANKS,
) -> list[float]:
    """Recall@k of neighbors drawn at random, for each k of `ranks`."""
    copies = query_ids[:, None] == gallery_ids
    count = (~copies).sum(1)
    right = ((gallery_labels == query_labels[:, None]) & ~copies).sum(1)
    shares = []
    for rank in ranks:
        # none of `drawn` draws without putting back is one of the right ones
        drawn = torch.minimum(count, torch.tensor(rank))
        left = (count - right).double()
        missed = torch.exp(_log_choose(left, drawn) - _log_choose(count.double(), drawn))
        shares.append(float(torch.where(left < drawn, 1.0, 1 - missed).mean()))
    return shares


def _log_choose(among: Tensor, drawn: Tensor) -> Tensor:
    return torch.lgamma(among + 1) - torch.lgamma(drawn + 1.0) - torch.lgamma((among - drawn).clamp_min(0) + 1)


def _draw(gallery: _Videos, queries: _Videos, found: Mapping[FeatureSpec, Tensor]) -> bytes:
    """PNG: a row for each of some queries, and for each encoder a column of the query and its nearest videos."""
    drawn = np.unique(np.linspace(0, len(queries.rows) - 1, DRAWN_QUERIES).round().astype(int)).tolist()
    near = {spec: places[drawn, :DRAWN_NEIGHBORS] for spec, places in found.items()}
    data = next(iter(found)).frozen.data
    asked = _middle_frames(queries, drawn, data)
    places = {int(place) for part in near.values() for place in part.flatten()} - {-1}
    pictures = _middle_frames(gallery, sorted(places), data)
    names, classes = queries.names, gallery.names
    rows = []
    for row, query in enumerate(drawn):
        strips = []
        for part in near.values():
            strip = [_framed(asked[query], BLACK)]
            for place in part[row].tolist():
                right = place >= 0 and classes[place] == names[query]
                strip.append(
                    _framed(pictures[place], GREEN if right else RED) if place >= 0 else torch.ones_like(strip[0])
                )
            strips.append(torch.stack(strip))
        rows.append((printable(names[query])[:NAME_LENGTH], torch.stack(strips)))
    return draw_rows(rows, [printable(spec.frozen.name) for spec in found], inches=0.8)


def _middle_frames(videos: _Videos, places: Sequence[int], data: DataConfig) -> dict[int, Tensor]:
    """The middle frame of the middle clip of some videos, by their places in `videos`: float [S, S, 3] in 0 to 1."""
    part = Manifest(tuple(videos.manifest.videos[videos.rows[place]] for place in places))
    with ClipLoader(part, data, batch=1, device="cpu", seed=0, train=False) as loader:
        batches = [(places[int(batch.index[0])], batch.clip[0]) for batch in loader.evaluate()]
    return {place: clip[len(clip) // 2].float() / 255 for place, clip in batches}


def _framed(picture: Tensor, color: tuple[float, float, float]) -> Tensor:
    """A picture with a frame of a color around it."""
    edge = max(len(picture) // 24, 1)
    framed = torch.tensor(color).repeat(picture.shape[0] + 2 * edge, picture.shape[1] + 2 * edge, 1)
    framed[edge:-edge, edge:-edge] = picture
    return framed
