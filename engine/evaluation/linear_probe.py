"""Linear probe: multinomial logistic regression on frozen features, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""L2 penalties to try; the best one on a held-out fifth of the training features is used. The largest are for features
with more dimensions than videos."""

FOLDS = 5


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    accuracy: float
    """Share of correct answers on the test features, 0 to 1."""
    interval: tuple[float, float]
    """95 % bootstrap interval of the accuracy."""
    right: Tensor
    """Whether each answer is correct: bool [test clips], on the CPU."""
    penalty: float
    """The chosen L2 penalty."""
    validated: float
    """Share of correct answers with this penalty on the held-out training features, 0 to 1."""


def linear_probe(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    held: Tensor | Sequence[Tensor] | None = None,
) -> ProbeResult:
    """Fits on `train` [n, D] and measures on `test` [m, D]; labels int64 from 0.

    Features are standardized by the training features' statistics. The penalty is chosen without the test features.

    held: bool [n], held-out training features that choose the penalty, from `held_out`; several, from `folds`: by the
        mean accuracy over them; None: a random fifth.
    """
    # one copy in double precision: those of a pool with many groups are large
    train, test = (features.to(torch.float64, copy=True) for features in (train, test))
    mean, std = train.mean(0), train.std(0) + 1e-6
    for features in (train, test):
        features.sub_(mean).div_(std)
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    held = held_out(len(train)) if held is None else held
    parts = [held] if isinstance(held, Tensor) else held

    def held_out_accuracy(penalty: float) -> float:
        accuracies = []
        for part in parts:
            weight, bias = _fit(train[~part], train_labels[~part], classes, penalty)
            accuracies.append(((train[part] @ weight + bias).argmax(1) == train_labels[part]).double().mean())
        return float(torch.stack(accuracies).mean())

    validated, penalty = max(((held_out_accuracy(value), value) for value in PENALTIES), key=lambda found: found[0])
    weight, bias = _fit(train, train_labels, classes, penalty)
    right = ((test @ weight + bias).argmax(1) == test_labels).cpu()
    return ProbeResult(
        accuracy=float(right.double().mean()),
        interval=bootstrap(right.double()),
        right=right,
        penalty=penalty,
        validated=validated,
    )


def held_out(count: int, groups: Tensor | None = None, least: int = 1) -> Tensor:
    """Selects a fifth of `count` training videos, bool [count], to choose a probe's setting.

    groups: int64 [count], the group of each video, such as the person in it; then a fifth of the groups, but at least
        `least`, is held out completely, since test videos are of other groups too. A single group is split.
    """
    generator = torch.Generator().manual_seed(0)
    if groups is not None and len(present := groups.unique()) > 1:
        order = present[torch.randperm(len(present), generator=generator)]
        return torch.isin(groups, order[: max(len(present) // 5, least)])
    held = torch.zeros(count, dtype=torch.bool)
    held[torch.randperm(count, generator=generator)[: count // 5]] = True
    return held


def folds(count: int, groups: Tensor | None = None) -> list[Tensor]:
    """Divides `count` training videos into five parts to hold out in turn: bool [count] each, every video in one.

    groups: int64 [count]; then groups stay whole, and with fewer than five groups there are as many parts. A single
        group is divided.
    """
    places, total = torch.arange(count), count
    if groups is not None and len(present := groups.unique()) > 1:
        places, total = torch.searchsorted(present, groups), len(present)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    return [torch.isin(places, part) for part in order.tensor_split(min(FOLDS, total))]


def _fit(features: Tensor, labels: Tensor, classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    weight = features.new_zeros(features.shape[1], classes, requires_grad=True)
    bias = features.new_zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe", tolerance_change=1e-7)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(features @ weight + bias, labels) + penalty * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def bootstrap(
    values: Tensor,
    weights: Tensor | None = None,
    groups: Tensor | None = None,
    *,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Returns the 95 % percentile interval of a mean (or of sum(values) / sum(weights)) over resampled clips.

    Values [n]. groups: int64 [n], the group of each clip; then whole groups are resampled (cluster bootstrap), because
        the results of clips of one group, such as those of one speaker, are correlated.
    """
    values = values.double()
    weights = torch.ones_like(values) if weights is None else weights.double()
    if groups is not None:
        _, places = groups.unique(return_inverse=True)
        empty = torch.zeros(int(places.max()) + 1, dtype=torch.double)
        values, weights = empty.index_add(0, places, values), empty.index_add(0, places, weights)
    picks = torch.randint(len(values), (draws, len(values)), generator=torch.Generator().manual_seed(seed))
    ratios = values[picks].sum(1) / weights[picks].sum(1)
    low, high = ratios.quantile(torch.tensor([0.025, 0.975], dtype=ratios.dtype)).tolist()
    return low, high
