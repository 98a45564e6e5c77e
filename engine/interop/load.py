"""Models from files: MAM2's own runs and checkpoints, VideoMAE's, VideoMAE v2's and Hugging Face's.

A classifier's encoder ends without a LayerNorm (`encoder.norm` is the identity), as in VideoMAE's fine-tuning and where
Hugging Face says `use_mean_pooling`: its norm comes after the mean over tokens. Hugging Face's LayerNorms have another
epsilon (1e-12, and 1e-5 before a head) than VideoMAE's (1e-6); a model read from its folder keeps what the folder says.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Set
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from mam2.engine.config import DataConfig, DecoderConfig, LossConfig, ModelConfig, PretrainConfig, UserError
from mam2.engine.interop.names import Tensors
from mam2.engine.interop.read import Weights, hugging_face_classes, read_hugging_face, read_videomae
from mam2.engine.model.classifier import Classifier, linear_head
from mam2.engine.model.encoder import Encoder
from mam2.engine.model.mam2 import MAM2
from mam2.engine.model.positions import Positions, set_clip_size
from mam2.engine.model.videomae import VideoMAE
from mam2.engine.train import checkpoint
from mam2.engine.train.classifiers import CLASSES, is_classifier, load_classifier
from mam2.engine.train.weights import find_weights

Model = MAM2 | VideoMAE | Classifier | Encoder
BESIDE_ENCODER = ("encoder_to_decoder.", "mask_token", "decoder.", "norm.", "head.")
"""How the parameters of a decoder and of a classifier's head begin."""
MOST_NAMED = 12
"""Tensors that an error names."""


def load_encoder(
    path: str | Path,
    *,
    frames: int | None = None,
    size: int | None = None,
    heads: int | None = None,
    positions: Positions = "resample",
) -> Encoder:
    """A pre-trained or fine-tuned encoder, on the CPU, in evaluation.

        encoder = load_encoder("runs/first")
        features = encoder.encode(video).mean(1)   # video [B, 3, T, H, W] uint8 -> [B, D]

    Args:
        path: a MAM2 run or checkpoint; a checkpoint of VideoMAE or VideoMAE v2 (.pth, read without running what it
            holds); a Hugging Face folder of VideoMAEModel, VideoMAEForPreTraining or VideoMAEForVideoClassification.
        frames, size: of the clips it is to take, where they are others than it was trained on.
        heads: attention heads, where path is a checkpoint of VideoMAE's code of a width that it never published.
        positions: what becomes of the positions at another size, see `mam2.engine.model.positions`.

    Returns:
        The encoder; `encode` gives [B, N, D]. Where path is a classifier, these are its blocks' outputs, as of Hugging
        Face's VideoMAEModel with `use_mean_pooling`, else they have passed the encoder's LayerNorm.

    Raises:
        UserError: for what cannot be read, and tensors that are missing, unknown or of another shape, by name.
    """
    own = find_weights(path)
    if own is not None:
        encoder = _own(own).encoder
    else:
        weights = _read(Path(path))
        encoder = _encoder(weights, heads)
        others = {name for name in weights.tensors if name.startswith(BESIDE_ENCODER)}
        _fill(nn.ModuleDict({"encoder": encoder}), weights, left_out=others)
    if frames is not None or size is not None:
        own_frames, own_size, _ = (tokens * side for tokens, side in zip(encoder.grid, encoder.patch_size, strict=True))
        try:
            set_clip_size(
                encoder, own_frames if frames is None else frames, own_size if size is None else size, positions
            )
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None
    return encoder.eval()


def load_model(path: str | Path, *, heads: int | None = None, decoder_heads: int | None = None) -> Model:
    """Everything a file holds, on the CPU, in evaluation.

        probabilities = load_model("videomae-base-finetuned-kinetics")(video).softmax(-1)

    Args:
        path: as in `load_encoder`.
        heads, decoder_heads: as in `load_encoder`, of the encoder and of VideoMAE's decoder.

    Returns:
        A `Classifier` where there is a head, `VideoMAE` where there is its decoder, `MAM2` of a run of MAM2, else an
        `Encoder`.

    Raises:
        UserError: as `load_encoder`.
    """
    own = find_weights(path)
    if own is not None:
        return _own(own).eval()
    weights = _read(Path(path))
    model: Classifier | VideoMAE
    if "head.weight" in weights.tensors:
        if "norm.weight" not in weights.tensors:
            raise UserError(
                f"{path}: its head reads the first token, not the mean over tokens (no fc_norm); "
                "such a classifier is not supported, load_encoder takes the encoder"
            )
        encoder = _encoder(weights, heads)
        model = Classifier(encoder, linear_head(encoder.width, len(weights.tensors["head.weight"])))
        model.norm.eps = weights.head_eps
    elif "mask_token" in weights.tensors:
        model = VideoMAE(_pretraining_config(weights, heads, decoder_heads))
        _set_eps(model, weights.eps)
        model.decoder.norm.eps = weights.head_eps
    else:
        return load_encoder(path, heads=heads)
    _fill(model, weights)
    return model.eval()


def encoder_of(model: Model) -> Encoder:
    """The encoder of any model."""
    return model if isinstance(model, Encoder) else model.encoder


def class_names(path: str | Path) -> tuple[str, ...]:
    """The names of a classifier's classes, in order; none where the file has none."""
    path = Path(path)
    own = find_weights(path)
    if own is not None:
        return tuple(json.loads(checkpoint.read_metadata(own).get(CLASSES, "[]")))
    return hugging_face_classes(path) if path.is_dir() else ()


def _read(path: Path) -> Weights:
    return read_hugging_face(path) if path.is_dir() else read_videomae(path)


def _own(file: Path) -> MAM2 | VideoMAE | Classifier:
    if is_classifier(file):
        return load_classifier(file)[0]
    config = checkpoint.read_config(file)
    if config.model.objective == "mam2":
        codes = 0
        if config.needs_codes:
            with safe_open(file, framework="pt") as tensors:
                rows = tensors.get_slice("appearance_decoder.head.weight").get_shape()[0]
            codes = rows // math.prod(config.code_shape)
        model: MAM2 | VideoMAE = MAM2(config, codes)
    else:
        model = VideoMAE(config)
    checkpoint.load_weights(model, file)
    return model


def _encoder(weights: Weights, heads: int | None) -> Encoder:
    """An encoder of the weights' sizes, not filled yet."""
    config = _model_config(weights, heads)
    tubelet, height, width = weights.patch_size
    if weights.frames % tubelet or weights.size % height or weights.size % width:
        raise UserError(
            f"{weights.path}: {weights.frames} frames of {weights.size}² make no whole tokens of {weights.patch_size}"
        )
    encoder = Encoder(
        (weights.frames // tubelet, weights.size // height, weights.size // width),
        weights.patch_size,
        width=config.width,
        depth=config.depth,
        heads=config.heads,
        mlp_ratio=config.mlp_ratio,
    )
    without_norm = "encoder.norm.weight" not in weights.tensors and "mask_token" not in weights.tensors
    if without_norm:  # what comes after it is a mean over tokens
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
        data=DataConfig(frames=weights.frames, size=weights.size),
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
    )


def _heads(weights: Weights, name: str, heads: int | None, width: int) -> int:
    if heads is None:
        raise UserError(f"{weights.path}: nothing says how many attention heads a width of {width} has; pass {name}=")
    if width % heads:
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
    """Puts all weights but those left out into a model that must have just these."""
    expected = model.state_dict()
    found: dict[str, Tensor] = {name: t for name, t in weights.tensors.items() if name not in left_out}
    problems = {
        "lacks": [name for name in expected if name not in found],
        "holds, and the model has no place for,": [name for name in found if name not in expected],
        "holds in another shape": [
            f"{name} {list(found[name].shape)}, expected {list(tensor.shape)}"
            for name, tensor in expected.items()
            if name in found and found[name].shape != tensor.shape
        ],
    }
    told = [
        f"{what} {', '.join(names[:MOST_NAMED])}"
        + (f" and {len(names) - MOST_NAMED} more" if names[MOST_NAMED:] else "")
        for what, names in problems.items()
        if names
    ]
    if told:
        raise UserError(f"{weights.path}: {'; '.join(told)}")
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(found[name])
