"""Which trainings of a convergence run belong together, and what each of them cost."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

Results = dict[str, Any]
"""The content of the JSON file that `benchmarks.convergence` writes."""
Trial = dict[str, Any]
"""One training of it, with what it reached."""
Measure = Literal["probe", "finetune"]
"""Share of test clips classified rightly, 0 to 1: by a linear probe of the frozen encoder, or after fine-tuning."""
Axis = Literal["epochs", "seconds", "training_seconds", "flops"]
"""What a training costs: seconds and FLOPs with the preparation of its targets, training seconds without it."""

JUDGED = "probe_validation"
"""What choices are made by, of learning rates and of settings: the test clips stay for what is reported."""
METHODS = {"mam2": "MAM2", "videomae": "VideoMAE", "random": "random encoder"}
MEASURES: dict[Measure, str] = {"probe": "linear probe", "finetune": "fine-tuning"}


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
    measured = grouped((trial for trial in trials if trial[measure] is not None), "epochs")
    return {budget: measured[budget,] for (budget,) in sorted(measured)}


def values(trials: Iterable[Trial], key: str) -> list[float]:
    """What is there under `key`."""
    return [trial[key] for trial in trials if trial[key] is not None]


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
    default = [trial for trial in trials if trial["variant"] == "mam2"]
    labels = sorted({trial["label"] for trial in default})
    if len(labels) > 1:
        raise ValueError(
            f"results: expected one label among the ablation trials of variant 'mam2', the default, found {labels}; "
            "give every changed setting a variant of its own"
        )
    return default, [trial for trial in trials if trial["variant"] != "mam2"]
