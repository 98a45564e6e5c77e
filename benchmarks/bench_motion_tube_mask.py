"""`motion_tube_mask`, compared with the energy of the whole clip in float32 and PyTorch's weighted sampling."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.bench_tube_mask import by_order, mask_error
from benchmarks.check import Operator, bind
from benchmarks.clips import Shape, clip, cubes, pixels
from mam2.kernels import costs, motion_tube_mask

STRENGTH = 0.5


def energies(shape: Shape, video: Tensor) -> Tensor:
    """Returns the sum of squared differences to the next frame per token [B,N]; the last frame adds nothing."""
    change = torch.nn.functional.pad(pixels(video).diff(dim=2), (0, 0, 0, 0, 0, 1))
    return cubes(change.square(), shape.patch).sum((2, 3))


def weights(shape: Shape, video: Tensor) -> Tensor:
    """Returns the sampling weight of every position [B,H'·W']."""
    energy = energies(shape, video).unflatten(1, (shape.grid[0], -1)).sum(1)
    return 1 - STRENGTH + STRENGTH * energy / energy.mean(1, keepdim=True)


def by_multinomial(shape: Shape, video: Tensor) -> tuple[Tensor, Tensor]:
    share = weights(shape, video)
    return by_order(shape, torch.multinomial(share, share.shape[1]))


def by_keys(shape: Shape, video: Tensor) -> tuple[Tensor, Tensor]:
    share = weights(shape, video)
    return by_order(shape, (-torch.rand_like(share).log() / share).argsort(1))


def cost(shape: Shape) -> costs.Cost:
    read = costs.motion_energy(shape.batch, shape.tokens, shape.values)
    drawn = costs.draw_mask(shape.batch, shape.tokens)
    return costs.Cost(read.bytes_moved + drawn.bytes_moved, read.flops + drawn.flops)


OPERATOR = Operator(
    name="motion_tube_mask",
    inputs=lambda shape, device: {"video": clip(shape, device)},
    definition=lambda shape: bind(shape, by_keys),
    providers=lambda shape, device: {
        "ours": lambda video: motion_tube_mask(video, shape.ratio, patch_size=shape.patch, strength=STRENGTH, seed=1),
        "eager": bind(shape, by_multinomial),
    },
    cost=cost,
    dtypes=(),
    check=mask_error,
)
