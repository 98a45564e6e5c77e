"""The two pictures of the convergence page."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from benchmarks.trials.intervals import paired
from benchmarks.trials.selection import (
    CHANCE,
    CURVES,
    JUDGED,
    METHODS,
    Axis,
    Measure,
    Results,
    Trial,
    ablations_of,
    by_epochs,
    cost,
    grouped,
    trials_of,
    values,
)

STYLES: dict[str, dict[str, Any]] = {
    "mam2-muon": {"color": "C3", "linestyle": "-"},
    "mam2": {"color": "C3", "linestyle": "--"},
    "videomae-muon": {"color": "C0", "linestyle": "-"},
    "videomae": {"color": "C0", "linestyle": "--"},
}
AXES: dict[Axis, tuple[str, float]] = {
    "epochs": ("epochs of pre-training", 1),
    "seconds": ("seconds, preparation counted", 1),
    "flops": ("TFLOP, preparation counted", 1e12),
}
"""Label and unit."""
VERDICTS: dict[str | None, dict[str, Any]] = {
    "better": {"color": "C0"},
    "worse": {"color": "C3"},
    None: {"color": "0.35", "markerfacecolor": "white"},
}
SEED: dict[str, Any] = {
    "marker": "o",
    "markersize": 4,
    "markeredgecolor": "white",
    "markeredgewidth": 0.6,
    "linestyle": "none",
    "zorder": 3,
}
QUESTIONS: dict[Measure, str] = {"probe": "what moves how (motion)", "shape": "what it is (shape)"}
WIDTH = 11
"""Inches; with fonts of 10 points legible down to 1100 pixels."""


def draw(results: Results, path: Path) -> None:
    """PNG of accuracy against epochs, seconds and FLOPs: a row for each measure, a line for each method.

    Nothing is drawn without trials of the group "main".
    """
    trials = trials_of(results, "main")
    measures = [measure for measure in CURVES if values(trials, measure)]
    if not measures:
        return
    figure = Figure(figsize=(WIDTH, 3.1 * len(measures) + 0.5), layout="constrained")
    panels = figure.subplots(len(measures), len(AXES), sharex="col", sharey="row", squeeze=False)
    for row, measure in zip(panels, measures, strict=True):
        for axes, axis in zip(row, AXES, strict=True):
            _panel(axes, results, trials, measure, axis)
        row[0].set_ylabel(f"{QUESTIONS[measure]}, %")
    for axes, (label, _) in zip(panels[-1], AXES.values(), strict=True):
        axes.set_xlabel(label)
    handles, labels = panels[0, 1].get_legend_handles_labels()
    # matplotlib lists those with error bars, the methods, last
    entries = sorted(zip(handles, labels, strict=True), key=lambda entry: not isinstance(entry[0], ErrorbarContainer))
    figure.legend(*zip(*entries, strict=True), loc="outside upper center", ncols=len(entries), frameon=False)
    figure.savefig(path, dpi=150)


def _panel(axes: Axes, results: Results, trials: list[Trial], measure: Measure, axis: Axis) -> None:
    scale = AXES[axis][1]
    for (variant,), mine in grouped(trials, "variant").items():
        cells = by_epochs(mine, measure).values()
        style, name = STYLES.get(variant, {"color": "C2"}), METHODS.get(variant, variant)
        means = [100 * statistics.fmean(values(cell, measure)) for cell in cells]
        places = [statistics.fmean(cost(trial, axis) for trial in cell) / scale for cell in cells]
        axes.errorbar(places, means, [_spread(cell, measure) for cell in cells], **style, capsize=3, label=name)
        if axis == "seconds" and any(trial["preparation_s"] for trial in mine):
            places = [statistics.fmean(cost(trial, "training_seconds") for trial in cell) for cell in cells]
            axes.plot(places, means, **{**style, "linestyle": ":"}, linewidth=0.9, label="_without preparation")
        for trial in (trial for cell in cells for trial in cell):
            axes.plot(cost(trial, axis) / scale, 100 * trial[measure], color=style["color"], **SEED)
    _references(axes, results, measure)
    axes.set_xscale("log", base=2 if axis == "epochs" else 10)
    if axis == "epochs":
        budgets = sorted({trial["epochs"] for trial in trials})
        axes.set_xticks(budgets, [f"{budget:g}" for budget in budgets])
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _references(axes: Axes, results: Results, measure: Measure) -> None:
    random = values([trial for trial in results.get("random", []) if trial["data"] == "synthetic"], measure)
    if random:
        axes.axhline(100 * statistics.fmean(random), color="gray", linestyle="--", label=METHODS["random"])
    axes.axhline(100 / CHANCE[measure], color="gray", linestyle=":", label="chance")


def _spread(cell: list[Trial], key: str) -> float:
    """Percent; 0 of a single seed."""
    sample = values(cell, key)
    return 100 * statistics.stdev(sample) if len(sample) > 1 else 0.0


def draw_ablations(results: Results, path: Path) -> None:
    """PNG of every ablation's probe accuracy on validation clips and of the default's, by family.

    Nothing is drawn without a changed setting.
    """
    default, changed = ablations_of(results)
    if not changed:
        return
    reference = {trial["seed"]: trial[JUDGED] for trial in default}
    families = grouped(changed, "family")
    count = sum(1 + len(grouped(family, "label")) for family in families.values())
    figure = Figure(figsize=(WIDTH, 0.27 * count + 1.4), layout="constrained")
    axes = figure.add_subplot()
    if reference:
        middle, spread = 100 * statistics.fmean(reference.values()), _spread(default, JUDGED)
        axes.axvspan(middle - spread, middle + spread, color="C2", alpha=0.2, label="the default: mean ± spread")
        axes.axvline(middle, color="C2")
    ticks: list[tuple[int, str]] = []
    headings: list[int] = []
    for (family,), members in families.items():
        headings.append(len(ticks))
        ticks.append((len(ticks), family))
        for (label,), cell in grouped(members, "label").items():
            _ablation(axes, len(ticks), cell, reference)
            ticks.append((len(ticks), label))
    axes.set_yticks(*zip(*ticks, strict=True))
    for place in headings:
        axes.get_yticklabels()[place].set_fontweight("bold")
        axes.axhline(place, color="black", alpha=0.12, linewidth=0.8)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(ticks) - 0.3, -0.7)
    axes.set_xlabel(f"{QUESTIONS['probe']} on validation clips, %")
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    for verdict, style in VERDICTS.items():
        axes.plot([], [], "o", label=f"clearly {verdict}" if verdict else "neither", **style)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)


def _ablation(axes: Axes, place: int, cell: list[Trial], reference: dict[int, float]) -> None:
    scores = values(cell, JUDGED)
    difference = paired({trial["seed"]: trial[JUDGED] for trial in cell}, reference)
    style = VERDICTS[difference.verdict if difference else None]
    middle = 100 * statistics.fmean(scores)
    axes.plot([100 * score for score in scores], [place] * len(scores), color="0.35", **SEED)
    axes.errorbar(middle, place, xerr=_spread(cell, JUDGED), fmt="o", capsize=3, **style)
