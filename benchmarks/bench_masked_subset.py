"""`masked_subset`: half of the masked tokens, evenly over cells; compared with keys drawn by NumPy on the host.

The comparison copies the keys of all tokens to the device and sorts them there, without regard to cells.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from benchmarks.check import Inputs, Operator, bind
from benchmarks.clips import Shape, tubes
from mam2.kernels import costs
from mam2.kernels.host_masks import position_keys
from mam2.kernels.masked_subset import masked_subset


def _count(shape: Shape) -> int:
    return shape.masked // 2


def inputs(shape: Shape, device: torch.device) -> Inputs:
    return {"masked": tubes(shape, device).masked, "step": torch.randint(2**31, (), device=device)}


def smallest(shape: Shape, masked: Tensor, keys: Tensor) -> Tensor:
    """Returns the half of the masked tokens [B,Nm] with the smallest keys [B,N], ascending."""
    kept = keys.gather(1, masked).topk(_count(shape), dim=1, largest=False, sorted=False).indices
    return masked.gather(1, kept.sort(1).values)


def from_the_host(shape: Shape, masked: Tensor, step: Tensor) -> Tensor:
    """Draws for step 0 whatever `step` is, which only the device knows."""
    keys = torch.from_numpy(position_keys(1, 0, shape.batch, shape.tokens, 0).astype(np.int64))
    pinned = keys.pin_memory() if masked.device.type == "cuda" else keys
    return smallest(shape, masked, pinned.to(masked.device, non_blocking=True))


def by_uniform_keys(shape: Shape, masked: Tensor, step: Tensor) -> Tensor:
    return smallest(shape, masked, torch.rand(shape.batch, shape.tokens, device=masked.device))


def subset_error(shape: Shape, outputs: list[Tensor]) -> float:
    """Returns 0 if every clip has the right number of tokens, each once, in order and in range."""
    (found,) = outputs
    if found.shape != (shape.batch, _count(shape)):
        return 1.0
    inside = bool((found >= 0).all() and (found < shape.tokens).all())
    return 0.0 if inside and bool((found.diff(dim=1) > 0).all()) else 1.0


OPERATOR = Operator(
    name="masked_subset",
    inputs=inputs,
    definition=lambda shape: bind(shape, by_uniform_keys),
    providers=lambda shape, device: {
        "ours": lambda masked, step: masked_subset(masked, shape.grid, _count(shape), by_cell=True, seed=1, step=step),
        "eager": bind(shape, from_the_host),
    },
    cost=lambda shape: costs.masked_subset(shape.batch, shape.masked, _count(shape)),
    dtypes=(),
    check=subset_error,
)
