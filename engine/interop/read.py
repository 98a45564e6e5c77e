"""Weights that others have written: VideoMAE's and VideoMAE v2's checkpoints, and folders of Hugging Face.

A checkpoint of VideoMAE's code says little about the model: sizes are read from the shapes, the heads from the width,
and the clip from the arguments that are pickled beside the weights, where there are any. P values a token.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mam2.engine.config import UserError
from mam2.engine.interop.names import Tensors, from_hugging_face, from_videomae
from mam2.engine.model.blocks import LAYER_NORM_EPS
from mam2.engine.model.pickles import load_pickle

HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}
"""Of VideoMAE's encoders by width."""
DECODER_HEADS = {192: 3, 384: 6, 512: 8, 640: 8}
"""Of VideoMAE's decoders by width."""
STATES = ("model", "module", "state_dict")
"""Where the weights are in a checkpoint: of VideoMAE, of DeepSpeed, of others."""
HEAD_NORM_EPS = 1e-5
"""PyTorch's default, which Hugging Face leaves in the LayerNorm before a head; VideoMAE has 1e-6 everywhere."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """A model of others under our names (see `mam2.engine.interop.names`)."""

    path: Path
    tensors: Tensors
    """float32, on the CPU."""
    frames: int = 16
    size: int = 224
    """Of the clips it takes."""
    patch_size: tuple[int, int, int]
    """Frames, height and width of a token."""
    heads: int | None
    decoder_heads: int | None
    """None where nothing says it."""
    eps: float = LAYER_NORM_EPS
    head_eps: float = LAYER_NORM_EPS
    """Of the LayerNorms, and of the one after encoder or decoder blocks where Hugging Face has another."""
    normalized_pixels: bool = True
    """Whether the decoder predicts standardised pixels."""


def read_hugging_face(folder: Path) -> Weights:
    """A folder that `save_pretrained` of a VideoMAE of Hugging Face has written, or a copy of one from its hub."""
    config = _config(folder)
    if config.get("model_type") != "videomae":
        raise UserError(
            f"{folder}: expected config.json to say model_type 'videomae', found {config.get('model_type')!r}; "
            "where the weights are those of VideoMAE's own code, name their file"
        )
    for key, (default, expected) in {"hidden_act": ("gelu", "gelu"), "num_channels": (3, 3)}.items():
        if config.get(key, default) != expected:
            raise UserError(f"{folder}: config.json: expected {key} {expected!r}, found {config[key]!r}")
    tensors = from_hugging_face(_folder_tensors(folder))
    if not config.get("qv_bias", config.get("qkv_bias", True)):
        tensors |= _zero_biases(tensors)
    patch = _side(folder, config, "patch_size", 16)
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
    )


def read_videomae(path: Path) -> Weights:
    """A checkpoint of VideoMAE's or VideoMAE v2's code (.pth, or safetensors with its names); nothing in it runs."""
    arguments: Any = None
    if path.suffix == ".safetensors":
        state: Any = _safetensors(path)
    else:
        state = load_pickle(path)
        if isinstance(state, dict):
            arguments = state.get("args")
            state = next((state[key] for key in STATES if isinstance(state.get(key), dict)), state)
    found = (
        {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
        if hasattr(state, "items")
        else {}
    )
    tensors = from_videomae({name: tensor.float() for name, tensor in found.items()})
    convolution = next((tensor for name, tensor in found.items() if name.endswith("patch_embed.proj.weight")), None)
    if convolution is None or convolution.ndim != 5 or "encoder.patch_embed.weight" not in tensors:
        hint = "; of Hugging Face's, name the folder" if any("embeddings.patch_embeddings." in n for n in found) else ""
        raise UserError(
            f"{path}: expected the weights of a VideoMAE (patch_embed.proj.weight, blocks.0.attn.qkv.weight, …), "
            f"found {', '.join(sorted(found)[:3]) or 'no tensors'}{hint}"
        )
    said = vars(arguments) if isinstance(arguments, argparse.Namespace) else {}
    decoder = tensors.get("mask_token")
    tubelet, height, width = convolution.shape[2:]
    return Weights(
        path=path,
        tensors=tensors,
        frames=said.get("num_frames", 16) * said.get("num_segments", 1),
        size=said.get("input_size", 224),
        patch_size=(tubelet, height, width),
        heads=HEADS.get(len(convolution)),
        decoder_heads=None if decoder is None else DECODER_HEADS.get(decoder.shape[-1]),
        normalized_pixels=said.get("normlize_target", True),
    )


def hugging_face_classes(folder: Path) -> tuple[str, ...]:
    """The names of a classifier's classes."""
    labels = _config(folder).get("id2label", {})
    return tuple(labels[number] for number in sorted(labels, key=int))


def _config(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: expected a folder of Hugging Face, config.json cannot be read: {error}") from None


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
    raise UserError(f"{folder}: expected model.safetensors or pytorch_model.bin beside config.json, found neither")


def _safetensors(path: Path) -> Tensors:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def _side(folder: Path, config: dict[str, Any], key: str, default: int) -> int:
    value = config.get(key, default)
    sides = set(value) if isinstance(value, list) else {value}
    if len(sides) > 1:
        raise UserError(f"{folder}: config.json: expected {key} to be a square, found {value}")
    return sides.pop()


def _zero_biases(tensors: Tensors) -> Tensors:
    layers = {
        name.removesuffix("qkv.weight"): len(t) // 3 for name, t in tensors.items() if name.endswith("qkv.weight")
    }
    return {
        f"{layer}{bias}": tensors[f"{layer}qkv.weight"].new_zeros(width)
        for layer, width in layers.items()
        for bias in ("q_bias", "v_bias")
    }
