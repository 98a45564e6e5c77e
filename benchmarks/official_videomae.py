"""Peer of the step benchmark: the model of VideoMAE's own code (github.com/MCG-NJU/VideoMAE), with our weights.

That code is no package: the environment variable MAM2_VIDEOMAE names a clone. Its modules import four names of timm,
of which none takes part in a training step without dropped paths. They are replaced while the modules are imported, so
that timm need not be installed.

Shapes: B clips, T frames, N tokens, Nm masked, P values per token.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.clips import MEAN, STD, cubes, deviation, pick
from mam2.engine.checkpoints.names import to_videomae
from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.errors import UserError
from mam2.engine.model.blocks import LAYER_NORM_EPS
from mam2.engine.model.videomae import VideoMAE

VARIABLE = "MAM2_VIDEOMAE"
MODULE = "modeling_pretrain"
FRAMES = 16
"""Its position table is always for clips of this length."""


def why_not(config: PretrainConfig) -> str | None:
    """Returns why the peer cannot be compared here, or None."""
    if not os.environ.get(VARIABLE):
        return f"{VARIABLE} is not set: name a clone of github.com/MCG-NJU/VideoMAE"
    if config.data.frames != FRAMES:
        return f"VideoMAE's code has positions for {FRAMES} frames, this model for {config.data.frames}"
    return None


def check_clone(folder: str | Path) -> Path:
    """Returns the folder; raises UserError if it holds no code of VideoMAE."""
    if not (Path(folder) / f"{MODULE}.py").is_file():
        raise UserError(
            f"{VARIABLE}={folder}: expected a clone of github.com/MCG-NJU/VideoMAE, found no {MODULE}.py in it; "
            "git clone https://github.com/MCG-NJU/VideoMAE"
        )
    return Path(folder).absolute()


@functools.cache
def load_code(folder: Path) -> types.ModuleType:
    """Imports VideoMAE's module of the pre-training model from a clone."""
    layers = types.ModuleType("timm.models.layers")
    registry = types.ModuleType("timm.models.registry")
    layers.to_2tuple = lambda value: (value, value)  # type: ignore[attr-defined]
    layers.trunc_normal_ = nn.init.trunc_normal_  # type: ignore[attr-defined]
    layers.drop_path = _no_drop_path  # type: ignore[attr-defined]
    registry.register_model = lambda function: function  # type: ignore[attr-defined]
    packages = {name: types.ModuleType(name) for name in ("timm", "timm.models")}
    replaced = packages | {module.__name__: module for module in (layers, registry)}
    with mock.patch.object(sys, "path", [str(folder), *sys.path]):
        before = {name: sys.modules.get(name) for name in replaced}
        sys.modules.update(replaced)
        try:
            return importlib.import_module(MODULE)
        finally:
            for name, module in before.items():
                if module is None:
                    del sys.modules[name]
                else:
                    sys.modules[name] = module


def _no_drop_path(*_: object) -> Tensor:
    raise AssertionError("the benchmark drops no paths")


def build(config: PretrainConfig, ours: VideoMAE) -> nn.Module:
    """Builds VideoMAE's model for a run's config, with a copy of our weights."""
    code = load_code(check_clone(os.environ[VARIABLE]))
    model, decoder = config.model, config.model.decoder
    theirs = code.PretrainVisionTransformer(
        img_size=config.data.size,
        patch_size=model.patch,
        tubelet_size=model.tubelet,
        encoder_embed_dim=model.width,
        encoder_depth=model.depth,
        encoder_num_heads=model.heads,
        decoder_num_classes=ours.decoder.head.out_features,
        decoder_embed_dim=decoder.width,
        decoder_depth=decoder.depth,
        decoder_num_heads=decoder.heads,
        mlp_ratio=model.mlp_ratio,
        qkv_bias=True,
        norm_layer=functools.partial(nn.LayerNorm, eps=LAYER_NORM_EPS),
    )
    theirs.load_state_dict(to_videomae(ours.state_dict(), ours.patch_size))
    return theirs.train()


def pixels(video: Tensor) -> Tensor:
    """Converts as its data pipeline does: [B, 3, T, H, W] uint8 -> float32, normalized, planar in memory."""
    mean, std = (torch.tensor(values, device=video.device).view(3, 1, 1, 1) for values in (MEAN, STD))
    return ((video / 255 - mean) / std).contiguous()


def loss_of(model: nn.Module, patch: tuple[int, int, int]) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns what its training loop computes: normalized clips [B, 3, T, H, W] and a bool mask [B, N] -> the loss.

    As there, the labels of all tokens are computed from the clip without a gradient, then the masked ones are selected.
    """

    def loss(video: Tensor, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            mean, std = (
                torch.as_tensor(values, device=video.device)[None, :, None, None, None] for values in (MEAN, STD)
            )
            tokens = cubes(video * std + mean, patch)
            labels = pick((tokens - tokens.mean(2, keepdim=True)) / deviation(tokens), hidden)
        return F.mse_loss(model(video, hidden), labels)

    return loss
