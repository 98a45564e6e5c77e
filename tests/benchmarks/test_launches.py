"""Launches are counted, a fallback to PyTorch is an error, and kernels are compiled ahead of launches."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from mam2.kernels import launch
from tests.helpers.paths import ROOT

CPU = torch.device("cpu")


def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes launch.run_kernel do nothing, and every device one on which Triton should run."""
    monkeypatch.setattr(launch, "run_kernel", lambda *_, **__: None)
    monkeypatch.setenv("MAM2_KERNELS", "triton")


def test_launches_are_counted_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = importlib.import_module("benchmarks.launches")
    launched(monkeypatch)
    with launches.counted() as counter:
        torch.ops.mam2.scale_gradient(torch.ones(2, 3), torch.ones(2))
    assert counter.names == ["scale_gradient"]
    assert launches.fallback(CPU, counter) == ""
    assert launch.run_kernel(None, 1) is None  # the original function


def test_a_case_without_a_launch_fell_back(monkeypatch: pytest.MonkeyPatch) -> None:
    correctness = importlib.import_module("benchmarks.correctness")
    launched(monkeypatch)

    def run(dtype: torch.dtype, *, x: torch.Tensor) -> list[torch.Tensor]:
        return [x.to(dtype) + 1]

    case = correctness.Case("plain", torch.float32, {"x": torch.ones(2)}, run)
    monkeypatch.setattr(correctness, "cases", lambda device: iter([case]))
    (row,) = correctness.rows(CPU, float("inf"))
    assert (row["verdict"], row["path"]) == ("wrong", "pytorch")
    assert row["reason"].startswith("fell back to PyTorch")
    monkeypatch.setenv("MAM2_KERNELS", "pytorch")
    (row,) = correctness.rows(CPU, float("inf"))
    assert row["verdict"] == "right"


@pytest.mark.slow
def test_kernels_are_compiled_ahead_in_threads() -> None:
    """With a driver that only names its GPU, in a separate process; each kernel is compiled once."""
    pytest.importorskip("triton")
    code = """
import functools, json, sys
import torch, triton
from tests.kernels import compile_kernels
from benchmarks.cases import *
from benchmarks.launches import compile_ahead
compile_kernels.driver.set_active(compile_kernels.PretendedDriver("sm_90"))
plain = Clip(patch=(2, 4, 4), layout="channels_last", dtype=BYTES)
cases = [scale_case((3, 2, 8), 2, BRAIN), scale_case((3, 2, 8), 2, BRAIN), energy_case(plain)]
def bad():
    raise RuntimeError
leave = triton.AsyncCompileMode.__exit__
def forget(mode, *error):  # as newer versions of Triton do
    leave(mode, *error)
    mode.raw_futures = []
triton.AsyncCompileMode.__exit__ = forget
calls = [functools.partial(case.run, case.dtype, **case.inputs) for case in cases] + [bad]
count = compile_ahead(calls, threads=2)
from mam2.kernels import motion_mask, scale_gradient
kernels = sys.modules["mam2.kernels.scale_gradient"]._scale_gradient_kernel, motion_mask._motion_energy_kernel
held = [[type(k).__name__ for k in list(kernel.device_caches[1][0].values())] for kernel in kernels]
print(json.dumps([count, held]))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    count, held = json.loads(done.stdout.splitlines()[-1])
    assert count == 2
    assert held == [["CompiledKernel"], ["CompiledKernel"]]


def judged(mine: list[float], truth: list[float], other_truth: list[float]) -> Any:
    correctness = importlib.import_module("benchmarks.correctness")
    found, exact, near = (torch.tensor(values) for values in (mine, truth, other_truth))
    return correctness.judge(found, exact, exact.double(), near.double())[0]


def test_only_structural_zeros_must_be_zero() -> None:
    """102/255 − 0.4 is 0 with two roundings and −2.4e-8 with one, as a GPU computes it."""
    assert judged([1.0, -2.4e-8], [1.0, 0.0], [1.1, 0.001]) == ""
    assert judged([1.0, -2.4e-8], [1.0, 0.0], [1.1, 0.0]) == "not 0 where the definition is 0"


def test_zeros_of_weights_and_missing_frames_are_structural() -> None:
    cases, correctness = (importlib.import_module(f"benchmarks.{name}") for name in ("cases", "correctness"))
    clip = cases.Clip(patch=(2, 4, 4), layout="channels_last", dtype=torch.uint8)
    torch.manual_seed(0)
    case = cases.loss_case(clip, torch.float32, target="adjacent", normalize=None, weighted=True, every_token=True)
    wrong = case._replace(run=lambda dtype, **inputs: [tensor + 1e-9 for tensor in case.run(dtype, **inputs)])
    row = correctness.verdict(wrong._replace(plain=case.run), CPU, 1)
    assert row["reason"].endswith("not 0 where the definition is 0")
    assert correctness.verdict(case, CPU, 1)["verdict"] == "right"


def test_a_subset_has_every_layout_target_and_head() -> None:
    cases = importlib.import_module("benchmarks.cases")
    every = list(cases.cases(CPU))
    some = cases.few(iter(every))
    assert len(some) < 0.7 * len(every)
    assert {case.group for case in some} == {case.group for case in every}
    names = " ".join(case.name for case in some)
    assert all(word in names for word in (*cases.TARGETS, *(clip.layout for clip in cases.CLIPS), "V8200"))
