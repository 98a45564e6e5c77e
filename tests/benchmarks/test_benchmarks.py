"""The benchmarks print no number for a wrong result, and label numbers of a CPU as such."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.helpers.benchmarks import module
from tests.helpers.paths import ROOT

CPU = torch.device("cpu")


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
    assert order == ["a", "b"] * 3  # the first call is the warm-up


def operator_of(name: str) -> Any:
    return next(entry for entry in module("operators").OPERATORS if entry.name == name)


def test_a_wrong_provider_gets_no_number() -> None:
    operators, operator = module("operators"), operator_of("masked_pixel_loss")
    shape = operators.SHAPES["cpu"][0]
    right = operator.providers(shape, CPU)
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
    missing = {"broken": broken, "absent": module("check").absent("not installed")}
    providers = {"ours": right["ours"], "eager": right["eager"], **wrong, **missing}
    rows = {row["provider"]: row for row in operators.compare(operator, shape, CPU, rounds=2, providers=providers)}
    verdicts = {name: row["verdict"] for name, row in rows.items()}
    expected = {"ours": "right", "eager": "right", **dict.fromkeys(wrong, "wrong")}
    assert verdicts == {**expected, "broken": "failed", "absent": "absent"}
    assert rows["absent"]["reason"] == "not installed"
    assert rows["eager"]["ratio_to_eager"] == 1
    assert rows["ours"]["ratio_to_eager"] > 0
    for name in [*wrong, *missing]:
        assert set(rows[name]) <= {"operator", "provider", "shape", "batch", "verdict", "error", "errors", "reason"}
    assert called == 1
    assert not any("ms" in key or "per_s" in key for row in rows.values() for key in row)  # only ratios of a CPU


def test_ours_without_a_triton_launch_gets_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    operators, operator = module("operators"), operator_of("masked_pixel_loss")
    monkeypatch.setattr(operators, "fallback", lambda device, counter: "fell back to PyTorch" * (not counter.names))
    shape = operators.SHAPES["cpu"][0]
    ours, eager, *_ = operators.compare(operator, shape, CPU, compiled=False, rounds=2)
    assert (ours["verdict"], ours["reason"], ours["path"]) == ("failed", "fell back to PyTorch", "pytorch")
    assert (eager["verdict"], eager["ratio_to_eager"]) == ("right", 1)
    assert "ratio_to_eager" not in ours


def test_a_mask_with_a_token_twice_is_wrong() -> None:
    clips, bench = module("clips"), module("bench_tube_mask")
    shape = clips.SHAPES["cpu"][0]
    mask = clips.tubes(shape, CPU)
    assert bench.mask_error(shape, [mask.visible, mask.masked]) == 0
    twice = mask.masked.clone()
    twice[0, 1] = twice[0, 0]
    assert bench.mask_error(shape, [mask.visible, twice]) == 1


@pytest.mark.parametrize("index", range(2))
def test_picking_by_number_and_by_boolean(index: int) -> None:
    clips = module("clips")
    tokens = torch.arange(2 * 4 * 3 * 2).view(2, 4, 3, 2)
    numbers = torch.tensor([[0, 2], [1, 3]])
    booleans = torch.zeros(2, 4, dtype=torch.bool).scatter(1, numbers, True)
    found = clips.pick(tokens, (numbers, booleans)[index])
    assert torch.equal(found, torch.stack([tokens[0, [0, 2]], tokens[1, [1, 3]]]).flatten(2))


def test_memory_is_counted_on_a_cpu() -> None:
    peak_mib, given = module("timing").peak_mib, torch.zeros(2**18)
    assert peak_mib(lambda: given + 1, CPU) == pytest.approx(1, abs=0.01)
    assert peak_mib(lambda: [given + 1, given + 2], CPU) == pytest.approx(2, abs=0.01)
    assert peak_mib(lambda: (given + 1).sum() + (given + 2).sum(), CPU) == pytest.approx(1, abs=0.01)


def test_a_kernel_that_errs_fails_the_check() -> None:
    correctness = module("correctness")

    def verdict(*results: torch.Tensor) -> dict[str, Any]:
        """Returns the verdict on a case whose runs give `results` in turn, where 1 and 2 are right."""
        runs = iter(results)

        def run(dtype: torch.dtype, *, exact: torch.Tensor) -> list[torch.Tensor]:
            return [next(runs)]

        inputs = {"exact": torch.tensor([1.0, 2.0])}
        case = correctness.Case("case", torch.float32, inputs, run, plain=lambda dtype, exact: [exact.to(dtype)])
        return correctness.verdict(case, CPU, runs=len(results))

    right = torch.tensor([1.0, 2.0])
    assert verdict(right, right)["verdict"] == "right"
    assert verdict(torch.tensor([1.0, 2.001]))["reason"].startswith("output 0: relative error")
    assert verdict(right, right.nextafter(2 * right))["reason"] == "output 0: a repeated run gave different bits"
    assert verdict(torch.tensor([1.0, float("nan")]))["verdict"] == "wrong"
    assert verdict(right.double())["verdict"] == "wrong"


@pytest.mark.slow
def test_dry_run_goes_through_every_section_and_is_marked(tmp_path: Path) -> None:
    gpu = module("gpu")
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", tmp_path]
    before = set((ROOT / "benchmarks").rglob("*.json"))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    shown = [line for line in done.stdout.splitlines() if line.startswith("NOT a GPU result")]
    assert len(shown) == len(gpu.SECTIONS) + 1  # the tables' titles and the last line
    assert set((ROOT / "benchmarks").rglob("*.json")) == before
    (file,) = tmp_path.rglob("*.json")
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {file.name, f"{file.stem}.md"}
    assert file.parent.name == "not-a-gpu-result"
    report = json.loads(file.read_text(encoding="utf-8"))
    assert report["note"].startswith("NOT a GPU result")
    assert report["machine"]["device"] == "CPU"
    sections = report["sections"]
    assert list(sections) == list(gpu.SECTIONS)
    assert {section["status"] for section in sections.values()} == {"done"}
    assert not any("log" in section for section in sections.values())
    rows = sections["operators"]["rows"]
    assert {row["operator"] for row in rows} == {entry.name for entry in module("operators").OPERATORS}
    assert not any("median_ms" in row for row in rows)
    assert [row["at_s"] for row in rows] == sorted(row["at_s"] for row in rows)
    for row in rows:
        assert row["verdict"] == "right" or (row["verdict"] == "absent" and row["reason"]), row
    assert sections["pretrain"]["rows"][0]["verdict"] == "right"
    assert "NOT a GPU result" in file.with_suffix(".md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_bare_machine_imports_every_section_and_says_what_is_missing() -> None:
    """A GPU machine without network has only the packages of its image: torch, triton and few others."""
    missing = ["av", "matplotlib", "nvidia.dali", "safetensors", "tensorboard", "tqdm", "transformers", "tyro"]
    code = f"""
import json, sys, time
sys.modules |= dict.fromkeys({missing})
import torch
from benchmarks import bench_step, correctness, counters, gpu, operators, sections, tune
wanted = sections.Selection(dry_run=True, compiled=False)
for name in ("loader", "files", "pretrain"):
    for row in sections.rows_of(name, torch.device("cpu"), time.monotonic() + 60, wanted):
        print(json.dumps(row))
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    files, others, online, cached, run = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    for row in (files, others):
        assert (row["verdict"], row["reason"]) == ("skipped", "av is not installed")
    assert online["median_ms_per_clip"] > 0
    assert (cached["verdict"], cached["reason"]) == ("skipped", "not installed: av, tqdm")
    assert (run["verdict"], run["reason"].split(",")[0]) == ("skipped", "not installed: av")


def test_dry_run_stays_out_of_the_results() -> None:
    gpu = module("gpu")
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--dry-run", "--out", str(gpu.RESULTS / "new")])
    assert stopped.value.code == 2


def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> ModuleType:
    """benchmarks.gpu with a shell script as the program of its sections; `$FILE` is where their rows go."""
    gpu = module("gpu")
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nwhile [ "$1" != --child ]; do shift; done\nSECTION=$2 FILE=$3\n{script}\n')
    program.chmod(0o755)
    monkeypatch.setattr(gpu.sys, "executable", str(program))
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "results")
    return gpu


MACHINE = """echo '{"machine": {"device": "X"}}' > "$FILE"\n"""
RIGHT = """echo '{"check": "a", "path": "triton", "verdict": "right"}' >> "$FILE"\n"""


def test_a_dry_run_compiles_nothing_but_its_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of a dry run's time was importing torch.compile in each section, and compiling in a library."""
    row = RIGHT.replace('"path": "triton"', '"found": "\'$TORCHDYNAMO_DISABLE\'"')
    gpu = stand_in(tmp_path, monkeypatch, MACHINE + row)
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    for options, found in ((["--dry-run", "--out", str(tmp_path / "dry")], "1"), ([], "")):
        assert gpu.main([*options, "--sections", "sweeps"]) == 0
        (file,) = (tmp_path / ("dry" if options else "results")).rglob("*.json")
        assert json.loads(file.read_text(encoding="utf-8"))["sections"]["sweeps"]["rows"][0]["found"] == found
    given: list[dict[str, str]] = []
    sections = module("sections")

    marks = []

    def run(command: list[str], *, environment: dict[str, str], **options: Any) -> Any:
        given.append(environment)
        marks.append(command[command.index("-m", 3) + 1])
        return module("processes").Ended(5, 0.0)

    monkeypatch.setattr(sections.processes, "run", run)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    for slow in (False, True):
        assert next(iter(sections.smoke_rows(CPU, 0.0, slow=slow)))["verdict"] == "right"
    assert "PATH" in given[0]
    assert "TORCHDYNAMO_DISABLE" not in given[0]
    assert marks == ["not slow", "slow"]


@pytest.mark.parametrize(
    ("text", "code", "slow", "verdict"),
    [
        ("t.py::a PASSED", None, False, "wrong"),
        ("t.py::a PASSED", None, True, "skipped"),
        ("t.py::a PASSED\nt.py::b FAILED", None, True, "wrong"),
        ("t.py::a PASSED", 0, True, "right"),
    ],
)
def test_slow_tests_may_be_cut_off(
    text: str, code: int | None, slow: bool, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = module("sections")

    def run(command: list[str], *, output: Any, **options: Any) -> Any:
        output.write(text.encode())
        return module("processes").Ended(code, 50.0)

    monkeypatch.setattr(sections.processes, "run", run)
    row = next(iter(sections.smoke_rows(CPU, 0.0, slow=slow)))
    assert (row["verdict"], row["passed"]) == (verdict, 1)
    assert len(sections.failures("compile" if slow else "smoke", {"status": "done", "rows": [row]})) == (
        verdict == "wrong"
    )


def test_a_section_that_hangs_is_cut_off_and_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hangs = MACHINE + RIGHT + """printf '{"che' >> "$FILE"\nexec sleep 60"""
    gpu = stand_in(tmp_path, monkeypatch, hangs)
    monkeypatch.setitem(gpu.SECTIONS, "correctness", gpu.SECTIONS["correctness"]._replace(most=1))
    assert gpu.main(["--sections", "correctness"]) == 1  # a run with unchecked kernels fails
    (file,) = (tmp_path / "results" / "x").glob("*.json")
    section = json.loads(file.read_text(encoding="utf-8"))["sections"]["correctness"]
    assert section["status"].startswith("cut off after")
    assert [row["check"] for row in section["rows"]] == ["a"]
    assert not (tmp_path / "results" / "running.jsonl").exists()


def test_a_section_that_breaks_leaves_the_others_and_what_it_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks = MACHINE + '[ "$SECTION" = counters ] && { echo it broke; exit 7; }\n' + RIGHT + "true"
    gpu = stand_in(tmp_path, monkeypatch, breaks)
    assert gpu.main(["--sections", "smoke", "counters", "sweeps"]) == 1
    (file,) = (tmp_path / "results" / "x").glob("*.json")
    sections = json.loads(file.read_text(encoding="utf-8"))["sections"]
    assert {name: part["status"] for name, part in sections.items()} == {
        "smoke": "done", "sweeps": "done", "counters": "failed with exit status 7",
    }  # fmt: skip
    assert "it broke" in sections["counters"]["log"]


def test_sections_that_do_not_fit_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = stand_in(tmp_path, monkeypatch, MACHINE + RIGHT)
    for name in ("operators", "step"):
        monkeypatch.setitem(gpu.SECTIONS, name, gpu.SECTIONS[name]._replace(least=10_000))
    assert gpu.main(["--sections", "smoke", "step", "operators", "--seconds", "60"]) == 0
    (file,) = (tmp_path / "results" / "x").glob("*.json")
    sections = json.loads(file.read_text(encoding="utf-8"))["sections"]
    assert list(sections) == ["smoke", "operators", "step"]
    assert sections["step"]["status"].startswith("not started: ")


@pytest.mark.parametrize(
    ("name", "row", "count"),
    [
        ("correctness", {"check": "c", "verdict": "right"}, 0),
        ("correctness", {"check": "c", "verdict": "skipped", "reason": "out of time"}, 1),
        ("operators", {"operator": "o", "provider": "ours", "verdict": "wrong", "error": 0.5}, 1),
        ("operators", {"operator": "o", "provider": "compiled", "verdict": "failed", "reason": "?"}, 0),
        ("operators", {"operator": "o", "provider": "ours", "verdict": "failed", "reason": "fell back to PyTorch"}, 1),
        ("smoke", {"check": "tests/kernels/test_gpu.py", "verdict": "wrong", "reason": "2 failed"}, 1),
        ("counters", {"kernel": "all", "verdict": "skipped", "reason": "ncu is not installed"}, 0),
        ("step", {"objective": "s", "verdict": "failed", "reason": "RuntimeError: ?"}, 1),
        ("step", {"objective": "s", "verdict": "failed", "reason": "OutOfMemoryError: ?"}, 0),
        ("loader", {"decoder": "all", "verdict": "skipped", "reason": "av is not installed"}, 0),
    ],
)
def test_what_makes_a_run_fail(name: str, row: dict, count: int) -> None:
    gpu = module("gpu")
    assert len(gpu.failures(name, {"status": "done", "rows": [row]})) == count
    assert len(gpu.failures(name, {"status": "failed with exit status 1", "rows": [row]})) == count + 1


def bench(folder: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`make bench` on one operator, without what takes a compiler."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks/test_operators.py",
        "--benchmark-quiet",
        "--plots",
        str(folder),
        *options,
    ]
    command += ["-k", "gather_tubes and not compiled"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", **variables}
    environment.pop("PYTEST_XDIST_WORKER", None)  # pytest-benchmark measures nothing if it finds xdist
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_bench_prints_ratios_and_draws(tmp_path: Path) -> None:
    done = bench(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("| gather_tubes")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [line[1] for line in cells] == ["ours", "eager"]
    assert float(cells[1][2]) == 1
    if not torch.cuda.is_available():
        assert "only ratios are meaningful" in done.stdout
        assert " ms " not in done.stdout
    assert {file.name for file in tmp_path.iterdir()} == {"time-against-batch.png", "roofline.png"}


@pytest.mark.slow
def test_bench_prints_no_number_behind_a_red_gate(tmp_path: Path) -> None:
    plugin = "import benchmarks.check\nbenchmarks.check.BUDGET = dict.fromkeys(benchmarks.check.BUDGET, -1.0)\n"
    (tmp_path / "no_budget.py").write_text(plugin)
    done = bench(tmp_path / "plots", "-p", "no_budget", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    lines = [line for line in done.stdout.splitlines() if line.startswith("| operator") or "| wrong" in line]
    assert len(lines) == 3
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == ["operator", "provider", "error", "verdict"]
    assert "no plots: nothing was timed" in done.stdout
    assert not (tmp_path / "plots").exists()


def gpu_rows() -> list[dict[str, Any]]:
    ceilings = {"operator": "ceilings", "copy_gb_per_s": 4000.0, "matmul_tflop_per_s": 700.0}
    names, providers = ("gather_tubes", "masked_pixel_loss"), ("ours", "eager")
    rows = [{"operator": o, "provider": p, "batch": b} for o in names for p in providers for b in (8, 64)]
    measured = {"median_ms": 0.5, "flops_per_byte": 2.0, "percent_of_matmul": 1.0}
    return [ceilings, *({**row, **measured} for row in rows), {**rows[0], "verdict": "wrong", "error": 1.0}]


def test_plots_of_a_gpu(tmp_path: Path) -> None:
    report = module("report")
    assert "roofline.png" in report.draw(gpu_rows(), tmp_path / "new", machine="X")
    for name in ("time-against-batch", "roofline"):
        assert (tmp_path / "new" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_no_plots_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = module("report")
    assert report.draw(gpu_rows()[:1], tmp_path, machine="X") == "no plots: nothing was timed"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.draw(gpu_rows(), tmp_path, machine="X") == "no plots: matplotlib is not installed"
    assert not list(tmp_path.iterdir())


def test_table_leaves_out_empty_columns() -> None:
    rows = [{"a": "x", "c": 0.12345}, {"a": "longer", "c": 12345.6}]
    expected = "| a      | c     |\n| ------ | ----- |\n| x      | 0.123 |\n| longer | 12346 |"
    assert module("report").table(rows, ("a", "b_b", "c")) == expected
    assert module("report").table([], ("a",)) == ""


@pytest.mark.slow
def test_accuracy_of_every_type(capsys: pytest.CaptureFixture[str]) -> None:
    assert module("accuracy").main(["--tiny"]) == 0
    shown = capsys.readouterr().out
    for operator in module("operators").OPERATORS:
        assert shown.count(f"| {operator.name} ") == len(operator.dtypes)
