"""`random` as a checkpoint: the same encoder with random weights, the same each time, in the verbs that take it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mam2.engine.checkpoints.frozen import FrozenEncoder, digest
from mam2.engine.checkpoints.untrained import _like, is_random, load_all_frozen
from mam2.engine.config.training import DataConfig
from mam2.engine.errors import UserError
from mam2.engine.model.blocks import initialize
from mam2.engine.model.positions import set_clip_size
from tests.helpers.commands import exit_status
from tests.helpers.small_models import encoder

CPU = torch.device("cpu")


def frozen(**values):
    made = encoder(**values)
    torch.manual_seed(5)
    initialize(made)
    return FrozenEncoder(name="made", encoder=made, data=DataConfig(), weights=Path("made"), digest=digest(made))


@pytest.mark.parametrize("values", [{}, {"layer_scale": 0.3, "depth": 1, "heads": 3, "mlp_ratio": 3}])
def test_it_is_like_the_other_in_everything_but_the_weights(values):
    other = frozen(**values)
    set_clip_size(other.encoder, 8, 32)
    state = torch.get_rng_state()
    random = _like(other)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.encoder.grid == other.encoder.grid == (4, 4, 4)
    assert torch.equal(random.encoder.positions, other.encoder.positions)
    assert random.encoder.blocks[0].attn.heads == other.encoder.blocks[0].attn.heads
    ours, theirs = random.encoder.state_dict(), other.encoder.state_dict()
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: t.shape for name, t in theirs.items()}
    # another draw of the same distribution
    weights = [state["blocks.0.mlp.fc1.weight"] for state in (ours, theirs)]
    assert not torch.equal(*weights)
    assert weights[0].std() == pytest.approx(float(weights[1].std()), rel=0.1)
    assert digest(_like(other).encoder) == random.digest != other.digest


def test_a_recipe_says_the_model_and_flags_the_clips():
    (random,) = load_all_frozen([Path("random")], CPU, recipe="demo", frames=4, size=16)
    assert (random.name, random.depth, random.data.frames, random.data.size) == ("random", 3, 4, 16)
    assert random.encoder.encode(torch.zeros(1, 3, 4, 16, 16, dtype=torch.uint8)).shape[0] == 1
    assert load_all_frozen([Path("random")], CPU, recipe="demo", frames=4, size=16)[0].digest == random.digest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["embed", "random"], "random weights of which model? Add --recipe"),
        (["embed", "random", "--recipe", "ucf101/finetune"], "recipe"),
        (["embed", "random", "--recipe", "demo", "--size", "17"], "17"),
        (["evaluate", "random"], "random weights of which model? Add --recipe"),
        (["evaluate", "videos", "--recipe", "ucf101/finetune"], "only for the checkpoint `random`"),
    ],
)
def test_what_is_missing_is_said_in_a_line(tmp_path, monkeypatch, capsys, synthetic_clips, arguments, message):
    monkeypatch.chdir(tmp_path)
    synthetic_clips(tmp_path / "videos", train=8)
    out = "out.npy" if arguments[0] == "embed" else "out"
    assert exit_status(*arguments, "--data", "videos/train", "--out", out) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_folder_of_this_name_is_not_taken_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_random("random")
    assert not is_random("runs/random")
    Path("random").mkdir()
    with pytest.raises(UserError, match="pass it by its absolute path"):
        is_random("random")
    assert not is_random(Path("random").absolute())


@pytest.fixture(scope="module")
def clips(tmp_path_factory, synthetic_clips):
    folder = tmp_path_factory.mktemp("clips")
    synthetic_clips(folder, train=32, test=16)
    return folder


def test_features_of_a_random_encoder(clips, tmp_path):
    arguments = ("embed", "random", "--recipe", "demo", "--data", clips / "test")
    for name in ("a", "b"):
        assert exit_status(*arguments, "--out", tmp_path / f"{name}.npy") == 0
    first, second = (np.load(tmp_path / f"{name}.npy") for name in ("a", "b"))
    np.testing.assert_array_equal(first, second)
    assert first.std(0).min() > 0
    assert json.loads((tmp_path / "a.json").read_text())["checkpoint"] == "random"


def test_a_random_classifier_is_at_chance(clips, tmp_path):
    recipe = tmp_path / "small.toml"
    recipe.write_text(
        'extends = ["ucf101/finetune"]\n[data]\nframes = 4\nsize = 32\nstride = 1\n'
        "[model]\nwidth = 24\ndepth = 1\nheads = 2\n[test]\ntemporal = 1\nspatial = 1\n"
    )
    assert (
        exit_status("evaluate", "random", "--recipe", recipe, "--data", clips / "test", "--out", tmp_path / "out") == 0
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["checkpoint"] == "random"
    assert results["videos"] == 16
    assert results["top1"] <= 0.5  # chance is 1/8 with eight classes


@pytest.mark.slow
def test_the_gain_over_random_is_in_the_probes_table(clips, tmp_path, small, capsys):
    from mam2.engine.train.pretrain import pretrain

    run = tmp_path / "run"
    pretrain(small(model={"objective": "videomae"}, optim={"epochs": 1.0}), clips / "train", run, progress=False)
    places = ["--out", tmp_path / "p.json", "--cache", tmp_path / "cache", "--probes", "linear", "--pools", "mean"]
    assert exit_status("probe", "random", run, "--data", clips / "train", "--val", clips / "test", *places) == 0
    random, trained = json.loads((tmp_path / "p.json").read_text())["scores"]
    assert (random["checkpoint"], trained["checkpoint"]) == ("random", str(run))
    assert trained["gain"] == pytest.approx(trained["accuracy"] - random["accuracy"])
    assert "the gain over random, layer 1" in capsys.readouterr().out
