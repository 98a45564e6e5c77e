"""Checkpoints as they are evaluated: frozen, with the clips that they were trained on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from mam2.engine.config import DataConfig, ModelConfig, PretrainConfig, UserError
from mam2.engine.interop.load import load_encoder, load_model
from mam2.engine.model.encoder import Encoder
from mam2.engine.model.mam2 import MAM2
from mam2.engine.model.videomae import VideoMAE
from mam2.engine.recipe import from_dict
from mam2.engine.train import checkpoint


@dataclass(frozen=True, kw_only=True, eq=False)
class FrozenEncoder:
    """An encoder in evaluation, without gradients."""

    name: str
    """The path it was loaded from, as it was given."""
    encoder: Encoder
    data: DataConfig
    """Frames, size and sampling of its clips; decoders and threads are those that suit this machine."""
    digest: str
    """SHA-256 of the weights' files, hexadecimal."""

    @property
    def depth(self) -> int:
        """Number of the last layer; layers count from 1."""
        return len(self.encoder.blocks)


def load_frozen(path: Path, device: torch.device, *, stride: int = 0) -> FrozenEncoder:
    """The encoder of whatever `load_encoder` reads, of a run its newest checkpoint.

    stride: distance of two sampled frames instead of the checkpoint's; 0 keeps that, and `DataConfig`'s default where
        the checkpoint says nothing of its clips.

    Raises UserError where it cannot be read.
    """
    encoder = load_encoder(path)
    weights = own_weights(path)
    return FrozenEncoder(
        name=str(path),
        encoder=encoder.to(device).requires_grad_(False),
        data=_clips_of(encoder, weights, stride),
        digest=_digest(weights or path),
    )


def load_pretrained(path: Path, device: torch.device, *, stride: int = 0) -> tuple[MAM2 | VideoMAE, PretrainConfig]:
    """The whole model of whatever `load_model` reads, and its config with `data` as in `FrozenEncoder`.

    A checkpoint of others gets VideoMAE's mask. Raises UserError where there is no decoder.
    """
    model = load_model(path)
    if not isinstance(model, MAM2 | VideoMAE):
        raise UserError(f"{path}: holds no decoder, so it predicts nothing; name a checkpoint of pre-training")
    weights = own_weights(path)
    config = checkpoint.read_config(weights) if weights else _foreign_config(model)
    data = _clips_of(model.encoder, weights, stride)
    return model.to(device).requires_grad_(False), dataclasses.replace(config, data=data)


def own_weights(path: Path) -> Path | None:
    """The weights' file of a run folder (its newest checkpoint), a checkpoint folder or such a file; None of others."""
    folder = checkpoint.newest(path) or path
    file = folder / checkpoint.WEIGHTS if (folder / checkpoint.STATE).is_file() else folder
    if file.suffix != ".safetensors" or not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            return file if "config" in (opened.metadata() or {}) else None
    except (OSError, SafetensorError) as error:
        raise UserError(f"checkpoint {file}: cannot be read: {error}") from None


def _clips_of(encoder: Encoder, weights: Path | None, stride: int) -> DataConfig:
    """The clips an encoder takes, as its checkpoint says if it is ours, with decoders that suit this machine.

    A video that cannot be decoded is left out and named, however many there are.
    """
    tubelet, patch, _ = encoder.patch_size
    data = DataConfig()
    if weights:
        written = json.loads(checkpoint.read_metadata(weights)["config"])
        data = from_dict(DataConfig, written["data"], where=f"checkpoint {weights}")
    data = dataclasses.replace(
        data,
        frames=encoder.grid[0] * tubelet,
        size=encoder.grid[1] * patch,
        front_end="auto",
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


def _digest(path: Path) -> str:
    """SHA-256 over a file, or over the files of a folder and their names."""
    digest = hashlib.sha256()
    for part in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if part.is_file():
            digest.update(part.relative_to(path).as_posix().encode() if part != path else b"")
            with part.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()
