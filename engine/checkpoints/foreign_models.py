"""Builds models from the weights of VideoMAE, VideoMAE v2 and Hugging Face that foreign.py read.

A classifier's encoder ends without a LayerNorm (`encoder.norm` is the identity), as in VideoMAE's fine-tuning and with
Hugging Face's `use_mean_pooling`: the norm comes after the mean over tokens. The epsilons of Hugging Face's LayerNorms
(1e-12, and 1e-5 before a head) differ from VideoMAE's (1e-6); a model from a Hugging Face folder keeps the folder's.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Set

import torch
from torch import Tensor, nn

from mam2.engine.checkpoints.foreign import Weights
from mam2.engine.checkpoints.names import Tensors
from mam2.engine.config.pretrain import DecoderConfig, LossConfig, ModelConfig, PretrainConfig
from mam2.engine.config.training import DataConfig
from mam2.engine.errors import UserError
from mam2.engine.model.classifier import Classifier, linear_head
from mam2.engine.model.encoder import Encoder
from mam2.engine.model.videomae import VideoMAE

NOT_OF_ENCODER = ("encoder_to_decoder.", "mask_token", "decoder.", "norm.", "head.")
"""Prefixes of the parameters of a decoder and of a classifier's head."""
MOST_NAMED = 12
"""Maximum number of tensors that an error lists."""


def foreign_model(weights: Weights, heads: int | None, decoder_heads: int | None) -> Classifier | VideoMAE | Encoder:
    """Builds the complete model of another project's file: a classifier, VideoMAE with its decoder, or an encoder."""
    model: Classifier | VideoMAE | Encoder
    if "head.weight" in weights.tensors:
        if "norm.weight" not in weights.tensors:
            raise UserError(
                f"{weights.path}: its head reads the first token, not the mean over tokens (no fc_norm); "
                "such a classifier is not supported; load_encoder reads its encoder"
            )
        encoder = _encoder(weights, heads)
        model = Classifier(encoder, linear_head(encoder.width, len(weights.tensors["head.weight"])), weights.task)
        model.norm.eps = weights.head_eps
    elif "mask_token" in weights.tensors:
        hidden = weights.tensors.get("decoder.blocks.0.mlp.fc1.weight")
        ratio = 0.0 if hidden is None else len(hidden) / hidden.shape[1]
        model = VideoMAE(_pretraining_config(weights, heads, decoder_heads), decoder_mlp_ratio=ratio)
        if _ends_without_norm(weights):
            model.encoder.norm = nn.Identity()  # type: ignore[assignment]
        _set_eps(model, weights.eps)
        model.decoder.norm.eps = weights.head_eps
    else:
        return foreign_encoder(weights, heads)
    _fill(model, weights)
    return model


def foreign_encoder(weights: Weights, heads: int | None) -> Encoder:
    """Returns the encoder of another project's file, without a head or decoder."""
    encoder = _encoder(weights, heads)
    others = {name for name in weights.tensors if name.startswith(NOT_OF_ENCODER)}
    _fill(nn.ModuleDict({"encoder": encoder}), weights, left_out=others)
    return encoder


def _encoder(weights: Weights, heads: int | None) -> Encoder:
    """Returns an encoder with the sizes of the weights, before loading them."""
    config = _model_config(weights, heads)
    tubelet, height, width = weights.patch_size
    frames, size = _frames(weights), _size(weights)
    if frames % tubelet or size % height or size % width:
        raise UserError(f"{weights.path}: {frames} frames of {size}² do not divide into tokens of {weights.patch_size}")
    encoder = Encoder(
        (frames // tubelet, size // height, size // width),
        weights.patch_size,
        width=config.width,
        depth=config.depth,
        heads=config.heads,
        mlp_ratio=config.mlp_ratio,
        layer_scale=config.layer_scale,
        channels=_channels(weights),
        mean=weights.mean,
        std=weights.std,
    )
    if _ends_without_norm(weights):
        encoder.norm = nn.Identity()  # type: ignore[assignment]
    _set_eps(encoder, weights.eps)
    return encoder


def _pretraining_config(weights: Weights, heads: int | None, decoder_heads: int | None) -> PretrainConfig:
    model, width = _model_config(weights, heads), weights.tensors["mask_token"].shape[-1]
    decoder = DecoderConfig(
        depth=_depth(weights.tensors, "decoder.blocks."),
        width=width,
        heads=_heads(weights, "decoder_heads", decoder_heads or weights.decoder_heads, width),
    )
    return PretrainConfig(
        data=DataConfig(
            frames=_frames(weights),
            size=_size(weights),
            channels=_channels(weights),
            mean=weights.mean,
            std=weights.std,
        ),
        model=dataclasses.replace(model, objective="videomae", decoder=decoder),
        loss=LossConfig(pixel_normalize="channel" if weights.normalized_pixels else "none"),
    )


def _model_config(weights: Weights, heads: int | None) -> ModelConfig:
    for name in ("encoder.patch_embed.weight", "encoder.blocks.0.mlp.fc1.weight"):
        if name not in weights.tensors:
            raise UserError(f"{weights.path}: lacks {name}")
    width, hidden = (
        len(weights.tensors["encoder.patch_embed.weight"]),
        weights.tensors["encoder.blocks.0.mlp.fc1.weight"],
    )
    return ModelConfig(
        patch=weights.patch_size[1],
        tubelet=weights.patch_size[0],
        width=width,
        depth=_depth(weights.tensors, "encoder.blocks."),
        heads=_heads(weights, "heads", heads or weights.heads, width),
        mlp_ratio=len(hidden) / width,
        layer_scale=1.0 if any(name.endswith(".gamma_1") for name in weights.tensors) else 0.0,
    )


def _ends_without_norm(weights: Weights) -> bool:
    """Returns whether the encoder ends without a LayerNorm, so that a mean over tokens follows."""
    return "encoder.norm.weight" not in weights.tensors and (
        weights.mean_pooling or "mask_token" not in weights.tensors
    )


def _frames(weights: Weights) -> int:
    assert weights.frames is not None  # load.py has set both
    return weights.frames


def _size(weights: Weights) -> int:
    assert weights.size is not None
    return weights.size


def _channels(weights: Weights) -> int:
    """Returns the channels of the clips, from the shape of the patch embedding."""
    return weights.tensors["encoder.patch_embed.weight"].shape[1] // math.prod(weights.patch_size)


def _heads(weights: Weights, name: str, heads: int | None, width: int) -> int:
    if heads is None:
        option = f"--{name.replace('_', '-')}"
        raise UserError(
            f"{weights.path}: unknown number of attention heads for the width {width}; pass {option} or {name}="
        )
    if heads < 1 or width % heads:
        raise UserError(f"{weights.path}: {name}: {heads} heads do not divide a width of {width}")
    return heads


def _depth(tensors: Tensors, beginning: str) -> int:
    numbers = (re.match(rf"{re.escape(beginning)}(\d+)\.", name) for name in tensors)
    return 1 + max((int(number[1]) for number in numbers if number), default=-1)


def _set_eps(model: nn.Module, eps: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps


def _fill(model: nn.Module, weights: Weights, left_out: Set[str] = frozenset()) -> None:
    """Loads all weights, except those left out, into a model; names and shapes must equal the model's."""
    expected = model.state_dict()
    found: dict[str, Tensor] = {name: t for name, t in weights.tensors.items() if name not in left_out}
    problems = {
        "lacks": [name for name in expected if name not in found],
        "contains unexpected": [name for name in found if name not in expected],
        "contains with another shape": [
            f"{name} {list(found[name].shape)}, expected {list(tensor.shape)}"
            for name, tensor in expected.items()
            if name in found and found[name].shape != tensor.shape
        ],
    }
    parts = [
        f"{what} {', '.join(names[:MOST_NAMED])}"
        + (f" and {len(names) - MOST_NAMED} more" if names[MOST_NAMED:] else "")
        for what, names in problems.items()
        if names
    ]
    if parts:
        raise UserError(f"{weights.path}: {'; '.join(parts)}")
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(found[name])
