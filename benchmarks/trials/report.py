"""What `benchmarks.convergence` found, as the tables, sentences and pictures of docs/convergence.md."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import Row, table
from benchmarks.trials.intervals import welch, wilson
from benchmarks.trials.pictures import draw, draw_ablations
from benchmarks.trials.reach import DRAWS, Reach, reach
from benchmarks.trials.selection import (
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

BEGIN, END = "<!-- numbers: begin -->", "<!-- numbers: end -->"
PICTURES = "convergence.png", "convergence-ablations.png"
"""Beside the page."""
ABLATION_COLUMNS = (
    *("family", "setting", "seeds", "on validation, %", "difference [95 %]", "clearly", "on test, %"),
    *("s an epoch", "× default"),
)
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
    return table([*rows, *_random_rows(results, trials_of(results, "main"))], list(rows[0]) if rows else [])


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
                    "linear probe on validation, %": percent(values(cell, JUDGED)),
                    "best": f"best{at_end}" if base_lr == best else None,
                }
            )
    return table(rows, list(rows[0]) if rows else [])


def ablation_table(results: Results) -> str:
    """Markdown: the default and below it, by family, the changed settings. Empty without changed settings."""
    default, changed = ablations_of(results)
    if not changed:
        return ""
    reference = values(default, JUDGED)
    rows = [{"family": "default", **_ablation_row(default, default)}] if default else []
    for (family,), members in grouped(changed, "family").items():
        for place, cell in enumerate(grouped(members, "label").values()):
            row: Row = {"family": None if place else family, **_ablation_row(cell, default)}
            if difference := welch(values(cell, JUDGED), reference):
                row["difference [95 %]"] = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * end for end in difference))
                row["clearly"] = difference.verdict
            rows.append(row)
    return table(rows, ABLATION_COLUMNS)


def _ablation_row(cell: list[Trial], default: list[Trial]) -> Row:
    seconds = _mean(cell, "epoch_s")
    return {
        "setting": cell[0]["label"],
        "seeds": len(cell),
        "on validation, %": percent(values(cell, JUDGED)),
        "on test, %": percent(values(cell, "probe")),
        "s an epoch": seconds,
        "× default": f"{seconds / _mean(default, 'epoch_s'):.2f}" if default else None,
    }


def real_table(results: Results) -> str:
    """Markdown: accuracy on the test videos of the real clips, with what their number allows. Empty without trials."""
    trials = trials_of(results, "real")
    if not trials:
        return ""
    videos = results["data"]["real"]["test"]
    rows: list[Row] = []
    for (variant, epochs), cell in sorted(grouped(trials, "variant", "epochs").items()):
        row: Row = {"method": METHODS.get(variant, variant), "epochs": f"{epochs:g}", "seeds": len(cell)}
        for measure, name in MEASURES.items():
            sample = values(cell, measure)
            row[f"{name}, %"] = percent(sample)
            row[f"{name}, 95 % of {videos} videos"] = _binomial(sample, videos)
        rows.append(row)
    return table([*rows, *_random_rows(results, trials)], list(rows[0]))


def _binomial(sample: list[float], videos: int) -> str | None:
    if not sample:
        return None
    # seeds see the same videos, so that more of them do not make the interval narrower
    low, high = wilson(statistics.fmean(sample), videos)
    return f"{100 * low:.1f} to {100 * high:.1f}"


def _random_rows(results: Results, trials: list[Trial]) -> list[Row]:
    random = results.get("random", {})
    rows: list[Row] = []
    for (data,) in grouped(trials, "data"):
        if data in random:
            accuracies = {f"{name}, %": percent(random[data].get(measure) or []) for measure, name in MEASURES.items()}
            rows.append({"method": METHODS["random"], **accuracies})
    return rows


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
    """What `method` needs to reach `other`'s final accuracy, in words. None where one of them was not measured."""
    reaches = {axis: reach(results, measure, axis, method=method, other=other) for axis in UNITS}
    found = reaches["epochs"]
    if found is None:
        return None
    name, goal = METHODS.get(method, method), METHODS.get(other, other)
    target = f"{goal}'s final {100 * found.goal:.1f} % ({found.spent:g} epochs)"
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
            "seeds, on the same test clips. Seconds are of one training alone (on CPUs on one thread), "
            "without decoding; seconds and TFLOP count the preparation once a training.",
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
    if numbers := real_table(results):
        counts = results["data"]["real"]
        parts += [
            "### Real clips",
            numbers,
            f"{counts['classes']} classes, {counts['test']} test videos: one video is {100 / counts['test']:.1f} "
            "points. The interval is Wilson's for the mean accuracy on that many videos; ± tells only how seeds "
            "differ on the same videos.",
        ]
    return "\n\n".join([*parts, END])


def _what_ran(results: Results) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        f"Setting `{results['setting']}`, {results['date']}, on {results['machine']} ({versions}): "
        f"{len(results['trials'])} trainings, {results['wall_s'] / 60:.0f} minutes in all."
    ]
    for name, counts in results["data"].items():
        lines.append(
            f"{name.capitalize()} clips: {counts['classes']} classes, {counts['train']} to train on, "
            f"{counts['validation']} for validation, {counts['test']} to test on."
        )
    if paid := results.get("preparation"):
        flops = (paid["tokenizer_flops"] + paid["tokenize_flops"]) / 1e12
        lines.append(
            f"What MAM2 with codes pays once a data set: {paid['tokenizer_s']:.1f} s to train the tokenizer, "
            f"{paid['tokenize_s']:.1f} s to compute the codes, {flops:.3g} TFLOP together."
        )
    return "\n".join(lines)


def _ratios(results: Results) -> list[str]:
    # the last is what the way of reckoning gives where nothing is gained: noise on a flat curve crosses early
    pairs = (("mam2", "videomae"), ("videomae", "mam2"), ("videomae", "videomae"))
    sentences = [
        f"- {name.capitalize()}: {sentence}"
        for measure, name in MEASURES.items()
        for method, other in pairs
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
        f"Budget: {budgets} epochs; accuracies of the linear probe. Difference: points against the default on the "
        "validation clips, by which choices are made, with the 95 % interval of Welch's t over seeds. Trainings of one "
        "seed are not paired: where a seed moves both alike the interval is too wide rather than too narrow. `clearly` "
        f"marks intervals without 0; were no setting to matter, about {0.05 * count:.1f} of the {count} rows would be "
        "marked all the same. Seconds are of training alone."
    )


def write_page(results: Results, docs_path: Path) -> None:
    """Replaces what stands between the markers of the page, and draws its pictures beside it.

    Raises:
        ValueError: the page does not have both markers once, in their order.
    """
    before, after = around(docs_path)
    draw(results, docs_path.with_name(PICTURES[0]))
    draw_ablations(results, docs_path.with_name(PICTURES[1]))
    docs_path.write_text(before + page(results) + after, encoding="utf-8")


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
