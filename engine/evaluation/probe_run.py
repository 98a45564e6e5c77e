"""Probes frozen encoders on labeled videos: linear, attentive and k-NN, for several checkpoints and layers.

n training and m test videos, D an encoder's width, V classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mam2.engine.checkpoints.frozen import FrozenEncoder
from mam2.engine.config.training import RunConfig
from mam2.engine.data.lists import read_column
from mam2.engine.data.manifest import Manifest, read_manifest
from mam2.engine.data.sources import list_and_split
from mam2.engine.errors import UserError
from mam2.engine.evaluation.attentive import attentive_probe
from mam2.engine.evaluation.components import Components, principal_components, probe_components
from mam2.engine.evaluation.feature_files import FeatureCache, FeatureSpec
from mam2.engine.evaluation.features import FeatureKind, cell_grid
from mam2.engine.evaluation.knn import knn
from mam2.engine.evaluation.linear_probe import bootstrap, folds, held_out, linear_probe
from mam2.engine.evaluation.pools import Pool, token_groups
from mam2.engine.model.pixel_encoder import PixelEncoder

Probe = Literal["linear", "attentive", "knn"]
ProbePool = Pool | Literal["tokens"]
"""Input of a probe: averages over groups of tokens, or `tokens`: principal components of all (linear probe only)."""
FEWEST_VIDEOS = 5
TEST_SHARE = 5
"""Without a test list, one in this number of videos of each class is a test video."""
POOLS: tuple[ProbePool, ...] = ("mean", "time")
"""The usual pool, and one that keeps the temporal order."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """Result of one probe of one layer of one checkpoint on the test videos."""

    checkpoint: str
    layer: int
    pool: ProbePool
    probe: Probe
    accuracy: float
    """Share of correct answers, 0 to 1."""
    interval: tuple[float, float]
    """95 % bootstrap interval of the accuracy, over the test videos, or over their groups."""
    gain: float
    """Difference to the first checkpoint's last probed layer, with the same pool and probe."""
    gain_interval: tuple[float, float]
    """95 % paired bootstrap interval of the gain."""
    setting: float
    """L2 penalty or learning rate chosen on held-out training videos; 0 for k-NN, which has none."""
    components: int = 0
    """Number of principal components, chosen by cross-validation, with the pool `tokens`; otherwise 0."""
    right: str
    """A digit per test video, in the order of the list: 1 for a correct answer."""


@dataclass(frozen=True, kw_only=True)
class ProbeReport:
    train: int
    """Number of decodable training videos with a label."""
    test: int
    both: int
    """Number of test videos that are also training videos; the accuracies are then too high."""
    skipped: int
    """Number of videos left out: unusable files of the lists, and labeled videos that could not be decoded."""
    classes: int
    groups: int
    """Number of groups of the test videos, for intervals over groups; 0: intervals over videos."""
    commonest: float
    """Accuracy of always predicting the most frequent class of the test videos."""
    scores: tuple[Score, ...]
    unit: str = "videos"
    """What is counted: videos, or segments of videos."""


@dataclass(frozen=True)
class _Outcome:
    right: Tensor
    """float64 [m], 1 for a correct answer, on the CPU."""
    setting: float
    components: int = 0


@dataclass(frozen=True)
class _Split:
    manifest: Manifest
    rows: NDArray[np.int64]
    """Indices in the manifest."""
    labels: Tensor
    """int64, the label of each row."""
    groups: Tensor | None = None
    """int64, the group of each row, if the videos have groups."""


def probe_encoders(
    encoders: Sequence[FrozenEncoder],
    data: Path,
    val: Path | None,
    *,
    probes: Sequence[Probe] = get_args(Probe),
    pools: Sequence[ProbePool] = POOLS,
    layers: Sequence[int] = (),
    group: str = "",
    cache: Path,
    batch: int = 32,
    run: RunConfig | None = None,
    progress: bool = True,
) -> ProbeReport:
    """Probes every encoder at every layer on labeled videos.

    Args:
        encoders: from `load_frozen`.
        data: labeled folder or list to train the probes.
        val: labeled folder or list to test them; None: a fifth of each class of `data`, or of its groups.
        pools: groups of tokens for the features, see pools.py; all are computed in one pass over the videos. `tokens`:
            all tokens of a clip, concatenated, of which the linear probe sees the principal components. If pixels are
            among several encoders, it also probes each other encoder together with them.
        layers: numbers from 1; empty: each encoder's last.
        group: a column of the lists, or TABLE:COLUMN of another table with a column of paths, that assigns videos to
            groups, such as the person in them. Intervals are then over groups, and settings are chosen on groups
            without training videos of the probe.
        cache: folder for the features, see `FeatureCache`.
        batch: clips per forward pass.
        run: contains the precision of the encoders.

    Raises:
        UserError: data without labels or groups, too few videos, layers that an encoder does not have, or `tokens`
            as the only pool without a linear probe.
    """
    for frozen in encoders:
        if not all(1 <= layer <= frozen.depth for layer in _layers(frozen, layers)):
            raise UserError(f"--layers {list(layers)}: {frozen.name} has layers 1 to {frozen.depth}")
    train, test = _splits(data, val, group, progress)
    averaged = [pool for pool in pools if pool != "tokens"]
    kinds: list[FeatureKind] = [*averaged] if set(probes) - {"attentive"} else []
    if "tokens" in pools and "linear" in probes:
        kinds.append("tokens")
    if "attentive" in probes and averaged:
        kinds.append("cells")
    if not kinds:
        raise UserError(f"--pools tokens: only for the linear probe, found --probes {' '.join(probes)}; add linear")
    wanted = [
        FeatureSpec(frozen, layer, kind) for frozen in encoders for layer in _layers(frozen, layers) for kind in kinds
    ]
    files = FeatureCache(cache, run)
    of_train = files.get(train.manifest, wanted, batch=batch, progress=progress)
    of_test = files.get(test.manifest, wanted, batch=batch, progress=progress)
    labeled = len(train.rows) + len(test.rows)
    train, test = _decoded(train, list(of_train.values())), _decoded(test, list(of_test.values()))
    if min(len(train.rows) - FEWEST_VIDEOS + 1, len(test.rows)) < 1:
        raise UserError(
            f"{len(train.rows)} training and {len(test.rows)} test videos with labels; "
            f"expected at least {FEWEST_VIDEOS} and 1"
        )
    groups = 0 if test.groups is None else len(test.groups.unique())
    if groups == 1:
        raise UserError(f"--group {group}: all test videos are in one group; expected two or more")
    scores: list[Score] = []
    first: dict[tuple[ProbePool, Probe], Tensor] = {}
    device = encoders[0].encoder.positions.device
    last = max(layers, default=encoders[0].depth)
    order = sorted(wanted, key=lambda want: (want.frozen is not encoders[0], want.layer != last))

    def score(name: str, layer: int, pool: ProbePool, probe: Probe, found: _Outcome) -> None:
        gained = found.right - first.setdefault((pool, probe), found.right)
        scores.append(
            Score(
                checkpoint=name,
                layer=layer,
                pool=pool,
                probe=probe,
                accuracy=float(found.right.mean()),
                interval=bootstrap(found.right, groups=test.groups),
                gain=float(gained.mean()),
                gain_interval=bootstrap(gained, groups=test.groups),
                setting=found.setting,
                components=found.components,
                right=digits(found.right),
            )
        )

    components: dict[FeatureSpec, Components] = {}
    for want in order:
        if want.kind == "tokens":
            components[want] = principal_components(of_train[want], train.rows, of_test[want], test.rows)
            found = _of_components([components[want]], train, test, device)
            score(want.frozen.name, want.layer, "tokens", "linear", found)
        for pool, probe in _asked_of(want, averaged, probes):
            found = _outcome(probe, pool, want, of_train[want], train, of_test[want], test, device)
            score(want.frozen.name, want.layer, pool, probe, found)
    pixels = next((want for want in components if isinstance(want.frozen.encoder, PixelEncoder)), None)
    names = [name for frozen in encoders for name in (frozen.name, _with_pixels(frozen))]
    if pixels:
        for want in components.keys() - {pixels}:
            found = _of_components([components[pixels], components[want]], train, test, device)
            score(_with_pixels(want.frozen), want.layer, "tokens", "linear", found)
    trained_on = {train.manifest.videos[row].identity for row in train.rows}
    tested_on = [test.manifest.videos[row].identity for row in test.rows]
    return ProbeReport(
        train=len(train.rows),
        test=len(test.rows),
        both=sum(video in trained_on for video in tested_on),
        skipped=labeled - len(train.rows) - len(test.rows) + _unusable(train.manifest, test.manifest),
        classes=len(train.manifest.classes),
        groups=groups,
        commonest=float(test.labels.bincount().max() / len(test.labels)),
        scores=tuple(
            sorted(
                scores,
                key=lambda s: (names.index(s.checkpoint), s.layer, pools.index(s.pool), probes.index(s.probe)),
            )
        ),
    )


def digits(right: Tensor) -> str:
    """Returns 1 for each correct answer and 0 for the others. right: [m], 0 or 1."""
    return "".join(str(int(one)) for one in right.tolist())


def _layers(frozen: FrozenEncoder, layers: Sequence[int]) -> list[int]:
    """Returns the layers to probe; pixels have only one."""
    return [frozen.depth] if isinstance(frozen.encoder, PixelEncoder) or not layers else list(dict.fromkeys(layers))


def _with_pixels(frozen: FrozenEncoder) -> str:
    return f"{frozen.name} + pixels"


def _of_components(parts: Sequence[Components], train: _Split, test: _Split, device: torch.device) -> _Outcome:
    held = folds(len(train.rows), train.groups)
    result, count = probe_components(parts, train.labels, test.labels, held, device)
    return _Outcome(result.right.double(), result.penalty, count)


def _asked_of(want: FeatureSpec, pools: Sequence[Pool], probes: Sequence[Probe]) -> list[tuple[Pool, Probe]]:
    """Returns the pools and probes for averaged features; attentive probes pool the cells themselves."""
    if want.kind == "cells":
        return [(pool, "attentive") for pool in pools]
    if want.kind == "tokens":
        return []
    return [(want.kind, probe) for probe in probes if probe != "attentive"]


def _outcome(
    probe: Probe,
    pool: Pool,
    want: FeatureSpec,
    train_features: NDArray[np.floating],
    train: _Split,
    test_features: NDArray[np.floating],
    test: _Split,
    device: torch.device,
) -> _Outcome:
    """Returns which test videos a probe classifies correctly, and the chosen setting."""
    known, asked = train_features[train.rows], test_features[test.rows]
    held = held_out(len(known), train.groups)
    if probe == "attentive":
        classes, groups = len(train.manifest.classes), token_groups(cell_grid(want.frozen.encoder.grid), pool)
        answers, rate = attentive_probe(known, train.labels, asked, held, classes, device, groups)
        return _Outcome((answers == test.labels).double(), rate)
    here, there = torch.from_numpy(known).to(device), torch.from_numpy(asked).to(device)
    labels = train.labels.to(device)
    if probe == "knn":
        return _Outcome((knn(here, labels, there).cpu() == test.labels).double(), 0.0)
    result = linear_probe(here, labels, there, test.labels.to(device), held.to(device))
    return _Outcome(result.right.double(), result.penalty)


def _unusable(*manifests: Manifest) -> int:
    """Returns the number of files of the lists that are missing or unusable, each counted once."""
    return len({entry.path for manifest in manifests for entry in manifest.skipped})


def _splits(data: Path, val: Path | None, group: str, progress: bool) -> tuple[_Split, _Split]:
    train = _labeled(data, read_manifest(data, progress=progress), group)
    if val is None:
        if train.groups is None:
            test = _test_rows(train.labels)
        elif len(train.groups.unique()) < 3:
            raise UserError(f"--group {group}: {data} has two groups; expected three or more, or --val")
        else:
            test = held_out(len(train.rows), train.groups, least=2)
        return _part(train, ~test), _part(train, test)
    other = _labeled(val, read_manifest(val, progress=progress), group)
    places = {name: place for place, name in enumerate(train.manifest.classes)}
    names = [other.manifest.classes[label] for label in other.labels.tolist()]
    if unknown := sorted(set(names) - places.keys()):
        raise UserError(f"--val {val}: no training video has the label {unknown[0]!r}")
    return train, dataclasses.replace(other, labels=torch.tensor([places[name] for name in names]))


def _test_rows(labels: Tensor) -> Tensor:
    """Selects a fifth of each class: bool [n]."""
    test = torch.zeros(len(labels), dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        shuffled = members[torch.randperm(len(members), generator=generator)]
        test[shuffled[: len(members) // TEST_SHARE or len(members) // 2]] = True
    return test


def _labeled(source: Path, manifest: Manifest, group: str) -> _Split:
    labels = np.array([video.label for video in manifest.videos])
    rows = (labels >= 0).nonzero()[0]
    if not len(rows):
        raise UserError(f"{source}: no labels; expected a folder per class, or a list of `path label`")
    groups = _groups(source, group, [manifest.videos[row].path for row in rows]) if group else None
    return _Split(manifest, rows, torch.from_numpy(labels[rows]), groups)


def _groups(source: Path, group: str, paths: Sequence[str]) -> Tensor:
    """Returns the group of each video, int64, from a column of its list or TABLE:COLUMN; at least two groups."""
    table, _, column = group.rpartition(":")
    names = read_column(Path(table) if table else list_and_split(source)[0], column)
    if missing := [path for path in paths if not names.get(path)]:
        raise UserError(f"--group {group}: no group for {len(missing)} of the videos, the first is {missing[0]}")
    places = {name: place for place, name in enumerate(sorted({names[path] for path in paths}))}
    if len(places) == 1:
        raise UserError(f"--group {group}: all videos of {source} are in one group; expected two or more")
    return torch.tensor([places[names[path]] for path in paths])


def _part(split: _Split, kept: Tensor) -> _Split:
    """Returns the rows of a split for which `kept` is true."""
    groups = None if split.groups is None else split.groups[kept]
    return dataclasses.replace(split, rows=split.rows[kept.numpy()], labels=split.labels[kept], groups=groups)


def _decoded(split: _Split, features: Sequence[NDArray[np.floating]]) -> _Split:
    """Returns a split without the videos that have no features."""
    there = np.ones(len(split.rows), bool)
    for rows in features:
        there &= ~np.isnan(rows.reshape(len(rows), -1)[split.rows, 0])
    return _part(split, torch.from_numpy(there))
