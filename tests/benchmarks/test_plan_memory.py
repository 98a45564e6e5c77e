"""The activations that `mam2 plan` declares against what autograd saves, for whole recipes without their data."""

import importlib

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "residual"),
    [
        *(("mam2-fast", "float32"), ("mam2-cae", "float32"), ("videomae", "float32"), ("laptop", "float32")),
        *(("mam2-fast", "bfloat16"), ("videomae", "bfloat16")),
    ],
)
def test_planned_activations_are_close_to_those_saved(recipe: str, residual: str) -> None:
    found = list(importlib.import_module("benchmarks.plan_memory").rows(recipe, residual))
    assert len(found) == (2 if recipe == "videomae" else 4)
    for row in found:
        assert row["counted_mib_per_clip"] > 1
        assert row["planned_percent"] == pytest.approx(100, abs=3), row["part"]


@pytest.mark.slow
def test_the_plan_of_a_whole_step_is_within_a_tenth_of_its_peak() -> None:
    row = importlib.import_module("benchmarks.plan_memory").step_row("laptop")
    assert row["counted_mib"] > 50
    assert row["planned_percent"] == pytest.approx(100, abs=10)
