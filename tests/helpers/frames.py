"""Frames of toy pictures for tests of tokenizers."""

import torch
from torch import Tensor


def toy_frames(count: int, size: int = 16, seed: int = 0) -> Tensor:
    """[B, size, size, 3] uint8: a disc on a background of another color."""
    generator = torch.Generator().manual_seed(seed)
    ground, color = torch.rand(2, count, 1, 1, 3, generator=generator)
    center = torch.rand(2, count, 1, 1, generator=generator) * 2 - 1
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    inside = ((y - center[0]) ** 2 + (x - center[1]) ** 2 < 0.4)[..., None]
    return (torch.where(inside, color, ground) * 255).to(torch.uint8)
