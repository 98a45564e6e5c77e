"""Nearest-neighbor retrieval: finds for each query video the gallery videos with the most similar features.

Labels are used only for the score: recall@k is the share of queries with a video of their class among the k nearest, as
usual (Xu et al. 2019). m queries, n gallery videos, D values, S the size of a clip in pixels.
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

from mam2.engine.config.training import DataConfig
from mam2.engine.data.loader import ClipLoader
from mam2.engine.data.manifest import Manifest, read_manifest
from mam2.engine.errors import UserError
from mam2.engine.evaluation.feature_files import FeatureCache, FeatureSpec
from mam2.engine.evaluation.linear_probe import bootstrap
from mam2.engine.evaluation.report import draw_rows
from mam2.engine.files import printable
from mam2.engine.model.pixels import as_colors, unit_pixels

RANKS = (1, 5, 10, 20)
"""The k of recall@k."""
CHUNK = 1024
DRAWN_QUERIES, DRAWN_NEIGHBORS = 8, 5
BLACK, GREEN, RED = (0.0, 0.0, 0.0), (0.2, 0.7, 0.3), (0.85, 0.2, 0.15)
NAME_LENGTH = 24
"""Maximum characters of a class name in the picture."""


@dataclass(frozen=True, kw_only=True)
class RetrievalScore:
    """Retrieval score of one checkpoint's features."""

    checkpoint: str
    recall: dict[int, float]
    """recall@k by k: share of the queries, 0 to 1."""
    interval: dict[int, tuple[float, float]]
    """95 % bootstrap interval of recall@k, over the queries."""


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    gallery: int
    """Number of decodable videos with a label."""
    queries: int
    chance: dict[int, float]
    """recall@k of random neighbors."""
    scores: tuple[RetrievalScore, ...]
    left_out: int
    """Number of files left out: missing or unusable ones, and labeled videos that could not be decoded."""


@dataclass(frozen=True)
class _Videos:
    manifest: Manifest
    rows: NDArray[np.int64]
    """Manifest indices of the videos with a label and features."""
    features: Mapping[FeatureSpec, NDArray[np.floating]]

    @property
    def names(self) -> list[str]:
        """Returns the class of each video."""
        return [self.manifest.classes[self.manifest.videos[row].label] for row in self.rows]

    @property
    def left_out(self) -> set[str]:
        """Returns the paths of unusable files, and of videos with a label and without features."""
        labeled = {row for row, video in enumerate(self.manifest.videos) if video.label >= 0}
        lost = {self.manifest.videos[row].path for row in labeled.difference(self.rows.tolist())}
        return lost | {skipped.path for skipped in self.manifest.skipped}

    @property
    def contents(self) -> list[str]:
        """Returns identifiers that are equal for copies of a video."""
        return [self.manifest.videos[row].identity for row in self.rows]


def retrieve(
    specs: Sequence[FeatureSpec],
    data: Path,
    val: Path | None,
    cache: FeatureCache,
    *,
    batch: int,
    progress: bool = True,
) -> tuple[Retrieval, bytes]:
    """Scores features of several encoders; also returns a PNG of queries and their results.

    data: labeled folder or list, the gallery. val: the queries; None: each video of `data` is a query for the others.
    batch: clips per forward pass.

    Raises UserError for data without labels, or with fewer than two decodable videos.
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
        left_out=len(gallery.left_out | queries.left_out),
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
        raise UserError(f"{source}: expected at least 2 videos with a label that can be decoded, found {usable.sum()}")
    return _Videos(manifest, usable.nonzero()[0], features)


def _numbered(*parts: Sequence[str]) -> list[Tensor]:
    """Converts names to numbers, equal names to equal numbers in all parts: int64 each."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(name for part in parts for name in part))}
    return [torch.tensor([numbers[name] for name in part]) for part in parts]


def nearest(queries: Tensor, gallery: Tensor, k: int, *, query_ids: Tensor, gallery_ids: Tensor) -> Tensor:
    """Returns the gallery indices of the nearest videos, the nearest first: [m, D], [n, D] -> int64 [m, min(k, n)].

    The gallery's mean is subtracted before cosines are computed, as in the k-NN probe. A video with the id of the query
    (int64 [m] and [n]: the same video, or a copy) comes last, with index -1.
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
    """Returns whether one of the k nearest has the query's label, for each k of `ranks`: bool [m, ranks]."""
    same = (gallery_labels[neighbors] == query_labels[:, None]) & (neighbors >= 0)
    return torch.stack([same[:, :rank].any(1) for rank in ranks], 1)


def chance(
    query_labels: Tensor,
    gallery_labels: Tensor,
    query_ids: Tensor,
    gallery_ids: Tensor,
    ranks: Sequence[int] = RANKS,
) -> list[float]:
    """Returns recall@k of random neighbors, for each k of `ranks`."""
    copies = query_ids[:, None] == gallery_ids
    count = (~copies).sum(1)
    right = ((gallery_labels == query_labels[:, None]) & ~copies).sum(1)
    shares = []
    for rank in ranks:
        # the probability that `drawn` draws without replacement contain no correct video
        drawn = torch.minimum(count, torch.tensor(rank))
        left = (count - right).double()
        missed = torch.exp(_log_choose(left, drawn) - _log_choose(count.double(), drawn))
        shares.append(float(torch.where(left < drawn, 1.0, 1 - missed).mean()))
    return shares


def _log_choose(among: Tensor, drawn: Tensor) -> Tensor:
    return torch.lgamma(among + 1) - torch.lgamma(drawn + 1.0) - torch.lgamma((among - drawn).clamp_min(0) + 1)


def _draw(gallery: _Videos, queries: _Videos, found: Mapping[FeatureSpec, Tensor]) -> bytes:
    """Draws a PNG with a row per query, and a column of the query and its nearest videos per encoder."""
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
    titles = [f"{printable(spec.frozen.name)}\na video, then its nearest (green: of its class)" for spec in found]
    return draw_rows(rows, titles, inches=0.8)


def _middle_frames(videos: _Videos, places: Sequence[int], data: DataConfig) -> dict[int, Tensor]:
    """Returns the middle frames of the middle clips of videos, by index in `videos`: float [S, S, 3] in 0 to 1."""
    part = Manifest(tuple(videos.manifest.videos[videos.rows[place]] for place in places))
    with ClipLoader(part, data, batch=1, device="cpu", seed=0, train=False) as loader:
        batches = [(places[int(batch.index[0])], batch.clip[0]) for batch in loader.evaluate()]
    return {place: as_colors(unit_pixels(clip[len(clip) // 2])) for place, clip in batches}


def _framed(picture: Tensor, color: tuple[float, float, float]) -> Tensor:
    """Returns a picture with a colored frame."""
    edge = max(len(picture) // 24, 1)
    framed = torch.tensor(color).repeat(picture.shape[0] + 2 * edge, picture.shape[1] + 2 * edge, 1)
    framed[edge:-edge, edge:-edge] = picture
    return framed
