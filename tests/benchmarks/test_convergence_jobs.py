"""The trainings that the convergence study chooses: rates, questions, kept encoders, and the time that is left."""

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.convergence import OutOfTime, Real, Run
from benchmarks.trials import real, worker
from benchmarks.trials.jobs import (
    Job,
    all_later_sweep_jobs,
    at_an_end,
    main_jobs,
    ranked_rates,
    wider,
)
from benchmarks.trials.selection import REAL_JUDGED
from benchmarks.trials.settings import QUICK, SETTINGS, changed, pretraining
from benchmarks.trials.worker import encoder_file
from mam2.engine.errors import UserError
from mam2.engine.model.mam2 import MAM2


def test_values_are_changed_by_their_dotted_names():
    config = changed(pretraining(QUICK, {}), {"model.regressor.keys": "all", "optim.batch": 8})
    assert (config.model.regressor.keys, config.optim.batch) == ("all", 8)
    with pytest.raises((AttributeError, TypeError)):
        changed(config, {"model.regresor.keys": "all"})


def test_rates_are_ranked_by_the_mean_on_validation_clips():
    trials = [
        {"variant": method, "base_lr": rate, "probe_validation": score, "probe": 1 - score}
        for method, scores in {"mam2": (0.2, 0.5, 0.4), "videomae": (0.6, 0.5, 0.4)}.items()
        for rate, score in zip((1, 2, 3), scores, strict=True)
    ]
    assert ranked_rates(trials) == {"mam2": [2, 3, 1], "videomae": [1, 2, 3]}
    unlucky = {"variant": "mam2", "base_lr": 2, "probe_validation": 0.0, "probe": 1.0}
    assert ranked_rates([*trials, unlucky])["mam2"] == [3, 2, 1]


def test_where_a_best_rate_is_at_an_end_every_variant_gets_one_more(tmp_path, monkeypatch):
    setting = dataclasses.replace(QUICK, rates={"adamw": (1e-2, 2e-2, 4e-2), "muon": (1e-2, 2e-2, 4e-2)})
    best = {"mam2": 2.1e-2, "videomae": 3e-1, "mam2-muon": 1.9e-2, "videomae-muon": 2e-2}
    trained = []

    def train(self, jobs):
        trained.append(len(jobs))
        return [
            {"variant": job.variant, "base_lr": job.base_lr, "probe_validation": -abs(job.base_lr - best[job.variant])}
            for job in jobs
        ]

    monkeypatch.setattr(Run, "train", train)
    wanted = []
    rates = Run(setting, tmp_path, None).sweep(wanted)
    assert rates == {"mam2": 2e-2, "videomae": 8e-2, "mam2-muon": 2e-2, "videomae-muon": 2e-2}
    assert trained == [12, 16]
    tried = {variant: sorted(job.base_lr for job in wanted if job.variant == variant) for variant in best}
    assert tried["videomae"] == [1e-2, 2e-2, 4e-2, 8e-2]
    assert {len(each) for each in tried.values()} == {4}
    assert tried["mam2"] == [5e-3, 1e-2, 2e-2, 4e-2], "beyond the better of the two ends"
    assert wider([1.0, 2.0, 4.0], [4.0, 2.0, 1.0]) == 8.0
    assert at_an_end([1.0, 2.0, 4.0], 1.0)
    assert not at_an_end([1.0, 2.0, 4.0], 2.0)
    assert not at_an_end([1.0], 1.0), "a single rate is no sweep"


def test_the_reported_trainings_on_real_clips_have_the_best_rate_of_their_sweep(tmp_path, monkeypatch):
    """With a rate per variant that is best on real clips, and another that is best on the synthetic ones."""
    best = {"mam2-muon": 6.4e-2, "videomae-muon": 1.6e-2, "motion alone": 3.2e-2, "codes alone": 1.6e-2}
    best["codes alone, 4 per patch"] = 8e-3
    setting, trained, reported = SETTINGS["cpu"], [], []

    def train(self, jobs):
        trained.extend(job for job in jobs if job not in trained)
        self.done |= {job.key: {} for job in jobs}
        return [
            {
                **dataclasses.asdict(job),
                "probe_validation": -abs(job.base_lr - 3.2e-2),
                REAL_JUDGED: -abs(job.base_lr - best.get(job.variant, 0)),
            }
            for job in jobs
        ]

    monkeypatch.setattr(Run, "train", train)
    for step in ("prepare", "prepare_real", "measure"):
        monkeypatch.setattr(Run, step, lambda self: None)
    monkeypatch.setattr("benchmarks.convergence.results", lambda run, jobs, later: reported.extend(jobs))
    Run(setting, tmp_path, Real((real.Lists(Path("a"), Path("b")),), Path("a"))).all()
    assert {(job.variant, job.base_lr) for job in reported if job.group == "real"} == set(best.items())
    swept = [job for job in reported if job.group == "real sweep"]
    assert len(swept) == len({job.key for job in swept}) == len(setting.real_factors) * len(setting.real_variants)
    groups = [job.group for job in trained]
    first = min(setting.later_rates)
    small = [job for job in trained if job.group == "main" and job.epochs < first and job.seed < 2]
    assert groups.index("real sweep") > max(trained.index(job) for job in small), "small budgets first"
    assert groups.index("real sweep") < min(trained.index(job) for job in all_later_sweep_jobs(setting))


def test_a_rate_is_judged_by_the_first_question_with_a_mean_per_time_slot():
    config = pretraining(QUICK, {})
    torch.manual_seed(0)
    encoder = MAM2(config, 16).encoder
    clips = np.random.default_rng(3).integers(0, 256, (24, 1, 1, 8, 40, 40, 3), dtype=np.uint8)
    labels, groups = torch.arange(24) % 2, torch.arange(24)
    first, second = (
        real.Question(groups[:12], shown[:12], groups[12:], shown[12:], groups[:12], groups[12:])
        for shown in (labels, groups // 2 % 2)
    )
    asked = real.RealClips(clips, {"words": first, "phrases": second})
    answers = real.ask(encoder, asked, config)
    accuracies = [answers["words"]["time"], answers["words"]["mean"], answers["phrases"]["time"]]
    assert len({found.accuracy for found in accuracies}) == 3, "each wrong choice would show"
    assert real.judge(encoder, asked, config) == answers["words"]["time"].accuracy
    swapped = real.RealClips(clips, {"phrases": second, "words": first})
    assert real.judge(encoder, swapped, config) == answers["phrases"]["time"].accuracy


def test_a_call_that_is_out_of_time_begins_no_training(tmp_path):
    run = Run(QUICK, tmp_path, None, minutes=1e-9)
    rates = dict.fromkeys(QUICK.variants, 1e-3)
    with pytest.raises(OutOfTime):
        run.train(main_jobs(QUICK, {1: rates}))
    assert run.done == {}


def test_kept_encoders_are_asked_only_what_their_trainings_lack(tmp_path, monkeypatch):
    """A training of an earlier version without the attentive answers; another has all; a third left no encoder."""
    run = Run(QUICK, tmp_path, None)
    lacking, complete, lost = (Job("real", "mam2-muon", (), 1.0, 1e-3, seed, data="real") for seed in range(3))
    old = {"words": {kind: {"right": "0"} for kind in real.KINDS if kind not in real.ATTENTIVE}}
    known = {"words": {kind: {"right": "0"} for kind in real.KINDS}}
    for job, answers in ((lacking, old), (complete, known), (lost, old)):
        run.done[job.key] = {"key": job.key, "answers": answers, "measuring_cpu_s": 1.0}
        if job is not lost:
            encoder_file(tmp_path, job).parent.mkdir(exist_ok=True)
            encoder_file(tmp_path, job).touch()
    begun = []

    def ended(self, what, calls):
        for job, call in calls.items():
            begun.append((job, call.func, call.args[-1]))
            yield job, {"answers": {"words": {kind: {"right": "1"} for kind in call.args[-1]}}, "measuring_cpu_s": 2.0}

    monkeypatch.setattr(Run, "_ended", ended)
    run.ask_again([lacking, complete, lost, Job("real sweep", "mam2-muon", (), 1.0, 1e-3, 0, data="real")])
    assert begun == [(lacking, worker.ask_again, list(real.ATTENTIVE))]
    again = Run(QUICK, tmp_path, None).done
    right = {kind: answer["right"] for kind, answer in again[lacking.key]["answers"]["words"].items()}
    assert right == {kind: str(int(kind in real.ATTENTIVE)) for kind in real.KINDS}
    assert again[lacking.key]["measuring_cpu_s"] == 3.0
    monkeypatch.setattr(Run, "_ended", lambda self, what, calls: iter(()))
    run.done[lacking.key]["answers"] = old
    with pytest.raises(OutOfTime):
        run.ask_again([lacking])


def test_groups_come_from_a_table(tmp_path):
    table = tmp_path / "meta.csv"
    table.write_text("path,speaker\na.mp4,M\nb.mp4,F\n")
    paths = [str(tmp_path / name) for name in ("a.mp4", "b.mp4", "a.mp4")]
    assert real.read_groups(f"{table}:speaker", paths).tolist() == [1, 0, 1]
    for groups, message in (
        (f"{table}:person", "no column for 'person'"),
        (str(table), "expected TABLE:COLUMN"),
        (f"{tmp_path / 'none.csv'}:speaker", "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            real.read_groups(groups, paths)
    with pytest.raises(UserError, match="no group for c"):
        real.read_groups(f"{table}:speaker", ["c"])


def test_a_variant_that_a_kept_run_lacks_is_timed_relative_to_the_default(tmp_path, monkeypatch):
    """This machine now takes 3 times as long per step as when the kept times were measured."""
    run = Run(QUICK, tmp_path, None)
    kept = {variant: 20.0 for variant in worker.timed(QUICK) if variant != "4 codes per patch"}
    (tmp_path / "steps.json").write_text(json.dumps(kept))
    asked = []

    def time_steps(setting, folder, variants):
        asked.append(variants)
        return {variant: 60.0 if variant == QUICK.default else 90.0 for variant in variants}

    monkeypatch.setattr(worker, "time_steps", time_steps)
    monkeypatch.setattr(Run, "_pool", lambda self, workers: ThreadPoolExecutor(workers))
    run.measure()
    assert asked == [["4 codes per patch", QUICK.default]]
    assert run.steps_ms == kept | {"4 codes per patch": 30.0}
    run.measure()
    assert len(asked) == 1
    assert run.steps_ms == kept | {"4 codes per patch": 30.0}
    (tmp_path / "steps.json").unlink()
    run.measure()
    assert set(asked[-1]) == set(worker.timed(QUICK))
    assert (run.steps_ms[QUICK.default], run.steps_ms["4 codes per patch"]) == (60.0, 90.0)


def test_jobs_that_differ_have_other_keys():
    job = Job("main", "mam2", (), 5, 1e-3, 0)
    assert job.key != dataclasses.replace(job, seed=1).key
