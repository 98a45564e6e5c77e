"""Pre-training on several data sets with weights: what a run logs, and that it resumes bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from mam2.engine import export
from mam2.engine.checkpoints import checkpoint
from mam2.engine.config.recipe import load_recipe, to_dict
from mam2.engine.data.manifest import read_saved_manifest
from mam2.engine.errors import UserError
from mam2.engine.runtime.log import read_log
from mam2.engine.tokenizer.precompute import tokenize
from mam2.engine.train.pretrain import pretrain
from mam2.engine.train.step import PretrainStep
from tests.helpers.commands import outcome, torchrun
from tests.helpers.runs import same_weights

SEEN = ("clips/many", "passes/many", "clips/few", "passes/few")


@pytest.fixture(scope="module")
def sets(clips, tmp_path_factory) -> tuple[Path, Path]:
    """The 32 clips in two folders without labels, 24 and 8, and a broken file in the second."""
    folder = tmp_path_factory.mktemp("sets")
    for number, file in enumerate(sorted(clips.rglob("*.*"))):
        target = folder / ("few" if number % 4 == 0 else "many") / f"{number}{file.suffix}"
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
    (folder / "few" / "broken.mp4").write_bytes(b"no video")
    return folder / "many", folder / "few"


@pytest.fixture(scope="module")
def config(small, finished):
    """A step shows 8 videos in two views, half of them from each set; an epoch has 4 steps."""
    return small(
        data={"weights": (1.0, 1.0)},
        optim={"batch": 16, "epochs": 2.5},
        tokenizer={"path": str(finished / "tokenizer.safetensors")},
    )


@pytest.fixture(scope="module")
def whole(config, sets, tmp_path_factory) -> Path:
    """A run of ten steps without an interruption."""
    out = tmp_path_factory.mktemp("whole")
    assert pretrain(config, sets, out, val=(sets[1], sets[0]), progress=False).step == 10
    return out


@pytest.mark.slow
def test_a_run_on_two_sets_says_what_it_saw(whole, config, sets, tmp_path):
    lines = read_log(whole)
    assert [[line[name] for name in SEEN] for line in lines if "loss/motion" in line] == [
        [8.0 * step, 4 * step / 24, 8.0 * step, 4 * step / 8] for step in (2, 4, 6, 8, 10)
    ]
    log = (whole / "log.txt").read_text()
    assert "2 data sets; an epoch is 32 samples: as many as there are videos, in the proportion of data.weights" in log
    assert f"many: 24 videos, 0 unusable; 50.00% of the clips, 0.667 passes per epoch ({sets[0]})" in log
    assert f"few: 8 videos, 1 unusable; 50.00% of the clips, 2 passes per epoch ({sets[1]})" in log
    assert "data    many: 80 clips, 1.67 passes, 0 unusable; few: 80 clips, 5 passes, 1 unusable" in log
    assert f"32 of the 32 videos of {sets[1]}, {sets[0]}" in log
    assert "held out (32 clips)" in log
    saved = load_recipe(whole / "config.json")
    assert (saved.data.sets, saved.data.weights) == (tuple(map(str, sets)), (1.0, 1.0))
    assert [each.videos for each in read_saved_manifest(whole / "manifest.jsonl").sets] == [24, 8]
    export(whole, "mam2", tmp_path / "card", license="other")
    card = (tmp_path / "card" / "README.md").read_text()
    assert "| data set `many` | 24 videos, 0 unusable files, 50.0% of the clips |" in card
    assert "| data set `few` | 8 videos, 1 unusable file, 50.0% of the clips |" in card
    assert str(sets[0].parent) not in card


@pytest.mark.slow
def test_a_run_stopped_within_an_epoch_resumes_exactly(whole, config, sets, tmp_path, monkeypatch):
    original, calls = PretrainStep.__call__, []

    def step(self, *args, **options):
        calls.append(None)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **options)

    monkeypatch.setattr(PretrainStep, "__call__", step)
    assert pretrain(config, sets, tmp_path, progress=False).step == 3
    for wrong, message in (
        ((3.0, 1.0), r"data\.weights = \[1\.0, 1\.0\], now it is \[3\.0, 1\.0\]"),
        ((), "now it is"),
    ):
        other = load_recipe(tmp_path / "config.json", data={"weights": list(wrong)})
        with pytest.raises(UserError, match=message):
            pretrain(other, sets, tmp_path, resume=True, progress=False)
    saved = load_recipe(tmp_path / "config.json")
    assert pretrain(saved, (), tmp_path, resume=True, progress=False).step == 10  # the config names the sets
    assert same_weights(whole, tmp_path)
    counts = [[line[name] for name in SEEN] for line in read_log(tmp_path)]
    assert counts == [[line[name] for name in SEEN] for line in read_log(whole) if "loss/motion" in line]


@pytest.mark.slow
def test_two_ranks_that_crashed_resume_exactly_and_show_the_clips_of_one(whole, config, sets, tmp_path, small):
    recipe = tmp_path / "recipe.json"
    values = to_dict(config)
    values["run"] |= {"save_every": 5, "precision": "float32"}
    recipe.write_text(json.dumps(values))
    command = ["-m", "mam2.engine", "pretrain", recipe, "--data", sets[0], "--data", sets[1], "--out"]
    done = torchrun(2, *command, tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    shutil.copytree(tmp_path / "two", tmp_path / "crashed")
    shutil.rmtree(checkpoint.newest(tmp_path / "crashed"))  # as after a kill -9 after step 5, in the second epoch
    done = torchrun(2, *command, tmp_path / "crashed", "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "5 done of 10" in done.stdout
    assert same_weights(tmp_path / "two", tmp_path / "crashed")
    one, two = ([line for line in read_log(run) if "loss/motion" in line] for run in (whole, tmp_path / "two"))
    for ours, theirs in zip(one, two, strict=True):
        assert [ours[name] for name in SEEN] == [theirs[name] for name in SEEN]
        assert ours["loss/motion"] == pytest.approx(theirs["loss/motion"], rel=2e-2)  # the same clips and masks


@pytest.mark.slow
def test_cached_codes_of_two_sets_train_to_the_same_bits_with_any_weights(config, sets, tmp_path, small):
    recorded = load_recipe(_written(tmp_path, config), data={"recorded": 2}, optim={"epochs": 1.0})
    made = tokenize(recorded, sets, tmp_path / "codes", progress=False)
    assert made.clips == 64
    cached = load_recipe(_written(tmp_path, recorded), tokenizer={"path": "", "cache": str(tmp_path / "codes")})
    for weights in ([1.0, 1.0], [5.0, 3.0]):
        for name, values in (("online", recorded), ("cached", cached)):
            run = load_recipe(_written(tmp_path, values), data={"weights": weights})
            pretrain(run, sets, tmp_path / f"{name} {weights[0]:g}", progress=False)
        assert same_weights(tmp_path / f"online {weights[0]:g}", tmp_path / f"cached {weights[0]:g}")
    assert not same_weights(tmp_path / "online 1", tmp_path / "online 5")
    with pytest.raises(UserError, match="contains codes of other videos"):
        pretrain(cached, sets[::-1], tmp_path / "reversed", progress=False)


def _written(folder: Path, config) -> Path:
    file = folder / "written.json"
    file.write_text(json.dumps(to_dict(config)))
    return file


def test_sets_that_do_not_fit_are_told_before_anything_is_opened(sets, tmp_path, capsys):
    for given, message in (
        (["--data", sets[0], "--data", sets[0]], "the same data set as"),
        (["--data", sets[0], "--data", sets[1], "--data-weights", "3"], "expected one number per data set, 2 for"),
        (["--data", sets[0], "--data", sets[1], "--data.weights", "3", "0"], "data.weights 0.0: expected above 0"),
        ([], "no data set: pass --data PATH"),
        (["--data", sets[0], "--val", sets[1], "--val", sets[1]], "--val"),
    ):
        status, _, error = outcome(capsys, "pretrain", "demo", *given, "--out", tmp_path / "run")
        assert (status, error.count("\n")) == (2, 1), error
        assert message in error
    assert not (tmp_path / "run").exists()
