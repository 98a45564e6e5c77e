"""Which trainings of a convergence run belong together, and what each of them cost."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

Results = dict[str, Any]
"""The content of the JSON file that `benchmarks.convergence` writes."""
Trial = dict[str, Any]
"""One training of it, with what it reached."""
Measure = Literal["probe", "shape", "color", "texture", "finetune"]
"""Share of test clips classified rightly, 0 to 1: how the shape moves, what shape it is, its color and the background's
texture, by linear probes of the frozen encoder; and how it moves after fine-tuning."""
Axis = Literal["epochs", "seconds", "training_seconds", "flops"]
"""What a training costs: seconds and FLOPs with the preparation of its targets, training seconds without it."""

JUDGED = "probe_validation"
"""What choices are made by, of learning rates and of settings: the test clips stay for what is reported."""
REAL_JUDGED = "judged"
"""What learning rates on real clips are chosen by, see `real.judge`."""
METHODS = {
    "mam2-muon": "MAM2, Muon",
    "mam2": "MAM2, AdamW",
    "videomae-muon": "VideoMAE, Muon",
    "videomae": "VideoMAE, AdamW",
    "random": "random encoder",
    "pixels": "pixel components",
}
MEASURES: dict[Measure, str] = {
    "probe": "motion",
    "shape": "shape",
    "color": "color",
    "texture": "texture",
    "finetune": "motion, fine-tuned",
}
CURVES: tuple[Measure, ...] = ("probe", "shape")
"""The two questions whose curves are drawn and compared: what moves how, and what it is."""
CHANCE: dict[Measure, int] = {"probe": 8, "shape": 5, "color": 3, "texture": 3, "finetune": 8}
"""Classes of each."""


def trials_of(results: Results, group: str) -> list[Trial]:
    return [trial for trial in results["trials"] if trial["group"] == group]


def grouped(trials: Iterable[Trial], *keys: str) -> dict[tuple[Any, ...], list[Trial]]:
    """The trials with the same values under `keys`, in the order in which each group first appears."""
    groups: dict[tuple[Any, ...], list[Trial]] = {}
    for trial in trials:
        groups.setdefault(tuple(trial[key] for key in keys), []).append(trial)
    return groups


def by_epochs(trials: Iterable[Trial], measure: Measure) -> dict[float, list[Trial]]:
    """The trials that were measured, for each budget, the smallest first."""
    measured = grouped((trial for trial in trials if trial.get(measure) is not None), "epochs")
    return {budget: measured[budget,] for (budget,) in sorted(measured)}


def values(trials: Iterable[Trial], key: str) -> list[float]:
    """What is there under `key`."""
    return [trial[key] for trial in trials if trial.get(key) is not None]


def cost(trial: Trial, axis: Axis) -> float:
    if axis == "epochs":
        return trial["epochs"]
    if axis == "flops":
        return trial["flops"] + trial["preparation_flops"]
    return trial["train_s"] + (trial["preparation_s"] if axis == "seconds" else 0.0)


def ablations_of(results: Results) -> tuple[list[Trial], list[Trial]]:
    """The trials of the default among the ablations, and those of changed settings.

    Raises:
        ValueError: trials with different labels claim to be the default.
    """
    trials = trials_of(results, "ablation")
    default = [trial for trial in trials if trial["family"] == "default"]
    labels = sorted({trial["label"] for trial in default})
    if len(labels) > 1:
        raise ValueError(
            f"results: expected one label among the ablation trials of the family 'default', found {labels}; "
            "give every changed setting a family of its own"
        )
    return default, [trial for trial in trials if trial["family"] != "default"]
