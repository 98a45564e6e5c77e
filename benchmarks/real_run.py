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
    """Steps between two checkpoints until the run is killed, and between two lines of the log."""
    flags: tuple[str, ...]


PLANS = {
    # not compiled: that takes minutes, and the section "step" times it; with a tokenizer that is trained in seconds
    "cuda": Plan(
        *("mam2-fast", 64, 40, 10),
        (
            *("--optim.batch", "64", "--data.stride", "1", "--run.no-compile"),
            *("--tokenizer.steps", "5", "--tokenizer.codes", "256", "--tokenizer.channels", "16"),
        ),
    ),
    "cpu": Plan(
        "demo", 16, 16, 4, ("--optim.batch", "8", "--run.no-compile", "--tokenizer.steps", "2", "--run.device", "cpu")
    ),
}


def command(plan: Plan, data: Path, run: Path, *, saved_every: int) -> list[str]:
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
    flags += ["--run.save-every", str(saved_every), "--run.log-every", str(plan.saved_every)]
    program = [sys.executable, "-m", "mam2.engine", "pretrain", plan.recipe, "--data", str(data), "--out", str(run)]
    return [*program, "--resume", *flags]


def rows(device: torch.device, deadline: float) -> Iterator[dict[str, Any]]:
    """Yields one row: whether a killed run resumed from its checkpoint and reached its last step with a finite loss.

    On a GPU it has the rates of the last line of the log, whose steps neither start nor save anything.
    """
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
        # the resumed run saves only at its end
        commands = [command(plan, data / "train", run, saved_every=every) for every in (plan.saved_every, plan.steps)]
        yield row | _killed_and_resumed(commands, run, plan, device, deadline)


def _killed_and_resumed(
    commands: list[list[str]], run: Path, plan: Plan, device: torch.device, deadline: float
) -> dict[str, Any]:
    """Runs the first command until its first checkpoint, then the second; returns the rest of the row."""
    with tempfile.TemporaryFile() as output:

        def go(command: list[str], stop: Any) -> processes.Ended:
            return processes.run(
                command, limit=lambda: 0.0 if stop() else deadline, cwd=ROOT, environment=os.environ, output=output
            )

        def said() -> str:
            output.seek(0)
            return output.read().decode(errors="replace")[-300:].strip()

        killed = go(commands[0], lambda: _saved(run))
        if killed.code is not None:
            return {"verdict": "wrong", "reason": f"it ended with exit status {killed.code}: {said()}"}
        if not _saved(run):
            return {"verdict": "skipped", "reason": f"out of time before the first checkpoint: {said()}"}
        first = _log(run)
        start = _saved(run)
        ended = go(commands[1], lambda: False)
        text = said()
    lines = _log(run)
    found: dict[str, Any] = {"killed_after": first[-1]["step"] if first else 0, "resumed_from": start}
    found |= {"start_s": killed.seconds, "resumed_s": ended.seconds}
    found |= rates(lines[-1]) if lines and device.type == "cuda" else {}
    if ended.code is None:
        last = lines[-1]["step"] if lines else 0
        return found | {"verdict": "skipped", "reason": f"out of time after resuming, step {last}: {text}"}
    if ended.code != 0 or not lines or lines[-1]["step"] != plan.steps:
        last = lines[-1]["step"] if lines else 0
        return found | {"verdict": "wrong", "reason": f"exit status {ended.code}, step {last}: {text}"}
    found["loss"] = sum(value for name, value in lines[-1].items() if name in ("loss/appearance", "loss/motion"))
    finite = found["loss"] == found["loss"] and abs(found["loss"]) < float("inf")
    return found | ({"verdict": "right"} if finite else {"verdict": "wrong", "reason": "the loss is not finite"})


def rates(line: dict[str, Any]) -> dict[str, Any]:
    """Returns the rates in a line of a run's log and the milliseconds of each phase of a step ("host/…", "device/…").

    The first line of a process has only the wait for data.
    """
    names = ("clips_per_s", "step_ms", "mfu")
    found = {name: value for name, value in line.items() if name in names or name.startswith(("host/", "device/"))}
    return {"log_step": line["step"], **found, "data_wait_percent": 100 * line["data_wait"]}


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
