"""Warm-up, stable phase, decay: resumed and extended runs, and a cooldown on longer, larger clips."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mam2.engine.checkpoints import checkpoint
from mam2.engine.config.recipe import load_recipe, to_dict
from mam2.engine.errors import UserError
from mam2.engine.runtime.log import read_log
from mam2.engine.train.pretrain import pretrain
from tests.helpers.commands import outcome
from tests.helpers.paths import CLIPS
from tests.helpers.runs import same_weights

STABLE = {"schedule": "warmup-stable-decay", "decay_share": 0.5, "batch": 16, "epochs": 2.0, "warmup_epochs": 0.25}


@pytest.fixture(scope="module")
def config(small, finished):
    """Eight steps: one of warm-up, three stable, four of decay."""
    tokenizer = {"path": str(finished / "tokenizer.safetensors")}
    return small(optim=STABLE, tokenizer=tokenizer, run={"compile": False, "log_every": 1, "save_every": 3, "keep": 1})


def changed(config, folder: Path, **tables):
    file = folder / "config to change.json"
    file.write_text(json.dumps(to_dict(config)))
    return load_recipe(file, **tables)


@pytest.fixture(scope="module")
def whole(config, clips, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    pretrain(config, clips, out, progress=False)
    return out


@pytest.mark.slow
def test_the_log_has_the_schedule_and_the_last_stable_checkpoint_stays(whole, config):
    peak, floor = config.optim.base_lr * 16 / 256, config.optim.min_lr * 16 / 256
    rates = [line["learning_rate"] for line in read_log(whole)]
    expected = [peak] * 4 + [floor + (peak - floor) * left / 4 for left in (4, 3, 2, 1)]
    assert rates == pytest.approx(expected)
    assert [folder.name for folder in sorted((whole / "checkpoints").glob("step-*"))] == [
        "step-00000004",  # run.keep is 1
        "step-00000008",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("step", [4])
def test_a_run_resumed_where_the_decay_begins_gives_the_same_bits(step, whole, config, clips, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(checkpoint.folder_of(tmp_path / "run", 8))
    assert pretrain(config, clips, tmp_path / "run", resume=True, progress=False).step == 8
    assert f"steps   {step} done of 8" in (tmp_path / "run" / "log.txt").read_text()
    assert same_weights(whole, tmp_path / "run")


@pytest.mark.slow
def test_a_stable_run_is_extended_without_a_jump(whole, config, clips, tmp_path):
    """One epoch that never decays, resumed for two epochs with a decay, is the run of two epochs."""
    run = tmp_path / "run"
    endless = changed(config, tmp_path, optim={"epochs": 1.0, "decay_share": 0.0})
    assert pretrain(endless, clips, run, progress=False).step == 4
    assert {line["learning_rate"] for line in read_log(run)} == {config.optim.base_lr * 16 / 256}
    assert pretrain(config, clips, run, resume=True, progress=False).step == 8
    assert same_weights(whole, run)
    longer = changed(config, tmp_path, optim={"epochs": 3.0})
    with pytest.raises(UserError, match=r"decrease the learning rate from step 4 on, but 8 steps are done"):
        pretrain(longer, clips, run, resume=True, progress=False)
    with pytest.raises(UserError, match=r"optim\.schedule = 'warmup-stable-decay', now it is 'cosine'"):
        pretrain(changed(config, tmp_path, optim={"schedule": "cosine"}), clips, run, resume=True, progress=False)


@pytest.mark.slow
def test_a_cooldown_on_longer_and_larger_clips_takes_weights_and_moments(whole, config, tmp_path, capsys):
    """On the command line, from the last stable checkpoint, on the clips of the repository."""
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(to_dict(config)))
    stable = checkpoint.folder_of(whole, 4)
    given = ["pretrain", recipe, "--data", CLIPS / "train.csv", "--checkpoint", stable, "--checkpoint-moments"]
    given += ["--data.frames", "16", "--data.size", "48", "--optim.decay-share", "1", "--optim.warmup-epochs", "0"]
    given += ["--optim.min-lr", "0", "--optim.epochs", "0.5", "--optim.batch", "8", "--data.max-unusable", "1"]
    status, out, error = outcome(capsys, *given, "--out", tmp_path / "cooldown")
    assert status == 0, error
    printed = out + error
    assert "positions of 8 frames of 32² resampled to 16 of 48²" in printed
    assert (
        "new schedule: the learning rate increases for 0 epochs and decreases in the last 100% of 0.5 epochs" in printed
    )
    found = read_log(tmp_path / "cooldown")
    rates = [line["learning_rate"] for line in found]
    assert rates == pytest.approx([rates[0] * (len(rates) - step) / len(rates) for step in range(len(rates))])
    assert rates[0] == pytest.approx(config.optim.base_lr * 8 / 256)
    before = load_file(stable / checkpoint.OPTIMIZER)
    after = load_file(checkpoint.newest(tmp_path / "cooldown") / checkpoint.OPTIMIZER)
    counted = [name for name in before if name.endswith(".step")]
    assert counted
    assert f"the optimizer's moments of {len(counted)} of {len(counted)} parameters from {stable}" in printed
    assert all(after[name] == before[name] + len(rates) for name in counted)


@pytest.mark.slow
def test_moments_are_taken_bit_for_bit_and_only_where_weights_are(whole, config, clips, tmp_path):
    """With a first beta of 0.9, a moment after one step keeps nine tenths of the old one."""
    one = changed(
        config, tmp_path, optim={"epochs": 0.25, "base_lr": 0.0, "min_lr": 0.0}, loss={"motion_target": "hog"}
    )
    stable = checkpoint.folder_of(whole, 4)
    pretrain(one, clips, tmp_path / "with", checkpoint=stable, checkpoint_moments=True, progress=False)
    pretrain(one, clips, tmp_path / "without", checkpoint=stable, progress=False)
    before = load_file(stable / checkpoint.OPTIMIZER)
    taken, fresh = (
        load_file(checkpoint.newest(tmp_path / name) / checkpoint.OPTIMIZER) for name in ("with", "without")
    )
    for name in [name for name in fresh if name.endswith(".exp_avg")]:
        old = torch.zeros_like(fresh[name]) if "motion_decoder.head" in name else before[name]
        torch.testing.assert_close(taken[name], 0.9 * old + fresh[name], rtol=1e-4, atol=1e-7, msg=name)
    assert taken["motion_decoder.head.weight.step"] == 1
    assert taken["encoder.blocks.0.mlp.fc1.weight.step"] == 5


@pytest.mark.slow
def test_moments_that_do_not_fit_are_one_line(whole, config, clips, tmp_path):
    muon = changed(config, tmp_path, optim={"name": "muon"})
    for run, given, message in (
        (muon, {"checkpoint": whole}, r"--checkpoint-moments: those of .* are of optim\.name adamw, this run has muon"),
        (config, {}, r"--checkpoint-moments: needs --checkpoint"),
        (config, {"checkpoint": tmp_path / "only weights"}, r"has no optimizer state; expected a run of mam2 pretrain"),
    ):
        folder = tmp_path / "only weights" / "checkpoints" / "step-00000008"
        if not folder.exists():
            shutil.copytree(checkpoint.newest(whole), folder)
            (folder / checkpoint.OPTIMIZER).unlink()
        with pytest.raises(UserError, match=message):
            pretrain(run, clips, tmp_path / "run", checkpoint_moments=True, progress=False, **given)
