"""The pixels of a clip in place of features: what a probe reaches without any encoder.

Shapes: B clips, C channels, T frames, T'×H'×W' the token grid, D gray pixels per token.
"""

from __future__ import annotations

import math
import statistics

import torch
from einops import rearrange
from torch import Tensor, nn

from mam2.engine.model.blocks import VideoTransformer
from mam2.engine.model.encoder import Encoder
from mam2.engine.model.pixels import pixel_statistics


class PixelEncoder(Encoder):
    """Returns the gray pixels of every token, normalized by mean and deviation; it has no weights, and one layer.

    Args:
        grid: tokens along time, height and width (T', H', W').
        patch_size: frames, height and width of a token; their product is D.
        channels: C of the clips; gray is the mean of the channels.
    """

    def __init__(self, grid: tuple[int, int, int], patch_size: tuple[int, int, int], *, channels: int = 3) -> None:
        VideoTransformer.__init__(self)  # without the layers of an encoder
        self.grid = self.trained_grid = grid
        self.patch_size = patch_size
        self.width = math.prod(patch_size)
        self.channels = channels
        self.mean, self.std = pixel_statistics(channels)
        self.blocks = nn.ModuleList([nn.Identity()])
        self.register_buffer("positions", torch.zeros(math.prod(grid), self.width), persistent=False)

    def encode(self, video: Tensor, path_scales: Tensor | None = None) -> Tensor:
        """Returns gray pixels: video [B, C, T, H, W], uint8 or float from 0 to 1 -> float32 [B, T'·H'·W', D]."""
        frames, rows, columns = self.patch_size
        gray = video.float().mean(1) / (1 if video.is_floating_point() else 255)
        # cosines, by which neighbors are found, tell little about values that are all positive
        gray = (gray - statistics.mean(self.mean)) / statistics.mean(self.std)
        return rearrange(gray, "b (t f) (h r) (w c) -> b (t h w) (f r c)", f=frames, r=rows, c=columns)
