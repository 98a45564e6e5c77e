"""Builds and loads classifiers: from a fine-tuning run's config, with the class names of a checkpoint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from mam2.engine.checkpoints import checkpoint
from mam2.engine.checkpoints.weights import find_weights
from mam2.engine.config.finetune import FinetuneConfig
from mam2.engine.data.manifest import Manifest
from mam2.engine.errors import UserError
from mam2.engine.model.adapters import merge_adapters
from mam2.engine.model.classifier import Classifier, TextHead, in_units, linear_head
from mam2.engine.model.encoder import Encoder
from mam2.engine.model.positions import set_clip_size

CLASSES = "classes"
"""Key of a checkpoint's metadata: the class names as JSON, in the order of the logits."""


def check_labeled(manifest: Manifest, source: str | Path) -> None:
    """Raises UserError for a video without a label."""
    unlabeled = next((video.path for video in manifest.videos if video.label < 0), None)
    if unlabeled is not None:
        raise UserError(
            f"{source}: no label for {unlabeled}; expected one folder per class, or a list of `path label` lines"
        )


def describe_classes(manifest: Manifest) -> str:
    """Returns lines for the log: the number of classes, and a warning if some have no video."""
    count, used = len(manifest.classes), {video.label for video in manifest.videos}
    if len(used) == count:
        return f"classes {count}"
    first = next(name for number, name in enumerate(manifest.classes) if number not in used)
    return (
        f"warning: {count} classes, of which {count - len(used)} have no training video (the first is {first}): are "
        "the labels numbers without gaps?"
    )


def relabeled(manifest: Manifest, source: str | Path, classes: Sequence[str]) -> Manifest:
    """Returns the manifest with its labels numbered as in `classes`.

    Lists and folders number their classes by the names that occur, so that a list that lacks a class numbers the others
    differently. Raises UserError for a video without a label, or with a label that is not in `classes`.
    """
    check_labeled(manifest, source)
    numbers = {name: number for number, name in enumerate(classes)}
    used = sorted({manifest.classes[video.label] for video in manifest.videos})
    unknown = [name for name in used if name not in numbers]
    if unknown:
        raise UserError(
            f"{source}: the class {unknown[0]!r} is not one of the classifier's {len(classes)} classes "
            f"({', '.join(classes[:3])}, …); lists for training and test must use the same class names"
        )
    videos = tuple(
        dataclasses.replace(video, label=numbers[manifest.classes[video.label]]) for video in manifest.videos
    )
    return dataclasses.replace(manifest, videos=videos, classes=tuple(classes))


def is_classifier(path: Path) -> bool:
    """Returns whether a checkpoint of MAM2 was written by `mam2 finetune`."""
    return CLASSES in checkpoint.read_metadata(path)


def build_encoder(config: FinetuneConfig) -> Encoder:
    """Builds a randomly initialized encoder for the clips of `config.data`, on the CPU.

    Its positions are resampled from the clip size of its pre-training.
    """
    model, data = config.model, config.data
    frames, size = model.frames or data.frames, model.size or data.size
    encoder = Encoder(
        (frames // model.tubelet, size // model.patch, size // model.patch),
        config.patch_size,
        width=model.width,
        depth=model.depth,
        heads=model.heads,
        mlp_ratio=model.mlp_ratio,
        layer_scale=model.layer_scale,
        channels=data.channels,
        mean=data.mean,
        std=data.std,
    )
    set_clip_size(encoder, data.frames, data.size)
    return encoder


def build_classifier(config: FinetuneConfig, embeddings: torch.Tensor | None = None) -> Classifier:
    """Builds the randomly initialized classifier of a config, on the CPU.

    embeddings: [V, E] float, the text embeddings of the classes if `config.model.text_width` is E; None uses zeros.
    """
    model = config.model
    head: nn.Module
    if model.text_width:
        if embeddings is None:
            embeddings = torch.zeros(model.classes, model.text_width)
        head = TextHead(model.width, embeddings, temperature=config.head.temperature, frozen=config.head.frozen)
    else:
        head = linear_head(model.width, model.classes)
    return Classifier(build_encoder(config), head, config.head.task)


def load_classifier(path: str | Path) -> tuple[Classifier, FinetuneConfig, tuple[str, ...]]:
    """Returns the classifier of a fine-tuning run, its config and the names of its classes; on the CPU.

    Adapters are merged into the weights. In regression it predicts the value in the units of the labels.

    path: a run folder, a checkpoint folder or a weights file, see `find_weights`. Raises UserError for anything else.
    """
    weights = find_weights(path)
    if weights is None or not is_classifier(weights):
        raise UserError(f"{path}: contains no classifier; expected a run of mam2 finetune, or one of its checkpoints")
    config = checkpoint.read_config(weights, FinetuneConfig)
    classifier = build_classifier(config)
    checkpoint.load_weights(classifier, weights, lambda tensors: merge_adapters(tensors, config.adapters))
    if config.head.task == "regression":
        in_units(classifier, config.model.target_mean, config.model.target_std)
    return classifier, config, tuple(json.loads(checkpoint.read_metadata(weights)[CLASSES]))
