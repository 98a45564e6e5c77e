"""Targets and validation measures of fine-tuning, for each `head.task`.

Shapes: n validation videos, V outputs of the head.
"""

from __future__ import annotations

import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mam2.engine.config.finetune import FinetuneConfig
from mam2.engine.data.label_texts import class_places, true_classes, true_values, values_of
from mam2.engine.data.manifest import Manifest
from mam2.engine.evaluation.accuracy import mean_average_precision, mean_class_accuracy, r_squared, top_k
from mam2.engine.train.finetune_targets import (
    ClassTargets,
    SetTargets,
    Targets,
    ValueTargets,
    balanced_weights,
    describe_weights,
)

ACCURACY = "accuracy/validation"
MEAN_CLASS = "accuracy/validation_mean_class"
LOSS = "loss/validation"
MAP, MAE, R2 = "map/validation", "mae/validation", "r2/validation"
VALUE = "value"
"""Name of the only output in regression, in place of class names."""


class LabelTask(ABC):
    """A kind of labels, for one run."""

    measure: str
    """Name in the log of the measure whose largest value RUN/best keeps."""

    def __init__(self, config: FinetuneConfig, classes: tuple[str, ...]) -> None:
        """classes: names in the order of the head's outputs."""
        self.config, self.classes = config, classes

    @abstractmethod
    def targets(self, manifest: Manifest, source: str | Path, info: Callable[[str], None]) -> Targets:
        """Returns the targets of the training videos. info: takes lines for the log."""

    @abstractmethod
    def measures(self, scores: Tensor, manifest: Manifest, places: list[int]) -> dict[str, float]:
        """Returns numbers for the log.

        scores: float64 [n, V], the outputs of the trained model for the videos at the indices `places` in a manifest;
        in regression standardized values.
        """

    @abstractmethod
    def describe(self, found: dict[str, float]) -> str:
        """Returns a text for the log about the result of `measures`."""


class ClassTask(LabelTask):
    def __init__(self, config: FinetuneConfig, classes: tuple[str, ...]) -> None:
        super().__init__(config, classes)
        self.measure = ACCURACY if config.test.best == "top1" else MEAN_CLASS

    def targets(self, manifest: Manifest, source: str | Path, info: Callable[[str], None]) -> Targets:
        weights = None
        if self.config.head.class_weights == "balanced":
            weights = balanced_weights(manifest)
            info(describe_weights(weights, manifest.classes))
        return ClassTargets(len(self.classes), self.config.augment.label_smoothing, weights)

    def measures(self, scores: Tensor, manifest: Manifest, places: list[int]) -> dict[str, float]:
        labels = torch.tensor([manifest.videos[place].label for place in places])
        own = scores.gather(1, labels[:, None])
        return {
            ACCURACY: float(top_k(scores, labels, 1).double().mean()),
            "accuracy/validation_top5": float(top_k(scores, labels, 5).double().mean()),
            MEAN_CLASS: mean_class_accuracy(scores, labels),
            LOSS: float(-own.clamp_min(1e-30).log().mean()),
        }

    def describe(self, found: dict[str, float]) -> str:
        return (
            f"top-1 {found[ACCURACY]:.2%}, top-5 {found['accuracy/validation_top5']:.2%}, "
            f"mean over classes {found[MEAN_CLASS]:.2%}"
        )


class SetTask(LabelTask):
    measure = MAP

    def targets(self, manifest: Manifest, source: str | Path, info: Callable[[str], None]) -> Targets:
        places = class_places(manifest, source, self.classes)
        return SetTargets(places, len(self.classes), self.config.augment.label_smoothing)

    def measures(self, scores: Tensor, manifest: Manifest, places: list[int]) -> dict[str, float]:
        truth = true_classes(manifest, "", self.classes, places)
        right = torch.where(truth, scores, 1 - scores)
        return {MAP: mean_average_precision(scores, truth), LOSS: float(-right.clamp_min(1e-30).log().mean())}

    def describe(self, found: dict[str, float]) -> str:
        return f"mean average precision {found[MAP]:.2%}"


class ValueTask(LabelTask):
    measure = R2

    def targets(self, manifest: Manifest, source: str | Path, info: Callable[[str], None]) -> Targets:
        model = self.config.model
        info(f"regression: the numbers have the mean {model.target_mean:.6g}, deviation {model.target_std:.6g}")
        return ValueTargets(values_of(manifest, source), model.target_mean, model.target_std)

    def measures(self, scores: Tensor, manifest: Manifest, places: list[int]) -> dict[str, float]:
        model, values = self.config.model, true_values(manifest, "", places)
        predicted = scores[:, 0] * model.target_std + model.target_mean
        error = predicted - values
        standardized = error / model.target_std
        squared = self.config.head.loss == "mse"
        return {
            R2: r_squared(predicted, values),
            MAE: float(error.abs().mean()),
            LOSS: float((standardized.square() if squared else standardized.abs()).mean()),
        }

    def describe(self, found: dict[str, float]) -> str:
        return f"mean absolute error {found[MAE]:.4g}, R² {found[R2]:.4f}"


TASKS: dict[str, type[LabelTask]] = {"classes": ClassTask, "multi-label": SetTask, "regression": ValueTask}


def standard(manifest: Manifest, source: str | Path) -> tuple[float, float]:
    """Returns mean and standard deviation of the numbers of a manifest's videos; 1 if all are equal."""
    values = values_of(manifest, source)
    own = [values[video.label] for video in manifest.videos]
    return statistics.fmean(own), statistics.pstdev(own) or 1.0
