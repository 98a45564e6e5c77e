"""What `benchmarks.convergence` found, as the tables, sentences and pictures of docs/convergence.md."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import Row, table
from benchmarks.trials.intervals import Difference, paired
from benchmarks.trials.pictures import draw, draw_ablations
from benchmarks.trials.reach import DRAWS, Reach, reach
from benchmarks.trials.real_report import real_parts
from benchmarks.trials.selection import (
    CURVES,
    JUDGED,
    MEASURES,
    METHODS,
    Axis,
    Measure,
    Results,
    Trial,
    ablations_of,
    grouped,
    trials_of,
    values,
)
from mam2.engine.files import write_whole

BEGIN, END = "<!-- numbers: begin -->", "<!-- numbers: end -->"
PICTURES = "convergence.png", "convergence-ablations.png"
"""Beside the page."""
ABLATION_COLUMNS = (
    *("family", "setting", "seeds", "motion on validation, %", "difference [95 %]", "clearly", "motion, %"),
    *("shape, %", "shape, difference [95 %]", "color, %", "texture, %", "s per epoch", "TFLOP per epoch", "× default"),
)
PAIRS = (("mam2", "videomae"), ("mam2-muon", "videomae-muon"), ("mam2-muon", "mam2"), ("videomae-muon", "videomae"))
"""Whose differences are reported: the methods under one optimizer, and the optimizers on one method."""
REACHED = (
    *(("mam2", "videomae"), ("mam2-muon", "videomae-muon"), ("mam2-muon", "videomae"), ("videomae-muon", "videomae")),
    *(("videomae", "mam2"), ("videomae-muon", "mam2-muon"), ("videomae", "videomae")),
)
"""Who is asked for whose best accuracy; the last is what the way of reckoning gives where nothing is gained."""
UNITS: dict[Axis, tuple[str, float]] = {
    "epochs": ("epochs", 1),
    "seconds": ("seconds with preparation", 1),
    "training_seconds": ("seconds without preparation", 1),
    "flops": ("TFLOP with preparation", 1e12),
}


def main_table(results: Results) -> str:
    """Markdown: a row for each method and budget, and the random encoder's. Empty without such trials."""
    cells = grouped(trials_of(results, "main"), "variant", "epochs", "base_lr")
    rows: list[Row] = []
    for (variant, epochs, base_lr), cell in sorted(cells.items()):
        training, preparation = _mean(cell, "train_s"), _mean(cell, "preparation_s")
        costs = {
            "seconds": training + preparation,
            "training s": training,
            "preparation s": preparation,
            "TFLOP": (_mean(cell, "flops") + _mean(cell, "preparation_flops")) / 1e12,
        }
        setting = {"epochs": f"{epochs:g}", "base lr": f"{base_lr:g}", "seeds": len(cell)}
        rows.append({"method": METHODS.get(variant, variant), **setting, **_accuracies(cell), **costs})
    untrained = [trial for trial in results.get("random", []) if trial["data"] == "synthetic"]
    if rows and untrained:
        rows.append({"method": METHODS["random"], "seeds": len(untrained), **_accuracies(untrained)})
    return table(rows, list(rows[0]) if rows else [])


def paired_table(results: Results) -> str:
    """Markdown: differences of two variants at each budget over the seeds that both have. Empty without any."""
    cells = grouped(trials_of(results, "main"), "variant", "epochs")
    rows: list[Row] = []
    for better, other in PAIRS:
        for epochs in sorted({epochs for variant, epochs in cells if variant == better}):
            row: Row = {"difference": f"{METHODS[better]} − {METHODS[other]}", "epochs": f"{epochs:g}"}
            for measure in CURVES:
                mine, theirs = (_by_seed(cells.get((name, epochs), []), measure) for name in (better, other))
                if found := paired(mine, theirs):
                    row["seeds"] = len(mine.keys() & theirs.keys())
                    row[f"{MEASURES[measure]}, points [95 %]"] = _points(found)
            if "seeds" in row:
                rows.append(row)
    return table(rows, ["difference", "epochs", "seeds", *(f"{MEASURES[m]}, points [95 %]" for m in CURVES)])


def _by_seed(cell: list[Trial], key: str) -> dict[int, float]:
    return {trial["seed"]: trial[key] for trial in cell if trial.get(key) is not None}


def _points(found: Difference) -> str:
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * end for end in found))


def sweep_table(results: Results) -> str:
    """Markdown: the validation accuracy by which each method's learning rate was chosen. Empty without such trials."""
    rows: list[Row] = []
    for (variant, epochs), trials in grouped(trials_of(results, "sweep"), "variant", "epochs").items():
        cells = {base_lr: cell for (base_lr,), cell in sorted(grouped(trials, "base_lr").items())}
        best = max(cells, key=lambda base_lr: _mean(cells[base_lr], JUDGED))
        at_end = " (an end of the sweep)" if len(cells) > 2 and best in (min(cells), max(cells)) else ""
        for base_lr, cell in cells.items():
            rows.append(
                {
                    "method": METHODS.get(variant, variant),
                    "epochs": f"{epochs:g}",
                    "base lr": f"{base_lr:g}",
                    "seeds": len(cell),
                    "motion on validation, %": percent(values(cell, JUDGED)),
                    "shape on validation, %": percent(values(cell, "shape_validation")),
                    "best": f"best{at_end}" if base_lr == best else None,
                }
            )
    return table(rows, list(rows[0]) if rows else [])


def ablation_table(results: Results) -> str:
    """Markdown: the default and below it, by family, the changed settings. Empty without changed settings."""
    default, changed = ablations_of(results)
    if not changed:
        return ""
    rows = [{"family": "default", **_ablation_row(default, default)}] if default else []
    for (family,), members in grouped(changed, "family").items():
        for place, cell in enumerate(grouped(members, "label").values()):
            row: Row = {"family": None if place else family, **_ablation_row(cell, default)}
            if difference := paired(_by_seed(cell, JUDGED), _by_seed(default, JUDGED)):
                row["difference [95 %]"] = _points(difference)
                row["clearly"] = difference.verdict
            if difference := paired(_by_seed(cell, "shape"), _by_seed(default, "shape")):
                row["shape, difference [95 %]"] = _points(difference)
            rows.append(row)
    return table(rows, ABLATION_COLUMNS)


def _ablation_row(cell: list[Trial], default: list[Trial]) -> Row:
    seconds = _mean(cell, "epoch_s")
    return {
        "setting": cell[0]["label"],
        "seeds": len(cell),
        "motion on validation, %": percent(values(cell, JUDGED)),
        "motion, %": percent(values(cell, "probe")),
        **{f"{question}, %": percent(values(cell, question)) for question in ("shape", "color", "texture")},
        "s per epoch": seconds,
        "TFLOP per epoch": statistics.fmean(trial["flops"] / trial["epochs"] / 1e12 for trial in cell),
        "× default": f"{seconds / _mean(default, 'epoch_s'):.2f}" if default else None,
    }


def _accuracies(cell: list[Trial]) -> Row:
    return {f"{name}, %": percent(values(cell, measure)) for measure, name in MEASURES.items()}


def _mean(cell: list[Trial], key: str) -> float:
    return statistics.fmean(values(cell, key))


def percent(sample: Sequence[float]) -> str | None:
    """Mean ± sample standard deviation of shares 0 to 1; the mean alone of one, None of none."""
    if not sample:
        return None
    mean = f"{100 * statistics.fmean(sample):.1f}"
    return mean if len(sample) < 2 else f"{mean} ± {100 * statistics.stdev(sample):.1f}"


def ratio_sentence(results: Results, measure: Measure, *, method: str, other: str) -> str | None:
    """What `method` needs to reach `other`'s best accuracy, in words. None where one of them was not measured."""
    reaches = {axis: reach(results, measure, axis, method=method, other=other) for axis in UNITS}
    found = reaches["epochs"]
    if found is None:
        return None
    name, goal = METHODS.get(method, method), METHODS.get(other, other)
    target = f"{goal}'s best {100 * found.goal:.1f} % ({found.spent:g} epochs)"
    draws = f"; in {100 * found.never:.1f} % of {DRAWS} draws it never does" if found.interval else ""
    if found.needed is None:
        best = f"its best mean is {100 * found.best:.1f} %"
        return f"{name} does not reach {target} within its {found.budget:g} epochs: {best}{draws}."
    ratios = "; ".join(_ratio(axis, each) for axis, each in reaches.items() if each)
    how = " at its smallest budget already, with at most" if found.at_most else " with"
    return f"{name} reaches {target}{how} {ratios}{draws}."


def _ratio(axis: Axis, found: Reach) -> str:
    unit, scale = UNITS[axis]
    costs = " against ".join(f"{cost / scale:.4g}" for cost in (found.needed or 0, found.spent))
    interval = ""
    if found.interval:
        low, high = (_end(ratio, found) for ratio in found.interval)
        interval = f"; 95 %: {low} to {high}"
    return f"**{found.ratio:.2f} ×** the {unit} ({costs}{interval})"


def _end(ratio: float, found: Reach) -> str:
    if math.isinf(ratio):
        return "never"
    return f"{'≤ ' if ratio <= found.smallest_ratio else ''}{ratio:.2f}"


def page(results: Results) -> str:
    """The generated part of docs/convergence.md, with its markers."""
    parts = [BEGIN, _what_ran(results)]
    if numbers := main_table(results):
        parts += [
            "### Accuracy against epochs, seconds and FLOPs",
            f"![Accuracy against epochs, seconds and FLOPs]({PICTURES[0]})",
            numbers,
            "Each row is a finished training with a schedule of its own; ± is the sample standard deviation over "
            "seeds, on the same test clips. Motion, shape, color and texture are linear probes of the same features. "
            "Seconds are of one training alone (on CPUs processor time of one thread, the optimizer's counted), "
            "without decoding; seconds and TFLOP count the preparation once per training.",
            *_missing(results),
        ]
        if differences := paired_table(results):
            parts += [
                "### Differences, paired by seed",
                differences,
                "Two trainings of one seed see the same clips in the same order. Intervals are Student's t over seeds.",
            ]
        parts += [
            "### What it takes to reach the other's accuracy",
            *_ratios(results),
        ]
    if numbers := ablation_table(results):
        parts += [
            "### Ablations",
            f"![Ablations]({PICTURES[1]})",
            numbers,
            _about_ablations(results),
        ]
    if numbers := sweep_table(results):
        parts += ["### Learning rates", numbers]
    parts += real_parts(results)
    return "\n\n".join([*parts, END])


def _what_ran(results: Results) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        f"Setting `{results['setting']}`, {results['date']}, on {results['machine']} ({versions}): "
        f"{_trainings(results)} trainings, {results['wall_s'] / 60:.0f} minutes in all, of which the processes worked "
        f"{_worked_s(results) / 60:.0f}."
    ]
    for name, counts in results["data"].items():
        lines.append(
            f"{name.capitalize()} clips: {counts['classes']} classes, {counts['train']} to train on, "
            f"{counts['validation']} for validation, {counts['test']} to test on."
            if name == "synthetic"
            else f"Real clips: {counts['train']} to pre-train on."
        )
    if paid := results.get("preparation"):
        flops = (paid["tokenizer_flops"] + paid["tokenize_flops"]) / 1e12
        lines.append(
            f"What MAM2 with codes pays once per data set: {paid['tokenizer_s']:.1f} s to train the tokenizer, "
            f"{paid['tokenize_s']:.1f} s to compute the codes, {flops:.3g} TFLOP together."
        )
    return "\n".join(lines)


def _trainings(results: Results) -> int:
    # the default's trainings stand among the ablations once more
    return sum(trial["family"] != "default" for trial in results["trials"])


def _worked_s(results: Results) -> float:
    """Processor seconds of all trainings and what was measured of them."""
    done = [trial for trial in results["trials"] if trial["family"] != "default"]
    return sum(trial.get("cpu_s", 0.0) + trial.get("measuring_cpu_s", 0.0) for trial in done)


def _missing(results: Results) -> list[str]:
    """A sentence on trainings of the main comparison that were planned and not done."""
    planned = results["seeds"] * len(results["budgets"]) * 4
    done = len(trials_of(results, "main"))
    return (
        [f"{planned - done} of the {planned} trainings were not done; rows show their seeds."] if done < planned else []
    )


def _ratios(results: Results) -> list[str]:
    sentences = [
        f"- {MEASURES[measure].capitalize()}: {sentence}"
        for measure in CURVES
        for method, other in REACHED
        if (sentence := ratio_sentence(results, measure, method=method, other=other))
    ]
    if not sentences:
        return []
    how = (
        "Mean accuracies are interpolated in log2(epochs) between budgets, and the first crossing counts. "
        "That flatters: noise on a curve that has flattened crosses early. VideoMAE against itself shows how much. "
        "The intervals resample the seeds, a seed with its results at all budgets; of few seeds such an interval is "
        "too narrow rather than too wide."
    )
    return ["\n".join(sentences), how]


def _about_ablations(results: Results) -> str:
    _, changed = ablations_of(results)
    count = len(grouped(changed, "family", "label"))
    budgets = ", ".join(f"{epochs:g}" for (epochs,) in grouped(changed, "epochs"))
    return (
        f"Default: {METHODS[results['default']]}. Budget: {budgets} epochs; accuracies of the linear probe. "
        "Difference: points against the default, paired by seed, with the 95 % interval of Student's t; for motion on "
        "the validation clips, by which choices are made. `clearly` marks intervals without 0; were no setting to "
        f"matter, about {0.05 * count:.1f} of the {count} rows would be marked all the same. Seconds are of training "
        "alone."
    )


def write_page(results: Results, docs_path: Path) -> None:
    """Replaces what stands between the markers of the page, and draws its pictures next to it.

    Raises:
        ValueError: the page does not have both markers once, in their order.
    """
    before, after = around(docs_path)
    draw(results, docs_path.with_name(PICTURES[0]))
    draw_ablations(results, docs_path.with_name(PICTURES[1]))
    write_whole(docs_path, before + page(results) + after)


def around(docs_path: Path) -> tuple[str, str]:
    """What stands before and after the numbers of a page. ValueError as of `write_page`."""
    text = docs_path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in before + after:
        raise ValueError(
            f"{docs_path}: expected the line {BEGIN} and after it {END}, once each; put them where the numbers go"
        )
    return before, after
