"""`mam2 plot`: the logs of runs as curves, also while they run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import tyro

from mam2.engine.errors import UserError


def run(arguments: list[str]) -> int:
    def plot(
        runs: tyro.conf.Positional[tuple[Path, ...]],
        out: Path | None = None,
        against: Literal["step", "hours", "both"] = "both",
    ) -> int:
        """Draw losses, code accuracy, gradient norms, rates and memory of one run, or compare several.

        Args:
            runs: run folders; a run that is still going on is drawn as far as it is.
            out: the picture, PNG; curves.png in the folder of a single run, runs.png here for several.
            against: what the curves are drawn over; hours leave out the time between a stop and a resume.
        """
        from mam2.engine.evaluation.plots import draw_logs
        from mam2.engine.runtime.log import read_log

        if not runs:
            raise UserError("plot: name at least one run folder: mam2 plot RUN [RUN …] --out FILE")
        if out and out.suffix.lower() != ".png":
            raise UserError(f"--out {out}: expected a name that ends in .png")
        logs = {}
        for folder in runs:
            if not (folder / "log.jsonl").is_file():
                raise UserError(
                    f"{folder} holds no log.jsonl: name run folders, the ones that pretrain was given with --out"
                )
            logs[_name(folder, runs)] = read_log(folder)
        try:
            picture = draw_logs(logs, against=("step", "hours") if against == "both" else (against,))
        except ValueError:
            raise UserError(
                f"{', '.join(map(str, runs))}: nothing has been logged yet; run.log_every says when"
            ) from None
        file = out or (runs[0] / "curves.png" if len(runs) == 1 else Path("runs.png"))
        try:
            file.write_bytes(picture)
        except OSError as error:
            raise UserError(f"--out {file}: cannot be written: {error.strerror}") from None
        print(file)
        return 0

    return tyro.cli(plot, args=arguments, prog="mam2 plot")


def _name(folder: Path, runs: tuple[Path, ...]) -> str:
    """What tells a run from the others: its path below the folder that all have in common."""
    absolute = [path.resolve() for path in runs]
    if len(set(absolute)) == 1:
        return folder.resolve().name
    return str(folder.resolve().relative_to(os.path.commonpath(absolute)))
