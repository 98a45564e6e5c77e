"""Plots the log of one run, or the logs of several runs in the same axes."""

from __future__ import annotations

import io
import itertools
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mam2.engine.errors import UserError
from mam2.engine.files import write_whole
from mam2.engine.runtime.log import read_log

Lines = Sequence[Mapping[str, Any]]
"""Lines of a log, as returned by `mam2.engine.runtime.log.read_log`."""


class Panel(NamedTuple):
    title: str
    columns: dict[str, str]
    """Columns of the log with their names; an empty name for a single column."""
    percent: bool = False
    logarithmic: bool = False
    reference: float | None = None
    """Value of a dotted line."""


PANELS = (
    Panel("appearance loss", {"loss/appearance": ""}),
    Panel(
        "motion loss",
        {"loss/motion": "of the step", "loss/motion_peak": "largest since the last line"},
        logarithmic=True,
    ),
    Panel("motion loss / loss of predicting no motion", {"loss/motion_relative": ""}, reference=1),
    Panel(
        "correct codes (%)",
        {"accuracy/codes": "model", "accuracy/commonest_code": "most frequent code of the step"},
        percent=True,
    ),
    Panel("pixel loss", {"loss/pixels": ""}),
    Panel("alignment loss", {"loss/alignment": ""}),
    Panel("effective rank of the teacher's features", {"teacher/rank": ""}, logarithmic=True),
    Panel("standard deviation of the teacher's features", {"teacher/deviation": ""}),
    Panel(
        "gradient norm at the regressor's output",
        {"gradient/appearance": "appearance", "gradient/motion": "motion"},
        logarithmic=True,
    ),
    Panel("held-out loss, all together", {"validation/loss": ""}),
    Panel("held-out motion loss / that of no motion", {"validation/motion_relative": ""}, reference=1),
    Panel(
        "held-out correct codes (%)",
        {"validation/codes": "model", "validation/commonest_code": "most frequent code"},
        percent=True,
    ),
    Panel("held-out pixel loss / that of the mean color", {"validation/pixels_relative": ""}, reference=1),
    Panel("held-out feature error / that of predicting 0", {"validation/latents_relative": ""}, reference=1),
    Panel("classification loss", {"loss/training": "training (soft targets)", "loss/validation": "validation"}),
    Panel(
        "validation accuracy (%)",
        {
            "accuracy/validation": "top 1",
            "accuracy/validation_top5": "top 5",
            "accuracy/validation_mean_class": "mean over classes",
        },
        percent=True,
    ),
    Panel("validation mean average precision (%)", {"map/validation": ""}, percent=True),
    Panel("validation mean absolute error", {"mae/validation": ""}),
    Panel("validation R²", {"r2/validation": ""}, reference=0),
    Panel("gradient norm", {"gradient/norm": ""}, logarithmic=True),
    Panel("learning rate", {"learning_rate": ""}),
    Panel("clips per second", {"clips_per_s": ""}),
    Panel("waiting for data (% of the time)", {"data_wait": ""}, percent=True),
    Panel("model FLOPs utilization (%)", {"mfu": ""}, percent=True),
    Panel("memory (GiB)", {"memory_gib": ""}),
)
STYLES: tuple[Literal["-", "--", ":"], ...] = ("-", "--", ":")
"""Line styles of the columns of one panel; colors distinguish runs."""
PAUSE = 5
"""A step that took this many times the median follows a pause: the run was stopped and resumed."""


def draw_logs(logs: Mapping[str, Lines], *, against: Sequence[Literal["step", "hours"]] = ("step",)) -> bytes:
    """Draws the logs as PNG, with one panel per quantity that at least one of them has.

    Args:
        logs: lines of each run by its name.
        against: quantity of the x-axis; two quantities draw each panel twice, side by side.

    Raises:
        ValueError: no log has any of the quantities.
    """
    panels = [
        panel
        for panel in PANELS
        if any(name in line for log in logs.values() for line in log for name in panel.columns)
    ]
    if not panels:
        raise ValueError("logs: expected lines with at least one of the quantities that are drawn, found none")
    columns = min(len(panels), 3) if len(against) == 1 else 2 * min(len(panels), 2)
    rows = -(-len(panels) * len(against) // columns)
    figure = Figure(figsize=(3.3 * columns, 2.3 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    places = [(panel, over) for panel in panels for over in against]
    for axis in axes.flat[len(places) :]:
        axis.axis("off")
    for axis, (panel, over) in zip(axes.flat, places, strict=False):
        _draw_panel(axis, panel, logs, over)
    if len(logs) > 1:
        handles = [Line2D([], [], color=f"C{number}", label=name) for number, name in enumerate(logs)]
        figure.legend(handles=handles, loc="outside upper center", ncols=min(len(logs), 4), frameon=False)
    return png(figure)


def _draw_panel(axis: Any, panel: Panel, logs: Mapping[str, Lines], over: Literal["step", "hours"]) -> None:
    several = len(logs) > 1
    for number, lines in enumerate(logs.values()):
        places = [line["step"] for line in lines] if over == "step" else hours(lines)
        for index, (column, label) in enumerate(panel.columns.items()):
            points = [(place, line[column]) for place, line in zip(places, lines, strict=True) if column in line]
            if not points:
                continue
            x, y = zip(*points, strict=True)
            values = [100 * value for value in y] if panel.percent else y
            style = {"color": f"C{number}", "linestyle": STYLES[index]} if several else {"color": f"C{index}"}
            # a single point would have no visible line
            axis.plot(x, values, label=label, linewidth=1.3, marker="." if len(x) == 1 else None, **style)
    if panel.reference is not None:
        axis.axhline(panel.reference, color="gray", linewidth=0.8, linestyle=":")
    if panel.logarithmic:
        axis.set_yscale("log")
    if any(panel.columns.values()):
        labels = list(panel.columns.values())
        styles = STYLES[: len(labels)]
        names = [Line2D([], [], color="gray", linestyle=style) for style in styles] if several else None
        axis.legend(*((names, labels) if names else ()), frameon=False, fontsize=8)
    axis.set_title(panel.title, fontsize=10)
    axis.set_xlabel(over, fontsize=8)
    axis.tick_params(labelsize=8, which="both")
    axis.spines[["top", "right"]].set_visible(False)


def hours(lines: Lines) -> list[float]:
    """Returns the hours of training up to each line; the time between a stop and a resume is excluded."""
    gaps = [
        (after["step"] - before["step"], after["time"] - before["time"]) for before, after in itertools.pairwise(lines)
    ]
    usual = statistics.median(seconds / steps for steps, seconds in gaps) if gaps else 0.0
    passed = [0.0]
    for steps, seconds in gaps:
        # a clock that was set back, or lines of another process of the run, must not reduce the time
        paused = not 0 <= seconds <= PAUSE * usual * steps
        passed.append(passed[-1] + (usual * steps if paused else seconds) / 3600)
    return passed[: len(lines)]


def png(figure: Any) -> bytes:
    """Returns a figure as PNG."""
    buffer = io.BytesIO()
    # tight, because the layout can leave too little space for a long label next to pictures of a fixed aspect
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
    return buffer.getvalue()


def plot(
    runs: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    against: Literal["step", "hours", "both"] = "both",
) -> Path:
    """Draws the curves of one run, or of several in the same axes; returns the picture's path.

    Args:
        runs: run folders; an active run is plotted up to its current step.
        out: output file, PNG; None: curves.png in the folder of a single run, runs.png here for several.
        against: quantity of the x-axis; hours exclude the time between a stop and a resume.

    Raises:
        UserError: a folder has no log, or the file cannot be written.
    """
    folders, target = tuple(map(Path, runs)), Path(out) if out else None
    if not runs:
        raise UserError("plot: expected at least one run folder: mam2 plot RUN [RUN …] --out FILE")
    if target and target.suffix.lower() != ".png":
        raise UserError(f"--out {target}: expected a name that ends in .png")
    logs = {}
    for folder in folders:
        if not (folder / "log.jsonl").is_file():
            raise UserError(
                f"{folder} contains no log.jsonl: expected run folders, those passed to pretrain with --out"
            )
        logs[_name(folder, folders)] = read_log(folder)
    try:
        picture = draw_logs(logs, against=("step", "hours") if against == "both" else (against,))
    except ValueError:
        raise UserError(
            f"{', '.join(map(str, runs))}: no log line yet; the first comes after run.log_every steps"
        ) from None
    file = target or (folders[0] / "curves.png" if len(runs) == 1 else Path("runs.png"))
    try:
        write_whole(file, picture)
    except OSError as error:
        raise UserError(f"--out {file}: cannot be written: {error.strerror}") from None
    return file


def _name(folder: Path, runs: tuple[Path, ...]) -> str:
    """Returns a run's name: its path relative to the common folder of all runs."""
    absolute = [path.resolve() for path in runs]
    if len(set(absolute)) == 1:
        return folder.resolve().name
    return str(folder.resolve().relative_to(os.path.commonpath(absolute)))
