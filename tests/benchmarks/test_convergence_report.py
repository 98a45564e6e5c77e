"""The convergence page, from made-up results."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.convergence_results import (
    BETTER,
    BUDGETS,
    WORSE,
    full,
    main_groups,
    module,
    results_of,
    rows_of,
    trials,
)

MARKERS = "<!-- numbers: begin -->", "<!-- numbers: end -->"


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
        ("pixel components", "80 principal components", "", "50.0"),
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


def test_real_table_with_components_chosen_by_cross_validation() -> None:
    """Encoder and pixels are in rows of the same pool; a trial that was not asked about it, of an earlier version, has
    its other rows."""
    pool = "principal components, as many as cross-validation chooses"
    results = full()
    assert pool not in module("real_report").real_table(results, "words")
    results["real"]["pixels"]["words"]["tokens"] = {"right": "1100", "accuracy": 0.5}
    trial = next(t for t in results["trials"] if t["group"] == "real" and t["variant"] == "mam2-muon")
    trial["answers"]["words"]["tokens"] = {"right": "1110", "accuracy": 0.75}
    rows = [row for row in rows_of(module("real_report").real_table(results, "words")) if row["pool"] == pool]
    assert [(row["encoder"], row["seeds"], row["accuracy, %"]) for row in rows] == [
        ("MAM2, Muon", "1", "75.0"),
        ("pixel components", "", "50.0"),
    ]


def test_real_table_with_attentive_probes() -> None:
    results = full()
    trial = next(t for t in results["trials"] if t["group"] == "real" and t["variant"] == "mam2-muon")
    trial["answers"]["words"]["attentive-time"] = {"right": "1110", "accuracy": 0.75}
    trial["answers"]["words"]["attentive"] = {"right": "1100", "accuracy": 0.5}
    rows = rows_of(module("real_report").real_table(results, "words"))
    assert [(row["pool"], row["accuracy, %"]) for row in rows[1:3]] == [
        ("attentive: a query per time slot", "75.0"),
        ("attentive: one query", "50.0"),
    ]
    kinds = {*module("real").KINDS, "pixels"}
    assert set(module("real_report").POOLS) == kinds, "every kind of answer has its rows"


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
