"""A decoder: self-attention over tokens, then a linear head that a fused loss may apply itself.

Shapes: B clips, N tokens, D width.
"""

from __future__ import annotations

from torch import Tensor, nn

from mam2.engine.model.blocks import Block, Residual, initialize, layer_norm, residual_stream


class Decoder(nn.Module):
    """Transformer blocks, LayerNorm and a linear `head` of `outputs` values, which `forward` does not apply.

    `head(features)` is the prediction; a loss that never computes the prediction uses `head.weight` and `head.bias`.
    residual: type of the sum that the blocks add to, see `residual_stream`.
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        outputs: int,
        mlp_ratio: float = 4.0,
        layer_scale: float = 0.0,
        residual: Residual = "float32",
    ) -> None:
        super().__init__()
        self.residual = residual
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, layer_scale) for _ in range(depth))
        self.norm = layer_norm(width)
        self.head = nn.Linear(width, outputs)
        initialize(self)
        # Small initial predictions, as in CAE: otherwise the first hundred steps only reduce them.
        nn.init.trunc_normal_(self.head.weight, std=0.02)

    def forward(self, tokens: Tensor, last: int | None = None) -> Tensor:
        """Maps tokens with positions [B, N, D] to features [B, N, D], or [B, last, D] for the last tokens only."""
        tokens = residual_stream(tokens, self.residual)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens if last is None else tokens[:, -last:])
