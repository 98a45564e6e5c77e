"""`tube_mask`, compared with VideoMAE's generator, which shuffles each clip's mask with NumPy on the host."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from benchmarks.check import Operator, bind
from benchmarks.clips import Shape
from mam2.kernels import costs, tube_mask


def _hidden(shape: Shape) -> int:
    """Returns the number of masked positions per slot."""
    return shape.masked // shape.grid[0]


def videomae(shape: Shape, step: Tensor) -> tuple[Tensor, Tensor]:
    rng, slot = np.random.default_rng(), np.zeros(shape.grid[1] * shape.grid[2], dtype=bool)
    slot[: _hidden(shape)] = True
    clips = [np.tile(rng.permutation(slot), shape.grid[0]) for _ in range(shape.batch)]
    masked = torch.from_numpy(np.stack(clips)).to(step.device)
    hidden, seen = (choice.nonzero()[:, 1].view(shape.batch, -1) for choice in (masked, ~masked))
    return seen, hidden


def by_order(shape: Shape, order: Tensor) -> tuple[Tensor, Tensor]:
    """Returns visible and masked tokens from positions [B,H'·W'] in the order in which they are masked."""
    offset = torch.arange(shape.grid[0], device=order.device)[:, None] * order.shape[1]
    parts = order[:, _hidden(shape) :], order[:, : _hidden(shape)]
    visible, masked = ((part.sort(1).values[:, None] + offset).flatten(1) for part in parts)
    return visible, masked


def by_sorting(shape: Shape, step: Tensor) -> tuple[Tensor, Tensor]:
    positions = shape.grid[1] * shape.grid[2]
    return by_order(shape, torch.rand(shape.batch, positions, device=step.device).argsort(1))


def mask_error(shape: Shape, outputs: list[Tensor]) -> float:
    """Returns 0 if every clip masks the right number of positions, equal in all slots, each token once and in order."""
    visible, masked = outputs
    everything = torch.arange(shape.tokens, device=masked.device).expand(shape.batch, -1)
    if masked.shape != (shape.batch, shape.masked) or visible.shape != (shape.batch, shape.tokens - shape.masked):
        return 1.0
    slots, positions = shape.grid[0], shape.grid[1] * shape.grid[2]
    by_slot = masked.view(shape.batch, slots, -1) % positions
    whole = torch.equal(torch.cat([visible, masked], 1).sort(1).values, everything)
    ordered = bool((masked.diff(dim=1) > 0).all() and (visible.diff(dim=1) > 0).all())
    return 0.0 if whole and ordered and torch.equal(by_slot, by_slot[:, :1].expand_as(by_slot)) else 1.0


OPERATOR = Operator(
    name="tube_mask",
    inputs=lambda shape, device: {"step": torch.randint(2**31, (), device=device)},
    definition=lambda shape: bind(shape, by_sorting),
    providers=lambda shape, device: {
        "ours": lambda step: tube_mask(shape.batch, shape.grid, shape.ratio, seed=1, step=step),
        "eager": bind(shape, videomae),
    },
    cost=lambda shape: costs.draw_mask(shape.batch, shape.tokens),
    dtypes=(),
    check=mask_error,
)
