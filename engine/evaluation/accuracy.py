"""Top-k accuracy, per-class table and confusion matrix of predictions.

Shapes: n videos, V classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mam2.engine.files import printable, write_table

NAMED_CLASSES = 60
"""Maximum number of classes whose names are shown in the confusion matrix."""
DRAWN_CLASSES = 1000
"""Maximum rows and columns of the confusion matrix: a picture cannot show more."""


def top_k(probabilities: Tensor, labels: Tensor, k: int) -> Tensor:
    """Returns whether the label is among the k most probable classes: [n, V], int64 [n] -> bool [n]."""
    k = min(k, probabilities.shape[1])
    return (probabilities.topk(k, dim=1).indices == labels[:, None]).any(1)


def class_accuracies(probabilities: Tensor, labels: Tensor) -> tuple[list[int], list[float | None]]:
    """Returns the videos of each class, and the share that is correct; None for a class without videos."""
    classes = probabilities.shape[1]
    totals = torch.bincount(labels, minlength=classes).tolist()
    rights = torch.bincount(labels[probabilities.argmax(1) == labels], minlength=classes).tolist()
    return totals, [right / total if total else None for right, total in zip(rights, totals, strict=True)]


def mean_class_accuracy(probabilities: Tensor, labels: Tensor) -> float:
    """Mean of the top-1 accuracies of the classes that have videos (balanced accuracy), 0 to 1."""
    known = [share for share in class_accuracies(probabilities, labels)[1] if share is not None]
    return sum(known) / len(known)


def average_precisions(scores: Tensor, truth: Tensor) -> list[float | None]:
    """Average precision of each class: the sum of precision times gain in recall over all distinct scores, descending.

    Videos with the same score are ranked together (as scikit-learn's average_precision_score).

    Args:
        scores: float [n, V].
        truth: bool [n, V], whether the video has the class.

    Returns:
        A value in 0 to 1 for each class; None for a class that no video has.
    """
    found: list[float | None] = []
    for column, has in zip(scores.T, truth.T, strict=True):
        order = column.argsort(descending=True, stable=True)
        ranked, hits = column[order], has[order].double().cumsum(0)
        last = torch.cat([ranked[1:] != ranked[:-1], torch.ones(1, dtype=torch.bool)])  # of the videos of a score
        right, seen = hits[last], torch.arange(1, len(ranked) + 1)[last]
        gained = torch.diff(right, prepend=right.new_zeros(1))
        total = float(hits[-1])
        found.append(float((right / seen * gained).sum()) / total if total else None)
    return found


def mean_average_precision(scores: Tensor, truth: Tensor) -> float:
    """Mean of `average_precisions` over the classes that videos have; 0 where no video has a class."""
    known = [value for value in average_precisions(scores, truth) if value is not None]
    return sum(known) / len(known) if known else 0.0


def r_squared(predicted: Tensor, values: Tensor) -> float:
    """Coefficient of determination of predictions [n]: 1 is exact, 0 is as good as the mean of the values.

    Where all values are the same: 1 if all predictions are exact, else 0 (as scikit-learn's r2_score).
    """
    error, spread = float((predicted - values).square().sum()), float((values - values.mean()).square().sum())
    if spread == 0:
        return float(error == 0)
    return 1 - error / spread


def confusion(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Counts the videos of each class (row) by predicted class (column): int64 [V, V].

    More than DRAWN_CLASSES classes are merged into that many groups of adjacent classes, because V² numbers would fill
    the memory.
    """
    classes = probabilities.shape[1]
    bins = min(classes, DRAWN_CLASSES)
    rows, columns = labels * bins // classes, probabilities.argmax(1) * bins // classes
    return torch.bincount(rows * bins + columns, minlength=bins**2).view(bins, bins)


def draw_confusion(matrix: Tensor, classes: Sequence[str]) -> bytes:
    """Draws the result of `confusion` as PNG, each row as shares of its videos."""
    # Imported here, because fine-tuning only counts and draws no pictures.
    from matplotlib.figure import Figure

    from mam2.engine.evaluation.plots import png

    names = [printable(name).replace("$", r"\$") for name in classes]
    shares = matrix.double() / matrix.sum(1, keepdim=True).clamp_min(1)
    named = len(classes) <= NAMED_CLASSES
    edge = max(4.0, 0.22 * len(classes)) if named else 9.0
    figure = Figure(figsize=(edge + 2.2, edge + 1.6), layout="constrained")
    axis = figure.subplots()
    picture = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    if named:
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
        axis.set_yticks(range(len(names)), names, fontsize=8)
    grouped = len(matrix) < len(classes)
    unit = f"group of about {len(classes) / len(matrix):.0f} classes" if grouped else "class"
    axis.set_xlabel(f"predicted ({unit})" if grouped else "predicted")
    axis.set_ylabel(f"true {unit}")
    figure.colorbar(picture, ax=axis, shrink=0.6, label=f"share of the {'group' if grouped else 'class'}")
    return png(figure)


def write_predictions(
    path: Path, videos: Sequence[str], labels: Tensor, probabilities: Tensor, classes: Sequence[str]
) -> None:
    """Writes a TSV with one line per video: its path, its class, whether the prediction is correct, and the five most
    probable classes with their probabilities. Raises OSError."""
    most = min(5, len(classes))
    values, ranking = probabilities.topk(most, dim=1)
    header = ["path", "class", "right", *(f"{name}{k + 1}" for k in range(most) for name in ("class", "probability"))]
    rows = [header]
    for video, label, chances, found in zip(videos, labels.tolist(), values.tolist(), ranking.tolist(), strict=True):
        cells = [video, classes[label], str(int(found[0] == label))]
        for chance, place in zip(chances, found, strict=True):
            cells += [classes[place], f"{chance:.6f}"]
        rows.append(cells)
    write_table(path, rows)
