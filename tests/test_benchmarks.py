"""The benchmarks print no number for what is wrong, and none of a CPU as a GPU's."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _repository_root_can_be_imported() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        yield


def module(name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.{name}")


def test_percentile_and_ratios() -> None:
    timing = module("timing")
    assert timing.percentile([3, 1, 2], 50) == 2
    assert timing.percentile([1, 2, 3, 4], 50) == 2.5
    assert timing.percentile(range(11), 20) == 2
    assert timing.percentile([7], 80) == 7
    with pytest.raises(ValueError, match="at least one"):
        timing.percentile([], 50)
    timings = {"eager": timing.summary([4.0, 8.0, 6.0]), "ours": timing.summary([2.0, 3.0, 1.0])}
    assert timings["eager"].p20_ms < timings["eager"].median_ms == 6 < timings["eager"].p80_ms
    assert timing.ratios(timings, "eager") == {"eager": 1, "ours": 3}
    assert timing.ratios({"ours": timings["ours"]}, "eager") == {"ours": None}


def test_rounds_are_interleaved() -> None:
    order: list[str] = []
    calls = {name: [lambda name=name: order.append(name)] for name in ("a", "b")}
    module("timing").interleaved(calls, CPU, rounds=2)
    assert order == ["a", "b"] * 3  # the first time to warm up


def test_a_wrong_provider_gets_no_number() -> None:
    operators = module("operators")
    operator = next(entry for entry in operators.OPERATORS if entry.name == "masked_pixel_loss")
    shape = operators.SHAPES["cpu"][0]
    right = operator.providers(shape)
    called = 0

    def off(**inputs: torch.Tensor) -> torch.Tensor:
        nonlocal called
        called += 1
        return right["ours"](**inputs) * 1.01

    def wrong_gradient(pred: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        return right["ours"](pred=pred.detach() + 0.9 * (pred - pred.detach()), **inputs)

    def broken(**inputs: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    nothing = {"nan": lambda **inputs: right["ours"](**inputs) * float("nan")}
    wrong = {"off": off, "wrong_gradient": wrong_gradient, **nothing}
    providers = {"ours": right["ours"], "eager": right["eager"], **wrong, "broken": broken}
    rows = {row["provider"]: row for row in operators.compare(operator, shape, CPU, rounds=2, providers=providers)}
    verdicts = {name: row["verdict"] for name, row in rows.items()}
    assert verdicts == {"ours": "right", "eager": "right", **dict.fromkeys(wrong, "wrong"), "broken": "failed"}
    assert rows["eager"]["ratio_to_eager"] == 1
    assert rows["ours"]["ratio_to_eager"] > 0
    for name in [*wrong, "broken"]:
        assert set(rows[name]) <= {"operator", "provider", "shape", "verdict", "error", "reason"}
    assert called == 1
    assert not any("ms" in key or "per_s" in key for row in rows.values() for key in row)  # a CPU's ratios only


def test_a_mask_with_a_token_twice_is_wrong() -> None:
    operators = module("operators")
    shape = operators.SHAPES["cpu"][0]
    mask = operators.mask(shape, CPU)
    assert operators.mask_error(shape, [mask.visible, mask.masked]) == 0
    twice = mask.masked.clone()
    twice[0, 1] = twice[0, 0]
    assert operators.mask_error(shape, [mask.visible, twice]) == 1


def test_a_kernel_that_errs_fails_the_check() -> None:
    correctness = module("correctness")
    name, run, exact, _ = correctness.mask_case(CPU, 0, 0, 0, 5, 3)
    assert correctness.verdict(correctness.Case(name, run, exact))["verdict"] == "right"
    assert correctness.verdict(correctness.Case(name, run, exact[::-1]))["verdict"] == "wrong"
    half = [torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 2.001], dtype=torch.float64)]
    row = correctness.verdict(correctness.Case("off", lambda: half[0], half[1]))
    assert (row["verdict"], row["reason"][:24]) == ("wrong", "output 0: relative error")
    unsteady = iter([torch.tensor([1.0]), torch.tensor([1.0000001])])
    row = correctness.verdict(correctness.Case("race", lambda: [next(unsteady)], [torch.ones(1).double()]))
    assert row["reason"] == "output 0: a second run gave other bits"


def test_dry_run_is_marked(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--no-compile", "--sections", "operators"]
    before = set((ROOT / "benchmarks").rglob("*.json"))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--out", tmp_path], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    shown = [line for line in done.stdout.splitlines() if line.startswith("NOT a GPU result")]
    assert len(shown) == 2  # the table's title and the last line
    assert set((ROOT / "benchmarks").rglob("*.json")) == before
    (file,) = tmp_path.rglob("*.json")
    assert file.parent.name == "not-a-gpu-result"
    report = json.loads(file.read_text(encoding="utf-8"))
    assert report["note"].startswith("NOT a GPU result")
    assert report["machine"]["device"] == "CPU"
    rows = report["sections"]["operators"]["rows"]
    assert {row["operator"] for row in rows} == {entry.name for entry in module("operators").OPERATORS}
    assert all(row["verdict"] == "right" and "median_ms" not in row for row in rows)


def test_dry_run_stays_out_of_the_results() -> None:
    gpu = module("gpu")
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--dry-run", "--out", str(gpu.RESULTS / "new")])
    assert stopped.value.code == 2


def test_a_section_that_hangs_is_cut_off_and_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = module("gpu")
    program = tmp_path / "python"
    program.write_text(
        '#!/bin/sh\n{ echo \'{"machine": {"device": "X"}}\'; echo \'{"check": "a", "path": "triton", '
        '"verdict": "right"}\'; printf \'{"che\'; } > "$5"\nexec sleep 60\n'
    )
    program.chmod(0o755)
    monkeypatch.setattr(gpu.sys, "executable", str(program))
    monkeypatch.setitem(gpu.SECONDS, "correctness", 1)
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "results")
    assert gpu.main(["--sections", "correctness"]) == 1  # unchecked kernels are no success
    (file,) = (tmp_path / "results" / "x").glob("*.json")
    section = json.loads(file.read_text(encoding="utf-8"))["sections"]["correctness"]
    assert section["status"] == "cut off after 1 s"
    assert [row["check"] for row in section["rows"]] == ["a"]


@pytest.mark.parametrize(
    ("name", "row", "count"),
    [
        ("correctness", {"check": "c", "verdict": "right"}, 0),
        ("correctness", {"check": "c", "verdict": "skipped", "reason": "out of time"}, 1),
        ("operators", {"operator": "o", "provider": "ours", "verdict": "wrong", "error": 0.5}, 1),
        ("operators", {"operator": "o", "provider": "compiled", "verdict": "failed", "reason": "?"}, 0),
        ("step", {"objective": "s", "verdict": "failed", "reason": "RuntimeError: ?"}, 1),
        ("step", {"objective": "s", "verdict": "failed", "reason": "OutOfMemoryError: ?"}, 0),
        ("loader", {"front_end": "all", "verdict": "skipped", "reason": "av is not installed"}, 0),
    ],
)
def test_what_makes_a_run_fail(name: str, row: dict, count: int) -> None:
    gpu = module("gpu")
    assert len(gpu.failures(name, {"status": "done", "rows": [row]})) == count
    assert len(gpu.failures(name, {"status": "failed with exit status 1", "rows": [row]})) == count + 1
