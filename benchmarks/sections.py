"""The sections of `make gpu`: their time limits, and the rows that each yields."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import processes
from benchmarks.machine import ROOT, describe

Row = dict[str, Any]
SHARE = 0.9
"""Share of a section's time after which it starts nothing new."""
TESTS = "tests/kernels/test_gpu.py"
CASES = "test_every_case_is_right_on_the_gpu"
"""The test of TESTS that repeats the section "correctness"."""
NO_COMPILER = "TORCHDYNAMO_DISABLE"
"""Environment variable of torch with which torch.compile returns functions unchanged."""


class Limits(NamedTuple):
    """Time limits of a section in seconds, counted after torch is imported and the device has answered."""

    most: int
    least: int
    """The section does not start if less time is left."""


SECTIONS = {
    "smoke": Limits(60, 20),
    "correctness": Limits(110, 30),
    "operators": Limits(110, 30),
    "sweeps": Limits(75, 25),
    "counters": Limits(60, 20),
    "step": Limits(110, 40),
    "variants": Limits(90, 25),
    "videomae": Limits(110, 40),
    "loader": Limits(60, 15),
    "pretrain": Limits(90, 40),
    "files": Limits(60, 20),
    "mam2-cae": Limits(60, 40),
    "compile": Limits(150, 30),
}
"""The most important first, because a time limit cuts off the end."""
COLUMNS = {
    "smoke": ("check", "passed", "failed", "skipped", "verdict", "reason"),
    "correctness": ("check", "error", "verdict", "reason"),
    "operators": (
        *("operator", "shape", "provider", "verdict", "error", "median_ms", "forward_ms", "backward_ms", "launched_ms"),
        *("unit_upstream_ms", "replayed", "percent_of_copy", "forward_percent_of_copy", "backward_percent_of_copy"),
        *("gb_per_s", "percent_of_matmul", "ratio_to_eager", "times_of_ours", "peak_mib", "kernels", "dispatch_us"),
        *("first_call_s", "copy_gb_per_s", "matmul_tflop_per_s", "reason"),
    ),
    "sweeps": ("tuned", "block", "present", "best", "present_ms", "best_ms", "candidates_ms", "verdict", "reason"),
    "counters": (
        *("kernel", "us", "registers", "read_mb", "written_mb", "percent_of_dram", "percent_of_issue"),
        *("percent_of_warps", "sectors_per_load", "verdict", "reason"),
    ),
    "step": (
        *("objective", "batch", "precision", "provider", "step", "timed", "verdict", "loss", "median_ms", "p20_ms"),
        *("p80_ms", "clips_per_s", "mfu_percent", "ratio", "ratio_to_best", "peak_gib", "part", "forward_ms"),
        *("backward_ms", "percent", "percent_of_flops", "launches", "attention", "reason"),
    ),
    "loader": (
        *("decoder", "files", "gop", "threads", "views", "batch", "clips_per_s", "frames_per_s", "ratio_to_pyav_alone"),
        *("data_wait_percent", "limit", "tokenizer", "codes", "median_ms_per_clip"),
        *("host_ms_per_clip", "verdict", "reason"),
    ),
    "pretrain": (
        *("run", "steps", "killed_after", "resumed_from", "start_s", "resumed_s", "log_step", "clips_per_s", "step_ms"),
        *("data_wait_percent", "loss", "verdict", "reason"),
    ),
}
COLUMNS |= {
    "compile": COLUMNS["smoke"],
    "files": COLUMNS["loader"],
    "variants": COLUMNS["operators"],
    "videomae": COLUMNS["step"],
    "mam2-cae": COLUMNS["step"],
}


@dataclass(frozen=True)
class Selection:
    """The selection on the command line."""

    dry_run: bool
    compiled: bool
    operators: tuple[str, ...] = ()
    """Names of operators; empty: all. The same holds for the other fields."""
    shapes: tuple[str, ...] = ()
    """Parts of a shape's text, such as "B64" or "planar"."""
    ways: tuple[str, ...] = ()
    """Providers of operators; variants of a step and their providers, and its "parts"."""
    objectives: tuple[str, ...] = ()
    """Objectives of the section "step"."""

    def takes(self, choice: str, text: str) -> bool:
        """Returns whether a name or text of a `choice` ("operators", "shapes", "ways", "objectives") is selected."""
        given = getattr(self, choice)
        return not given or any(word in text if choice == "shapes" else word == text for word in given)


def run_section(name: str, file: Path, until: float, wanted: Selection) -> int:
    """Runs a section in its process: writes the machine to `file`, then every row as soon as it is measured.

    "at_s" of a row is its time in seconds since the section's start-up. `until` is the time.monotonic() at which the
    whole command ends. Returns the exit status.
    """
    import torch

    from mam2.kernels import active_path

    if not wanted.dry_run and not torch.cuda.is_available():
        print("torch sees no GPU; --dry-run runs the same on the CPU", file=sys.stderr)
        return 2
    device = torch.device("cpu" if wanted.dry_run else "cuda")
    torch.ones(1, device=device).sum().item()  # initialize the device before the clock starts
    with file.open("a", encoding="utf-8") as stream:

        def write(row: Row) -> None:
            stream.write(json.dumps(tidy(row)) + "\n")
            stream.flush()

        write({"machine": describe(device)})
        if not wanted.dry_run and active_path(device) != "triton":
            print(f"the kernels would run through {active_path(device)}: unset MAM2_KERNELS", file=sys.stderr)
            return 2
        deadline = min(time.monotonic() + SHARE * SECTIONS[name].most, until - 3)
        began = time.monotonic()
        for row in rows_of(name, device, deadline, wanted):
            write(row | {"at_s": time.monotonic() - began})
    return 0


def rows_of(name: str, device: Any, deadline: float, wanted: Selection) -> Iterator[Row]:
    """Yields the rows of a section until `deadline` (time.monotonic)."""
    if name in ("smoke", "compile"):
        yield from smoke_rows(device, deadline, slow=name == "compile")
    elif name == "correctness":
        from benchmarks import correctness

        yield from correctness.rows(device, deadline)
    elif name in ("operators", "variants"):
        from benchmarks import operators

        yield from operators.rows(device, deadline, wanted, variants=name == "variants")
    elif name == "sweeps":
        from benchmarks import tune

        yield from tune.sweep_rows(device, deadline)
    elif name == "counters":
        from benchmarks import counters

        yield from counters.rows(device, deadline)
    elif name == "loader":
        from benchmarks import bench_loader, loader_settings

        yield from bench_loader.rows(device, deadline, loader_settings.DRY_RUN if wanted.dry_run else None)
    elif name == "files":
        from benchmarks import bench_loader, bench_tokenizer, loader_settings

        yield from bench_loader.file_rows(device, deadline, loader_settings.DRY_RUN if wanted.dry_run else None)
        yield from bench_tokenizer.rows(device, deadline)
    elif name == "pretrain":
        from benchmarks import real_run

        yield from real_run.rows(device, deadline)
    else:
        from benchmarks import bench_step

        steps = ("mam2-fast", "mam2-fast half decoded", "mam2-fast bfloat16 residual", "mam2-fast heads of 128")
        objectives = [step for step in steps if wanted.takes("objectives", step)] if name == "step" else (name,)
        yield from bench_step.rows(device, deadline, wanted, objectives=objectives)


def smoke_rows(device: Any, deadline: float, *, slow: bool = False) -> Iterator[Row]:
    """Yields one row of counts for tests/kernels/test_gpu.py, and one per failed test.

    slow: the tests with the mark `slow`, most of which compile; else the others. Slow ones that are cut off count as
    skipped. pytest runs without tests/conftest.py, which imports packages that a GPU machine may lack.
    """
    row: Row = {"check": f"{TESTS}, slow" if slow else TESTS}
    if not (ROOT / TESTS).is_file():
        yield row | {"verdict": "skipped", "reason": f"{TESTS} is not in this checkout"}
        return
    command = [sys.executable, "-m", "pytest", TESTS, "--noconftest", "-p", "no:cacheprovider", "-o"]
    command += ["addopts=--import-mode=importlib", "-v", "--tb=short", "--deselect", f"{TESTS}::{CASES}"]
    command += ["-m", "slow" if slow else "not slow"]
    if device.type == "cuda":  # the tests' CPU variants check nothing new here
        command += ["-k", "not cpu"]
    environment = {name: value for name, value in os.environ.items() if name != NO_COMPILER}  # the tests compile
    with tempfile.TemporaryFile() as output:
        ended = processes.run(command, limit=lambda: deadline, cwd=ROOT, environment=environment, output=output)
        output.seek(0)
        text = output.read().decode(errors="replace")
    print(text[-4000:], flush=True)
    found = re.findall(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)", text, re.MULTILINE)
    counts = {word: sum(verdict == word for _, verdict in found) for word in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    bad = counts["FAILED"] + counts["ERROR"]
    row |= {"passed": counts["PASSED"], "failed": bad, "skipped": counts["SKIPPED"]}
    checked = counts["PASSED"] or device.type != "cuda"
    reason = ""
    if bad:
        reason = f"{bad} failed"
    elif ended.code is None:
        reason = f"cut off after {ended.seconds:.0f} s"
    elif ended.code not in (0, 5):  # 5: no test was collected
        reason = f"pytest ended with exit status {ended.code}"
    elif not checked:
        reason = "no test ran on the GPU"
    late = slow and ended.code is None and not bad
    yield row | ({"verdict": "skipped" if late else "wrong", "reason": reason} if reason else {"verdict": "right"})
    for test, verdict in found:
        if verdict in ("FAILED", "ERROR"):
            yield {"check": test, "verdict": "wrong", "reason": verdict.lower()}


def tidy(value: Any) -> Any:
    """Rounds floats to six digits; NaN and infinities, which JSON lacks, become words."""
    if isinstance(value, dict):
        return {key: tidy(item) for key, item in value.items()}
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value


def failures(name: str, section: dict[str, Any]) -> list[str]:
    """Returns why a run fails: a failed section, a wrong or unchecked kernel, a fallback, an error in our code."""
    rows: Sequence[Row] = section["rows"]
    status = section["status"]
    gate = name == "correctness"
    late_is_fine = status.startswith(("cut off", "not started")) and not gate
    bad = [] if status == "done" or late_is_fine else [status]
    for row in rows:
        verdict = row.get("verdict", "right")
        ours = gate or row.get("provider", "ours") == "ours"
        late = verdict == "skipped" and not gate
        too_large = row.get("reason", "").startswith("OutOfMemoryError")
        if ours and verdict not in ("right", "absent") and not late and not too_large:
            keys = ("check", "operator", "objective", "decoder", "tokenizer", "tuned", "kernel", "run")
            label = next(str(row[key]) for key in keys if key in row)
            bad.append(f"{label}: {verdict} {row.get('reason', row.get('error', ''))}")
    return bad
