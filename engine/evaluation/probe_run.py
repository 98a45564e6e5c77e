"""Probes of frozen encoders on a labelled set: linear, attentive and k-NN, of several checkpoints and layers.

n training and m test videos, D an encoder's width, V classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mam2.engine.checkpoints.frozen import FrozenEncoder
from mam2.engine.config.pretrain import RunConfig
from mam2.engine.data.manifest import Manifest, read_manifest
from mam2.engine.errors import UserError
from mam2.engine.evaluation.attentive import attentive_probe
from mam2.engine.evaluation.feature_files import FeatureCache, Wanted
from mam2.engine.evaluation.knn import knn
from mam2.engine.evaluation.linear_probe import bootstrap, held_out, linear_probe

Probe = Literal["linear", "attentive", "knn"]
FEWEST_VIDEOS = 5
TEST_SHARE = 5
"""Without a test list, one video in so many of each class is tested on."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """What one probe of one layer of one checkpoint gave on the test videos."""

    checkpoint: str
    layer: int
    probe: Probe
    accuracy: float
    """Share of right answers, 0 to 1."""
    interval: tuple[float, float]
    """95 % bootstrap interval of it."""
    gain: float
    """Over the first checkpoint's last layer asked for, the same probe."""
    gain_interval: tuple[float, float]
    """95 % bootstrap interval of it, the videos paired."""
    setting: float
    """L2 penalty or learning rate chosen on held-out training videos; 0 for k-NN, which has none."""


@dataclass(frozen=True, kw_only=True)
class Probed:
    train: int
    """Training videos that have a label and could be decoded."""
    test: int
    both: int
    """Videos of the test list that are training videos as well: the accuracies are then too high."""
    skipped: int
    """Labelled videos that could not be decoded."""
    classes: int
    commonest: float
    """Accuracy of always answering the test videos' commonest class."""
    scores: tuple[Score, ...]


@dataclass(frozen=True)
class _Split:
    manifest: Manifest
    rows: NDArray[np.int64]
    """Places in the manifest."""
    labels: Tensor
    """int64, of each row."""


def probe_encoders(
    encoders: Sequence[FrozenEncoder],
    data: Path,
    val: Path | None,
    *,
    probes: Sequence[Probe] = get_args(Probe),
    layers: Sequence[int] = (),
    cache: Path,
    batch: int = 32,
    run: RunConfig | None = None,
    progress: bool = True,
) -> Probed:
    """Probes every encoder at every layer on labelled videos.

    Args:
        encoders: from `load_frozen`.
        data: folder or list with labels to train the probes on.
        val: one to test them on; None: a fifth of each class of `data`.
        layers: numbers from 1; none: each encoder's last.
        cache: folder that keeps the features, see `FeatureCache`.
        batch: clips that go through an encoder at once.
        run: its precision is that of the encoders.

    Raises:
        UserError: for data without labels, too few videos, or layers that an encoder lacks.
    """
    for frozen in encoders:
        if not all(1 <= layer <= frozen.depth for layer in layers):
            raise UserError(f"--layers {list(layers)}: {frozen.name} has the layers 1 to {frozen.depth}")
    train, test = _splits(data, val, progress)
    kinds: tuple[Literal["mean", "cells"], ...] = ("mean", "cells") if "attentive" in probes else ("mean",)
    wanted = [
        Wanted(frozen, layer, kind)
        for frozen in encoders
        for layer in dict.fromkeys(layers or [frozen.depth])
        for kind in kinds
        if kind == "cells" or set(probes) - {"attentive"}
    ]
    files = FeatureCache(cache, run)
    of_train = files.get(train.manifest, wanted, batch=batch, progress=progress)
    of_test = files.get(test.manifest, wanted, batch=batch, progress=progress)
    labelled = len(train.rows) + len(test.rows)
    train, test = _decoded(train, list(of_train.values())), _decoded(test, list(of_test.values()))
    if min(len(train.rows) - FEWEST_VIDEOS + 1, len(test.rows)) < 1:
        raise UserError(
            f"{len(train.rows)} training and {len(test.rows)} test videos with labels; "
            f"expected at least {FEWEST_VIDEOS} and 1"
        )
    scores: list[Score] = []
    first: dict[Probe, Tensor] = {}
    device = next(encoders[0].encoder.parameters()).device
    last = max(layers, default=encoders[0].depth)
    order = sorted(wanted, key=lambda want: (want.frozen is not encoders[0], want.layer != last))
    for want in order:
        for probe in [p for p in probes if (p == "attentive") == (want.kind == "cells")]:
            right, setting = _right(probe, of_train[want], train, of_test[want], test, device)
            gained = right - first.setdefault(probe, right)
            scores.append(
                Score(
                    checkpoint=want.frozen.name,
                    layer=want.layer,
                    probe=probe,
                    accuracy=float(right.mean()),
                    interval=bootstrap(right),
                    gain=float(gained.mean()),
                    gain_interval=bootstrap(gained),
                    setting=setting,
                )
            )
    names = [frozen.name for frozen in encoders]
    trained_on = {train.manifest.videos[row].content or train.manifest.videos[row].path for row in train.rows}
    tested_on = [test.manifest.videos[row].content or test.manifest.videos[row].path for row in test.rows]
    return Probed(
        train=len(train.rows),
        test=len(test.rows),
        both=sum(video in trained_on for video in tested_on),
        skipped=labelled - len(train.rows) - len(test.rows),
        classes=len(train.manifest.classes),
        commonest=float(test.labels.bincount().max() / len(test.labels)),
        scores=tuple(sorted(scores, key=lambda s: (names.index(s.checkpoint), s.layer, probes.index(s.probe)))),
    )


def _right(
    probe: Probe,
    train_features: NDArray[np.floating],
    train: _Split,
    test_features: NDArray[np.floating],
    test: _Split,
    device: torch.device,
) -> tuple[Tensor, float]:
    """Which test videos a probe names rightly, float64 [m] on the CPU, and the setting chosen."""
    known, asked = train_features[train.rows], test_features[test.rows]
    if probe == "attentive":
        held, classes = held_out(len(known)), len(train.manifest.classes)
        answers, rate = attentive_probe(known, train.labels, asked, held, classes, device)
        return (answers == test.labels).double(), rate
    here, there = torch.from_numpy(known).to(device), torch.from_numpy(asked).to(device)
    labels = train.labels.to(device)
    if probe == "knn":
        return (knn(here, labels, there).cpu() == test.labels).double(), 0.0
    result = linear_probe(here, labels, there, test.labels.to(device))
    return result.right.double(), result.penalty


def _splits(data: Path, val: Path | None, progress: bool) -> tuple[_Split, _Split]:
    train = _labelled(data, read_manifest(data, progress=progress))
    if val is None:
        test = np.zeros(len(train.rows), bool)
        generator = torch.Generator().manual_seed(0)
        for label in train.labels.unique():
            members = (train.labels == label).nonzero()[:, 0]
            shuffled = members[torch.randperm(len(members), generator=generator)]
            test[shuffled[: len(members) // TEST_SHARE or len(members) // 2]] = True
        kept, tested = (_Split(train.manifest, train.rows[part], train.labels[part]) for part in (~test, test))
        return kept, tested
    other = _labelled(val, read_manifest(val, progress=progress))
    places = {name: place for place, name in enumerate(train.manifest.classes)}
    names = [other.manifest.classes[label] for label in other.labels.tolist()]
    if unknown := sorted(set(names) - places.keys()):
        raise UserError(f"--val {val}: no training video has the label {unknown[0]!r}")
    labels = torch.tensor([places[name] for name in names])
    return train, _Split(other.manifest, other.rows, labels)


def _labelled(source: Path, manifest: Manifest) -> _Split:
    labels = np.array([video.label for video in manifest.videos])
    rows = (labels >= 0).nonzero()[0]
    if not len(rows):
        raise UserError(f"{source}: no labels; expected a folder a class, or a list of `path label`")
    return _Split(manifest, rows, torch.from_numpy(labels[rows]))


def _decoded(split: _Split, features: Sequence[NDArray[np.floating]]) -> _Split:
    """Without the videos that have no features."""
    there = np.ones(len(split.rows), bool)
    for rows in features:
        there &= ~np.isnan(rows.reshape(len(rows), -1)[split.rows, 0])
    return _Split(split.manifest, split.rows[there], split.labels[torch.from_numpy(there)])
