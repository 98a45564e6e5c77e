"""The convergence benchmark: its trainings, and a whole quick run that continues where it stopped."""

import dataclasses
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.convergence import OutOfTime, Real, Run
from benchmarks.trials import prepared, real, trial, worker
from benchmarks.trials.clips import write_hard_dataset
from benchmarks.trials.jobs import (
    Job,
    ablation_jobs,
    all_later_sweep_jobs,
    at_an_end,
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
    wider,
)
from benchmarks.trials.selection import REAL_JUDGED
from benchmarks.trials.settings import ABLATIONS, QUICK, SETTINGS, changed, finetuning, pretraining
from benchmarks.trials.worker import config_of, encoder_file
from mam2.engine.errors import UserError
from mam2.engine.model.mam2 import MAM2
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


def test_jobs_that_differ_have_other_keys():
    job = Job("main", "mam2", (), 5, 1e-3, 0)
    assert job.key != dataclasses.replace(job, seed=1).key


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
