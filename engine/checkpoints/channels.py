"""Adapts an encoder to the channels of a config: the same number, or one gray channel instead of three colors."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import torch
from torch import nn

from mam2.engine.checkpoints import checkpoint
from mam2.engine.checkpoints.weights import find_weights
from mam2.engine.config.training import DataConfig
from mam2.engine.errors import UserError
from mam2.engine.model.encoder import Encoder
from mam2.engine.model.pixels import gray_embedding, pixel_statistics

GRAY = "start   the patch embedding takes one gray channel: the sum of its weights for red, green and blue"
"""Line for the log."""


def data_for(data: DataConfig, encoder: Encoder, path: str | Path) -> DataConfig:
    """Returns `data` with the value range and normalization of an encoder's training, unless `data` sets its own.

    Raises UserError if the encoder of `path` cannot take clips of `data.channels` channels, or was trained with another
    mean or standard deviation.
    """
    weights = find_weights(path)
    if weights is not None and not data.value_range:
        written = json.loads(checkpoint.read_metadata(weights)["config"])
        data = dataclasses.replace(data, value_range=tuple(written["data"].get("value_range", ())))
    if becomes_gray(data, encoder):
        return data
    if data.channels != encoder.channels:
        raise UserError(
            f"{path}: its encoder takes {encoder.channels} channels, data.channels is {data.channels}; "
            f"set --data.channels {encoder.channels}"
        )
    for name, own, values in (("mean", encoder.mean, data.mean), ("std", encoder.std, data.std)):
        if values and values != own:
            raise UserError(f"{path}: trained with data.{name} {list(own)}, found {list(values)}; omit data.{name}")
    default = (encoder.mean, encoder.std) == pixel_statistics(encoder.channels)
    return data if default else dataclasses.replace(data, mean=encoder.mean, std=encoder.std)


def becomes_gray(data: DataConfig, encoder: Encoder) -> bool:
    """Returns whether an RGB encoder is asked to take gray clips."""
    return data.channels == 1 and encoder.channels == 3


def gray_encoder(encoder: Encoder, data: DataConfig) -> Encoder:
    """Returns a copy of an RGB encoder for gray clips; see `gray_embedding`."""
    gray = copy.deepcopy(encoder)
    gray.channels = 1
    gray.mean, gray.std = pixel_statistics(1, data.mean, data.std)
    old = encoder.patch_embed
    weight, bias = gray_embedding(old.weight, old.bias, (encoder.mean, encoder.std), (gray.mean, gray.std))
    gray.patch_embed = nn.Linear(weight.shape[1], len(weight), device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        gray.patch_embed.weight.copy_(weight)
        gray.patch_embed.bias.copy_(bias)
    return gray
