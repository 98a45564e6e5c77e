"""Labels that are not one class: several classes per video, separated by `;`, or a number to predict.

A manifest keeps the text of such a label as its class. The functions here parse these texts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mam2.engine.data.manifest import Manifest
from mam2.engine.errors import UserError

SEPARATOR = ";"
"""Between the classes of one video."""
MOST_NAMED = 3
"""Classes that an error lists."""


def names_in(text: str) -> list[str]:
    """Returns the classes that a label names, each once."""
    return list(dict.fromkeys(name for part in text.split(SEPARATOR) if (name := part.strip())))


def check_one_class(manifest: Manifest, source: str | Path) -> None:
    """Raises UserError for labels of which some are whole numbers and others are not: they are not single classes."""
    whole = next((name for name in manifest.classes if name.isdecimal()), None)
    other = next((name for name in manifest.classes if not name.isdecimal()), None)
    if whole is not None and other is not None:
        raise UserError(
            f"{source}: has the labels {whole!r} and {other!r}; one class per video needs only whole numbers or only "
            "names: set head.task multi-label or regression, or correct the labels"
        )


def names_of_all(manifest: Manifest) -> tuple[str, ...]:
    """Returns the names of all classes in the labels, in order; numbers in the order of their values."""
    names = {name for text in manifest.classes for name in names_in(text)}
    return tuple(sorted(names, key=int) if all(name.isdecimal() for name in names) else sorted(names))


def class_places(manifest: Manifest, source: str | Path, classes: Sequence[str]) -> list[list[int]]:
    """Returns the places in `classes` of the classes of each label of a manifest.

    Raises UserError for a class that is not among them.
    """
    places = {name: place for place, name in enumerate(classes)}
    found = []
    for text in manifest.classes:
        names = names_in(text)
        unknown = next((name for name in names if name not in places), None)
        if unknown is not None:
            raise UserError(
                f"{source}: the class {unknown!r} is not one of the {len(classes)} classes of the training "
                f"({', '.join(classes[:MOST_NAMED])}, …); lists for training and test must use the same class names"
            )
        found.append([places[name] for name in names])
    return found


def values_of(manifest: Manifest, source: str | Path) -> list[float]:
    """Returns the number of each label of a manifest. Raises UserError for a label that is not a number."""
    values = []
    for text in manifest.classes:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise UserError(f"{source}: the label {text!r} is not a number; regression expects one number per video")
        values.append(value)
    return values


def true_classes(manifest: Manifest, source: str | Path, classes: Sequence[str], videos: Sequence[int]) -> Tensor:
    """Returns bool [n, V]: which of `classes` each of the videos at `videos` in a manifest has."""
    places = class_places(manifest, source, classes)
    truth = torch.zeros(len(videos), len(classes), dtype=torch.bool)
    for row, video in enumerate(videos):
        truth[row, places[manifest.videos[video].label]] = True
    return truth


def true_values(manifest: Manifest, source: str | Path, videos: Sequence[int]) -> Tensor:
    """Returns float64 [n]: the number of each of the videos at `videos` in a manifest."""
    values = values_of(manifest, source)
    return torch.tensor([values[manifest.videos[video].label] for video in videos], dtype=torch.float64)
