"""Timing of operators: forward and backward separately, clips in other codebases' layouts, only selected variants."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.benchmarks import module

CPU = torch.device("cpu")


class Called(TorchDispatchMode):
    """Lists the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def operator_of(name: str) -> Any:
    return next(entry for entry in module("operators").OPERATORS if entry.name == name)


def test_forward_and_backward_have_their_own_bytes() -> None:
    """A kernel as fast as a copy reaches 100 % in each pass, whatever the time of the other pass."""
    operators, timing, clips = module("operators"), module("timing"), module("clips")
    shape, operator = clips.Shape(batch=64), operator_of("masked_pixel_loss")
    forward, backward = (cost(shape).bytes_moved for cost in (operator.cost, operator.backward_cost))
    assert (round(forward / 1e6), round(backward / 1e6)) == (693, 554)
    assert operators.whole_bytes(operator, shape) == forward + backward
    times = {"ours": 5.0, "ours forward": 3.0, "copy forward": 3.0, "copy backward": 1.0, "ours unit upstream": 4.0}
    found = operators.passes({name: timing.summary([ms]) for name, ms in times.items()}, "ours")
    assert found == {
        "forward_ms": 3, "forward_percent_of_copy": 100, "backward_ms": 2, "backward_percent_of_copy": 50,
        "unit_upstream_ms": 4, "unit_upstream_percent_of_copy": 75,
    }  # fmt: skip


@pytest.mark.parametrize("planar", [False, True])
def test_a_float_clip_is_normalized_and_lies_as_asked(planar: bool) -> None:
    clips = module("clips")
    shape = clips.Shape(batch=1, frames=2, size=32, clip_dtype=torch.float32, planar=planar)
    video = clips.clip(shape, CPU)
    assert (video.dtype, video.is_contiguous()) == (torch.float32, planar)
    restored = clips.pixels(video, shape)
    assert video.min() < -1
    assert -1e-5 < restored.min() < 0.1 < 0.9 < restored.max() < 1 + 1e-5
    assert str(shape).endswith(f"{'planar ' * planar}float32 clip")


def test_variants_hold_what_other_codebases_and_the_engine_pass() -> None:
    loss, head = operator_of("masked_pixel_loss").variants, operator_of("linear_cross_entropy").variants
    assert {(shape.planar, shape.clip_dtype) for shape in loss} >= {(True, torch.float32), (False, torch.float32)}
    assert {(shape.codes, shape.bias) for shape in head} >= {(8192, True), (1024, True)}


def test_only_what_is_asked_for_is_measured() -> None:
    operators, sections = module("operators"), module("sections")
    wanted = sections.Selection(True, False, operators=("gather_tubes",), shapes=("B4",), ways=("ours",))
    (row,) = operators.rows(CPU, float("inf"), wanted)
    assert (row["operator"], row["provider"], row["verdict"]) == ("gather_tubes", "ours", "right")
    assert not list(operators.rows(CPU, float("inf"), sections.Selection(True, False, shapes=("B64",))))


def test_a_copy_is_a_kernel_and_no_memcpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A memcpy of 1 GiB in a CUDA graph runs on the copy engine, which reaches two thirds of what kernels do."""
    timing = module("timing")
    monkeypatch.setitem(timing.CEILINGS, "cpu", (64, 4, torch.float32))
    with Called() as called:
        targets = [copy() for copy in timing.copies(80, CPU)]
        assert timing.ceilings(CPU)["copy_gb_per_s"] > 0
    assert [target.nbytes for target in targets] == [40, 40]
    assert called.names.count("aten::bitwise_not.out") > 2
    assert not any(name.startswith("aten::copy_") for name in called.names)


def test_a_slow_candidate_has_fewer_rounds_and_calls() -> None:
    timing = module("timing")
    assert timing.rounds_within(0.4, 0.01, most=30) == 30
    assert timing.rounds_within(0.4, 0.04, most=30) == 10
    assert timing.rounds_within(0.4, 1.0, most=30) == 5
    assert timing.rounds_within(0.4, 1.0, most=3) == 3
    assert timing.rounds_within(float("inf"), 1.0, most=30) == 30
    # a round of inputs that together exceed the cache is never cut, unless each call waits for the host
    assert timing.calls_of_a_round(2, 0.1, waits=False) == 10
    assert timing.calls_of_a_round(4, 0.1, waits=False) == 12
    assert timing.calls_of_a_round(2, 5.0, waits=False) == 2
    assert timing.calls_of_a_round(64, 1.8, waits=False) == 64
    assert timing.calls_of_a_round(64, 1.8, waits=True) == 6
    assert timing.calls_of_a_round(64, 100.0, waits=True) == 2


def test_rounds_end_when_their_time_is_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    timing = module("timing")
    clock, calls = [0.0], []

    def call(name: str, seconds: float) -> None:
        calls.append(name)
        clock[0] += seconds

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    candidates = {"slow": [lambda: call("slow", 0.09375)], "fast": [lambda: call("fast", 0.03125)]}
    found = timing.interleaved(candidates, CPU, rounds=30, seconds=0.5)
    assert calls == ["slow", "fast"] * (1 + 8)  # a warm-up, then 1 s of rounds of 0.125 s
    assert found["slow"].median_ms == pytest.approx(93.75)
    assert timing.interleaved({}, CPU, rounds=2) == {}


def test_the_most_important_operators_come_first() -> None:
    names = [operator.name for operator in module("operators").OPERATORS]
    assert names[:5] == [
        *("masked_pixel_loss", "masked_frame_difference_loss", "linear_cross_entropy", "linear_masked_loss"),
        "gather_tubes",
    ]
    assert len(set(names)) == 9


def test_operators_that_are_not_compiled_import_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    operators, sections = module("operators"), module("sections")
    resets: list[None] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(None))
    wanted = sections.Selection(True, True, operators=("gather_tubes",), ways=("ours",))
    assert len(list(operators.rows(CPU, float("inf"), wanted))) == 1
    assert not resets
