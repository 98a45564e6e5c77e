"""The section `pretrain`: a run that is killed after its first checkpoint, and what its row tells."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

RATES = {"clips_per_s": 640.0, "step_ms": 100.0, "mfu": 0.3, "host/wait_ms": 2.0, "device/step_ms": 98.0}
LINE = {**RATES, "data_wait": 0.25, "loss/appearance": 5.0, "loss/motion": 1.0}
"""A line of a run's log."""


@pytest.fixture
def bench() -> ModuleType:
    return importlib.import_module("benchmarks.real_run")


def row_of(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str, last: int, code: int | None
) -> tuple[dict[str, Any], list[list[str]]]:
    """Returns the row of a run that is killed at step 4 and, when resumed, logs step `last` and ends with `code`."""
    plan, run, started = bench.PLANS["cpu"], tmp_path / "run", []

    def pretend(command: list[str], *, limit: Any, **_: Any) -> Any:
        started.append(command)
        (run / "checkpoints" / "step-00000004").mkdir(parents=True, exist_ok=True)
        with (run / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps({"step": last if len(started) > 1 else 4, **LINE}) + "\n")
        assert limit() == (100.0 if len(started) > 1 else 0.0)
        return bench.processes.Ended(code if len(started) > 1 else None, 5.0)

    monkeypatch.setattr(bench.processes, "run", pretend)
    commands = [bench.command(plan, tmp_path, run, saved_every=every) for every in (plan.saved_every, plan.steps)]
    return bench._killed_and_resumed(commands, run, plan, torch.device(device), 100.0), started


def test_the_row_has_the_rates_of_the_last_line_of_the_log(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    row, commands = row_of(bench, monkeypatch, tmp_path, "cuda", last=16, code=0)
    assert row == {
        "killed_after": 4, "resumed_from": 4, "start_s": 5.0, "resumed_s": 5.0, "verdict": "right", "loss": 6.0,
        "log_step": 16, "data_wait_percent": 25.0, **RATES,
    }  # fmt: skip
    saved = [command[command.index("--run.save-every") + 1] for command in commands]
    assert saved == ["4", "16"], "the resumed run writes no checkpoint among the steps whose rate is told"


def test_a_run_that_is_out_of_time_tells_how_far_it_came(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    row, _ = row_of(bench, monkeypatch, tmp_path, "cuda", last=12, code=None)
    assert (row["verdict"], row["log_step"], row["step_ms"]) == ("skipped", 12, 100.0)
    assert row["reason"].startswith("out of time after resuming, step 12")


def test_a_cpu_gets_no_rate(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    row, _ = row_of(bench, monkeypatch, tmp_path, "cpu", last=16, code=0)
    assert (row["verdict"], set(row) & set(RATES)) == ("right", set())


def test_the_first_line_of_a_process_has_no_rate(bench: ModuleType) -> None:
    assert bench.rates({"step": 1, "data_wait": 0.5}) == {"log_step": 1, "data_wait_percent": 50.0}
