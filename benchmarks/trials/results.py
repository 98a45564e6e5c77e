"""Composes the results of the convergence comparison from its trainings, times and preparation."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.trials import prepared, real, worker
from benchmarks.trials.jobs import Job, trained_by
from benchmarks.trials.settings import Setting, pretraining
from mam2.engine.config.recipe import to_dict
from mam2.engine.costs import step_flops
from mam2.engine.files import write_whole

PACKAGES = ("mam2", "torch", "numpy")


class Measured(NamedTuple):
    """A run that has ended."""

    setting: Setting
    out: Path
    """Its folder, with the prepared data."""
    done: Mapping[str, dict[str, Any]]
    """Results of the trainings, by the keys of their jobs."""
    steps_ms: Mapping[str, float]
    """Milliseconds of a training step, by variant or label."""
    workers: int
    """Trainings that run at once."""
    wall_s: float


def results(run: Measured, jobs: Sequence[Job], later: Sequence[Job]) -> dict[str, Any]:
    """Returns the contents of results.json.

    jobs: trainings of the report. later: sweeps at larger budgets, whose best trainings are among the jobs, too.
    """
    there = (run.out / "real" / prepared.PREPARED).is_file()
    names = ("synthetic", *(["real"] if there else []))
    facts = {name: prepared.read_facts(run.out / name) for name in names}
    tuned = {trained_by(job).key: run.done[job.key] for job in jobs if job.group == "finetune"}
    trained = [job for job in jobs if job.group != "finetune"]
    trials = [_trial(run, job, tuned) for job in trained if job.group != "random"]
    trials += [{**_trial(run, job, {}), "group": "sweep"} for job in later]
    trials += [
        {**trial, "group": "ablation", "family": "default", "label": "default"}
        for trial in trials
        if (trial["group"], trial["variant"], trial["epochs"])
        == ("main", run.setting.default, run.setting.ablation_epochs)
    ]
    untrained = [
        {**run.done[job.key], "finetune": tuned.get(job.key, {}).get("finetune")}
        for job in trained
        if job.group == "random"
    ]
    found = {
        "machine": _machine(run.workers),
        "setting": run.setting.name,
        "default": run.setting.default,
        "budgets": list(run.setting.budgets),
        "seeds": run.setting.seeds,
        "config": to_dict(pretraining(run.setting, {})),
        "date": datetime.date.today().isoformat(),
        "wall_s": run.wall_s,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "data": {name: {"validation": 0, **fact["videos"], "classes": fact["classes"]}
                 for name, fact in facts.items()},
        "preparation": {name: facts["synthetic"][name] for name in
                        ("tokenizer_s", "tokenize_s", "tokenizer_flops", "tokenize_flops")},
        "steps_ms": run.steps_ms,
        "trials": [_shown(trial) for trial in trials],
        "random": [_shown(trial) for trial in untrained],
    }  # fmt: skip
    if there:
        found["real"] = _real(run.out)
    return found


def _real(out: Path) -> dict[str, Any]:
    """Returns the questions about real clips, and the answers of the pixel baseline."""
    clips = real.load_questions(out / "real")
    file = out / "pixels.json"
    if not file.is_file():
        answers = {
            name: {kind: answer._asdict() for kind, answer in answers.items()}
            for name, answers in real.pixel_answers(clips).items()
        }
        write_whole(file, json.dumps(answers))
    return {
        "pixels": json.loads(file.read_text(encoding="utf-8")),
        "questions": {
            name: {
                "train": len(asked.train),
                "test": len(asked.test),
                "classes": int(asked.train_labels.max()) + 1,
                "groups": asked.test_groups.tolist(),
            }
            for name, asked in clips.questions.items()
        },
    }


def _trial(run: Measured, job: Job, tuned: dict[str, dict[str, Any]]) -> dict[str, Any]:
    found = run.done[job.key]
    config = worker.config_of(run.setting, job)
    facts = prepared.read_facts(run.out / job.data, config.tokenizer.codes_per_patch)
    codes = facts["codebook_size"] if config.needs_codes else 0
    frames = config.coded_frames
    clips = found["steps"] * config.optim.batch
    step_s = run.steps_ms[job.label or job.variant] / 1000
    tokenize = {unit: frames * facts[f"tokenize_{unit}"] for unit in ("s", "flops")}
    return found | {
        "changes": dict(job.changes),
        "finetune": tuned.get(job.key, {}).get("finetune"),
        "step_ms": 1000 * step_s,
        "train_s": found["steps"] * step_s,
        "epoch_s": found["steps"] / job.epochs * step_s,
        "flops": float(sum(step_flops(config, codes).values()) * clips),
        "preparation_s": facts["tokenizer_s"] + tokenize["s"] if codes else 0.0,
        "preparation_flops": facts["tokenizer_flops"] + tokenize["flops"] if codes else 0.0,
    }


def _shown(trial: dict[str, Any]) -> dict[str, Any]:
    """Returns a trial without its key, which only this program reads."""
    return {name: value for name, value in trial.items() if name != "key"}


def _machine(workers: int) -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{workers} {'core' if workers == 1 else 'cores'} of {model}"
