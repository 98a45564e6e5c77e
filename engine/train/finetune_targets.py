"""Training targets of fine-tuning: converts labels of the training list, before clips are mixed.

Shapes: B clips, V outputs of the head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mam2.engine.data.manifest import Manifest


class Targets(ABC):
    """Makes the targets of a batch from the labels of its clips."""

    @abstractmethod
    def arrays(self, labels: Tensor) -> list[NDArray[Any]]:
        """Returns the arrays to copy to the device for `labels`, int64 [B] on the CPU."""

    @abstractmethod
    def on_device(self, sent: Sequence[Tensor]) -> Tensor:
        """Returns targets [B, V] float32 from the tensors of `arrays`, on their device."""


class ClassTargets(Targets):
    """One class per video: a smoothed one-hot row, times the weight of its class.

    The weight belongs to the label, not to each value of the row: a rare class with a large weight would otherwise
    attract every clip through label smoothing.
    """

    def __init__(self, classes: int, smoothing: float, weights: Sequence[float] | None = None) -> None:
        """smoothing: share of the target spread over all classes. weights: of each class; None for 1."""
        self._classes, self._smoothing = classes, smoothing
        self._weights = None if weights is None else np.asarray(weights, np.float32)

    def arrays(self, labels: Tensor) -> list[NDArray[Any]]:
        found: list[NDArray[Any]] = [labels.numpy()]
        return found if self._weights is None else [*found, self._weights[labels.numpy()]]

    def on_device(self, sent: Sequence[Tensor]) -> Tensor:
        rows = smoothed(sent[0], self._classes, self._smoothing)
        return rows if self._weights is None else rows * sent[1][:, None]


class SetTargets(Targets):
    """Several classes per video: 1 at its classes, 0 elsewhere, moved toward 0.5 by the share `smoothing`."""

    def __init__(self, places: Sequence[Sequence[int]], classes: int, smoothing: float) -> None:
        """places: of each label, the places of its classes."""
        self._places, self._classes, self._smoothing = places, classes, smoothing

    def arrays(self, labels: Tensor) -> list[NDArray[Any]]:
        rows = np.full((len(labels), self._classes), self._smoothing / 2, np.float32)
        for row, label in zip(rows, labels.tolist(), strict=True):
            row[self._places[label]] = 1 - self._smoothing / 2
        return [rows]

    def on_device(self, sent: Sequence[Tensor]) -> Tensor:
        return sent[0]


class ValueTargets(Targets):
    """A number per video, standardized: [B, 1]."""

    def __init__(self, values: Sequence[float], mean: float, std: float) -> None:
        """values: of each label. mean, std: of the values of the training videos."""
        self._values = ((np.asarray(values, np.float64) - mean) / std).astype(np.float32)

    def arrays(self, labels: Tensor) -> list[NDArray[Any]]:
        return [self._values[labels.numpy()][:, None]]

    def on_device(self, sent: Sequence[Tensor]) -> Tensor:
        return sent[0]


def smoothed(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """[B] int64 -> [B, V] float32: 1 - smoothing at the label, and smoothing spread over all classes."""
    targets = torch.full((len(labels), classes), smoothing / classes, device=labels.device)
    return targets.scatter_(1, labels[:, None], 1 - smoothing + smoothing / classes)


def balanced_weights(manifest: Manifest) -> list[float]:
    """Returns the weight of each class, inverse to its number of videos; 0 for a class without videos.

    A class with n of N videos has N / (K n), with K the number of classes that have videos: the weights of all videos
    have the mean 1 (scikit-learn's "balanced").
    """
    counts = np.bincount([video.label for video in manifest.videos], minlength=len(manifest.classes))
    present = int((counts > 0).sum())
    return [len(manifest.videos) / (present * count) if count else 0.0 for count in counts.tolist()]


def describe_weights(weights: Sequence[float], classes: Sequence[str]) -> str:
    """Returns a line for the log: the smallest and the largest weight, each with its class."""
    known = [(weight, name) for weight, name in zip(weights, classes, strict=True) if weight]
    (low, low_name), (high, high_name) = min(known), max(known)
    return f"class weights from {low:.4g} ({low_name}) to {high:.4g} ({high_name})"
