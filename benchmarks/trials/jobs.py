"""Which trainings a convergence run consists of, the important ones first."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.trials.selection import JUDGED, grouped, values
from benchmarks.trials.settings import ABLATIONS, Setting, base_of, optimizer_of

SWEEP_SEED = 100
"""Seed of the first training of a sweep, so that no seed that is reported chose anything."""


@dataclass(frozen=True)
class Job:
    """One training, or the fine-tuning of what one left."""

    group: str
    """sweep, main, ablation, real sweep, real, random, or finetune."""
    variant: str
    changes: tuple[tuple[str, Any], ...]
    epochs: float
    base_lr: float
    seed: int
    data: str = "synthetic"
    family: str = ""
    label: str = ""

    @property
    def key(self) -> str:
        return json.dumps(dataclasses.astuple(self))


def sweep_jobs(setting: Setting, rates: Mapping[str, Sequence[float]]) -> list[Job]:
    """A training for each variant, each of its learning rates and each seed of the sweep."""
    return [
        Job("sweep", variant, tuple(changes.items()), setting.sweep_epochs, rate, SWEEP_SEED + seed)
        for seed in range(setting.sweep_seeds)
        for variant, changes in setting.variants.items()
        for rate in rates[variant]
    ]


def wider(tried: Sequence[float], ranked: Sequence[float]) -> float:
    """The next learning rate to try, twice the highest or half the lowest: beyond the end where the best one is, or
    else beyond the better of the two ends. ranked: those tried, the best first."""
    ends = [rate for rate in ranked if rate in (min(tried), max(tried))]
    return ends[0] * 2 if ends[0] == max(tried) else ends[0] / 2


def at_an_end(tried: Sequence[float], best: float) -> bool:
    """Whether a better rate may lie beyond those tried; a single one is no sweep."""
    return len(tried) > 1 and best in (min(tried), max(tried))


def main_job(setting: Setting, variant: str, epochs: float, rate: float, seed: int) -> Job:
    return Job("main", variant, tuple(setting.variants[variant].items()), epochs, rate, seed)


def final_jobs(setting: Setting) -> list[Job]:
    """The sweep's second round, for the larger budgets: trainings with the main comparison's first seed. Those at the
    best rates are a part of that."""
    return [
        main_job(setting, variant, setting.long_epochs, rate, 0)
        for variant, changes in setting.variants.items()
        for rate in setting.long_rates[optimizer_of(changes)]
    ]


def main_jobs(setting: Setting, rates: Mapping[str, float], long_rates: Mapping[str, float]) -> list[Job]:
    """The small budgets first, each with all seeds, so that what is done at any time can be compared.

    rates: of the budgets below `long_epochs`, by variant; long_rates: of the others.
    """
    return [
        main_job(setting, variant, epochs, (rates if epochs < setting.long_epochs else long_rates)[variant], seed)
        for epochs in sorted(setting.budgets)
        for seed in range(setting.seeds)
        for variant in setting.variants
    ]


def early_jobs(setting: Setting, rates: Mapping[str, float], *, real: bool) -> list[Job]:
    """The first trainings after the sweep: the small budgets and untrained encoders. real: of real clips, too."""
    main = main_jobs(setting, rates, rates)
    return [
        *(job for job in main if job.seed < setting.first_seeds and job.epochs < setting.long_epochs),
        *random_jobs(setting, ["synthetic", *(["real"] if real else [])]),
    ]


def later_jobs(setting: Setting, rates: Mapping[str, float], long_rates: Mapping[str, float]) -> list[Job]:
    """All others but fine-tuning, the important ones first."""
    main = main_jobs(setting, rates, long_rates)
    first = [job for job in main if job.seed < setting.first_seeds]
    at_once = [job for job in first if job.epochs == setting.long_epochs]
    targets, *others = (ablation_jobs(setting, rates, [family]) for family in setting.families)
    return list(dict.fromkeys([*at_once, *targets, *first, *main, *(job for jobs in others for job in jobs)]))


def random_jobs(setting: Setting, data: Sequence[str]) -> list[Job]:
    """Encoders that are not trained."""
    return [
        Job("random", "random", tuple(setting.real.items()) if name == "real" else (), 1.0, 1e-3, seed, data=name)
        for name in data
        for seed in range(setting.seeds)
    ]


def ablation_jobs(setting: Setting, rates: Mapping[str, float], families: Sequence[str] = ()) -> list[Job]:
    """One change of the default each, at its learning rate. families: only these; none: all that the setting has."""
    default = setting.variants[setting.default]
    return [
        Job("ablation", label, tuple({**default, **changes}.items()), setting.ablation_epochs, rates[setting.default],
            seed, family=family, label=label)
        for seed in range(setting.ablation_seeds)
        for family, label, changes in ABLATIONS
        if family in (families or setting.families)
    ]  # fmt: skip


def real_sweep_jobs(setting: Setting, rates: Mapping[str, float]) -> list[Job]:
    """On real clips: a training for each of `real_variants` and each of `real_factors`.

    rates: by method and optimizer, those that the sweep on synthetic clips chose.
    """
    return [
        _real_job(setting, "real sweep", variant, rates[base_of(setting, variant)] * factor, SWEEP_SEED)
        for variant in setting.real_variants
        for factor in sorted(setting.real_factors)
    ]


def real_jobs(setting: Setting, rates: Mapping[str, float]) -> list[Job]:
    """On real clips: the trainings that are reported. rates: by real variant."""
    return [
        _real_job(setting, "real", variant, rates[variant], seed)
        for seed in range(setting.real_seeds)
        for variant in setting.real_variants
    ]


def _real_job(setting: Setting, group: str, variant: str, rate: float, seed: int) -> Job:
    changes = {**setting.all_variants[variant], **setting.real}
    return Job(group, variant, tuple(changes.items()), setting.real_epochs, rate, seed, data="real", label=variant)


def finetune_jobs(setting: Setting, rates: Mapping[str, float], long_rates: Mapping[str, float]) -> list[Job]:
    """Jobs for the encoders that `main_jobs` left, and of random ones."""
    main = [job for job in main_jobs(setting, rates, long_rates) if job.seed < setting.finetune_seeds]
    random = [job for job in random_jobs(setting, ["synthetic"]) if job.seed < setting.finetune_seeds]
    return [dataclasses.replace(job, group="finetune") for job in [*random, *main]]


def trained_by(job: Job) -> Job:
    """The training whose encoder a fine-tuning starts from."""
    return dataclasses.replace(job, group="random" if job.variant == "random" else "main")


def ranked_rates(trials: Sequence[Mapping[str, Any]], judged: str = JUDGED) -> dict[str, list[float]]:
    """Each variant's learning rates, that of the highest mean accuracy first. judged: where a trial has it."""
    ranked: dict[str, list[float]] = {}
    for (variant,), mine in grouped([dict(trial) for trial in trials], "variant").items():
        means = {rate: statistics.fmean(values(cell, judged)) for (rate,), cell in grouped(mine, "base_lr").items()}
        ranked[variant] = sorted(means, key=lambda rate: -means[rate])
    return ranked
