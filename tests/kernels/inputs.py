"""Random inputs of the operators."""

from __future__ import annotations

import torch

from mam2.kernels import TubeMask


def random_clips(
    dtype: torch.dtype = torch.uint8,
    *,
    batch: int = 2,
    frames: int = 6,
    height: int = 8,
    width: int = 12,
    channels: int = 3,
) -> torch.Tensor:
    """[B, C, T, H, W], a view of [B, T, H, W, C] as from the loader; values 0 to 255, for floats 0 to 1."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (batch, frames, height, width, channels), generator=generator, dtype=torch.uint8)
    return (raw if dtype == torch.uint8 else (raw / 255).to(dtype)).permute(0, 4, 1, 2, 3)


def random_predictions(mask: TubeMask, values: int = 144, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """[B, Nm, values], normally distributed, a leaf that requires a gradient."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*mask.masked.shape, values, generator=generator, dtype=dtype).requires_grad_()
