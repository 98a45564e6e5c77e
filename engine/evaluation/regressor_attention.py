"""Attention maps of the regressor.

B clips, Nv/Nm visible/masked tokens, M = Nv or Nv + Nm keys, H heads of K values.
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor

from mam2.engine.model.blocks import CrossAttention, RegressorBlock
from mam2.engine.model.mam2 import MAM2
from mam2.kernels import TubeMask


@torch.no_grad()
def regressor_attention(model: MAM2, video: Tensor, mask: TubeMask) -> Tensor:
    """Returns the attention of each masked token to each visible one: video [B, C, T, H, W] -> float32 [B, Nm, Nv].

    softmax(q kᵀ / √K) of the queries and keys of each block, averaged over heads and blocks. A row sums to 1 if the
    keys are only the visible latents, and to less if masked tokens are keys too, which get the rest.

    Raises ValueError for a model without a regressor.
    """
    if not model.regressor.blocks:
        raise ValueError("model: expected a regressor with blocks, found none; without them there is no attention map")
    maps: list[Tensor] = []
    with ExitStack() as hooks:
        for block in model.regressor.blocks:
            assert isinstance(block, RegressorBlock)

            def keep(module: CrossAttention, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
                maps.append(_weights(module, *inputs[:2])[..., : mask.visible.shape[1]])

            hooks.callback(block.attn.register_forward_pre_hook(keep).remove)  # type: ignore[arg-type]
        model.complete(video, mask)
    return torch.stack(maps).mean(0)


def _weights(module: CrossAttention, queries: Tensor, keys: Tensor) -> Tensor:
    """Returns attention weights [B, Nm, M], averaged over heads; it computes one head at a time to save memory."""
    q, k = (x.float().unflatten(-1, (module.heads, -1)) for x in (module.q(queries), module.k(keys)))
    total = q.new_zeros(len(q), q.shape[1], k.shape[1])
    for head in range(module.heads):
        total += (q[:, :, head] @ k[:, :, head].transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
    return total / module.heads
