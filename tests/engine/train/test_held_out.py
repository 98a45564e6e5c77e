"""Held-out pretext losses while a run pre-trains: the numbers are correct, and the training does not change."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from mam2.engine.checkpoints import checkpoint
from mam2.engine.checkpoints.frozen import load_pretrained
from mam2.engine.data.loader import ClipLoader
from mam2.engine.data.manifest import Manifest, read_manifest
from mam2.engine.errors import UserError
from mam2.engine.evaluation.plots import PANELS, draw_logs
from mam2.engine.evaluation.pretext import evaluation_mask
from mam2.engine.evaluation.scores import score
from mam2.engine.runtime.log import read_log
from mam2.engine.tokenizer.files import load_vqgan
from mam2.engine.tokenizer.prepare import build_tokenizer
from mam2.engine.train.held_out import LOSS, SCORES
from mam2.engine.train.objective import build_objective
from mam2.engine.train.pretrain import pretrain
from tests.helpers.commands import exit_status

pytestmark = pytest.mark.usefixtures("float32")
KINDS = {
    "mam2": {"loss": {"alignment": 0.5}},
    "pixels": {"loss": {"appearance_target": "pixels"}, "mask": {"kind": "motion"}},
    "latents": {"loss": {"appearance_target": "latents", "visible": 0.5, "teacher_momentum": 0.9}},
    "random": {"mask": {"kind": "random"}, "optim": {"micro_batch": 4}, "loss": {"balance": "fixed"}},
    "videomae": {"model": {"objective": "videomae"}},
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory, synthetic_clips):
    folder = tmp_path_factory.mktemp("clips")
    synthetic_clips(folder, train=32, test=16)
    return folder


def weights(run):
    return load_file(checkpoint.newest(run) / checkpoint.WEIGHTS)


def optimizer_state(run):
    """Moments of the optimizer and states of the random generators."""
    return load_file(checkpoint.newest(run) / checkpoint.OPTIMIZER)


def validated(run):
    """Steps and their held-out numbers."""
    lines = [line for line in read_log(run) if LOSS in line]
    return {line["step"]: {name: value for name, value in line.items() if "validation" in name} for line in lines}


def measured_apart(run, videos):
    """The held-out numbers of a run's last checkpoint, from one batch of all videos."""
    model, config = load_pretrained(run, torch.device("cpu"))
    manifest = Manifest(read_manifest(videos, progress=False).videos)
    with ClipLoader(manifest, config.data, batch=len(manifest.videos), device="cpu", seed=0, train=False) as loader:
        batch = next(iter(loader.evaluate()))
    tokenizer = codes = None
    if config.needs_codes:
        tokenizer = build_tokenizer(load_vqgan(run / "tokenizer.safetensors"), config, torch.device("cpu"))
        codes = tokenizer.codes(batch.video)
    mask = evaluation_mask(batch.clip, config)
    with torch.no_grad():
        total, losses, _ = build_objective(model, config, lambda part: part)(batch.video, mask, codes)
    found = {LOSS: float(total)} | {f"validation/{name[5:]}": float(loss) for name, loss in losses.items()}
    scores = score(model, tokenizer, batch.clip, mask, config)
    numbers = {name: getattr(scores, key) for name, key in SCORES.items()}
    return found | {name: value for name, value in numbers.items() if value is not None}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_training_is_the_same_bit_for_bit_and_the_numbers_are_right(clips, tmp_path, small, kind):
    every = {"validation": {"every": 0.5}}
    plain, watched = (small(**KINDS[kind], **tables) for tables in ({}, every))
    pretrain(plain, clips / "train", tmp_path / "plain", progress=False)
    pretrain(watched, clips / "train", tmp_path / "watched", val=clips / "test", progress=False)
    for read in (weights, optimizer_state):
        first, second = read(tmp_path / "plain"), read(tmp_path / "watched")
        assert first.keys() == second.keys()
        assert [name for name in first if not torch.equal(first[name], second[name])] == []
    losses = [
        [{name: value for name, value in line.items() if name.startswith("loss/")} for line in read_log(tmp_path / run)]
        for run in ("plain", "watched")
    ]
    assert losses[0] == losses[1]

    found = validated(tmp_path / "watched")
    assert list(found) == [2, 4, 6, 8]
    expected = measured_apart(tmp_path / "watched", clips / "test")
    assert found[8].keys() == expected.keys()
    for name, value in expected.items():
        assert found[8][name] == pytest.approx(value, rel=1e-4 if kind != "random" else 3e-6), name
    assert len({numbers[LOSS] for numbers in found.values()}) == 4  # the model that is trained, not a copy of its start
    assert not validated(tmp_path / "plain")


@pytest.mark.slow
def test_two_processes_measure_what_one_would(clips, tmp_path, small):
    """An odd number of videos, one of them broken: the mask of a clip depends on its number, not on its rank."""
    videos = tmp_path / "videos"
    videos.mkdir()
    for number, path in enumerate(sorted((clips / "test").rglob("*.*"))[:9]):
        (videos / f"{number}{path.suffix}").write_bytes(path.read_bytes())
    whole = tmp_path / "whole.csv"
    whole.write_text("".join(f"{path}\n" for path in sorted(videos.iterdir())))
    config = small(data={"views": 1})
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(dataclasses.asdict(config)))
    run = tmp_path / "run"
    arguments = ["pretrain", recipe, "--data", clips / "train", "--val", whole, "--out", run]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "3000"}
    done = subprocess.run(
        [*command, "-m", "mam2.engine", *map(str, arguments), "--run.precision", "float32"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found, expected = validated(run), measured_apart(run, whole)
    last = found[max(found)]
    assert last.keys() == expected.keys()
    for name, value in expected.items():
        assert last[name] == pytest.approx(value, rel=1e-4), name
    assert (run / "log.txt").read_text().count("held out (9 clips)") == len(found)


@pytest.mark.slow
def test_a_resumed_run_measures_no_step_twice(clips, tmp_path, small):
    config = small(model={"objective": "videomae"}, run={"save_every": 4})
    run = tmp_path / "run"
    pretrain(config, clips / "train", run, val=clips / "test", progress=False)
    steps = [int(step) for step in re.findall(r"step (\d+): held out", (run / "log.txt").read_text())]
    assert steps == [4, 8]
    more = dataclasses.replace(config, validation=dataclasses.replace(config.validation, every=0.25))
    pretrain(more, clips / "train", run, val=clips / "test", resume=True, progress=False)
    assert (run / "log.txt").read_text().count(": held out") == 2


@pytest.mark.slow
def test_what_is_wrong_with_the_videos_is_said(clips, tmp_path, small, capsys):
    config = small(model={"objective": "videomae"}, optim={"epochs": 1.0}, validation={"videos": 5})
    videos = tmp_path / "videos.csv"
    paths = [*sorted((clips / "test").rglob("*.*"))[:4], *sorted((clips / "train").rglob("*.*"))[:4]]
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video" * 100)
    videos.write_text("".join(f"{path}\n" for path in [broken, *paths]))
    pretrain(config, clips / "train", tmp_path / "run", val=videos, progress=False)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "val     5 of the 8 videos" in log
    assert f"unusable for validation: {broken}: " in log
    assert "warning: 3 videos of --val also in the training data" in log

    with pytest.raises(UserError, match="no such file or folder"):
        pretrain(config, clips / "train", tmp_path / "other", val=tmp_path / "nowhere", progress=False)
    assert not (tmp_path / "other").exists()
    assert exit_status("pretrain", "demo", "--data", clips / "train", "--out", "x", "--validation.every", "0") == 2
    assert "validation.every" in capsys.readouterr().err


def test_the_curves_have_panels_for_them():
    drawn = {name for panel in PANELS for name in panel.columns}
    assert {LOSS, *SCORES} <= drawn
    lines = [{"step": step, "time": step, LOSS: math.exp(-step), "validation/codes": 0.1 * step} for step in (1, 2)]
    assert draw_logs({"run": lines})[:4] == b"\x89PNG"
