"""Formats rows of results as text and as plots."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
COLORS = {"ours": "C3", "eager": "C7", "compiled": "C0", "torch": "C1", "liger": "C2", "cut": "C4"}


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Returns an aligned Markdown table of the columns that are not empty; "" without rows."""
    shown = [column for column in columns if any(row.get(column) is not None for row in rows)]
    if not shown:
        return ""
    cells = [[column.replace("_", " ") for column in shown], *([_cell(row.get(c)) for c in shown] for row in rows)]
    widths = [max(len(line[place]) for line in cells) for place in range(len(shown))]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "" if value is None else str(value)


def draw(rows: Sequence[Row], folder: Path, *, machine: str, note: str = "") -> str:
    """Draws time against batch and the roofline into `folder`; returns a line with their paths or why there are none.

    `rows` are those of `operators.rows` on a GPU; a row may have "relative_time" instead of "median_ms".
    """
    if importlib.util.find_spec("matplotlib") is None:
        return "no plots: matplotlib is not installed"
    timed = [row for row in rows if "median_ms" in row or "relative_time" in row]
    peaks = next((row for row in rows if row.get("operator") == "ceilings"), None)
    if not timed or not peaks:
        return "no plots: nothing was timed"
    folder.mkdir(parents=True, exist_ok=True)
    title = f"{machine}{f' ({note})' if note else ''}"
    files = [folder / "time-against-batch.png", folder / "roofline.png"]
    _time_against_batch(timed, files[0], title)
    _roofline(timed, peaks, files[1], title)
    return "plots: " + ", ".join(map(str, files))


def _time_against_batch(rows: Sequence[Row], file: Path, title: str) -> None:
    """Draws one panel per operator with one line per provider."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    names = list(dict.fromkeys(row["operator"] for row in rows))
    key = "median_ms" if "median_ms" in rows[0] else "relative_time"
    label = "ms per call" if key == "median_ms" else "time (eager, largest batch: 1)"
    columns = min(len(names), 4)
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * lines + 0.6), layout="constrained")
    batches = sorted({row["batch"] for row in rows})
    for place, name in enumerate(names):
        axes = figure.add_subplot(lines, columns, place + 1)
        for provider in dict.fromkeys(row["provider"] for row in rows):
            mine = sorted(
                (row["batch"], row[key]) for row in rows if (row["operator"], row["provider"]) == (name, provider)
            )
            if mine:
                axes.plot(*zip(*mine, strict=True), marker="o", label=provider, color=COLORS.get(provider))
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, map(str, batches))
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set(title=name, xlabel="clips per batch", ylabel=label)
        axes.grid(which="both", alpha=0.25)
        axes.legend(fontsize=8)
    figure.suptitle(f"Time against batch, forward and backward: {title}")
    figure.savefig(file, dpi=110)


def _roofline(rows: Sequence[Row], peaks: Row, file: Path, title: str) -> None:
    """Draws the rate over operations per declared byte, all providers at the largest batch; ours have filled marks."""
    from matplotlib.figure import Figure

    largest = max(row["batch"] for row in rows)
    shown = [row for row in rows if row["batch"] == largest and row.get("percent_of_matmul")]
    ridge = 1000 * peaks["matmul_tflop_per_s"] / peaks["copy_gb_per_s"]
    intensities = [ridge, *(row["flops_per_byte"] for row in shown)]
    left, right = min(intensities) / 4, max(intensities) * 8
    figure = Figure(figsize=(8.5, 5.5), layout="constrained")
    axes = figure.add_subplot()
    roof = "ceilings measured in the same run"
    axes.plot([left, ridge, right], [100 * left / ridge, 100, 100], color="black", label=roof)
    for name, marker in zip(dict.fromkeys(row["operator"] for row in shown), itertools.cycle("osD^vPX*")):
        axes.plot([], [], marker, color="black", label=name)
        for row in (row for row in shown if row["operator"] == name):
            color = COLORS.get(row["provider"], "black")
            face = color if row["provider"] == "ours" else "none"
            place = row["flops_per_byte"], row["percent_of_matmul"]
            axes.plot(*place, marker, color=color, markerfacecolor=face, markersize=8)
    for provider in dict.fromkeys(row["provider"] for row in shown):
        axes.plot([], [], color=COLORS.get(provider, "black"), linewidth=6, label=provider)
    axes.set(xscale="log", yscale="log", ylabel="rate, % of a large matrix product's")
    axes.set(xlabel="operations per declared byte (FLOP/B)", title=f"Roofline at batch {largest}: {title}")
    axes.grid(which="both", alpha=0.25)
    axes.legend(fontsize=8, loc="lower right", ncols=2)
    figure.savefig(file, dpi=110)
