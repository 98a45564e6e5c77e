"""Our own weights are read back unchanged, also at other clip sizes; unreadable or unwritable files are errors."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from mam2.engine.checkpoints import checkpoint
from mam2.engine.checkpoints.export import write_hugging_face, write_videomae
from mam2.engine.checkpoints.load import class_names, load_encoder, load_model
from mam2.engine.checkpoints.names import from_hugging_face, from_videomae, to_hugging_face, to_videomae
from mam2.engine.config.finetune import EncoderConfig, FinetuneConfig
from mam2.engine.config.pretrain import RegressorConfig
from mam2.engine.errors import UserError
from mam2.engine.model.blocks import sincos_positions
from mam2.engine.model.classifier import Classifier, TextHead
from mam2.engine.model.encoder import Encoder
from mam2.engine.model.mam2 import MAM2
from mam2.engine.model.positions import set_clip_size
from mam2.engine.model.videomae import VideoMAE
from tests.helpers.small_models import CLASSES, CONFIG, PATCH, classifier, clip, encoder, shaken


@pytest.mark.parametrize("build", [encoder, classifier, lambda: VideoMAE(CONFIG)])
def test_names_go_there_and_back(build: Callable[[], nn.Module]) -> None:
    model = build()
    name = "encoder." if isinstance(model, Encoder) else ""
    tensors = {name + key: tensor for key, tensor in shaken(model).state_dict().items()}
    for back, there in ((from_videomae, to_videomae), (from_hugging_face, to_hugging_face)):
        found = back(there(tensors, PATCH))
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[key], tensors[key]) for key in tensors)


def test_our_runs_checkpoints_and_files(tmp_path: Path) -> None:
    regressor = RegressorConfig(depth=1, width=24, heads=3)
    mam2_config = dataclasses.replace(
        CONFIG, model=dataclasses.replace(CONFIG.model, objective="mam2", regressor=regressor)
    )
    for name, model, config in (
        ("videomae", VideoMAE(CONFIG), CONFIG),
        ("mam2", MAM2(mam2_config, codes=7), mam2_config),
    ):
        folder = checkpoint.write(tmp_path / name, 3, dict(shaken(model).state_dict()), {}, config, metadata={})
        expected = model.eval().encode(clip())
        for path in (tmp_path / name, folder, folder / checkpoint.WEIGHTS):
            loaded = load_model(path)
            assert type(loaded) is type(model)
            assert not loaded.training
            assert torch.equal(load_encoder(str(path)).encode(clip()), expected)


def test_our_fine_tuned_classifier(tmp_path: Path) -> None:
    ours = shaken(classifier())
    model = EncoderConfig(patch=8, width=48, depth=2, heads=4, mlp_ratio=2, classes=len(CLASSES))
    config = FinetuneConfig(data=CONFIG.data, model=model)
    weights, notes = dict(ours.state_dict()), {"classes": json.dumps(CLASSES)}
    checkpoint.write(tmp_path / "run", 3, weights, {}, config, metadata=notes)
    assert torch.equal(load_model(tmp_path / "run")(clip()), ours(clip()))
    assert torch.equal(load_encoder(tmp_path / "run").encode(clip()), ours.encoder.encode(clip()))
    assert class_names(tmp_path / "run") == CLASSES


def test_an_encoder_for_clips_of_another_size(tmp_path: Path) -> None:
    write_hugging_face(encoder(), tmp_path)
    longer, larger = load_encoder(tmp_path, frames=8), load_encoder(tmp_path, size=48, positions="recompute")
    assert longer.encode(clip(8)).shape == (2, 4 * 9, 48)
    assert larger.encode(clip(4, 48)).shape == (2, 2 * 36, 48)
    assert not torch.equal(longer.positions, sincos_positions(4 * 9, 48))
    assert torch.equal(larger.positions, sincos_positions(2 * 36, 48))
    with pytest.raises(UserError, match=r"size: expected a multiple of the patch, 8, found 20"):
        load_encoder(tmp_path, size=20)


def test_other_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none: no such file"):
        load_encoder(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: expected a Hugging Face folder, but config.json"):
        load_encoder(tmp_path / "empty")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="run: this run has no checkpoint yet"):
        load_encoder(tmp_path / "run")
    for name in ("text.pth", "text.safetensors"):
        (tmp_path / name).write_text("not a checkpoint")
        with pytest.raises(UserError, match=name):
            load_encoder(tmp_path / name)


def test_what_others_cannot_compute_is_not_written(tmp_path: Path) -> None:
    resampled = encoder()
    set_clip_size(resampled, 8, 24)
    with pytest.raises(UserError, match="takes 8 frames of 24², not the clip size of its pre-training"):
        write_hugging_face(resampled, tmp_path)
    with pytest.raises(UserError, match="text embeddings"):
        write_videomae(Classifier(encoder(), TextHead(48, torch.randn(3, 8))), tmp_path / "out.pth")
    assert not any(tmp_path.iterdir())
