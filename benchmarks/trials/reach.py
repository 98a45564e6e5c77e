"""What one method needs to reach the best accuracy of another."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.trials.intervals import LEVEL
from benchmarks.trials.selection import Axis, Measure, Results, by_epochs, cost, trials_of

DRAWS = 2000


@dataclass(frozen=True, kw_only=True)
class Reach:
    """Costs are in the unit of the axis: epochs, seconds or FLOPs."""

    goal: float
    """The highest mean accuracy over the other method's budgets, 0 to 1."""
    spent: float
    """What the other method's budget with that accuracy costs."""
    best: float
    """The highest mean accuracy over the method's budgets."""
    budget: float
    """What the method's largest budget costs."""
    needed: float | None
    """What the method needs to reach the goal; None: none of its budgets does."""
    at_most: bool
    """The smallest budget reaches the goal already, so that `needed` and `ratio` are upper bounds."""
    ratio: float | None
    """needed / spent."""
    interval: tuple[float, float] | None
    """95 % of the ratios of the draws, where a draw that never reaches its goal has the ratio inf.

    None with fewer than two seeds of either method.
    """
    smallest_ratio: float
    """The smallest budget's cost / spent: in the interval, too, this ratio is an upper bound."""
    never: float
    """Share of the draws where no budget reaches the goal."""


def reach(
    results: Results, measure: Measure, axis: Axis, *, method: str = "mam2", other: str = "videomae"
) -> Reach | None:
    """What `method` needs of `axis` to reach the highest mean accuracy of `other`'s budgets, over that budget's cost.

    Not that of its largest budget: a method may be worse there, and then the ratio would flatter the other one.

    The method's mean accuracy is interpolated linearly in log2(epochs) between its budgets, and the first crossing
    counts; its cost is interpolated linearly in epochs. The interval resamples the seeds of both methods; a seed keeps
    its results at all budgets. A seed without a result at one of the budgets is left out.

    Returns:
        None where one of the two was not measured.
    """
    trials = trials_of(results, "main")
    curves = [by_epochs((trial for trial in trials if trial["variant"] == name), measure) for name in (method, other)]
    mine, theirs = ([{trial["seed"]: trial[measure] for trial in cell} for cell in curve.values()] for curve in curves)
    best = max(range(len(theirs)), key=lambda place: statistics.fmean(theirs[place].values()), default=0)
    scores, goals = _matrix(mine), _matrix(theirs[best : best + 1])
    if not scores.size or not goals.size:
        return None
    epochs = list(curves[0])
    costs = [statistics.fmean(cost(trial, axis) for trial in cell) for cell in curves[0].values()]
    spent = statistics.fmean(cost(trial, axis) for trial in list(curves[1].values())[best])

    means, goal = scores.mean(0), goals.mean()
    place = _crossing(epochs, means, goal)
    needed = None if math.isinf(place) else float(np.interp(place, epochs, costs))

    generator = np.random.default_rng(0)
    drawn = scores[generator.integers(len(scores), size=(DRAWS, len(scores)))].mean(1)
    drawn_goals = goals[generator.integers(len(goals), size=(DRAWS, len(goals)))].mean((1, 2))
    places = np.array([_crossing(epochs, *draw) for draw in zip(drawn, drawn_goals, strict=True)])
    ratios = np.sort(np.where(np.isinf(places), math.inf, np.interp(places, epochs, costs) / spent))
    tail = round((1 - LEVEL) / 2 * DRAWS)
    return Reach(
        goal=float(goal),
        spent=spent,
        best=float(means.max()),
        budget=costs[-1],
        needed=needed,
        at_most=place == epochs[0],
        ratio=None if needed is None else needed / spent,
        interval=(float(ratios[tail]), float(ratios[-1 - tail])) if min(len(scores), len(goals)) > 1 else None,
        smallest_ratio=costs[0] / spent,
        never=float(np.isinf(places).mean()),
    )


def _matrix(budgets: Sequence[dict[int, float]]) -> np.ndarray:
    """[seeds, budgets]: accuracies of the seeds that every budget has."""
    seeds = sorted(set.intersection(*map(set, budgets))) if budgets else []
    return np.array([[accuracy[seed] for accuracy in budgets] for seed in seeds])


def _crossing(epochs: Sequence[float], means: np.ndarray, goal: float) -> float:
    """Epochs at which the curve first is at the goal; the first budget where it starts there, inf where it never is."""
    for place, mean in enumerate(means):
        if mean < goal:
            continue
        if place == 0:
            return epochs[0]
        before = math.log2(epochs[place - 1])
        share = (goal - means[place - 1]) / (mean - means[place - 1])
        return 2 ** (before + share * (math.log2(epochs[place]) - before))
    return math.inf
