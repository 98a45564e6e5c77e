"""Draws the masks of a run's config, and the masked tokens to predict."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from mam2.engine.config.pretrain import PretrainConfig
from mam2.kernels import TubeMask, motion_tube_mask, random_mask, tube_mask
from mam2.kernels.host_masks import position_keys

DECODED_STREAM = 1 << 62
"""Added to the seed for the choice of tokens to predict, so that this draw is independent of the mask's."""
CELL = 4
"""Number of patches in a cell of 2×2."""


def sample_masks(video: Tensor, config: PretrainConfig, *, step: int, first_sample: int = 0) -> TubeMask:
    """Draws masks for clips [B, C, T, H, W] from (run.seed, step, sample), on their device.

    first_sample: index of the first clip in the step's batch.
    """
    mask, seed = config.mask, config.run.seed
    if mask.kind == "motion":
        return motion_tube_mask(
            video,
            mask.ratio,
            patch_size=config.patch_size,
            strength=mask.strength,
            seed=seed,
            step=step,
            first_sample=first_sample,
        )
    draw = tube_mask if mask.kind == "tube" else random_mask
    return draw(
        len(video), config.grid, mask.ratio, seed=seed, step=step, first_sample=first_sample, device=video.device
    )


def keep_decoded(mask: TubeMask, config: PretrainConfig, *, step: int, first_sample: int = 0) -> TubeMask:
    """Keeps only the masked tokens to predict, the share `mask.decoded`, ascending.

    They are drawn from (run.seed, step, sample) on the mask's device. The other masked tokens are in neither part of
    the result.
    """
    count = config.decoded_tokens
    if count == mask.masked.shape[1]:
        return mask
    hidden, device = mask.masked, mask.masked.device
    tokens = math.prod(config.grid)
    keys = position_keys(config.run.seed + DECODED_STREAM, first_sample, len(hidden), tokens, step).astype(np.int64)
    # the keys of all tokens, so that the host needs no token numbers; pinned, so that it does not wait for the copy
    every = torch.from_numpy(keys)
    every = every.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else every.to(device)
    order = every.gather(1, hidden)
    if config.mask.decoded_kind == "cell":
        _, rows, columns = config.grid
        sample = torch.arange(first_sample, first_sample + len(hidden), device=device)[:, None]
        slot, row, column = hidden // (rows * columns), hidden // columns % rows, hidden % columns
        # clockwise from the upper left patch, so that neighboring slots choose neighboring patches
        place = torch.where(row % 2 == 0, column % 2, 3 - column % 2)
        order = order + (((place - slot - step - sample) % CELL) << 32)
    kept = order.topk(count, dim=1, largest=False, sorted=False).indices.sort(dim=1).values
    return mask._replace(masked=hidden.gather(1, kept))
