"""The 95 % interval of a difference between trainings of the same seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np

LEVEL = 0.95
GRID = 20_001
NO_SPREAD = 1e-12
"""Differences of accuracies that are as near as that are the same but for rounding."""


class Difference(NamedTuple):
    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> Literal["better", "worse", None]:
        """None where the interval holds 0."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else None


def paired(values: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """Mean difference over the seeds that both have, with the interval of the paired t; both: by seed.

    None where no interval can be given: fewer than two seeds in common, or no spread.
    """
    seeds = sorted(values.keys() & reference.keys())
    differences = [values[seed] - reference[seed] for seed in seeds]
    if len(seeds) < 2 or statistics.stdev(differences) < NO_SPREAD:
        return None
    mean = statistics.fmean(differences)
    half = t_quantile(len(seeds) - 1) * statistics.stdev(differences) / math.sqrt(len(seeds))
    return Difference(mean, mean - half, mean + half)


def t_quantile(freedom: float) -> float:
    """The t that 95 % of a Student distribution lie within ±t of; freedom: of 1 or more, not only whole.

    With t = √freedom · tan(angle) the density becomes cos(angle) ** (freedom − 1), which a grid integrates.
    """
    angles = np.linspace(0, math.pi / 2, GRID)
    density = np.maximum(np.cos(angles), 0) ** (freedom - 1)
    cumulated = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(freedom) * math.tan(np.interp(LEVEL * cumulated[-1], cumulated, angles))
