"""`mam2 convert-tokenizer`: checkpoints with the names and shapes of taming's, and files that are refused."""

from __future__ import annotations

import os
import re
import sys
import types
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mam2.engine.tokenizer.files import fingerprint, load_vqgan
from mam2.engine.tokenizer.vqgan import CONFIGS, VQGAN, VQGANConfig
from tests.helpers.commands import exit_status

SMALL = VQGANConfig(
    codes=24, embed_dim=8, z_channels=16, channels=32, channel_multipliers=(1, 2), res_blocks=1, attention_levels=(1,)
)
TRAINING = ("loss.discriminator.main.0.weight", "loss.perceptual_loss.lin0.model.1.weight", "loss.logvar")


def lightning(path: Path, state: dict[str, Tensor], **extra: object) -> Path:
    """Writes a file like those of Lightning 1.0: optimizers, schedulers, a callback's class as a key, NumPy scalars."""
    names = ("pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint")
    modules = {name: types.ModuleType(name) for name in names}
    callback = type("ModelCheckpoint", (), {"__module__": names[-1]})
    modules[names[-1]].ModelCheckpoint = callback  # type: ignore[attr-defined]
    kept = callback()
    kept.best_k_models = {"epoch=3.ckpt": torch.tensor(0.5)}
    checkpoint = {
        "epoch": 3,
        "global_step": 1000,
        "pytorch-lightning_version": "1.0.8",
        "callbacks": {
            callback: {"best_model_score": np.float64(0.25), "best_model_path": "epoch=3.ckpt", "self": kept}
        },
        "optimizer_states": [{"state": {0: {"step": 7, "exp_avg": torch.zeros(4)}}, "param_groups": [{"lr": 4.5e-6}]}],
        "lr_schedulers": [],
        "state_dict": OrderedDict({**state, **{name: torch.zeros(2) for name in TRAINING}}),
        **extra,
    }
    sys.modules.update(modules)
    try:
        torch.save(checkpoint, path)
    finally:
        for name in names:
            del sys.modules[name]
    return path


def published_state(name: str) -> dict[str, Tensor]:
    """The names and shapes of a published model; every tensor is one number repeated, so that the file stays small."""
    with torch.device("meta"):
        state = VQGAN(CONFIGS[name]).state_dict()
    return {key: torch.full((1,), 0.01).expand(tensor.shape) for key, tensor in state.items()}


def small_state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return dict(VQGAN(SMALL).state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_published_models_are_named(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = lightning(tmp_path / "last.ckpt", published_state(name))
    assert exit_status("convert-tokenizer", path, "--out", tmp_path / "vqgan.safetensors") == 0
    out = capsys.readouterr().out
    config = CONFIGS[name]
    assert f"{name}: {config.codes} codes, quantizer {config.quantizer}, {config.factor} pixels per code" in out
    assert "3 others dropped" in out
    assert load_vqgan(tmp_path / "vqgan.safetensors").config == config


def test_the_weights_are_those_of_the_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = small_state()
    out = tmp_path / "new" / "vqgan.safetensors"
    assert exit_status("convert-tokenizer", lightning(tmp_path / "last.ckpt", state), "--out", out) == 0
    printed = capsys.readouterr().out
    assert "none of the published models: 24 codes" in printed
    converted = load_vqgan(out)
    assert converted.config == SMALL
    for name, tensor in converted.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert re.search(rf"fingerprint {fingerprint(converted)[:12]}", printed)
    assert [path.name for path in out.parent.iterdir()] == ["vqgan.safetensors"]
    assert "pytorch_lightning" not in sys.modules


class Malicious:
    """Its pickle makes a folder when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.target),)


def test_code_in_a_checkpoint_is_refused_and_never_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = lightning(tmp_path / "last.ckpt", small_state(), hyper_parameters=Malicious(tmp_path / "made"))
    assert exit_status("convert-tokenizer", path, "--out", tmp_path / "vqgan.safetensors") == 2
    error = capsys.readouterr().err
    assert "last.ckpt: expected only tensors, found a pickle that needs" in error
    assert "mkdir; not loaded" in error
    assert not (tmp_path / "made").exists()
    assert not (tmp_path / "vqgan.safetensors").exists()


def test_what_stands_in_for_a_framework_runs_none_of_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same if that framework is installed."""
    path = lightning(tmp_path / "last.ckpt", small_state())
    ran = []

    class ModelCheckpoint:
        def __new__(cls, *_: object) -> ModelCheckpoint:
            ran.append("new")
            return super().__new__(cls)

        def __setstate__(self, _: object) -> None:
            ran.append("setstate")

    names = ("pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules[names[-1]], "ModelCheckpoint", ModelCheckpoint, raising=False)
    load_vqgan(path)
    assert ran == []


@pytest.mark.parametrize("name", ["encoder.mid.block_1.conv1.weight", "quantize.embedding.weight", "quant_conv.bias"])
def test_a_wrong_shape_is_named(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = small_state()
    state[name] = state[name][..., :1]
    path = lightning(tmp_path / "last.ckpt", state)
    assert exit_status("convert-tokenizer", path, "--out", tmp_path / "vqgan.safetensors") == 2
    assert f"last.ckpt: expected {name} of shape" in capsys.readouterr().err
    assert not (tmp_path / "vqgan.safetensors").exists()


def test_a_missing_parameter_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = small_state()
    del state["decoder.mid.block_1.conv1.bias"]
    path = lightning(tmp_path / "last.ckpt", state)
    assert exit_status("convert-tokenizer", path, "--out", tmp_path / "vqgan.safetensors") == 2
    assert "expected decoder.mid.block_1.conv1.bias of shape (64,), found none" in capsys.readouterr().err


def test_wrong_paths_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status("convert-tokenizer", tmp_path / "none.ckpt", "--out", tmp_path / "vqgan.safetensors") == 2
    assert "none.ckpt: expected a VQGAN checkpoint" in capsys.readouterr().err
    path = lightning(tmp_path / "last.ckpt", small_state())
    assert exit_status("convert-tokenizer", path, "--out", tmp_path / "vqgan.ckpt") == 2
    assert "expected a name that ends in .safetensors" in capsys.readouterr().err
    assert exit_status("convert-tokenizer", path, "--out", path / "vqgan.safetensors") == 2
    assert "cannot be written" in capsys.readouterr().err
