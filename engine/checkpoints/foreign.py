"""Reads weights of other projects: checkpoints of VideoMAE and VideoMAE v2, and Hugging Face folders.

A checkpoint of VideoMAE's code describes the model only in part: sizes are inferred from the shapes, the number of
heads from the width, and the clip from the arguments that may be pickled with the weights. P values per token.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from mam2.engine.checkpoints.names import Tensors, from_hugging_face, from_videomae
from mam2.engine.checkpoints.pickles import load_pickle
from mam2.engine.checkpoints.weight_files import kind_of, open_safetensors
from mam2.engine.config.finetune import HeadTask
from mam2.engine.errors import UserError
from mam2.engine.model.blocks import LAYER_NORM_EPS

HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}
"""Attention heads of VideoMAE's encoders by width."""
DECODER_HEADS = {192: 3, 384: 6, 512: 8, 640: 8}
"""Attention heads of VideoMAE's decoders by width."""
WHOLE_NUMBERS = (
    "num_frames",
    "num_channels",
    "tubelet_size",
    "num_attention_heads",
    "decoder_num_attention_heads",
)
"""Keys of a Hugging Face config that must be positive integers, in addition to the sides of clip and patch."""
ARGUMENTS = ("num_frames", "num_segments", "input_size", "sampling_rate")
"""Arguments of VideoMAE's code that describe its clips."""
EMBEDDING = "patch_embed.proj.weight"
"""Suffix of the name of VideoMAE's first layer."""
STATES = ("model", "module", "state_dict")
"""Keys under which checkpoints hold the weights: VideoMAE's, DeepSpeed's, others'."""
HEAD_NORM_EPS = 1e-5
"""Epsilon of Hugging Face's LayerNorm before a head, PyTorch's default; VideoMAE has 1e-6 everywhere."""


PROBLEM_TYPES: dict[HeadTask, str] = {
    "classes": "single_label_classification",
    "multi-label": "multi_label_classification",
    "regression": "regression",
}
"""Hugging Face's names of what a head's outputs are of."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """Weights of another project under our names (see `mam2.engine.checkpoints.names`)."""

    path: Path
    tensors: Tensors
    """Tensors by name, float32, on the CPU."""
    frames: int | None
    size: int | None
    """Height and width of the model's clips; None if unknown."""
    patch_size: tuple[int, int, int]
    """Frames, height and width of a token."""
    heads: int | None
    decoder_heads: int | None
    """Attention heads of the decoder; None if unknown."""
    eps: float = LAYER_NORM_EPS
    head_eps: float = LAYER_NORM_EPS
    """Epsilon of the LayerNorm before a head, after the encoder's or decoder's blocks.

    Hugging Face uses another one.
    """
    task: HeadTask = "classes"
    """Kind of the head's outputs."""
    normalized_pixels: bool = True
    """Whether the decoder predicts standardized pixels."""
    mean_pooling: bool = False
    """Whether the encoder ends without a LayerNorm and a mean over tokens follows."""
    stride: int = 0
    """Distance of two sampled frames; 0 if unknown."""
    classes: tuple[str, ...] = ()
    """Names of a classifier's classes, in the order of its logits; empty if unknown."""
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    """Statistics per channel by which its clips are normalized; empty if unknown."""
    uniform: bool = False
    """Whether clips are sampled over the whole video (TSN), as VideoMAE's on Something-Something V2."""


def read_hugging_face(folder: Path) -> Weights:
    """Reads a VideoMAE folder written by Hugging Face's `save_pretrained`, or a copy of one from its hub."""
    config = _config(folder)
    if config.get("model_type") != "videomae":
        raise UserError(
            f"{folder}: config.json: expected model_type 'videomae', found {config.get('model_type')!r}; "
            "for weights of VideoMAE's own code, pass their file"
        )
    if config.get("hidden_act", "gelu") != "gelu":
        raise UserError(f"{folder}: config.json: expected hidden_act 'gelu', found {config['hidden_act']!r}")
    tensors = from_hugging_face(_folder_tensors(folder))
    if not config.get("qv_bias", config.get("qkv_bias", True)):
        # not instead of those in the file: releases of transformers ignore the key that they do not know
        tensors = _zero_biases(tensors) | tensors
    config = {key: _whole(folder, key, value) if key in WHOLE_NUMBERS else value for key, value in config.items()}
    patch = _side(folder, config, "patch_size", 16)
    mean, std = _statistics(folder, config.get("num_channels", 3))
    return Weights(
        path=folder,
        tensors=tensors,
        frames=config.get("num_frames", 16),
        size=_side(folder, config, "image_size", 224),
        patch_size=(config.get("tubelet_size", 2), patch, patch),
        heads=config.get("num_attention_heads", 12),
        decoder_heads=config.get("decoder_num_attention_heads", 6),
        eps=config.get("layer_norm_eps", 1e-12),
        head_eps=HEAD_NORM_EPS,
        normalized_pixels=config.get("norm_pix_loss", True),
        mean_pooling=config.get("use_mean_pooling", True),
        classes=hugging_face_classes(folder),
        task=next((task for task, name in PROBLEM_TYPES.items() if name == config.get("problem_type")), "classes"),
        mean=mean,
        std=std,
    )


def read_videomae(path: Path) -> Weights:
    """Reads a checkpoint of VideoMAE's or VideoMAE v2's code (.pth, or safetensors with its names); runs no code."""
    arguments: Any = None
    classes: Any = None
    if path.suffix == ".safetensors" or kind_of(path) == "safetensors":
        state: Any = _safetensors(path)
    else:
        state = load_pickle(path)
        if isinstance(state, dict):
            arguments, classes = state.get("args"), state.get("classes")
            state = _state_in(path, state)
    found = (
        {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
        if hasattr(state, "items")
        else {}
    )
    tensors = from_videomae({name: tensor.float() for name, tensor in found.items()})
    convolution = next((tensor for name, tensor in found.items() if name.endswith("patch_embed.proj.weight")), None)
    if convolution is None or convolution.ndim != 5 or "encoder.patch_embed.weight" not in tensors:
        hint = "; of Hugging Face's, pass the folder" if any("embeddings.patch_embeddings." in n for n in found) else ""
        raise UserError(
            f"{path}: expected the weights of a VideoMAE (patch_embed.proj.weight, blocks.0.attn.qkv.weight, …), "
            f"found {', '.join(sorted(found)[:3]) or 'no tensors'}{hint}"
        )
    said = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    said = said if isinstance(said, dict) else {}
    numbers = {key: _whole(path, f"args.{key}", said[key]) for key in ARGUMENTS if said.get(key) is not None}
    frames = numbers.get("num_frames")
    decoder = tensors.get("mask_token")
    tubelet, height, width = convolution.shape[2:]
    return Weights(
        path=path,
        tensors=tensors,
        frames=None if frames is None else frames * numbers.get("num_segments", 1),
        size=numbers.get("input_size"),
        patch_size=(tubelet, height, width),
        heads=HEADS.get(len(convolution)),
        decoder_heads=None if decoder is None else DECODER_HEADS.get(decoder.shape[-1]),
        normalized_pixels=said.get("normlize_target", True),
        stride=numbers.get("sampling_rate", 0),
        uniform=said.get("data_set") == "SSV2",
        classes=tuple(map(str, classes)) if isinstance(classes, list) else (),
    )


def _statistics(folder: Path, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and standard deviation per channel from the image processor's file; empty without them."""
    try:
        values = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return (), ()
    mean, std = [values.get(key) for key in ("image_mean", "image_std")]
    if not values.get("do_normalize", True) or not all(
        isinstance(numbers, list) and len(numbers) == channels for numbers in (mean, std)
    ):
        return (), ()
    return tuple(map(float, mean)), tuple(map(float, std))


def hugging_face_classes(folder: Path) -> tuple[str, ...]:
    """Returns the names of a folder's classes in the order of the logits; empty if the classes have no names."""
    labels = _config(folder).get("id2label", {})
    try:
        names = tuple(str(labels[number]) for number in sorted(labels, key=int))
    except (TypeError, ValueError):
        raise UserError(f"{folder}: config.json: expected id2label to map numbers to names, found {labels}") from None
    # placeholders of transformers for classes without names
    return () if all(name == f"LABEL_{number}" for number, name in enumerate(names)) else names


def _state_in(path: Path, checkpoint: dict[str, Any]) -> Any:
    """Returns the weights in a checkpoint, under any of the known keys. Raises UserError if two keys hold weights."""
    for key in STATES:
        if isinstance(checkpoint.get(key), dict):
            return checkpoint[key]
    tables = [key for key, value in checkpoint.items() if isinstance(value, dict)]
    holding = [key for key in tables if any(str(name).endswith(EMBEDDING) for name in checkpoint[key])]
    if len(holding) > 1:
        raise UserError(
            f"{path}: contains the weights of several models ({', '.join(map(repr, holding))}); save one of them as "
            "{'model': checkpoint['" + str(holding[-1]) + "']}"
        )
    if not holding and tables and not any(isinstance(value, Tensor) for value in checkpoint.values()):
        raise UserError(
            f"{path}: expected the weights of a VideoMAE under one of {', '.join(map(repr, STATES))}, found the keys "
            f"{', '.join(map(repr, list(checkpoint)[:8]))}, none of which contains a {EMBEDDING}"
        )
    return checkpoint[holding[0]] if holding else checkpoint


def _config(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: expected a Hugging Face folder, but config.json cannot be read: {error}") from None


def _folder_tensors(folder: Path) -> Tensors:
    for name, read in (("model.safetensors", _safetensors), ("pytorch_model.bin", load_pickle)):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            files = [name]
        elif index.is_file():
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        else:
            continue
        return {key: tensor.float() for file in files for key, tensor in read(folder / file).items()}
    raise UserError(f"{folder}: expected model.safetensors or pytorch_model.bin next to config.json, found neither")


def _safetensors(path: Path) -> Tensors:
    with open_safetensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)


def _whole(path: Path, key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{path}: expected {key} to be an integer of at least 1, found {value!r}")
    return value


def _side(folder: Path, config: dict[str, Any], key: str, default: int) -> int:
    value = config.get(key, default)
    sides = list(dict.fromkeys(value)) if isinstance(value, list) else [value]
    if len(sides) != 1:
        raise UserError(f"{folder}: config.json: expected {key} to be a square, found {value}")
    return _whole(folder, f"{key} in config.json", sides.pop())


def _zero_biases(tensors: Tensors) -> Tensors:
    layers = {
        name.removesuffix("qkv.weight"): len(t) // 3 for name, t in tensors.items() if name.endswith("qkv.weight")
    }
    return {
        f"{layer}{bias}": tensors[f"{layer}qkv.weight"].new_zeros(width)
        for layer, width in layers.items()
        for bias in ("q_bias", "v_bias")
    }
