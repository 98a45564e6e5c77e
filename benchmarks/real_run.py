"""Runs a real `mam2 pretrain` on encoded clips: kills it after its first checkpoint, then resumes it to its end."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import processes
from benchmarks.machine import ROOT

NEEDS = ("av", "tyro", "tqdm", "safetensors", "tensorboard", "matplotlib")


class Plan(NamedTuple):
    """The plan of a run: its recipe, clips and steps, and when it is killed."""

    recipe: str
    clips: int
    steps: int
    saved_every: int
    flags: tuple[str, ...]


PLANS = {
    # not compiled: that takes minutes, and the section "step" times it
    "cuda": Plan(
        *("mam2-fast", 128, 150, 50),
        ("--optim.batch", "64", "--data.stride", "1", "--run.no-compile", "--tokenizer.steps", "50"),
    ),
    "cpu": Plan(
        "demo", 16, 16, 4, ("--optim.batch", "8", "--run.no-compile", "--tokenizer.steps", "2", "--run.device", "cpu")
    ),
}


def command(plan: Plan, data: Path, run: Path) -> list[str]:
    """Returns the command of the run; it resumes if there is a checkpoint."""
    batch = int(plan.flags[plan.flags.index("--optim.batch") + 1])
    epochs = plan.steps * batch / plan.clips
    flags = [
        *plan.flags,
        "--data.views",
        "1",
        "--optim.epochs",
        f"{epochs:g}",
        "--optim.warmup-epochs",
        f"{epochs / 4:g}",
    ]
    flags += ["--run.save-every", str(plan.saved_every), "--run.log-every", "1"]
    program = [sys.executable, "-m", "mam2.engine", "pretrain", plan.recipe, "--data", str(data), "--out", str(run)]
    return [*program, "--resume", *flags]


def rows(device: torch.device, deadline: float) -> Iterator[dict[str, Any]]:
    """Yields one row: whether a killed run resumed from its checkpoint and reached its last step with a finite loss."""
    plan = PLANS[device.type]
    row: dict[str, Any] = {"run": plan.recipe, "steps": plan.steps}
    missing = [package for package in NEEDS if importlib.util.find_spec(package) is None]
    if missing:
        yield row | {"verdict": "skipped", "reason": f"not installed: {', '.join(missing)}"}
        return
    from mam2.engine.data.synthetic import write_dataset

    with tempfile.TemporaryDirectory() as folder:
        data, run = Path(folder) / "data", Path(folder) / "run"
        write_dataset(data, train=plan.clips, test=0, progress=False)
        yield row | _killed_and_resumed(command(plan, data / "train", run), run, plan, device, deadline)


def _killed_and_resumed(
    command: list[str], run: Path, plan: Plan, device: torch.device, deadline: float
) -> dict[str, Any]:
    with tempfile.TemporaryFile() as output:

        def go(stop: Any) -> processes.Ended:
            return processes.run(
                command, limit=lambda: 0.0 if stop() else deadline, cwd=ROOT, environment=os.environ, output=output
            )

        def said() -> str:
            output.seek(0)
            return output.read().decode(errors="replace")[-300:].strip()

        killed = go(lambda: _saved(run))
        if killed.code is not None:
            return {"verdict": "wrong", "reason": f"it ended with exit status {killed.code}: {said()}"}
        if not _saved(run):
            return {"verdict": "skipped", "reason": f"out of time before the first checkpoint: {said()}"}
        first = _log(run)
        start = _saved(run)
        ended = go(lambda: False)
        text = said()
    if ended.code is None:
        return {"killed_after": first[-1]["step"], "verdict": "skipped", "reason": "out of time after resuming"}
    found: dict[str, Any] = {"killed_after": first[-1]["step"] if first else 0, "resumed_from": start}
    lines = _log(run)
    if ended.code != 0 or not lines or lines[-1]["step"] != plan.steps:
        last = lines[-1]["step"] if lines else 0
        return found | {"verdict": "wrong", "reason": f"exit status {ended.code}, step {last}: {text}"}
    found["loss"] = sum(value for name, value in lines[-1].items() if name in ("loss/appearance", "loss/motion"))
    if device.type == "cuda":
        found["clips_per_s"] = lines[-1].get("clips_per_s")
    finite = found["loss"] == found["loss"] and abs(found["loss"]) < float("inf")
    return found | ({"verdict": "right"} if finite else {"verdict": "wrong", "reason": "the loss is not finite"})


def _saved(run: Path) -> int:
    """Returns the step of the newest complete checkpoint; 0 if there is none."""
    steps = [int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*")]
    return max(steps, default=0)


def _log(run: Path) -> list[dict[str, Any]]:
    """Returns the complete lines of the run's log."""
    found = []
    file = run / "log.jsonl"
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if "step" in entry:
            found.append(entry)
    return found
