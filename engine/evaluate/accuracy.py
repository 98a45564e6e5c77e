"""How right predictions are, and what is taken for what: numbers, a table, a picture.

Shapes: n videos, V classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

NAMED_CLASSES = 60
"""More than these are not named in the confusion picture."""


def top_k(probabilities: Tensor, labels: Tensor, k: int) -> Tensor:
    """Whether the label is among the k likeliest classes, or all if they are fewer: [n, V], int64 [n] -> bool [n]."""
    k = min(k, probabilities.shape[1])
    return (probabilities.topk(k, dim=1).indices == labels[:, None]).any(1)


def confusion(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Videos of each class (row) that were taken for each class (column): int64 [V, V]."""
    classes = probabilities.shape[1]
    return torch.bincount(labels * classes + probabilities.argmax(1), minlength=classes**2).view(classes, classes)


def class_accuracies(matrix: Tensor) -> list[float | None]:
    """Share of each class's videos that are right, from the confusion; None for a class without videos."""
    totals = matrix.sum(1).tolist()
    return [right / total if total else None for right, total in zip(matrix.diagonal().tolist(), totals, strict=True)]


def draw_confusion(matrix: Tensor, classes: Sequence[str]) -> bytes:
    """PNG of the confusion, each row as shares of the class's videos."""
    # Imported here: fine-tuning, which only counts, needs no pictures.
    from mam2.engine.evaluate.plots import plt, png

    shares = matrix.double() / matrix.sum(1, keepdim=True).clamp_min(1)
    named = len(classes) <= NAMED_CLASSES
    edge = max(4.0, 0.22 * len(classes)) if named else 9.0
    figure, axis = plt.subplots(figsize=(edge + 2.2, edge + 1.6), layout="constrained")
    picture = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    if named:
        axis.set_xticks(range(len(classes)), classes, rotation=90, fontsize=8)
        axis.set_yticks(range(len(classes)), classes, fontsize=8)
    axis.set_xlabel("taken for")
    axis.set_ylabel("class")
    figure.colorbar(picture, ax=axis, shrink=0.6, label="share of the class")
    return png(figure)


def write_predictions(
    path: Path, videos: Sequence[str], labels: Tensor, probabilities: Tensor, classes: Sequence[str]
) -> None:
    """TSV, a line a video: its path, its class, whether that is the likeliest, and the five likeliest with their
    probabilities."""
    most = min(5, len(classes))
    values, likeliest = probabilities.topk(most, dim=1)
    header = ["path", "class", "right", *(f"{name}{k + 1}" for k in range(most) for name in ("class", "probability"))]
    lines = ["\t".join(header)]
    for video, label, chances, found in zip(videos, labels.tolist(), values.tolist(), likeliest.tolist(), strict=True):
        cells = [video, classes[label], str(int(found[0] == label))]
        for chance, place in zip(chances, found, strict=True):
            cells += [classes[place], f"{chance:.6f}"]
        lines.append("\t".join(cells))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogateescape")
