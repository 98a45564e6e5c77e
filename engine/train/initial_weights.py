"""Initial weights of pre-training: from a published VideoMAE, from Hugging Face, or from any run of MAM2.

The encoder is loaded as a whole. Regressor and decoders are loaded part by part if the trained model has the same part;
a head only if it also predicts the same target. Positions are resampled if the clip size differs.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mam2.engine.checkpoints import run as checkpoint
from mam2.engine.checkpoints.channels import GRAY, becomes_gray, data_for, gray_encoder
from mam2.engine.checkpoints.load import Model, encoder_of, load_model
from mam2.engine.checkpoints.weights import find_weights
from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.errors import UserError
from mam2.engine.model.blocks import Attention
from mam2.engine.model.classifier import Classifier
from mam2.engine.model.encoder import Encoder
from mam2.engine.model.mam2 import MAM2
from mam2.engine.model.videomae import VideoMAE
from mam2.engine.tokenizer.prepare import FILE as TOKENIZER

START = "start"
"""Key of a checkpoint's metadata: the initial weights of its run, as JSON of `InitialWeights.about`."""
PARTS = {
    MAM2: {
        "regressor": ("regressor.",),
        "appearance decoder": ("appearance_decoder.blocks.", "appearance_decoder.norm."),
        "appearance head": ("appearance_decoder.head.",),
        "motion decoder": ("motion_decoder.blocks.", "motion_decoder.norm."),
        "motion head": ("motion_decoder.head.",),
    },
    VideoMAE: {
        "decoder": ("encoder_to_decoder.", "mask_token", "decoder.blocks.", "decoder.norm."),
        "pixel head": ("decoder.head.",),
    },
}
"""Parts of a model other than its encoder, with the prefixes of their parameters."""


@dataclass(frozen=True, kw_only=True)
class InitialWeights:
    path: str
    """The path as passed by the user."""
    file: Path
    """The file or folder that was read."""
    model: Model
    """The model of the checkpoint, on the CPU."""
    config: PretrainConfig | None
    """Config of a pre-training run of MAM2, else None."""
    tokenizer: Path | None
    """The tokenizer next to the checkpoint, if its run predicted codes."""
    step: int | None
    """Step of a checkpoint of MAM2."""

    @property
    def encoder(self) -> Encoder:
        return encoder_of(self.model)

    @property
    def about(self) -> dict[str, Any]:
        """Returns the origin of the weights as plain values."""
        return {"checkpoint": self.path, "weights": str(self.file), "step": self.step}


def read_initial_weights(path: str | Path, options: Mapping[str, int | None]) -> InitialWeights:
    """Reads a checkpoint of any kind that `load_model` takes.

    options: frames, size, heads and decoder_heads, if the file does not state them. Raises UserError.
    """
    weights = find_weights(path)
    model = load_model(weights or path, **options)
    config, step, tokenizer = None, None, None
    if weights:
        step = int(checkpoint.read_metadata(weights)["step"])
        if not isinstance(model, Classifier):
            config = checkpoint.read_config(weights)
            beside = (folder / TOKENIZER for folder in (weights.parent, *weights.parents[1:3]))
            tokenizer = next((file for file in beside if file.is_file()), None) if config.needs_codes else None
    return InitialWeights(
        path=str(path), file=weights or Path(path), model=model, config=config, tokenizer=tokenizer, step=step
    )


def complete_config(config: PretrainConfig, start: InitialWeights) -> PretrainConfig:
    """Returns the config with the clip size of the weights; their positions are resampled to the config's clip size.

    Raises UserError if the encoder differs from the config's; the message lists the values to set.
    """
    encoder, block = start.encoder, start.encoder.blocks[0]
    tubelet, patch, _ = encoder.patch_size
    attention, gamma = getattr(block, "attn", None), getattr(block, "gamma_1", None)
    assert isinstance(attention, Attention)
    found = {
        "patch": patch,
        "tubelet": tubelet,
        "width": encoder.width,
        "depth": len(encoder.blocks),
        "heads": attention.heads,
        "mlp_ratio": encoder.state_dict()["blocks.0.mlp.fc1.weight"].shape[0] / encoder.width,
    }
    wrong = {name: value for name, value in found.items() if value != getattr(config.model, name)}
    if (gamma is None) != (config.model.layer_scale == 0):
        wrong["layer_scale"] = 0.0 if gamma is None else 0.1
    if wrong:
        asked = ", ".join(f"model.{name} {getattr(config.model, name):g}" for name in wrong)
        flags = " ".join(f"--model.{name.replace('_', '-')} {value:g}" for name, value in wrong.items())
        raise UserError(f"--checkpoint {start.path}: its encoder differs from the recipe's ({asked}); add {flags}")
    frames, size = encoder.trained_grid[0] * tubelet, encoder.trained_grid[1] * patch
    same = (frames, size) == (config.data.frames, config.data.size)
    model = dataclasses.replace(config.model, frames=0 if same else frames, size=0 if same else size)
    return dataclasses.replace(config, data=data_for(config.data, encoder, start.path), model=model)


def take_weights(
    model: MAM2 | VideoMAE, config: PretrainConfig, start: InitialWeights, *, same_tokenizer: bool
) -> list[str]:
    """Loads the matching weights into a model. Returns lines for the log: what was loaded, what is new, and why.

    config: config of the model, from `complete_config`. same_tokenizer: whether both predict codes of one tokenizer.
    """
    source, own = start.model.state_dict(), model.state_dict()
    taken, new, lines = ["encoder"], [], []
    names = {f"encoder.{name}" for name in model.encoder.state_dict()}
    if isinstance(start.model, Encoder):
        source = {f"encoder.{name}": tensor for name, tensor in source.items()}
    if becomes_gray(config.data, start.encoder):
        embedding = gray_encoder(start.encoder, config.data).patch_embed.state_dict()
        source |= {f"encoder.patch_embed.{name}": tensor for name, tensor in embedding.items()}
        lines.append(GRAY)
    if isinstance(start.encoder.norm, nn.Identity):
        names = {name for name in names if not name.startswith("encoder.norm.")}
        new.append("the encoder's last LayerNorm (that encoder has none)")
    if type(start.model) is type(model):
        for part, beginnings in PARTS[type(model)].items():
            inside = {name for name in own if name.startswith(beginnings)}
            reason = _why_new(part, inside, model, config, start, same_tokenizer) if inside else ""
            if reason:
                new.append(f"{part} ({reason})")
            elif inside:
                taken.append(part)
                names |= inside
    else:
        new.append(f"all parts after the encoder (the checkpoint is a {type(start.model).__name__})")
    if isinstance(model, MAM2) and model.teacher:
        averaged = {name for name in own if name.startswith("teacher.")}
        if averaged <= source.keys():
            taken.append("teacher")
            names |= averaged
        else:
            source |= {f"teacher.{name}": tensor for name, tensor in start.encoder.state_dict().items()}
            names |= {name for name in averaged if name.replace("teacher.", "encoder.", 1) in names}
            taken.append("teacher (the same encoder: the checkpoint has no teacher)")
    with torch.no_grad():
        for name in names:
            own[name].copy_(source[name])
    what = start.file if start.step is None else f"{start.file}, step {start.step}"
    lines.insert(0, f"start   from {start.path} ({what}): {', '.join(taken)}")
    if new:
        lines.append(f"start   new, with random weights: {'; '.join(new)}")
    if config.trained_grid != config.grid:
        lines.append(
            f"start   positions of {config.model.frames or config.data.frames} frames of "
            f"{config.model.size or config.data.size}² resampled to {config.data.frames} of {config.data.size}²"
        )
    eps = {module.eps for module in start.encoder.modules() if isinstance(module, nn.LayerNorm)}
    ours = {module.eps for module in model.encoder.modules() if isinstance(module, nn.LayerNorm)}
    if eps - ours:
        lines.append(f"start   its LayerNorms have an epsilon of {min(eps - ours):g}, those of this run {min(ours):g}")
    return lines


def describe_schedule(config: PretrainConfig) -> str:
    """Returns a line for the log with the schedule of a run from given weights."""
    optim = config.optim
    return (
        f"start   new optimizer and schedule: the learning rate increases for {optim.warmup_epochs:g} epochs "
        f"and decreases until epoch {optim.epochs:g} (optim.warmup_epochs, optim.epochs)"
    )


def _why_new(
    part: str,
    names: set[str],
    model: MAM2 | VideoMAE,
    config: PretrainConfig,
    start: InitialWeights,
    same_tokenizer: bool,
) -> str:
    """Returns why a part cannot be loaded; empty if it can."""
    other = start.model
    assert isinstance(other, MAM2 | VideoMAE)
    source, own = other.state_dict(), model.state_dict()
    if not any(name in source for name in names):
        return "the checkpoint has none"
    if part == "appearance head":
        assert start.config is not None
        before, now = start.config.loss, config.loss
        if before.appearance_target != now.appearance_target or start.config.code_shape != config.code_shape:
            return "another target"
        if now.appearance_target == "codes" and not same_tokenizer:
            return "another tokenizer"
        if now.appearance_target == "pixels" and before.pixel_normalize != now.pixel_normalize:
            return "another target"
        if now.appearance_target == "latents" and before.teacher_blocks != now.teacher_blocks:
            return "another target"
    if part == "motion head":
        assert start.config is not None
        if start.config.loss.motion_target != config.loss.motion_target:
            return "another target"
    if part == "pixel head":
        assert isinstance(other, VideoMAE)
        assert isinstance(model, VideoMAE)
        if (other.target, other.normalize) != (model.target, model.normalize):
            return "another target"
    theirs = {name for name in source if name.startswith(PARTS[type(model)][part])}
    if (
        theirs != names
        or any(source[name].shape != own[name].shape for name in names)
        or _heads(other, names) != _heads(model, names)
    ):
        return "of another size"
    return ""


def _heads(model: nn.Module, names: set[str]) -> list[int]:
    """Returns the attention heads of the modules with the given parameters."""
    return [
        int(getattr(module, "heads", 0))
        for name, module in model.named_modules()
        if hasattr(module, "heads") and any(parameter.startswith(f"{name}.") for parameter in names)
    ]


def metadata_of(start: InitialWeights | None, saved: Path | None) -> dict[str, str]:
    """Returns a run's checkpoint metadata about its initial weights; a resumed run keeps that of its checkpoint."""
    if saved:
        known = checkpoint.read_metadata(saved)
        return {START: known[START]} if START in known else {}
    return {START: json.dumps(start.about)} if start else {}
