"""Small models and clips for them, for the tests of VideoMAE and of importing and exporting weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mam2.engine.config.pretrain import DecoderConfig, ModelConfig, PretrainConfig
from mam2.engine.config.training import DataConfig
from mam2.engine.model.classifier import Classifier, linear_head
from mam2.engine.model.encoder import Encoder
from mam2.engine.model.pixels import PIXEL_MEAN, PIXEL_STD

CLASSES = ("walk", "run", "jump")
PATCH = (2, 8, 8)
CONFIG = PretrainConfig(
    data=DataConfig(frames=4, size=24),
    model=ModelConfig(
        objective="videomae",
        patch=8,
        width=48,
        depth=2,
        heads=4,
        mlp_ratio=2,
        decoder=DecoderConfig(depth=2, width=24, heads=3),
    ),
)


def clip(frames: int = 4, size: int = 24) -> Tensor:
    """uint8 [2, 3, T, H, W], a view of [B, T, H, W, 3], as from the loader."""
    generator = torch.Generator().manual_seed(2)
    video = torch.randint(0, 256, (2, frames, size, size, 3), dtype=torch.uint8, generator=generator)
    return video.permute(0, 4, 1, 2, 3)


def normalized(video: Tensor) -> Tensor:
    """[B, 3, T, H, W] uint8 -> [B, T, 3, H, W], normalized as by Hugging Face's processor."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD))
    return (video.transpose(1, 2) / 255 - mean) / std


def shaken(model: nn.Module) -> nn.Module:
    """Changes every parameter: with initial biases of 0 and norms of 1 a lost parameter would not be noticed."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def encoder(**changes: int) -> Encoder:
    torch.manual_seed(0)
    return Encoder((2, 3, 3), PATCH, **{"width": 48, "depth": 2, "heads": 4, "mlp_ratio": 2, **changes})


def classifier() -> Classifier:
    return Classifier(encoder(), linear_head(48, len(CLASSES)))
