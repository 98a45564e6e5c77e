"""Draws the masks of a run's config, and the masked tokens to predict."""

from __future__ import annotations

from torch import Tensor

from mam2.engine.config.pretrain import PretrainConfig
from mam2.kernels import TubeMask, motion_tube_mask, random_mask, tube_mask
from mam2.kernels.masked_subset import masked_subset

DECODED_STREAM = 1 << 62
"""Added to the seed for the choice of tokens to predict, so that this draw is independent of the mask's."""


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
    masked = masked_subset(
        mask.masked,
        config.grid,
        count,
        by_cell=config.mask.decoded_kind == "cell",
        seed=config.run.seed + DECODED_STREAM,
        step=step,
        first_sample=first_sample,
    )
    return mask._replace(masked=masked)
