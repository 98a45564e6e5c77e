"""Loads checkpoints for evaluation: frozen, with the data settings of their training."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mam2.engine.checkpoints import checkpoint
from mam2.engine.checkpoints.load import load_encoder, load_model
from mam2.engine.checkpoints.weights import find_weights
from mam2.engine.config.pretrain import ModelConfig, PretrainConfig
from mam2.engine.config.recipe import from_dict
from mam2.engine.config.training import DataConfig
from mam2.engine.errors import UserError
from mam2.engine.model.blocks import Attention
from mam2.engine.model.encoder import Encoder
from mam2.engine.model.mam2 import MAM2
from mam2.engine.model.pixels import pixel_statistics
from mam2.engine.model.videomae import VideoMAE


@dataclass(frozen=True, kw_only=True, eq=False)
class FrozenEncoder:
    """An encoder in evaluation mode, without gradients."""

    name: str
    """The path as the caller passed it."""
    encoder: Encoder
    data: DataConfig
    """Frames, size and sampling of its clips; decoder and threads are chosen for this machine."""
    weights: Path
    """The file that the encoder was loaded from, or another project's folder."""
    digest: str
    """See `digest`."""

    @property
    def depth(self) -> int:
        """Number of the last layer; layers are numbered from 1."""
        return len(self.encoder.blocks)


def load_frozen(
    path: Path,
    device: torch.device,
    *,
    stride: int = 0,
    frames: int | None = None,
    size: int | None = None,
    heads: int | None = None,
) -> FrozenEncoder:
    """Loads the encoder of any path that `load_encoder` reads, in evaluation mode.

    stride: distance of two sampled frames instead of the checkpoint's; 0 keeps the checkpoint's, or `DataConfig`'s
        default if the checkpoint does not describe its clips.
    frames, size, heads: see `load_encoder`.

    Raises UserError if the path cannot be read.
    """
    weights = find_weights(path)  # only once, because a running training may write a newer one at any time
    encoder = load_encoder(weights or path, frames=frames, size=size, heads=heads)
    return FrozenEncoder(
        name=str(path),
        encoder=encoder.to(device).requires_grad_(False),
        data=_clips_of(encoder, weights, stride),
        weights=weights or path,
        digest=digest(encoder),
    )


def load_pretrained(
    path: Path,
    device: torch.device,
    *,
    stride: int = 0,
    frames: int | None = None,
    size: int | None = None,
    heads: int | None = None,
    decoder_heads: int | None = None,
) -> tuple[MAM2 | VideoMAE, PretrainConfig]:
    """Loads the whole model of any path that `load_model` reads, and its config with `data` as in `FrozenEncoder`.

    A checkpoint of another project gets VideoMAE's mask. Raises UserError if there is no decoder.
    """
    weights = find_weights(path)
    model = load_model(weights or path, frames=frames, size=size, heads=heads, decoder_heads=decoder_heads)
    if not isinstance(model, MAM2 | VideoMAE):
        raise UserError(f"{path}: contains no decoder, so it cannot predict; pass a checkpoint of pre-training")
    config = checkpoint.read_config(weights) if weights else _foreign_config(model)
    data = _clips_of(model.encoder, weights, stride)
    return model.to(device).requires_grad_(False), dataclasses.replace(config, data=data)


def _clips_of(encoder: Encoder, weights: Path | None, stride: int) -> DataConfig:
    """Returns an encoder's clip settings, from the checkpoint if it is ours, with decoders chosen for this machine.

    Every video that cannot be decoded is left out and reported, without a limit on their number.
    """
    data = DataConfig()
    if weights:
        written = json.loads(checkpoint.read_metadata(weights)["config"])
        data = from_dict(DataConfig, written["data"], where=f"checkpoint {weights}")
    return clips_for(encoder, data, stride)


def clips_for(encoder: Encoder, data: DataConfig, stride: int = 0) -> DataConfig:
    """Returns `data` for the evaluation of an encoder: clips of its size, one view, without a limit on unusable videos.

    stride: see `load_frozen`.
    """
    tubelet, patch, _ = encoder.patch_size
    data = dataclasses.replace(
        data,
        frames=encoder.grid[0] * tubelet,
        size=encoder.grid[1] * patch,
        channels=encoder.channels,
        decoder="auto",
        threads=0,
        views=1,
        recorded=0,
        max_unusable=1.0,
    )
    return dataclasses.replace(data, stride=stride, fps=0.0, sampling="dense") if stride else data


def _foreign_config(model: MAM2 | VideoMAE) -> PretrainConfig:
    assert isinstance(model, VideoMAE)
    tubelet, patch, _ = model.patch_size
    config = PretrainConfig(model=ModelConfig(objective="videomae", patch=patch, tubelet=tubelet))
    return dataclasses.replace(config, loss=dataclasses.replace(config.loss, pixel_normalize=model.normalize or "none"))


def digest(encoder: Encoder) -> str:
    """Returns the SHA-256 (hexadecimal) of everything that affects an encoder's outputs.

    Weights, positions, sizes, epsilons. Two encoders with the same digest compute the same features, also if they
    were read from different files.
    """
    heads = [module.heads for module in encoder.modules() if isinstance(module, Attention)]
    norms = [module.eps for module in encoder.modules() if isinstance(module, nn.LayerNorm)]
    sizes: list[Any] = [encoder.grid, encoder.patch_size, heads, norms]
    if (encoder.mean, encoder.std) != pixel_statistics(encoder.channels):
        sizes.append([encoder.mean, encoder.std])
    found = hashlib.sha256(json.dumps(sizes).encode())
    for name, tensor in sorted({**encoder.state_dict(), "positions": encoder.positions}.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
