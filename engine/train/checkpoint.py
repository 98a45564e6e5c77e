"""Checkpoints: a folder of safetensors and JSON that is either whole or not there.

    RUN/checkpoints/step-00001000/model.safetensors       weights; the config as JSON in the metadata
                                  optimizer.safetensors   AdamW's moments and step, `<parameter>.<name>`
                                  state.json              step, config, versions

A checkpoint is written aside, synced to disk and renamed; only then the oldest are removed. Reading one
executes nothing: no pickle.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mam2.engine.config import PretrainConfig, UserError, from_dict, to_dict

FOLDER = "checkpoints"
WEIGHTS = "model.safetensors"


def save(
    run: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, config: PretrainConfig, *, keep: int
) -> Path:
    """Writes the checkpoint of a finished step and removes all but the newest `keep`. Returns its folder.

    Raises OSError (disk full, no permission); the older checkpoints are then still there.
    """
    final = run / FOLDER / f"step-{step:08d}"
    if final.is_dir():  # steps are deterministic: the same step was saved before
        return final
    aside = final.with_name(f".part-{final.name}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    state = {"step": step, "config": to_dict(config), "torch": torch.__version__}
    try:
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, aside / WEIGHTS, metadata={"config": json.dumps(to_dict(config)), "step": str(step)})
        save_file(_optimizer_tensors(model, optimizer), aside / "optimizer.safetensors")
        (aside / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        for file in aside.iterdir():
            _sync(file)
        _sync(aside)
        aside.rename(final)
        _sync(final.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    for old in _all(run)[:-keep]:
        shutil.rmtree(old)
    return final


def newest(run: Path) -> Path | None:
    """The folder of the newest checkpoint of a run, or None."""
    found = _all(run)
    return found[-1] if found else None


def _all(run: Path) -> list[Path]:
    return sorted((run / FOLDER).glob("step-*"))


def restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Loads a checkpoint into model and optimiser. Returns its step. Raises UserError where it does not fit."""
    state = read_state(folder)
    load_weights(model, folder / WEIGHTS)
    parameters = dict(model.named_parameters())
    for key, tensor in _load(folder / "optimizer.safetensors").items():
        name, _, entry = key.rpartition(".")
        optimizer.state[parameters[name]][entry] = tensor.to(parameters[name].device)
    return int(state["step"])


def read_state(folder: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint folder."""
    try:
        return json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"checkpoint {folder}: state.json cannot be read ({error}); remove the folder to go back"
        ) from None


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads safetensors weights into a model. Raises UserError naming the first tensor that does not fit."""
    weights, own = _load(path), model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        if name not in weights:
            raise UserError(f"checkpoint {path}: lacks {name}; was it written with another model config?")
        if name not in own:
            raise UserError(
                f"checkpoint {path}: holds {name}, which this model lacks; use the config it was written with"
            )
        if own[name].shape != weights[name].shape:
            raise UserError(
                f"checkpoint {path}: {name} has shape {list(weights[name].shape)}, this model {list(own[name].shape)}; "
                "use the config it was written with"
            )
    model.load_state_dict(weights)


def read_config(path: Path) -> PretrainConfig:
    """The config a checkpoint (its folder or its weights file) was written with."""
    path = path / WEIGHTS if path.is_dir() else path
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"checkpoint {path}: cannot be read: {error}") from None
    if "config" not in metadata:
        raise UserError(f"checkpoint {path}: carries no config; was it written by mam2 pretrain?")
    return from_dict(PretrainConfig, json.loads(metadata["config"]), where=f"checkpoint {path}")


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"checkpoint {path}: cannot be read: {error}") from None


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
