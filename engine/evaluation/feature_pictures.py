"""Draws features of tokens as colors: their three principal components as red, green and blue.

Shapes: B clips, T'×H'×W' = N tokens, Nm masked, D width.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from mam2.engine.config.pretrain import PretrainConfig
from mam2.kernels import TubeMask

REACH = 2.0
"""Standard deviations of a component from black to gray, and from gray to full color."""


def feature_pictures(
    features: Tensor, predicted: Tensor, mask: TubeMask, config: PretrainConfig
) -> tuple[Tensor, Tensor]:
    """Returns pictures of true features [B, N, D] and of predicted ones [B, Nm, D]: float [B, T', H, W, 3], 0 to 1.

    The components are those of the true features of all B clips. The second picture is gray where nothing is predicted.
    """
    true = features.flatten(0, 1).double().cpu()
    mean = true.mean(0)
    axes = torch.linalg.svd(true - mean, full_matrices=False).Vh[:3]
    axes = axes * torch.where(axes.sum(1) < 0, -1, 1)[:, None]  # the decomposition leaves the sign open
    scale = REACH * ((true - mean) @ axes.T).square().mean(0).sqrt().clamp(min=1e-12)

    def colors(tokens: Tensor) -> Tensor:
        shares = (tokens.double().cpu() - mean) @ axes.T / scale
        return (0.5 + 0.5 * shares).clamp(0, 1).float().to(tokens.device)

    gray = torch.full_like(colors(features), 0.5)
    index = mask.masked[..., None].expand(-1, -1, 3)
    return _laid_out(colors(features), config), _laid_out(gray.scatter(1, index, colors(predicted)), config)


def _laid_out(colors: Tensor, config: PretrainConfig) -> Tensor:
    """Draws a square per token: [B, N, 3] -> [B, T', H, W, 3]."""
    slots, rows, _ = config.grid
    pictures = rearrange(colors, "b (t h w) c -> b t h w c", t=slots, h=rows)
    return pictures.repeat_interleave(config.model.patch, 2).repeat_interleave(config.model.patch, 3)
