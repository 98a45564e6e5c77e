"""Exports models: to a Hugging Face folder, and to a checkpoint for VideoMAE's code.

Both recompute the positions from the clip size, so that an exported model must use the position table of its clip size.
"""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from mam2.engine.checkpoints import checkpoint
from mam2.engine.checkpoints.foreign import PROBLEM_TYPES
from mam2.engine.checkpoints.load import Model, encoder_of
from mam2.engine.checkpoints.names import Tensors, to_hugging_face, to_videomae
from mam2.engine.checkpoints.weight_files import open_safetensors, sort_metadata
from mam2.engine.checkpoints.weights import find_weights
from mam2.engine.config.recipe import shareable
from mam2.engine.errors import UserError
from mam2.engine.files import write_whole
from mam2.engine.model.blocks import Block, sincos_positions
from mam2.engine.model.classifier import Classifier
from mam2.engine.model.pixels import pixel_statistics
from mam2.engine.model.videomae import VideoMAE

TOKENIZER = "tokenizer.safetensors"
"""In a run folder; `mam2.engine.tokenizer` writes it."""
BILINEAR = 2
"""PIL's number of the bilinear filter."""


def write_hugging_face(model: Model, folder: Path, classes: tuple[str, ...] = ()) -> str:
    """Writes config.json, model.safetensors and preprocessor_config.json for `from_pretrained`.

    A classifier becomes a VideoMAEForVideoClassification. VideoMAE becomes a VideoMAEForPreTraining if that class
    computes its loss (see `decoder_is_videomaes`). Of any other model the encoder becomes a VideoMAEModel. The
    encoders' outputs equal ours. The LayerNorm before a head has an epsilon of 1e-5 in Hugging Face's code and of 1e-6
    in ours, so that logits and predicted pixels differ slightly. To fine-tune an encoder there:
    `VideoMAEForVideoClassification.from_pretrained(folder, use_mean_pooling=True, num_labels=…)`.

    Args:
        model: any model of MAM2.
        folder: an existing, empty folder.
        classes: names of a classifier's classes.

    Returns:
        The name of the class in transformers.
    """
    if isinstance(model, VideoMAE) and not decoder_is_videomaes(model):
        model = model.encoder
    encoder, tensors = encoder_of(model), _tensors(model)
    tubelet, patch, _ = encoder.patch_size
    block = _first(encoder.blocks)
    size = encoder.grid[1] * patch
    config: dict[str, Any] = {
        "model_type": "videomae",
        "architectures": ["VideoMAEModel"],
        "image_size": size,
        "patch_size": patch,
        "num_channels": encoder.channels,
        "num_frames": encoder.grid[0] * tubelet,
        "tubelet_size": tubelet,
        "hidden_size": encoder.width,
        "num_hidden_layers": len(encoder.blocks),
        "num_attention_heads": block.attn.heads,
        "intermediate_size": len(tensors["encoder.blocks.0.mlp.fc1.weight"]),
        "hidden_act": "gelu",
        "layer_norm_eps": block.norm1.eps,
        "use_mean_pooling": isinstance(encoder.norm, nn.Identity),
    }
    if isinstance(model, Classifier):
        names = classes or tuple(f"LABEL_{number}" for number in range(len(tensors["head.weight"])))
        config |= {
            "architectures": ["VideoMAEForVideoClassification"],
            "id2label": {str(number): name for number, name in enumerate(names)},
            "label2id": {name: number for number, name in enumerate(names)},
            "problem_type": PROBLEM_TYPES[model.task],
        }
    elif isinstance(model, VideoMAE):
        config |= {
            "architectures": ["VideoMAEForPreTraining"],
            "decoder_hidden_size": model.mask_token.shape[-1],
            "decoder_num_hidden_layers": len(model.decoder.blocks),
            "decoder_num_attention_heads": _first(model.decoder.blocks).attn.heads,
            "decoder_intermediate_size": len(tensors["decoder.blocks.0.mlp.fc1.weight"]),
            "norm_pix_loss": model.normalize is not None,
        }
    processor = {
        "image_processor_type": "VideoMAEImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": BILINEAR,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(encoder.mean),
        "image_std": list(encoder.std),
    }
    # not save_file, whose files other users cannot read
    weights = save(to_hugging_face(tensors, encoder.patch_size), {"format": "pt"})
    (folder / "model.safetensors").write_bytes(weights)
    for name, values in {"config.json": config, "preprocessor_config.json": processor}.items():
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return config["architectures"][0]


def write_mam2(path: str | Path, folder: Path) -> None:
    """Copies a MAM2 checkpoint without its optimizer, and the tokenizer of its run, for use on other machines.

    Paths of this machine are removed from its config. Raises UserError if `path` is not a MAM2 checkpoint.
    """
    weights = find_weights(path)
    if weights is None:
        raise UserError(f"{path}: is not a checkpoint of mam2, which --to mam2 copies; use --to huggingface")
    metadata = checkpoint.read_metadata(weights)
    metadata["config"] = json.dumps(shareable(json.loads(metadata["config"])))
    if "start" in metadata:
        start = json.loads(metadata["start"])
        metadata["start"] = json.dumps({"checkpoint": Path(start["checkpoint"]).name, "step": start["step"]})
    with open_safetensors(weights) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    (folder / checkpoint.WEIGHTS).write_bytes(save(tensors, metadata))
    sort_metadata(folder / checkpoint.WEIGHTS)
    (folder / checkpoint.STATE).write_text(json.dumps({"step": int(metadata["step"])}) + "\n", encoding="utf-8")
    for place in list(weights.absolute().parents)[:3]:
        if (place / TOKENIZER).is_file():
            shutil.copyfile(place / TOKENIZER, folder / TOKENIZER)
            break


def write_videomae(model: Model, path: Path, classes: tuple[str, ...] = ()) -> str:
    """Writes a .pth for `--finetune` of VideoMAE and VideoMAE v2: the weights under `model`, with their names.

    `args` contains what `load_model` cannot infer from the shapes, and `classes` the names of a classifier's classes. A
    decoder is left out if VideoMAE's loss differs from the model's, see `decoder_is_videomaes`.

    Returns:
        The name of our class of the exported weights.
    """
    if isinstance(model, VideoMAE) and not (
        decoder_is_videomaes(model) and isinstance(model.encoder.norm, nn.LayerNorm)
    ):
        model = model.encoder
    encoder = encoder_of(model)
    if (encoder.mean, encoder.std) != pixel_statistics(encoder.channels):
        raise UserError(
            "--to videomae: the file cannot state data.mean and data.std, with which the model was trained; "
            "use --to huggingface, whose image processor states them"
        )
    tubelet, patch, _ = encoder.patch_size
    args: dict[str, Any] = {"num_frames": encoder.grid[0] * tubelet, "input_size": encoder.grid[1] * patch}
    if isinstance(model, VideoMAE):
        args["normlize_target"] = model.normalize is not None  # VideoMAE's spelling
    written: dict[str, Any] = {"model": to_videomae(_tensors(model), encoder.patch_size), "args": args}
    # on a full disk, torch.save to a file raises a RuntimeError without the reason
    buffer = io.BytesIO()
    torch.save(written | ({"classes": list(classes)} if classes else {}), buffer)
    write_whole(path, buffer.getbuffer())
    return type(model).__name__


def decoder_is_videomaes(model: VideoMAE) -> bool:
    """Returns whether VideoMAE's loss equals the model's: on pixels that are standardized per channel, or not at all.

    The objective `joint` and `loss.pixel_normalize = "patch"` have other targets, which neither VideoMAE's code nor
    Hugging Face's supports.
    """
    return model.target == "pixel" and model.normalize in ("channel", None)


def _tensors(model: Model) -> Tensors:
    """Returns the exportable tensors under our names.

    Raises UserError if they would not reproduce the model's outputs.
    """
    encoder = encoder_of(model)
    if not torch.equal(encoder.positions, sincos_positions(len(encoder.positions), encoder.width)):
        tubelet, patch, _ = encoder.patch_size
        raise UserError(
            f"the model takes {encoder.grid[0] * tubelet} frames of {encoder.grid[1] * patch}², not the clip size "
            "of its pre-training, with position embeddings interpolated from that size; VideoMAE's code and Hugging "
            "Face compute the position embeddings from the clip size, so their outputs would be wrong. "
            "Use --to torch or --to onnx, which store the interpolated ones"
        )
    if isinstance(model, Classifier) and not isinstance(model.head, nn.Linear):
        raise UserError(
            "the head compares with text embeddings, but the format needs a linear one; use --to torch or --to onnx"
        )
    if isinstance(model, VideoMAE | Classifier):
        return _without_layer_scale(dict(model.state_dict()))
    return _without_layer_scale({f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()})


def _without_layer_scale(tensors: Tensors) -> Tensors:
    """Merges LayerScale into the layers that end each branch: γ·(Wx + b) = (γW)x + γb."""
    for name in [name for name in tensors if name.endswith((".gamma_1", ".gamma_2"))]:
        gamma, block = tensors.pop(name), name.removesuffix(".gamma_1").removesuffix(".gamma_2")
        last = f"{block}.attn.proj" if name.endswith(".gamma_1") else f"{block}.mlp.fc2"
        tensors[f"{last}.weight"] = gamma[:, None] * tensors[f"{last}.weight"]
        tensors[f"{last}.bias"] = gamma * tensors[f"{last}.bias"]
    return tensors


def _first(blocks: nn.ModuleList) -> Block:
    block = blocks[0]
    assert isinstance(block, Block)
    return block
