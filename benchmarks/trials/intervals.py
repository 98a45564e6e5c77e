"""Intervals at 95 %: of a difference between two means, and of a share of a few videos."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

LEVEL = 0.95
GRID = 20_001


class Difference(NamedTuple):
    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> Literal["better", "worse", None]:
        """None where the interval holds 0."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else None


def welch(values: Sequence[float], reference: Sequence[float]) -> Difference | None:
    """Mean of `values` minus that of `reference`, with the interval of Welch's t.

    Both are taken as independent samples: where a seed shifts both alike, the interval is too wide rather than too
    narrow. None where no interval can be given: fewer than two of either, or no spread in both.
    """
    if min(len(values), len(reference)) < 2:
        return None
    parts = [statistics.variance(sample) / len(sample) for sample in (values, reference)]
    if not sum(parts):
        return None
    sizes = len(values), len(reference)
    freedom = sum(parts) ** 2 / sum(part**2 / (size - 1) for part, size in zip(parts, sizes, strict=True))
    difference = statistics.fmean(values) - statistics.fmean(reference)
    half = t_quantile(freedom) * math.sqrt(sum(parts))
    return Difference(difference, difference - half, difference + half)


def t_quantile(freedom: float) -> float:
    """The t that 95 % of a Student distribution lie within ±t of; freedom: of 1 or more, not only whole.

    With t = √freedom · tan(angle) the density becomes cos(angle) ** (freedom − 1), which a grid integrates.
    """
    angles = np.linspace(0, math.pi / 2, GRID)
    density = np.maximum(np.cos(angles), 0) ** (freedom - 1)
    cumulated = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(freedom) * math.tan(np.interp(LEVEL * cumulated[-1], cumulated, angles))


def wilson(share: float, count: int) -> tuple[float, float]:
    """Interval (low, high) of a share, 0 to 1, of `count` independent videos (Wilson's score interval)."""
    z = statistics.NormalDist().inv_cdf((1 + LEVEL) / 2)
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return middle - half, middle + half
