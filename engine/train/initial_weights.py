"""Initial weights of pre-training: from a published VideoMAE, from Hugging Face, or from any run of MAM2.

The encoder is loaded as a whole. Regressor and decoders are loaded part by part if the trained model has the same part;
a head only if it also predicts the same target. Positions are resampled if the clip size differs.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from mam2.engine.checkpoints import checkpoint
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
from mam2.engine.units import counted

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
    moments: Path | None = None
    """Optimizer state of a checkpoint of MAM2's pre-training, if the run takes it."""

    @property
    def encoder(self) -> Encoder:
        return encoder_of(self.model)

    @property
    def about(self) -> dict[str, Any]:
        """Returns the origin of the weights as plain values."""
        return {"checkpoint": self.path, "weights": str(self.file), "step": self.step}


def read_initial_weights(
    path: str | Path, options: Mapping[str, int | None], *, moments: bool = False
) -> InitialWeights:
    """Reads a checkpoint of any kind that `load_model` takes.

    options: frames, size, heads and decoder_heads, if the file does not state them. moments: also take the optimizer's
    moments. Raises UserError.
    """
    weights = find_weights(path)
    model = load_model(weights or path, **options)
    config, step, tokenizer = None, None, None
    if weights:
        step = int(checkpoint.read_metadata(weights)["step"])
        if not isinstance(model, Classifier):
            config = checkpoint.read_config(weights)
            files = (folder / TOKENIZER for folder in (weights.parent, *weights.parents[1:3]))
            tokenizer = next((file for file in files if file.is_file()), None) if config.needs_codes else None
    state = weights.with_name(checkpoint.OPTIMIZER) if weights else None
    if moments and (config is None or state is None or not state.is_file()):
        raise UserError(
            f"--checkpoint-moments: {path} has no optimizer state; expected a run of mam2 pretrain or one of its "
            "checkpoints/step-… folders, or leave the flag out"
        )
    return InitialWeights(
        path=str(path),
        file=weights or Path(path),
        model=model,
        config=config,
        tokenizer=tokenizer,
        step=step,
        moments=state if moments else None,
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
    if start.moments and start.config and start.config.optim.name != config.optim.name:
        raise UserError(
            f"--checkpoint-moments: those of {start.path} are of optim.name {start.config.optim.name}, this run has "
            f"{config.optim.name}; use the same optimizer, or leave the flag out"
        )
    frames, size = encoder.trained_grid[0] * tubelet, encoder.trained_grid[1] * patch
    same = (frames, size) == (config.data.frames, config.data.size)
    model = dataclasses.replace(config.model, frames=0 if same else frames, size=0 if same else size)
    return dataclasses.replace(config, data=data_for(config.data, encoder, start.path), model=model)


class Match(NamedTuple):
    """The parameters of a model that initial weights provide."""

    names: set[str]
    """Their names in the model's state."""
    taken: list[str]
    """The parts of the model that are loaded."""
    new: list[str]
    """The parts that start with random weights, each with the reason."""


def matching_weights(
    model: MAM2 | VideoMAE, config: PretrainConfig, start: InitialWeights, *, same_tokenizer: bool
) -> Match:
    """Returns what a model takes from initial weights. config and same_tokenizer: see `take_weights`."""
    own = model.state_dict()
    taken, new = ["encoder"], []
    names = {f"encoder.{name}" for name in model.encoder.state_dict()}
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
        if averaged <= start.model.state_dict().keys():
            taken.append("teacher")
            names |= averaged
        else:
            names |= {name for name in averaged if name.replace("teacher.", "encoder.", 1) in names}
            taken.append("teacher (the same encoder: the checkpoint has no teacher)")
    return Match(names, taken, new)


def take_weights(
    model: MAM2 | VideoMAE, config: PretrainConfig, start: InitialWeights, *, same_tokenizer: bool
) -> list[str]:
    """Loads the matching weights into a model. Returns lines for the log: what was loaded, what is new, and why.

    config: config of the model, from `complete_config`. same_tokenizer: whether both predict codes of one tokenizer.
    """
    source, own = start.model.state_dict(), model.state_dict()
    if isinstance(start.model, Encoder):
        source = {f"encoder.{name}": tensor for name, tensor in source.items()}
    lines = []
    if becomes_gray(config.data, start.encoder):
        embedding = gray_encoder(start.encoder, config.data).patch_embed.state_dict()
        source |= {f"encoder.patch_embed.{name}": tensor for name, tensor in embedding.items()}
        if isinstance(start.model, MAM2) and start.model.teacher:
            embedding = gray_encoder(start.model.teacher, config.data).patch_embed.state_dict()
            source |= {f"teacher.patch_embed.{name}": tensor for name, tensor in embedding.items()}
        lines.append(GRAY)
    names, taken, new = matching_weights(model, config, start, same_tokenizer=same_tokenizer)
    if not {name for name in names if name.startswith("teacher.")} <= source.keys():
        encoder = {name: tensor for name, tensor in source.items() if name.startswith("encoder.")}
        source |= {name.replace("encoder.", "teacher.", 1): tensor for name, tensor in encoder.items()}
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


def take_moments(model: nn.Module, optimizer: torch.optim.Optimizer, start: InitialWeights, names: Set[str]) -> str:
    """Loads the optimizer's moments of the parameters `names` that have the same shape. Returns a line for the log."""
    assert start.moments
    parameters = {name: tensor for name, tensor in model.named_parameters() if name in names}
    loaded = set()
    for key, tensor in checkpoint.load_tensors(start.moments).items():
        name, _, entry = key.rpartition(".")
        if name in parameters and (tensor.ndim == 0 or tensor.shape == parameters[name].shape):
            checkpoint.set_moment(optimizer, parameters[name], entry, tensor)
            loaded.add(name)
    total = sum(parameter.requires_grad for parameter in model.parameters())
    return f"start   the optimizer's moments of {len(loaded)} of {total} parameters from {start.moments}"


def describe_schedule(config: PretrainConfig, *, moments: bool = False) -> str:
    """Returns a line for the log with the schedule of a run from given weights."""
    optim = config.optim
    what = "new schedule" if moments else "new optimizer and schedule"
    until = f"decreases until epoch {optim.epochs:g} (optim.warmup_epochs, optim.epochs)"
    if optim.schedule == "warmup-stable-decay":
        until = (
            f"decreases in the last {optim.decay_share:.0%} of {counted(optim.epochs, 'epoch')} "
            "(optim.warmup_epochs, optim.decay_share, optim.epochs)"
        )
    return f"start   {what}: the learning rate increases for {counted(optim.warmup_epochs, 'epoch')} and {until}"


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
