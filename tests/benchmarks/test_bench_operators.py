"""Timing of operators: forward and backward separately, clips in other codebases' layouts, only selected variants."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.benchmarks import module

CPU = torch.device("cpu")


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
