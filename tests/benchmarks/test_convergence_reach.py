"""Intervals of paired seeds, and what one method needs to reach the accuracy of another."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from tests.helpers.convergence_results import (
    BETTER,
    WORSE,
    main_groups,
    module,
    results_of,
    trials,
)


@pytest.mark.parametrize(
    ("freedom", "expected"), [(1, 12.7062), (2, 4.30265), (2.5, 3.57465), (4, 2.77645), (30, 2.04227), (1e6, 1.95996)]
)
def test_quantiles_of_student(freedom: float, expected: float) -> None:
    assert module("intervals").t_quantile(freedom) == pytest.approx(expected, rel=1e-3)


def test_paired_interval() -> None:
    paired = module("intervals").paired
    # differences 0.1, 0.2, 0.3 over the seeds 1 to 3; seed 4 has no partner
    found = paired({1: 0.6, 2: 0.8, 3: 0.7, 4: 0.0}, {3: 0.4, 2: 0.6, 1: 0.5, 9: 0.1})
    half = 4.30265 * 0.1 / math.sqrt(3)
    assert found == pytest.approx((0.2, 0.2 - half, 0.2 + half), rel=1e-3)
    assert found.verdict is None
    assert paired({1: 0.6, 2: 0.82}, {1: 0.5, 2: 0.71}).verdict == "better"
    assert paired({1: 0.5, 2: 0.71}, {1: 0.6, 2: 0.82}).verdict == "worse"
    assert paired({1: 0.6, 2: 0.8}, {2: 0.6, 3: 0.5}) is None
    assert paired({1: 0.75, 2: 0.5}, {1: 0.5, 2: 0.25}) is None


def test_paired_interval_holds_the_difference_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    seeds = generator.normal(0, 3, (1000, 4))
    other = seeds + generator.normal(0, 1, seeds.shape)
    intervals = [
        module("intervals").paired(*(dict(enumerate(each)) for each in pair)) for pair in zip(other, seeds, strict=True)
    ]
    assert 0.93 < statistics.fmean(each.low < 0 < each.high for each in intervals) < 0.97


def test_reach_between_two_budgets() -> None:
    reach = module("reach").reach
    results = results_of(*main_groups(BETTER, WORSE))
    # 0.6 lies halfway from 0.5 at 10 epochs to 0.7 at 20: 10 √2 epochs
    epochs = 10 * math.sqrt(2)
    found = {axis: reach(results, "probe", axis) for axis in ("epochs", "seconds", "training_seconds", "flops")}
    assert {axis: (each.needed, each.spent) for axis, each in found.items()} == {
        "epochs": pytest.approx((epochs, 40)),
        "seconds": pytest.approx((3 * epochs + 12, 80)),
        "training_seconds": pytest.approx((3 * epochs, 80)),
        "flops": pytest.approx((1.5e12 * epochs + 2e12, 40e12)),
    }
    for each in found.values():
        assert each.goal == pytest.approx(0.6)
        assert each.ratio == pytest.approx(each.needed / each.spent)
        assert each.interval[0] < each.ratio < each.interval[1]
        assert (each.never, each.at_most) == (0, False)
    # the extreme draws: all seeds the worst of one method, the best of the other
    low, high = (10 * 2 ** ((0.1 + shift) / 0.2) / 40 for shift in (-0.02, 0.02))
    assert low <= found["epochs"].interval[0] < found["epochs"].interval[1] <= high


def test_reach_of_the_other_method_fails() -> None:
    results = results_of(*main_groups(BETTER, WORSE))
    found = module("reach").reach(results, "finetune", "epochs", method="videomae", other="mam2")
    assert (found.needed, found.ratio, found.never) == (None, None, 1)
    assert (found.goal, found.best) == pytest.approx((0.9, 0.7))
    assert found.interval == (math.inf, math.inf)


def test_reach_at_the_smallest_budget_is_a_bound() -> None:
    report = module("report")
    results = results_of(*main_groups((0.70, 0.75, 0.8, 0.85), WORSE))
    found = module("reach").reach(results, "probe", "seconds")
    assert found.at_most
    assert found.needed == 5 * 3 + 12
    assert found.ratio == found.smallest_ratio == pytest.approx(27 / 80)
    sentence = report.ratio_sentence(results, "probe", method="mam2", other="videomae")
    assert (
        "at its smallest budget already, with at most **0.12 ×** the epochs (5 against 40; 95 %: ≤ 0.12 to" in sentence
    )


def test_draws_that_never_reach_end_the_interval_with_never() -> None:
    results = results_of(*main_groups((0.3, 0.4, 0.5, 0.602), WORSE))
    found = module("reach").reach(results, "probe", "epochs")
    assert 0.2 < found.never < 0.6
    assert found.interval[1] == math.inf
    sentence = module("report").ratio_sentence(results, "probe", method="mam2", other="videomae")
    assert "to never)" in sentence
    assert f"in {100 * found.never:.1f} % of 2000 draws it never does." in sentence


def test_the_first_crossing_counts_where_the_curve_falls_again() -> None:
    results = results_of(*main_groups((0.5, 0.7, 0.5, 0.7), WORSE))
    assert module("reach").reach(results, "probe", "epochs").needed == pytest.approx(5 * math.sqrt(2))


def test_the_goal_is_the_best_of_the_other_methods_budgets_where_its_largest_is_worse() -> None:
    results = results_of(*main_groups(BETTER, (0.4, 0.5, 0.6, 0.3)))
    found = module("reach").reach(results, "probe", "epochs")
    assert (found.goal, found.spent) == pytest.approx((0.6, 20))
    assert found.ratio == pytest.approx(10 * math.sqrt(2) / 20)
    sentence = module("report").ratio_sentence(results, "probe", method="mam2", other="videomae")
    assert sentence.startswith("MAM2, AdamW reaches VideoMAE, AdamW's best 60.0 % (20 epochs) with **0.71 ×**")


def test_one_seed_has_no_interval() -> None:
    results = results_of(*main_groups(BETTER, WORSE, seeds=1))
    assert module("reach").reach(results, "probe", "epochs").interval is None
    sentence = module("report").ratio_sentence(results, "probe", method="mam2", other="videomae")
    assert "95 %" not in sentence
    assert "draws" not in sentence


def test_a_seed_that_lacks_a_budget_is_left_out() -> None:
    results = results_of(*main_groups(BETTER, WORSE))
    complete = module("reach").reach(results, "probe", "epochs")
    results["trials"] += trials("main", "mam2", 0.9, epochs=40, seeds=1, seed=7)
    assert module("reach").reach(results, "probe", "epochs") == complete


def test_nothing_is_reached_without_one_of_the_methods() -> None:
    groups = main_groups(BETTER, WORSE, finetune=None)
    assert module("reach").reach(results_of(*groups), "finetune", "epochs") is None
    assert module("reach").reach(results_of(*groups[:4]), "probe", "epochs") is None
    assert module("reach").reach(results_of(*groups[4:]), "probe", "epochs") is None
