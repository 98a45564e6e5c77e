"""The pre-trained video transformer; it runs on any subset of a clip's tokens.

Shapes: B clips, C channels, T frames, N tokens (any subset), P values per token in (t, h, w, c) order, D width.
There is no class token; positions are fixed and looked up by token index, so that masked tokens cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.model.blocks import Block, VideoTransformer, initialize, layer_norm, sincos_positions
from mam2.engine.model.pixels import pixel_statistics
from mam2.engine.model.positions import set_clip_size
from mam2.kernels import gather_tubes

OVERSHOOT = 0.25
"""Distance by which a float clip may exceed 0 to 1: bicubic resizing overshoots by less."""


class Encoder(VideoTransformer):
    """ViT over tubelets: linear patch embedding, fixed sin-cos positions, pre-norm blocks, final LayerNorm.

    Args:
        grid: tokens along time, height and width (T', H', W'); token index is row-major.
        patch_size: frames, height and width of a token.
        width, depth, heads, mlp_ratio, layer_scale: sizes of the blocks.
        channels: C of the clips.
        mean, std: per channel, for pixels from 0 to 1; empty: see `pixel_statistics`.
    """

    positions: Tensor

    def __init__(
        self,
        grid: tuple[int, int, int],
        patch_size: tuple[int, int, int],
        *,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        layer_scale: float = 0.0,
        channels: int = 3,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
    ) -> None:
        super().__init__()
        self.grid = grid
        self.trained_grid = grid
        """Token grid whose sin-cos table the positions are, or are resampled from."""
        self.patch_size = patch_size
        self.width = width
        self.channels = channels
        self.mean, self.std = pixel_statistics(channels, mean, std)
        self.patch_embed = nn.Linear(math.prod(patch_size) * channels, width)
        self.register_buffer("positions", sincos_positions(math.prod(grid), width), persistent=False)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, layer_scale) for _ in range(depth))
        self.norm = layer_norm(width)
        initialize(self)

    @classmethod
    def from_config(cls, cfg: PretrainConfig) -> Encoder:
        model = cfg.model
        encoder = cls(
            cfg.trained_grid,
            cfg.patch_size,
            width=model.width,
            depth=model.depth,
            heads=model.heads,
            mlp_ratio=model.mlp_ratio,
            layer_scale=model.layer_scale,
            channels=cfg.data.channels,
            mean=cfg.data.mean,
            std=cfg.data.std,
        )
        set_clip_size(encoder, cfg.data.frames, cfg.data.size)
        return encoder

    def forward(self, tokens: Tensor, index: Tensor | None = None, path_scales: Tensor | None = None) -> Tensor:
        """Maps normalized tokens [B, N, P] with their indices [B, N] int64 to [B, N, D].

        path_scales: [depth, 2, B], see `Block`; None changes no branch. For clips see `encode`.
        """
        if index is None:
            raise ValueError(
                f"index: expected the index of each token besides tokens [B, N, P], found only {tuple(tokens.shape)}; "
                "for a clip [B, C, T, H, W] call encoder.encode(video)"
            )
        tokens = self.patch_embed(tokens) + self.positions[index]
        for number, block in enumerate(self.blocks):
            tokens = block(tokens) if path_scales is None else block(tokens, path_scales[number])
        return self.norm(tokens)

    def tokens(self, video: Tensor, index: Tensor) -> Tensor:
        """Returns the normalized pixels of the tokens at `index` [B, N].

        [B, N, P] in the compute dtype of the first layer. video: [B, C, T, H, W], uint8 (0 to 255) or float (0 to 1),
        any strides.
        """
        expected = (self.channels, *(tokens * size for tokens, size in zip(self.grid, self.patch_size, strict=True)))
        if video.ndim != 5 or video.shape[1:] != expected:
            raise ValueError(
                f"video: expected [B, {', '.join(map(str, expected))}], found {tuple(video.shape)}; "
                "crop or resize clips to the model's size"
            )
        device = video.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else self.patch_embed.weight.dtype
        return gather_tubes(video, index, patch_size=self.patch_size, mean=self.mean, std=self.std, dtype=dtype)

    def encode(self, video: Tensor, path_scales: Tensor | None = None) -> Tensor:
        """Encodes every token of a clip, without a mask: video [B, C, T, H, W] -> [B, T'·H'·W', D].

        video: uint8 (0 to 255) or float (0 to 1, not normalized: the encoder normalizes it), any strides.

        Raises ValueError for other sizes and, in evaluation mode, for a float clip outside of this range.
        """
        if not self.training and not torch.compiler.is_compiling() and video.is_floating_point():
            _check_range(video)
        index = torch.arange(len(self.positions), device=video.device).expand(len(video), -1)
        return self(self.tokens(video, index), index, path_scales)


def _check_range(video: Tensor) -> None:
    """Raises ValueError for a float clip far outside 0 to 1 (bytes, or normalized values), or not finite."""
    low, high = (bound.item() for bound in video.detach().aminmax())
    if not (low >= -OVERSHOOT and high <= 1 + OVERSHOOT):  # also true for NaN
        raise ValueError(
            f"video: expected floats from 0 to 1, found {low:.4g} to {high:.4g}; divide bytes by 255 (or pass uint8), "
            "omit the normalization by mean and deviation, which the encoder does itself, and replace values that "
            "are not finite"
        )
