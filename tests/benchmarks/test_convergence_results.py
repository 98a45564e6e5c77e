"""What results.json has of a training: its costs, and the fine-tuning of its encoder."""

import json

import pytest

from benchmarks.trials.jobs import ablation_jobs, finetune_jobs, main_jobs, random_jobs, trained_by
from benchmarks.trials.prepared import PREPARED
from benchmarks.trials.results import Measured, results
from benchmarks.trials.settings import QUICK

FACTS = {
    "videos": {"train": 8, "validation": 4, "test": 4},
    "classes": ["a", "b"],
    "codebook_size": 16,
    "tokenizer_s": 10.0,
    "tokenize_s": 1.0,
    "tokenizer_flops": 100.0,
    "tokenize_flops": 7.0,
}


def test_a_trial_has_the_costs_of_its_steps_and_of_its_codes(tmp_path):
    (tmp_path / "synthetic").mkdir()
    (tmp_path / "synthetic" / PREPARED).write_text(json.dumps(FACTS))
    rates = {1: dict.fromkeys(QUICK.variants, 1e-3)}
    jobs = [*main_jobs(QUICK, rates), *random_jobs(QUICK, ["synthetic"])]
    tuned = finetune_jobs(QUICK, rates)
    assert tuned
    done = {job.key: {"key": job.key, **vars(job), "steps": 6, "probe": 0.5} for job in jobs}
    done |= {job.key: {"finetune": 0.75} for job in tuned}
    steps_ms = dict.fromkeys(QUICK.variants, 20.0)
    run = Measured(QUICK, tmp_path, done, steps_ms, 1, 5.0)
    found = results(run, [*jobs, *tuned], [])
    assert "real" not in found
    assert found["data"]["synthetic"] == {**FACTS["videos"], "classes": ["a", "b"]}
    main = [trial for trial in found["trials"] if trial["group"] == "main"]
    assert len(main) == len(main_jobs(QUICK, rates))
    assert {trial["variant"] for trial in main} == set(QUICK.variants)
    for trial in main:
        assert "key" not in trial
        assert trial["train_s"] == pytest.approx(6 * 0.02)
        assert trial["epoch_s"] == pytest.approx(6 * 0.02 / trial["epochs"])
        predicts_codes = trial["variant"].startswith("mam2")
        assert (trial["preparation_s"] > 10) == (trial["preparation_flops"] > 100) == predicts_codes
    starts = {trained_by(job).key for job in tuned}
    assert [trial["finetune"] for trial in main] == [0.75 if job.key in starts else None for job in jobs[: len(main)]]
    assert len(found["random"]) == QUICK.seeds


def test_several_codes_per_patch_cost_what_their_own_tokenizer_does(tmp_path):
    (tmp_path / "synthetic").mkdir()
    (tmp_path / "synthetic" / PREPARED).write_text(json.dumps(FACTS))
    of_four = {"tokenizer_s": 30.0, "tokenize_s": 4.0, "tokenizer_flops": 300.0, "tokenize_flops": 28.0}
    (tmp_path / "synthetic" / "codes-4.json").write_text(json.dumps(of_four))
    jobs = ablation_jobs(QUICK, {1: dict.fromkeys(QUICK.variants, 1e-3)}, ["targets"])
    done = {job.key: {"key": job.key, **vars(job), "steps": 6, "probe": 0.5} for job in jobs}
    run = Measured(QUICK, tmp_path, done, {job.label: 20.0 for job in jobs}, 1, 5.0)
    trials = {trial["label"]: trial for trial in results(run, jobs, [])["trials"]}
    paid = {label: (trial["preparation_s"], trial["preparation_flops"]) for label, trial in trials.items()}
    assert paid["codes alone"] == (11.0, 107.0)
    assert paid["codes of both frames"] == (12.0, 114.0)
    assert paid["4 codes per patch"] == paid["codes alone, 4 per patch"] == (34.0, 328.0)
    assert paid["motion alone"] == (0.0, 0.0)
    assert trials["4 codes per patch"]["flops"] > trials["codes of both frames"]["flops"], "four heads, two heads"
