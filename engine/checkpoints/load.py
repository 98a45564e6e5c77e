"""Loads models from files: runs and checkpoints of MAM2, VideoMAE, VideoMAE v2 and Hugging Face."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from pathlib import Path
from typing import TypeVar

from safetensors import safe_open

from mam2.engine.checkpoints import checkpoint
from mam2.engine.checkpoints.classifiers import CLASSES, is_classifier, load_classifier
from mam2.engine.checkpoints.foreign import Weights, hugging_face_classes, read_hugging_face, read_videomae
from mam2.engine.checkpoints.foreign_models import foreign_encoder, foreign_model
from mam2.engine.checkpoints.hub import local_path
from mam2.engine.checkpoints.weights import find_weights
from mam2.engine.config.finetune import FinetuneConfig
from mam2.engine.config.training import DataConfig
from mam2.engine.errors import UserError
from mam2.engine.model.build import build_model
from mam2.engine.model.classifier import Classifier
from mam2.engine.model.encoder import Encoder
from mam2.engine.model.mam2 import MAM2
from mam2.engine.model.positions import Positions, set_clip_size
from mam2.engine.model.videomae import VideoMAE

Model = MAM2 | VideoMAE | Classifier | Encoder
ModelKind = TypeVar("ModelKind", MAM2, VideoMAE, Classifier, Encoder, Model)
FRAMES, SIZE = 16, 224
"""Clips of a file that does not describe them: those of nearly all models that VideoMAE published."""
MOST_TOKENS = 2**20
"""Maximum tokens of a clip; a million positions of a ViT-B take 3 GB."""


def load_encoder(
    path: str | Path,
    *,
    frames: int | None = None,
    size: int | None = None,
    heads: int | None = None,
    positions: Positions = "resample",
) -> Encoder:
    """Loads a pre-trained or fine-tuned encoder, on the CPU, in evaluation mode.

        encoder = load_encoder("runs/first")
        features = encoder.encode(video).mean(1)   # video [B, C, T, H, W] uint8 -> [B, D]

    Args:
        path: a MAM2 run or checkpoint; a checkpoint of VideoMAE or VideoMAE v2 (.pth, read without executing code in
            it); a Hugging Face folder of VideoMAEModel, VideoMAEForPreTraining or VideoMAEForVideoClassification; or
            `hub:OWNER/NAME`, a repository of such a folder or of a MAM2 checkpoint (see hub.py).
        frames, size: size of the clips that the encoder will read. If the file states another one, the positions are
            resampled. A file that states none (a .pth without arguments) is assumed to have been trained on this one;
            if it is not passed either, on 16 frames of 224², and a warning is logged.
        heads: attention heads, for a checkpoint of VideoMAE's code whose width was never published.
        positions: how positions are adapted to another size, see `mam2.engine.model.positions`.

    Returns:
        The encoder; `encode` returns [B, N, D]. For a classifier, these are the outputs of its blocks, as in Hugging
        Face's VideoMAEModel with `use_mean_pooling`; otherwise the encoder's LayerNorm has been applied.

    Raises:
        UserError: the path cannot be read, or tensors are missing, unknown or of another shape; the error names them.
    """
    own = find_weights(path)
    if own is not None:
        encoder = _own(own).encoder
    else:
        weights = _read(local_path(path), frames, size)
        encoder = foreign_encoder(weights, heads)
    return _resized(path, encoder, frames, size, positions).eval()


def load_model(
    path: str | Path,
    *,
    frames: int | None = None,
    size: int | None = None,
    heads: int | None = None,
    decoder_heads: int | None = None,
) -> Model:
    """Loads the complete model of a file, on the CPU, in evaluation mode.

        probabilities = load_model("videomae-base-finetuned-kinetics")(video).softmax(-1)

    Args:
        path: as in `load_encoder`.
        frames, size: as in `load_encoder`; a model with a decoder accepts only the clip size of its training.
        heads, decoder_heads: as in `load_encoder`, for the encoder and for VideoMAE's decoder.

    Returns:
        A `Classifier` if the file has a head, `VideoMAE` if it has its decoder, `MAM2` for a run of MAM2, else an
        `Encoder`.

    Raises:
        UserError: as in `load_encoder`.
    """
    own = find_weights(path)
    model: Model = (
        _own(own) if own is not None else foreign_model(_read(local_path(path), frames, size), heads, decoder_heads)
    )
    _resized(path, model, frames, size)
    return model.eval()


def load_any_classifier(
    path: str | Path, *, frames: int | None = None, size: int | None = None, heads: int | None = None
) -> tuple[Classifier, FinetuneConfig, tuple[str, ...]]:
    """Loads a classifier of any kind that `load_model` reads, on the CPU, in evaluation mode.

    Args:
        path, frames, size, heads: as in `load_encoder`.

    Returns:
        The classifier; a config whose `data` and `test` describe its clips and views (for another project: the clips
        that the file states, and VideoMAE's views); and the names of its classes in the order of the logits, empty if
        unknown.

    Raises:
        UserError: as in `load_encoder`, or the file contains no classifier.
    """
    own = find_weights(path)
    if own is not None:
        if not is_classifier(own):
            raise UserError(
                f"{path}: contains no classifier; expected a run of mam2 finetune, or one of its checkpoints"
            )
        model, config, classes = load_classifier(own)
    else:
        weights = _read(local_path(path), frames, size)
        found = foreign_model(weights, heads, None) if "head.weight" in weights.tensors else None
        if not isinstance(found, Classifier):
            raise UserError(f"{path}: contains no classifier (no head), only an encoder; fine-tune it first")
        model, classes = found, weights.classes
        if classes and len(classes) != len(weights.tensors["head.weight"]):
            raise UserError(f"{path}: names {len(classes)} classes for a head of {len(weights.tensors['head.weight'])}")
        data = DataConfig(
            stride=weights.stride or DataConfig().stride, sampling="uniform" if weights.uniform else "dense"
        )
        config = FinetuneConfig(data=data)
    _resized(path, model, frames, size)
    (slots, rows, _), (tubelet, patch, _) = model.encoder.grid, model.encoder.patch_size
    data = dataclasses.replace(config.data, frames=slots * tubelet, size=rows * patch, channels=model.encoder.channels)
    return model.eval(), dataclasses.replace(config, data=data), classes


def encoder_of(model: Model) -> Encoder:
    """Returns the encoder of any model."""
    return model if isinstance(model, Encoder) else model.encoder


def class_names(path: str | Path) -> tuple[str, ...]:
    """Returns the names of a classifier's classes, in order; empty if the file has none."""
    path = local_path(path)
    own = find_weights(path)
    if own is not None:
        return tuple(json.loads(checkpoint.read_metadata(own).get(CLASSES, "[]")))
    return hugging_face_classes(path) if path.is_dir() else read_videomae(path).classes


def _read(path: Path, frames: int | None, size: int | None) -> Weights:
    """Reads another project's weights and sets their clip size: the file's, the caller's, or VideoMAE's usual one."""
    weights = read_hugging_face(path) if path.is_dir() else read_videomae(path)
    unknown = [
        name
        for name, said, given in (("frames", weights.frames, frames), ("size", weights.size, size))
        if said is None and given is None
    ]
    if unknown:
        logging.getLogger("mam2").warning(
            "%s: does not state the %s of its clips; %d frames of %d² are assumed; if that is wrong, pass %s",
            path,
            " and the ".join(unknown),
            FRAMES if "frames" in unknown else weights.frames or frames,
            SIZE if "size" in unknown else weights.size or size,
            ", ".join(f"--{name} or {name}=" for name in unknown),
        )
    own_frames = next(value for value in (weights.frames, frames, FRAMES) if value is not None)
    own_size = next(value for value in (weights.size, size, SIZE) if value is not None)
    weights = dataclasses.replace(weights, frames=own_frames, size=own_size)
    if min(own_frames, own_size) < 1:
        raise UserError(f"{path}: expected at least 1 frame of 1 pixel, found frames {frames}, size {size}")
    tokens = own_frames * own_size**2 // math.prod(weights.patch_size)
    if tokens > MOST_TOKENS:
        raise UserError(
            f"{path}: {weights.frames} frames of {weights.size}² with a patch of {weights.patch_size} would be "
            f"{tokens} tokens per clip; expected at most {MOST_TOKENS}. Correct the file's num_frames and image size"
        )
    return weights


def _resized(
    path: str | Path, model: ModelKind, frames: int | None, size: int | None, positions: Positions = "resample"
) -> ModelKind:
    """Adapts the model to clips of another size, in place; None keeps its frames or size."""
    encoder = encoder_of(model)
    own_frames, own_size, _ = (tokens * side for tokens, side in zip(encoder.grid, encoder.patch_size, strict=True))
    frames, size = own_frames if frames is None else frames, own_size if size is None else size
    if isinstance(model, MAM2 | VideoMAE) and (frames, size) != (own_frames, own_size):
        raise UserError(
            f"{path}: its decoder predicts clips of {own_frames} frames of {own_size}², not {frames} of {size}²; "
            "omit frames and size"
        )
    try:
        set_clip_size(encoder, frames, size, positions)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return model


def _own(file: Path) -> MAM2 | VideoMAE | Classifier:
    if is_classifier(file):
        return load_classifier(file)[0]
    config = checkpoint.read_config(file)
    codebook_size = 0
    if config.needs_codes:
        with safe_open(file, framework="pt") as tensors:
            rows = tensors.get_slice("appearance_decoder.head.weight").get_shape()[0]
        codebook_size = rows // math.prod(config.code_shape)
    model = build_model(config, codebook_size)
    checkpoint.load_weights(model, file)
    return model
