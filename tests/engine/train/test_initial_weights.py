"""Pre-training from given weights: what fits is loaded, the rest is reported, positions are resampled."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from mam2.engine.checkpoints import checkpoint
from mam2.engine.checkpoints.export import write_hugging_face, write_videomae
from mam2.engine.checkpoints.load import load_encoder, load_model
from mam2.engine.errors import UserError
from mam2.engine.model.blocks import sincos_positions
from mam2.engine.model.mam2 import MAM2
from mam2.engine.model.positions import resample_positions, set_clip_size
from mam2.engine.model.videomae import VideoMAE
from mam2.engine.train.finetune import finetune
from mam2.engine.train.initial_weights import complete_config, read_initial_weights, take_weights
from mam2.engine.train.pretrain import pretrain
from tests.helpers.commands import exit_status
from tests.helpers.small_models import classifier, shaken

CODES = 16


def changed(config, **tables):
    return dataclasses.replace(
        config, **{table: dataclasses.replace(getattr(config, table), **values) for table, values in tables.items()}
    )


@pytest.fixture(scope="module")
def config(small):
    """A MAM2 small enough to train in seconds; the objective videomae has the same encoder."""
    return small(optim={"epochs": 1.0})


@pytest.fixture(scope="module")
def runs(config, tmp_path_factory):
    """A checkpoint of MAM2 and one of VideoMAE, with every parameter changed."""
    folders = {}
    for objective in ("mam2", "videomae"):
        own = changed(config, model={"objective": objective})
        model = shaken(MAM2(own, CODES) if objective == "mam2" else VideoMAE(own))
        folder = tmp_path_factory.mktemp(objective)
        checkpoint.write(folder, 7, dict(model.state_dict()), {}, own, {})
        folders[objective] = folder
    return folders


def started(config, path, *, same_tokenizer=True, **options):
    """A model with the weights of a checkpoint, one with random weights, and the lines for the log."""
    start = read_initial_weights(path, options)
    config = complete_config(config, start)

    def build():
        torch.manual_seed(3)
        return MAM2(config, CODES) if config.model.objective == "mam2" else VideoMAE(config)

    model = build()
    lines = take_weights(model, config, start, same_tokenizer=same_tokenizer)
    return model.state_dict(), build().state_dict(), start.model.state_dict(), lines


def origins(found, fresh, source):
    """The names of the parameters that are loaded, and of those that are new."""
    taken = {name for name in found if name in source and torch.equal(found[name], source[name])}
    return taken, {name for name in found if torch.equal(found[name], fresh[name])} - taken


def test_of_the_same_model_everything_is_taken(config, runs):
    for objective, folder in runs.items():
        found, fresh, source, lines = started(changed(config, model={"objective": objective}), folder)
        assert origins(found, fresh, source) == (set(found), set())
        assert len(lines) == 1
        assert "step 7): encoder, " in lines[0]


@pytest.mark.parametrize(
    ("tables", "same_tokenizer", "new", "message"),
    [
        ({}, False, ("appearance_decoder.head.",), "appearance head (another tokenizer)"),
        ({"loss": {"motion_target": "intra"}}, True, ("motion_decoder.head.",), "motion head (another target)"),
    ],
)
def test_a_head_is_taken_only_for_the_same_target(config, runs, tables, same_tokenizer, new, message):
    found, fresh, source, lines = started(changed(config, **tables), runs["mam2"], same_tokenizer=same_tokenizer)
    taken, drawn = origins(found, fresh, source)
    assert {name for name in found if name.startswith(new)} == drawn if new else not drawn
    assert taken | drawn == set(found)
    assert message in " ".join(lines)


def test_other_sizes_and_objectives_leave_the_encoder(config, runs):
    wider = dataclasses.replace(config.model.decoder, depth=config.model.decoder.depth + 1)
    found, fresh, source, lines = started(changed(config, model={"decoder": wider}), runs["mam2"])
    taken, drawn = origins(found, fresh, source)
    assert {name.split(".")[0] for name in drawn} == {"appearance_decoder", "motion_decoder"}
    assert "appearance decoder (of another size)" in lines[1]
    found, fresh, source, lines = started(config, runs["videomae"])
    taken, drawn = origins(found, fresh, source)
    assert {name.split(".")[0] for name in taken} == {"encoder"}
    assert not [name for name in drawn if name.startswith("encoder.")]
    assert "all parts after the encoder (the checkpoint is a VideoMAE)" in lines[1]


def test_an_encoder_of_another_size_is_an_error_with_the_values(config, runs):
    other = changed(config, model={"width": 48, "depth": 3, "layer_scale": 0.1})
    flags = rf"--model.width {config.model.width} --model.depth {config.model.depth} --model.layer-scale 0$"
    with pytest.raises(UserError, match=flags.replace(".", r"\.")):
        complete_config(other, read_initial_weights(runs["mam2"], {}))


def test_published_formats_and_classifiers(config, tmp_path):
    """Files of VideoMAE's code and of Hugging Face, with the clip size that they state."""
    own = changed(config, model={"objective": "videomae"})
    model = shaken(VideoMAE(own))
    (tmp_path / "hf").mkdir()
    write_hugging_face(model, tmp_path / "hf")
    write_videomae(model, tmp_path / "videomae.pth")
    heads = {"heads": own.model.heads, "decoder_heads": own.model.decoder.heads}
    for path, options in ((tmp_path / "hf", {}), (tmp_path / "videomae.pth", heads)):
        found, fresh, source, lines = started(own, path, **options)
        assert origins(found, fresh, source) == (set(found), set())
        torch.testing.assert_close(
            found["encoder.patch_embed.weight"], model.state_dict()["encoder.patch_embed.weight"]
        )
    assert "resampled" not in " ".join(lines)

    (tmp_path / "classifier").mkdir()
    write_hugging_face(shaken(classifier()), tmp_path / "classifier")
    tuned = changed(
        config,
        data={"frames": 4, "size": 48},
        model={"patch": 8, "width": 48, "depth": 2, "heads": 4, "mlp_ratio": 2.0},
    )
    found, fresh, source, lines = started(tuned, tmp_path / "classifier")
    _, drawn = origins(found, fresh, source)
    assert {name for name in drawn if name.startswith("encoder.")} == {"encoder.norm.weight", "encoder.norm.bias"}
    assert "the encoder's last LayerNorm" in lines[1]
    assert "positions of 4 frames of 24² resampled to 4 of 48²" in " ".join(lines)


def test_positions_come_from_the_trained_table_however_often_the_size_changes(config):
    encoder = MAM2(config, CODES).encoder
    grid, table = encoder.grid, encoder.positions.clone()
    tubelet, patch, _ = encoder.patch_size
    set_clip_size(encoder, 4 * tubelet, 3 * patch)
    set_clip_size(encoder, 2 * tubelet, 5 * patch)
    torch.testing.assert_close(encoder.positions, resample_positions(table, grid, (2, 5, 5)))
    set_clip_size(encoder, grid[0] * tubelet, grid[1] * patch)
    assert torch.equal(encoder.positions, table)
    set_clip_size(encoder, 2 * tubelet, 5 * patch, "recompute")
    assert torch.equal(encoder.positions, sincos_positions(50, encoder.width))
    assert encoder.trained_grid == (2, 5, 5)


@pytest.fixture(scope="module")
def clips(tmp_path_factory, synthetic_clips):
    folder = tmp_path_factory.mktemp("clips")
    synthetic_clips(folder, train=16)
    return folder / "train"


@pytest.mark.slow
def test_a_run_starts_from_a_run_at_another_size_and_continues(config, clips, tmp_path, small_finetuning):
    """At a learning rate of 0 the final weights are those of the first run, positions included."""
    first = changed(config, model={"objective": "videomae"}, optim={"batch": 8})
    pretrain(first, clips, tmp_path / "first", progress=False)
    half = first.data.size // 2
    second = changed(first, data={"size": half}, optim={"base_lr": 0.0, "min_lr": 0.0, "epochs": 2.0})
    result = pretrain(second, clips, tmp_path / "second", checkpoint=tmp_path / "first", progress=False)
    assert result.step == result.steps == 8
    before, after = (load_file(checkpoint.newest(tmp_path / name) / checkpoint.WEIGHTS) for name in ("first", "second"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    log = (tmp_path / "second" / "log.txt").read_text()
    assert f"positions of {first.data.frames} frames of {first.data.size}² resampled to" in log
    assert "the learning rate increases for 0.5 epochs and decreases until epoch 2 " in log
    model = json.loads((tmp_path / "second" / "config.json").read_text())["model"]
    assert (model["frames"], model["size"]) == (first.data.frames, first.data.size)
    known = json.loads(checkpoint.read_metadata(result.checkpoint)["start"])
    assert (known["checkpoint"], known["step"]) == (str(tmp_path / "first"), 4)

    loaded = load_model(tmp_path / "second")
    assert torch.equal(loaded.encoder.positions, resample_positions(*_table(first), second.grid))
    assert loaded.positions.shape == (len(loaded.encoder.positions), first.model.decoder.width)
    assert not torch.equal(loaded.positions, sincos_positions(*loaded.positions.shape))

    (result.checkpoint.parent / "latest").unlink()
    saved = checkpoint.read_state(result.checkpoint)
    (result.checkpoint / "state.json").write_text(json.dumps(saved | {"step": 4}))
    result.checkpoint.rename(checkpoint.folder_of(tmp_path / "second", 4))
    again = pretrain(second, clips, tmp_path / "second", resume=True, progress=False)
    assert again.step == 8
    assert json.loads(checkpoint.read_metadata(again.checkpoint)["start"]) == known
    assert torch.equal(load_encoder(tmp_path / "second").positions, loaded.encoder.positions)

    tuned = small_finetuning(data={"frames": second.data.frames, "size": half}, optim={"batch": 8, "epochs": 1.0})
    finetune(tuned, clips, tmp_path / "ft", val=clips, encoder=tmp_path / "second", progress=False)
    assert torch.equal(load_encoder(tmp_path / "ft").positions, loaded.encoder.positions)


def _table(config):
    return sincos_positions(config.grid[0] * config.grid[1] * config.grid[2], config.model.width), config.grid


@pytest.mark.slow
def test_codes_stay_those_of_the_checkpoints_tokenizer(config, clips, tmp_path, capsys):
    config = changed(config, optim={"batch": 8})
    pretrain(config, clips, tmp_path / "first", progress=False)
    still = changed(config, optim={"base_lr": 0.0, "min_lr": 0.0})
    (tmp_path / "recipe.json").write_text(json.dumps(dataclasses.asdict(still)))
    places = ("--data", clips, "--out", tmp_path / "second", "--checkpoint", tmp_path / "first")
    assert exit_status("pretrain", tmp_path / "recipe.json", *places) == 0
    output = capsys.readouterr()
    assert "codes   from the tokenizer that the checkpoint was trained with" in output.out + output.err
    one, other = ((tmp_path / name / "tokenizer.safetensors").read_bytes() for name in ("first", "second"))
    assert one == other
    before, after = (load_file(checkpoint.newest(tmp_path / name) / checkpoint.WEIGHTS) for name in ("first", "second"))
    assert all(torch.equal(before[name], after[name]) for name in before)
