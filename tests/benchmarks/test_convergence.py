"""The convergence study on CPU: its trainings learn, share what they must, stop and continue."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.convergence import Real, Run
from benchmarks.trials import prepared, real, trial
from benchmarks.trials.clips import write_hard_dataset
from benchmarks.trials.jobs import (
    ablation_jobs,
    early_jobs,
    finetune_jobs,
    last_jobs,
    later_sweep_jobs,
    main_jobs,
    middle_jobs,
    random_jobs,
    ranked_rates,
    real_jobs,
    real_sweep_jobs,
    sweep_jobs,
    trained_by,
)
from benchmarks.trials.selection import REAL_JUDGED
from benchmarks.trials.settings import ABLATIONS, QUICK, SETTINGS, changed, finetuning, pretraining
from benchmarks.trials.worker import config_of
from mam2.engine.errors import UserError
from mam2.engine.tokenizer.files import load_vqgan
from mam2.engine.tokenizer.prepare import build_tokenizer
from tests.helpers.paths import ROOT


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A quick run's folder."""
    out, clips = tmp_path_factory.mktemp("convergence"), tmp_path_factory.mktemp("real")
    write_hard_dataset(clips, {"train": 16, "test": 8})
    lines = [f"{file.relative_to(clips)},{file.parent.name[0]}" for file in sorted(clips.glob("*/*/*"))]
    (clips / "groups.csv").write_text("\n".join(["path,way", *lines]))
    _run(out, clips)
    return out


def _run(out, clips):
    command = [sys.executable, "-m", "benchmarks.convergence", "--quick", "--out", str(out)]
    command += ["--real-train", str(clips / "train"), "--real-test", str(clips / "test")]
    command += ["--real-group", f"{clips / 'groups.csv'}:way"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_answers_are_numbered_in_alphabetical_order(tmp_path):
    table = tmp_path / "looks.csv"
    table.write_text("path,shape,color\na.mp4,cross,red\nsub/b.mp4,bar,blue\n")
    found = prepared.answers(table, [str(tmp_path / "sub/b.mp4"), str(tmp_path / "a.mp4")])
    assert {name: numbers.tolist() for name, numbers in found.items()} == {"shape": [0, 1], "color": [0, 1]}
    with pytest.raises(UserError, match=r"no line for .*c\.mp4"):
        prepared.answers(table, [str(tmp_path / "c.mp4")])


@pytest.mark.parametrize("name", SETTINGS)
def test_every_training_of_every_setting_is_possible(name):
    setting = SETTINGS[name]
    rates = dict.fromkeys(setting.variants, 1e-3)
    tried = {len(setting.rates[optimizer]) for optimizer in ("adamw", "muon")}
    assert len(tried) == 1, "as many rates for each optimizer"
    by_budget = {setting.sweep_epochs: rates}
    for place, epochs in enumerate(setting.later_rates):
        by_budget[epochs] = dict.fromkeys(setting.variants, (2 + place) * 1e-3)
    main, ablations = main_jobs(setting, by_budget), ablation_jobs(setting, by_budget)
    on_real = real_jobs(setting, dict.fromkeys(setting.real_variants, 3e-3))
    swept, untrained = real_sweep_jobs(setting, rates), random_jobs(setting, ["synthetic", "real"])
    jobs = [
        *sweep_jobs(setting, dict.fromkeys(setting.variants, (1e-3, 2e-3))),
        *main,
        *ablations,
        *on_real,
        *swept,
        *untrained,
    ]
    finetuned = finetune_jobs(setting, by_budget)
    assert len({job.key for job in [*jobs, *finetuned]}) == len(jobs) + len(finetuned)
    assert {trained_by(job).key for job in finetuned} <= {job.key for job in jobs}
    for job in jobs:
        config = config_of(setting, job)
        # a video in v views is v clips: every variant takes the same number of steps
        assert config.optim.epochs * config.data.views == pytest.approx(job.epochs)
        assert config.optim.warmup_epochs == pytest.approx(0.05 * config.optim.epochs)
        assert config.optim.name == ("muon" if job.label or "muon" in job.variant else "adamw")
    finetuning(setting, pretraining(setting, {})).check()
    assert setting.ablation_epochs in setting.budgets
    assert {job.variant for job in main} == set(setting.variants)
    early = early_jobs(setting, {setting.sweep_epochs: rates}, real=True)
    middle, last = middle_jobs(setting, by_budget), last_jobs(setting, by_budget)
    assert {job.key for job in [*early, *middle, *last]} == {job.key for job in [*main, *ablations, *untrained]}
    assert {job.key for job in middle}.isdisjoint(job.key for job in last)
    for job in main:
        below = max((epochs for epochs in by_budget if epochs <= job.epochs), default=min(by_budget))
        assert job.base_lr == by_budget[below][job.variant]
    assert set(setting.later_rates) < set(setting.budgets)
    assert setting.sweep_epochs < min(setting.later_rates)
    assert max(setting.budgets) in setting.later_rates, "the rate of the largest budget is chosen at it"
    assert all(len({len(rates) for rates in tried.values()}) == 1 for tried in list(setting.later_rates.values())[1:])
    for epochs in setting.later_rates:
        swept_again = later_sweep_jobs(setting, epochs)
        best = {job.variant: job.base_lr for job in swept_again}
        shared = {job.key for job in main_jobs(setting, {**by_budget, epochs: best})} & {j.key for j in swept_again}
        assert len(shared) == len(setting.variants), "the best trainings of a later sweep are not done again"
    assert {job.family for job in ablations} == set(setting.families)
    assert {job.variant for job in on_real} == {job.variant for job in swept} == set(setting.real_variants)
    for variant in setting.real_variants:
        tried = {job.base_lr for job in swept if job.variant == variant}
        assert tried == {1e-3 * factor for factor in setting.real_factors}
        assert 1e-3 in tried, "the rate of the sweep on synthetic clips"
    assert {job.seed for job in swept}.isdisjoint(job.seed for job in on_real), "no reported seed chose a rate"
    assert setting.seeds >= (2 if name == "quick" else 5)
    changes = [json.dumps(ablation.changes, sort_keys=True) for ablation in ABLATIONS]
    assert len(set(changes)) == len(changes), "two ablations are the same"
    default = pretraining(setting, {})
    for family, label, change in ABLATIONS:
        assert pretraining(setting, change) != default, (family, label)


@pytest.mark.slow
def test_a_quick_run_trains_all_and_writes_its_page(finished):
    results = json.loads((finished / "results.json").read_text())
    trained = {(t["group"], t["variant"]) for t in results["trials"]}
    assert {(group, variant) for group in ("main", "sweep") for variant in QUICK.variants} <= trained
    for group in ("real", "real sweep"):
        assert {variant for of, variant in trained if of == group} == set(QUICK.real_variants)
    swept = ranked_rates([t for t in results["trials"] if t["group"] == "real sweep"], REAL_JUDGED)
    assert {len(rates) for rates in swept.values()} == {len(QUICK.real_factors)}
    for found in results["trials"]:
        assert found["group"] != "real" or found["base_lr"] == swept[found["variant"]][0], "the best rate of the sweep"
    assert results["steps_ms"].keys() == {*QUICK.variants, *(a.label for a in ABLATIONS)}
    labels = {a.label for a in ABLATIONS}
    assert {label for group, label in trained if group == "ablation"} == {"mam2-muon", *labels}
    page = (finished / "convergence.md").read_text()
    for text in ("VideoMAE, Muon's best", "± ", "pixel components", "of 7 groups", "chosen on **train**", *labels):
        assert text in page
    assert "were not done" not in page.partition("numbers: begin")[2]
    for picture in ("convergence.png", "convergence-ablations.png"):
        assert (finished / picture).read_bytes().startswith(b"\x89PNG")
    without = ("videomae", "videomae-muon", "motion alone", "pixels instead of codes")
    for found in results["trials"]:
        assert found["train_s"] == pytest.approx(found["steps"] * found["step_ms"] / 1000)
        coded = found["variant"] not in without and not found["variant"].startswith("latents")
        assert (found["preparation_s"] > 0) == coded, found["variant"]
        if found["group"] == "real":
            assert found["answers"]["train"].keys() == set(real.KINDS)
            assert {len(answer["right"]) for answer in found["answers"]["train"].values()} == {8}
        elif found["group"] == "real sweep":
            assert 0 <= found[REAL_JUDGED] <= 1
        else:
            assert all(0 <= found[name] <= 1 for name in ("probe", "shape", "color", "texture", "shape_validation"))
        tuned = found["group"] == "main" and found["seed"] == 0
        assert (found["finetune"] is not None) == (tuned or (found["family"] == "default" and found["seed"] == 0))


@pytest.mark.slow
def test_a_killed_run_leaves_no_process_and_continues(tmp_path):
    command = [sys.executable, "-m", "benchmarks.convergence", "--quick", "--out", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (tmp_path / "trials.jsonl").is_file() or not (tmp_path / "trials.jsonl").read_text():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert children
    process.kill()
    process.wait()
    while any(_alive(child) for child in children):
        assert time.monotonic() < deadline, "workers are left behind"
        time.sleep(0.2)
    lines = (tmp_path / "trials.jsonl").read_text().splitlines()
    with (tmp_path / "trials.jsonl").open("a") as file:
        file.write('{"key": "cut o')
    done = Run(QUICK, tmp_path, None).done
    assert len(done) == len(lines)


def _alive(pid):
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_a_run_that_is_done_trains_nothing_again(finished):
    """Only the training whose line is missing, and a kept encoder is asked what its training was not asked."""
    lines = [json.loads(line) for line in (finished / "trials.jsonl").read_text().splitlines()]
    asked = next(place for place, line in enumerate(lines) if line["group"] == "real")
    earlier = json.loads(json.dumps(lines[asked]))
    for answers in earlier["answers"].values():
        del answers["attentive"]
    kept = [*lines[:asked], earlier, *lines[asked + 1 : -1]]
    (finished / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    _run(finished, Path(json.loads((finished / "setting.json").read_text())[1][-1]).parent)
    after = [json.loads(line) for line in (finished / "trials.jsonl").read_text().splitlines()]
    assert after[:-2] == kept
    assert after[-2]["measuring_cpu_s"] > earlier["measuring_cpu_s"]
    spent = dict.fromkeys(("wall_s", "cpu_s", "measuring_cpu_s"), 0)
    for again, first in zip(after[-2:], (lines[asked], lines[-1]), strict=True):
        assert {**again, **spent} == {**first, **spent}, "the same encoder or training gave other numbers"


@pytest.mark.slow
def test_variants_of_a_seed_see_the_same_clips(finished):
    clips = prepared.load(finished / "synthetic")
    one, other = (pretraining(QUICK, changes, seed=5) for changes in list(QUICK.variants.values())[:2])
    for _, (mine, codes), (theirs, none) in zip(
        range(5), trial.batches(one, clips), trial.batches(other, clips), strict=False
    ):
        assert torch.equal(mine, theirs)
        assert none is None
        assert codes.shape == (len(mine), int(np.prod(one.grid)))
    both = changed(one, {"tokenizer.frames": "all"})
    assert next(trial.batches(both, clips))[1].shape == (one.optim.batch, int(np.prod(one.grid)), 2)


@pytest.mark.slow
@pytest.mark.parametrize("frames", ["first", "all"])
@pytest.mark.parametrize("depth", [1, 4])
def test_the_codes_of_a_step_are_those_that_the_tokenizer_gives_its_clips(finished, depth, frames):
    config = pretraining(QUICK, {"tokenizer.codes_per_patch": depth, "tokenizer.frames": frames}, seed=5)
    file = "tokenizer.safetensors" if depth == 1 else f"tokenizer-{depth}.safetensors"
    tokenizer = build_tokenizer(load_vqgan(finished / "synthetic" / file), config, torch.device("cpu"))
    clips, codes = next(trial.batches(config, prepared.load(finished / "synthetic", depth)))
    assert codes.shape == (len(clips), int(np.prod(config.grid)), *config.code_shape)
    assert (tokenizer.codes(clips) == codes).float().mean() > 0.99, "other batches, other rounding"


def test_the_first_frame_has_the_first_codes():
    config = pretraining(QUICK, {"tokenizer.codes_per_patch": 3})
    tokens, videos = int(np.prod(config.grid)), config.optim.batch
    codes = np.broadcast_to(np.arange(2 * 3, dtype=np.int16), (videos, 1, 1, tokens, 2 * 3))
    split = prepared.Split(np.zeros((videos, 1, 1, 8, 40, 40, 3), np.uint8), torch.zeros(videos))
    data = prepared.Prepared({"train": split}, codes, 16, 1, {})
    for changes, expected in (
        ({}, [0, 1, 2]),
        ({"tokenizer.frames": "all"}, list(range(6))),
        ({"tokenizer.codes_per_patch": 1, "tokenizer.frames": "all"}, [0, 1]),
    ):
        found = next(trial.batches(changed(config, changes), data))[1]
        assert found.shape == (videos, tokens, len(expected))
        assert found[0, 0].tolist() == expected
    assert next(trial.batches(changed(config, {"tokenizer.codes_per_patch": 1}), data))[1].shape == (videos, tokens)


@pytest.mark.slow
def test_the_trainings_learn(finished):
    """Twenty passes over 64 clips: the losses fall, and fine-tuning fits what it was shown.

    It starts from MAM2 after one pass: at this size encoders of a few more passes fine-tune worse.
    """
    clips, encoders = prepared.load(finished / "synthetic"), []
    for changes in list(QUICK.variants.values())[:2]:
        short, long = (
            trial.pretrain(pretraining(QUICK, changes, epochs=epochs, base_lr=1.6e-2), clips) for epochs in (1.0, 20.0)
        )
        name = "loss/pixels" if changes else "loss/appearance"
        assert long.losses[name] < short.losses[name]
        encoders.append(short.encoder)
    config = changed(finetuning(QUICK, pretraining(QUICK, {})), {"optim.epochs": 60.0})
    shown = dataclasses.replace(clips, splits={**clips.splits, "test": _first_clips(clips.splits["train"])})
    assert trial.finetune(encoders[0], shown, config, labelled=64) > 0.3  # chance: 0.125


def test_the_labeled_videos_are_of_every_class_and_kind_of_file():
    labels = torch.arange(8).repeat_interleave(200)  # in the order of the files, whose codec alternates
    chosen = trial.labeled_videos(labels, 400)
    assert len(set(chosen.tolist())) == 400
    assert torch.bincount(labels[torch.from_numpy(chosen)]).tolist() == [50] * 8
    assert 0.4 < (chosen % 2).mean() < 0.6


def _first_clips(train):
    return prepared.Split(train.clips[:, :1, :1], train.labels)


def test_a_folder_of_another_run_is_left_alone(tmp_path):
    assert Run(QUICK, tmp_path, None).done == {}
    assert Run(QUICK, tmp_path, None).done == {}
    assert Run(dataclasses.replace(QUICK, seeds=7), tmp_path, None).done == {}, "more of the same"
    with pytest.raises(UserError, match="other settings or data: name another folder"):
        Run(dataclasses.replace(QUICK, recorded=1), tmp_path, None)
    with pytest.raises(UserError, match="name another folder"):
        Run(QUICK, tmp_path, Real((real.Lists(Path("a"), Path("b")),), Path("a")))


def test_real_clips_that_do_not_fit_are_named(tmp_path):
    write_hard_dataset(tmp_path, {"train": 8, "test": 8})
    (tmp_path / "test" / "left").rename(tmp_path / "test" / "sideways")
    data = {split: tmp_path / split for split in ("train", "test")}
    with pytest.raises(UserError, match="'sideways' is not one of the classifier's 8"):
        prepared.prepare(data, tmp_path / "out", pretraining(QUICK, {}), recorded=1, views=1)
