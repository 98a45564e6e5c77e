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

Rates = Mapping[float, Mapping[str, float]]
"""Learning rates by budget, from which on they are used, and by method and optimizer."""
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


def later_sweep_jobs(setting: Setting, epochs: float) -> list[Job]:
    """The sweep at a larger budget: trainings with the main comparison's first seed. Those at the best rates are a part
    of that."""
    return [
        main_job(setting, variant, epochs, rate, 0)
        for variant, changes in setting.variants.items()
        for rate in setting.later_rates[epochs][optimizer_of(changes)]
    ]


def all_later_sweep_jobs(setting: Setting) -> list[Job]:
    return [job for epochs in setting.later_rates for job in later_sweep_jobs(setting, epochs)]


def rates_at(rates: Rates, epochs: float) -> Mapping[str, float]:
    """By variant, those of the largest budget of `rates` that is not above `epochs`, or of the smallest one."""
    return rates[max((budget for budget in rates if budget <= epochs), default=min(rates))]


def main_jobs(setting: Setting, rates: Rates) -> list[Job]:
    """The small budgets first, each with all seeds, so that what is done at any time can be compared."""
    return [
        main_job(setting, variant, epochs, rates_at(rates, epochs)[variant], seed)
        for epochs in sorted(setting.budgets)
        for seed in range(setting.seeds)
        for variant in setting.variants
    ]


def early_jobs(setting: Setting, rates: Rates, *, real: bool) -> list[Job]:
    """The first trainings after the sweep: the small budgets and untrained encoders. real: of real clips, too."""
    return [
        *(job for job in _of_first_seeds(setting, rates) if job.epochs < min(setting.later_rates)),
        *random_jobs(setting, ["synthetic", *(["real"] if real else [])]),
    ]


def middle_jobs(setting: Setting, rates: Rates) -> list[Job]:
    """What follows the sweeps at larger budgets: the first seeds at all budgets, and the ablations of the targets."""
    return [*_of_first_seeds(setting, rates), *ablation_jobs(setting, rates, setting.families[:1])]


def last_jobs(setting: Setting, rates: Rates) -> list[Job]:
    """The other seeds, and the other ablations, the important ones first."""
    first = _of_first_seeds(setting, rates)
    return [
        *(job for job in main_jobs(setting, rates) if job not in first),
        *(job for family in setting.families[1:] for job in ablation_jobs(setting, rates, [family])),
    ]


def _of_first_seeds(setting: Setting, rates: Rates) -> list[Job]:
    return [job for job in main_jobs(setting, rates) if job.seed < setting.first_seeds]


def random_jobs(setting: Setting, data: Sequence[str]) -> list[Job]:
    """Encoders that are not trained."""
    return [
        Job("random", "random", tuple(setting.real.items()) if name == "real" else (), 1.0, 1e-3, seed, data=name)
        for name in data
        for seed in range(setting.seeds)
    ]


def ablation_jobs(setting: Setting, rates: Rates, families: Sequence[str] = ()) -> list[Job]:
    """One change of the default each, at its learning rate. families: only these; none: all that the setting has."""
    default = setting.variants[setting.default]
    rate = rates_at(rates, setting.ablation_epochs)[setting.default]
    return [
        Job("ablation", label, tuple({**default, **changes}.items()), setting.ablation_epochs, rate, seed,
            family=family, label=label)
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


def finetune_jobs(setting: Setting, rates: Rates) -> list[Job]:
    """Jobs for the encoders that `main_jobs` left, and of random ones."""
    main = [job for job in main_jobs(setting, rates) if job.seed < setting.finetune_seeds]
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
