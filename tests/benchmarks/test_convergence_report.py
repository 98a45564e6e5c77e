"""The convergence page, from made-up results."""

from __future__ import annotations

import importlib
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.helpers.paths import ROOT

MARKERS = "<!-- numbers: begin -->", "<!-- numbers: end -->"
BUDGETS = (5, 10, 20, 40)
OFFSETS = (-0.01, 0.0, 0.01)
"""Accuracies, one per seed."""


@pytest.fixture(scope="module", autouse=True)
def _repository_root_can_be_imported() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        yield


def module(name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.trials.{name}")


def trials(group: str, variant: str, probe: float, *, epochs: float = 20, seeds: int = 3, **more: Any) -> list[dict]:
    """One for each seed. VideoMAE takes 2 s and 1 TFLOP an epoch, the others 3 s and 1.5 TFLOP."""
    slow = 1.0 if variant == "videomae" else 1.5
    prepared = 12.0 if variant == "mam2" else 0.0
    return [
        {
            "group": group,
            "variant": variant,
            "label": variant,
            "family": "",
            "data": "synthetic",
            "epochs": epochs,
            "steps": int(100 * epochs),
            "base_lr": 1e-3,
            "seed": seed,
            "probe": probe + offset,
            "probe_validation": probe + offset,
            "shape": probe / 2 - offset,
            "shape_validation": probe / 2 - offset,
            "finetune": probe + 0.1 + offset,
            "train_s": 2 * slow * epochs,
            "step_ms": 20 * slow,
            "epoch_s": 2 * slow,
            "flops": 1e12 * slow * epochs,
            "preparation_s": prepared,
            "preparation_flops": 2e12 if prepared else 0.0,
            "losses": {},
            **more,
        }
        for seed, offset in enumerate(OFFSETS[:seeds])
    ]


def results_of(*groups: list[dict]) -> dict[str, Any]:
    counts = {"train": 100, "validation": 20, "test": 50}
    return {
        "machine": "a machine",
        "setting": "cpu",
        "date": "2026-01-01",
        "wall_s": 600.0,
        "versions": {"torch": "2.13"},
        "default": "mam2",
        "budgets": list(BUDGETS),
        "seeds": 3,
        "data": {"synthetic": {**counts, "classes": 8}, "real": {**counts, "classes": 0}},
        "trials": [trial for group in groups for trial in group],
        "random": [],
    }


def main_groups(mam2: tuple[float, ...], videomae: tuple[float, ...], **more: Any) -> list[list[dict]]:
    return [
        trials("main", variant, probe, epochs=epochs, **more)
        for variant, curve in (("mam2", mam2), ("videomae", videomae))
        for epochs, probe in zip(BUDGETS, curve, strict=True)
    ]


BETTER, WORSE = (0.40, 0.50, 0.70, 0.80), (0.30, 0.40, 0.50, 0.60)


def full() -> dict[str, Any]:
    changed = [
        trials("ablation", "ratio-0.75", 0.62, label="0.75", family="mask ratio"),
        trials("ablation", "no-motion", 0.40, label="no motion decoder", family="motion"),
        trials("ablation", "ratio-0.8", 0.90, label="0.8", family="mask ratio", epoch_s=6.0),
    ]
    sweep = [
        trials("sweep", "mam2", probe, seeds=1, base_lr=base_lr)
        for base_lr, probe in ((3e-3, 0.5), (3e-4, 0.4), (1e-3, 0.6))
    ]
    default = trials("ablation", "mam2", 0.625, label="as it is", family="default")
    real = [
        {**trial, "answers": answers(right)}
        for variant, rights in (("mam2-muon", ("1101", "1111")), ("videomae-muon", ("1000", "1000")))
        for trial, right in zip(trials("real", variant, 0.5, seeds=2, data="real"), rights, strict=True)
    ]
    tried = [
        {**trial, "judged": judged}
        for variant, found in (("mam2-muon", (0.5, 0.6, 0.4)), ("codes alone", (0.1, 0.2, 0.3)))
        for rate, judged in zip((3e-3, 1e-3, 2e-3), found, strict=True)
        for trial in trials("real sweep", variant, 0.5, seeds=1, data="real", base_lr=rate, epochs=10)
    ]
    results = results_of(*main_groups(BETTER, WORSE), *changed, default, *sweep, real, tried)
    results["preparation"] = {"tokenizer_s": 5.0, "tokenize_s": 7.0, "tokenizer_flops": 1.5e12, "tokenize_flops": 5e11}
    untrained = {"data": "synthetic", "finetune": None, "shape": 0.2}
    results["random"] = [
        {**untrained, "probe": 0.2},
        {**untrained, "probe": 0.22, "finetune": 0.3},
        {"data": "real", "answers": answers("0101")},
    ]
    asked = {"train": 8, "test": 4, "classes": 2, "groups": [7, 7, 9, 9]}
    results["real"] = {"pixels": {"words": {"pixels": answer("1100")}}, "questions": {"words": asked}}
    return results


def answer(right: str) -> dict[str, Any]:
    return {"accuracy": right.count("1") / len(right), "right": right}


def answers(right: str) -> dict[str, Any]:
    return {"words": {"mean": answer("0000"), "time": answer(right)}}


def rows_of(table: str) -> list[dict[str, str]]:
    head, _, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    return [dict(zip(head, cells, strict=True)) for cells in body]


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


def test_main_table() -> None:
    rows = rows_of(module("report").main_table(full()))
    assert [(row["method"], row["epochs"]) for row in rows] == [
        *(("MAM2, AdamW", f"{epochs}") for epochs in BUDGETS),
        *(("VideoMAE, AdamW", f"{epochs}") for epochs in BUDGETS),
        ("random encoder", ""),
    ]
    assert rows[1] == {
        "method": "MAM2, AdamW",
        "epochs": "10",
        "base lr": "0.001",
        "seeds": "3",
        "motion, %": "50.0 ± 1.0",
        "shape, %": "25.0 ± 1.0",
        "motion, fine-tuned, %": "60.0 ± 1.0",
        "seconds": "42",
        "training s": "30",
        "preparation s": "12",
        "TFLOP": "17",
    }
    assert rows[-1]["motion, %"] == "21.0 ± 1.4"
    assert rows[-1]["motion, fine-tuned, %"] == "30.0"


def test_differences_are_paired_by_seed() -> None:
    results = full()
    assert module("report").paired_table(results) == "", "the same in every seed: no interval"
    for trial in results["trials"]:
        if trial["group"] == "main" and trial["variant"] == "mam2":
            trial["probe"] += 0.001 * trial["seed"]
    results["trials"] = [t for t in results["trials"] if (t["variant"], t["epochs"], t["seed"]) != ("videomae", 40, 0)]
    rows = rows_of(module("report").paired_table(results))
    assert [(row["epochs"], row["seeds"]) for row in rows] == [("5", "3"), ("10", "3"), ("20", "3"), ("40", "2")]
    half = 4.30265 * 0.1 / math.sqrt(3)
    expected = f"+10.1 [{10.1 - half:+.1f}, {10.1 + half:+.1f}]"
    assert rows[0]["motion, points [95 %]"] == expected
    assert rows[0]["difference"] == "MAM2, AdamW − VideoMAE, AdamW"


def test_ablation_table() -> None:
    rows = rows_of(module("report").ablation_table(full()))
    assert [(row["family"], row["setting"]) for row in rows] == [
        ("default", "as it is"),
        ("mask ratio", "0.75"),
        ("", "0.8"),
        ("motion", "no motion decoder"),
    ]
    assert [row["× default"] for row in rows] == ["1.00", "1.00", "2.00", "1.00"]
    assert {row["TFLOP per epoch"] for row in rows} == {"1.5"}
    assert rows[0]["motion, %"] == "62.5 ± 1.0"


def test_ablations_are_compared_seed_by_seed() -> None:
    results = full()
    for trial in results["trials"]:
        if trial["label"] == "no motion decoder":
            trial["probe_validation"] += 0.001 * trial["seed"]
    row = rows_of(module("report").ablation_table(results))[-1]
    half = 4.30265 * 0.1 / math.sqrt(3)
    assert row["difference [95 %]"] == f"-22.4 [{-22.4 - half:+.1f}, {-22.4 + half:+.1f}]"
    assert row["clearly"] == "worse"


def test_two_defaults_are_refused() -> None:
    groups = [trials("ablation", "mam2", 0.6, label=label, family="default") for label in ("default", "mask ratio 0.8")]
    with pytest.raises(ValueError, match=r"found \['default', 'mask ratio 0.8'\]"):
        module("report").ablation_table(results_of(*groups))


def test_sweep_table() -> None:
    report = module("report")
    rows = rows_of(report.sweep_table(full()))
    assert [(row["base lr"], row["best"]) for row in rows] == [("0.0003", ""), ("0.001", "best"), ("0.003", "")]
    for probes, best in (((0.1, 0.2, 0.3), "best (an end of the sweep)"), ((0.1, 0.2), "best")):  # two: the last round
        ends = results_of(*(trials("sweep", "mam2", probe, base_lr=probe) for probe in probes))
        assert [row["best"] for row in rows_of(report.sweep_table(ends)) if row["best"]] == [best]


def test_real_table() -> None:
    rows = rows_of(module("real_report").real_table(full(), "words"))
    assert [(row["encoder"], row["pool"], row["seeds"], row["accuracy, %"]) for row in rows] == [
        ("pixel components", "", "", "50.0"),
        ("MAM2, Muon", "a mean per time slot", "2", "87.5"),
        ("VideoMAE, Muon", "a mean per time slot", "2", "25.0"),
        ("random encoder", "a mean per time slot", "1", "50.0"),
        ("MAM2, Muon", "the mean of all tokens", "2", "0.0"),
        ("VideoMAE, Muon", "the mean of all tokens", "2", "0.0"),
        ("random encoder", "the mean of all tokens", "1", "0.0"),
    ]
    # of the groups of two clips MAM2 has 1.0 and 0.75 right, VideoMAE 0.5 and 0
    assert rows[1]["95 % over groups"] == "75.0 to 100.0"
    assert rows[1]["against VideoMAE"] == "+62.5 [+50.0 to +75.0]"
    assert rows[2]["against VideoMAE"] == ""


def test_real_sweep_table() -> None:
    rows = rows_of(module("real_report").real_sweep_table(full()))
    assert [tuple(row.values()) for row in rows] == [
        ("MAM2, Muon", "10", "0.001", "60.0", "best (an end of the sweep)"),
        ("MAM2, Muon", "10", "0.002", "40.0", ""),
        ("MAM2, Muon", "10", "0.003", "50.0", ""),
        ("MAM2, codes alone", "10", "0.001", "20.0", ""),
        ("MAM2, codes alone", "10", "0.002", "30.0", "best"),
        ("MAM2, codes alone", "10", "0.003", "10.0", ""),
    ]


def test_the_page_says_what_real_rates_were_chosen_on() -> None:
    results = full()
    parts = "\n".join(module("real_report").real_parts(results))
    assert "chosen on **words**, with a mean per time slot: " in parts
    assert "there are no others" in parts
    results["real"]["questions"]["phrases"] = results["real"]["questions"]["words"]
    results["real"]["pixels"]["phrases"] = results["real"]["pixels"]["words"]
    for trial in [*results["trials"], *results["random"]]:
        if "answers" in trial:
            trial["answers"]["phrases"] = trial["answers"]["words"]
    assert "phrases did not take part in the choice" in "\n".join(module("real_report").real_parts(results))
    results["trials"] = [trial for trial in results["trials"] if trial["group"] != "real sweep"]
    assert "chosen on" not in "\n".join(module("real_report").real_parts(results)), "of a run without a sweep"


def test_page_has_every_part() -> None:
    page = module("report").page(full())
    assert page.startswith(MARKERS[0])
    assert page.endswith(MARKERS[1])
    assert [line for line in page.splitlines() if line.startswith("#")] == [
        "### Accuracy against epochs, seconds and FLOPs",
        "### What it takes to reach the other's accuracy",
        "### Ablations",
        "### Learning rates",
        "### Real clips",
    ]
    assert "(convergence.png)" in page
    assert "(convergence-ablations.png)" in page
    assert "on a machine (torch 2.13): 46 trainings, 10 minutes in all" in page
    assert "24 of the 48 trainings were not done" in page
    assert "5.0 s to train the tokenizer, 7.0 s to compute the codes, 2 TFLOP together" in page
    wanted = "- Motion: MAM2, AdamW reaches VideoMAE, AdamW's best 60.0 % (40 epochs) with **0.35 ×** the epochs"
    assert wanted in page
    assert (
        "- Motion: VideoMAE, AdamW does not reach MAM2, AdamW's best 80.0 % (40 epochs) within its 40 epochs: " in page
    )
    assert (
        "- Shape: VideoMAE, AdamW reaches VideoMAE, AdamW's best 30.0 % (40 epochs) with **1.00 ×** the epochs" in page
    )
    assert page.count("- Shape: ") == 3
    assert "**words**: 2 classes (chance 50 %), 8 clips to fit on, 4 to test on, of 2 groups." in page


def test_page_leaves_out_what_was_not_run() -> None:
    page = module("report").page(results_of(*main_groups(BETTER, WORSE, seeds=1, finetune=None)))
    assert [line for line in page.splitlines() if line.startswith("#")] == [
        "### Accuracy against epochs, seconds and FLOPs",
        "### What it takes to reach the other's accuracy",
    ]
    assert "ine-tun" not in page
    assert "ablations" not in page
    assert "None" not in page
    assert "nan" not in page


def test_only_what_is_between_the_markers_is_replaced(tmp_path: Path) -> None:
    report = module("report")
    path = tmp_path / "convergence.md"
    path.write_text(f"# Ours\n\n{MARKERS[0]}\nold\n{MARKERS[1]}\n\nProse – kept.\n", encoding="utf-8")
    for _ in range(2):
        report.write_page(full(), path)
        assert path.read_text(encoding="utf-8") == f"# Ours\n\n{report.page(full())}\n\nProse – kept.\n"
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "convergence-ablations.png",
        "convergence.md",
        "convergence.png",
    ]


@pytest.mark.parametrize("text", ["", MARKERS[0], MARKERS[1] + MARKERS[0], "".join(MARKERS) * 2])
def test_a_page_without_its_markers_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "convergence.md"
    path.write_text(text)
    with pytest.raises(ValueError, match="numbers: begin"):
        module("report").write_page(full(), path)
    assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


def panels_of(monkeypatch: pytest.MonkeyPatch, name: str, results: dict[str, Any]) -> list[Any]:
    """The axes that the function `name` of the pictures draws."""
    pictures = module("pictures")
    figures: list[Any] = []
    monkeypatch.setattr(pictures.Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    getattr(pictures, name)(results, Path("unused.png"))
    return [axes for figure in figures for axes in figure.axes]


def test_picture_of_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    panels = panels_of(monkeypatch, "draw", full())
    assert len(panels) == 6
    assert {axes.get_xscale() for axes in panels} == {"log"}
    curves = [axes.containers[0].lines[0].get_xdata().tolist() for axes in panels]
    assert curves[:3] == [list(BUDGETS), [27, 42, 72, 132], [9.5, 17, 32, 62]]
    heights = panels[0].containers[1].lines[0].get_ydata()
    assert heights == pytest.approx([100 * probe for probe in WORSE])
    labels = {line.get_label(): line for line in panels[1].lines}
    assert labels["random encoder"].get_ydata()[0] == pytest.approx(21)
    assert labels["chance"].get_ydata()[0] == pytest.approx(12.5)
    assert labels["_without preparation"].get_xdata().tolist() == [15, 30, 60, 120]
    assert panels[3].containers[1].lines[0].get_ydata() == pytest.approx([50 * probe for probe in WORSE])


def test_picture_of_one_measure_only(monkeypatch: pytest.MonkeyPatch) -> None:
    results = results_of(*main_groups(BETTER, WORSE, seeds=1, shape=None))
    assert len(panels_of(monkeypatch, "draw", results)) == 3
    assert not panels_of(monkeypatch, "draw_ablations", results)
    assert not panels_of(monkeypatch, "draw", results_of())


def test_picture_of_ablations(monkeypatch: pytest.MonkeyPatch) -> None:
    (axes,) = panels_of(monkeypatch, "draw_ablations", full())
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["mask ratio", "0.75", "0.8", "motion", "no motion decoder"]
    points = [container.lines[0] for container in axes.containers]
    assert [float(point.get_xdata()[0]) for point in points] == pytest.approx([62, 90, 40])
    assert [point.get_color() for point in points] == ["0.35", "0.35", "0.35"], "the same in every seed: no interval"
    band = axes.patches[0]
    assert (band.get_x(), band.get_width()) == pytest.approx((61.5, 2))
