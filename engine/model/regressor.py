"""The latent regressor: predicts the encoder's latents of masked tokens from the visible ones (after CAE).

Shapes: B clips, Nv visible and Nm masked tokens, D the encoder's width, Dr the regressor's.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mam2.engine.model.blocks import RegressorBlock, Residual, initialize, layer_norm, mask_token, residual_stream


class Regressor(nn.Module):
    """Cross-attention blocks whose queries are initialized with one learned token.

    Args:
        input_width: D. If it differs from `width`, there is a linear projection.
        projection_norm: add a LayerNorm after that projection, as in CAE.
        width, depth, heads, mlp_ratio, layer_scale: sizes of the blocks. With depth 0 nothing is predicted: it passes
            the visible latents and mask tokens to the decoder.
        keys: `all`: each block's keys and values are the visible latents and the current masked states, so that masked
            tokens exchange information; `visible`: only the visible latents, so that each token is predicted
            separately.
        residual: type of the masked states and of the visible latents that the blocks read, see `residual_stream`.
    """

    def __init__(
        self,
        input_width: int,
        *,
        width: int,
        depth: int,
        heads: int,
        keys: Literal["all", "visible"],
        mlp_ratio: float = 4.0,
        layer_scale: float = 0.0,
        projection_norm: bool = False,
        residual: Residual = "float32",
    ) -> None:
        super().__init__()
        self.residual = residual
        if keys not in ("all", "visible"):
            raise ValueError(f"keys: expected 'all' or 'visible', found {keys!r}")
        self.keys = keys
        self.project: nn.Module = nn.Identity()
        if input_width != width:
            linear = nn.Linear(input_width, width)
            self.project = nn.Sequential(linear, layer_norm(width)) if projection_norm else linear
        self.mask_token = mask_token(width)
        self.blocks = nn.ModuleList(RegressorBlock(width, heads, mlp_ratio, layer_scale) for _ in range(depth))
        if depth:
            self.norm = layer_norm(width)
        initialize(self)

    def forward(
        self, visible: Tensor, visible_positions: Tensor, masked_positions: Tensor, *, keep_visible: bool = False
    ) -> Tensor:
        """Predicts the masked latents.

        Args:
            visible: the encoder's latents [B, Nv, D].
            visible_positions, masked_positions: [B, Nv, Dr] and [B, Nm, Dr].
            keep_visible: return the projected visible latents, too.

        Returns:
            [B, Nm, Dr]; with `keep_visible` the projected visible latents and these, [B, Nv + Nm, Dr]; at depth 0 the
            projected visible latents and the mask tokens, [B, Nv + Nm, Dr].
        """
        visible = self.project(visible)
        batch, masked_count, _ = masked_positions.shape
        masked = self.mask_token.expand(batch, masked_count, -1)
        if not self.blocks:
            return torch.cat([visible, masked], dim=1)
        wide = masked_positions.dtype
        masked, seen = (residual_stream(tokens, self.residual) for tokens in (masked, visible))
        context, context_positions = seen, visible_positions
        if self.keys == "all":
            context_positions = torch.cat([visible_positions, masked_positions], dim=1)
        for block in self.blocks:
            if self.keys == "all":
                context = torch.cat([seen, masked], dim=1)
            masked = block(masked, context, masked_positions, context_positions)
        latents = self.norm(masked.to(wide))
        return torch.cat([visible, latents], dim=1) if keep_visible else latents
