"""`mam2 plot`: plots the logs of runs, also of active ones."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from mam2.engine.commands.options import run_verb


def run(arguments: list[str]) -> int:
    def plot(
        runs: tyro.conf.Positional[tuple[Path, ...]],
        out: Path | None = None,
        against: Literal["step", "hours", "both"] = "both",
    ) -> int:
        """Plot losses, code accuracy, gradient norms, rates and memory of one run, or compare several.

        Args:
            runs: run folders; an active run is plotted up to its current step.
            out: output file, PNG; default: curves.png in the folder of a single run, runs.png here for several.
            against: quantity of the x-axis; hours exclude the time between a stop and a resume.
        """
        from mam2.engine.evaluation.plots import plot

        print(plot(runs, out, against=against))
        return 0

    return run_verb(plot, arguments, "plot")
