"""Draws the masks of a run's config."""

from __future__ import annotations

from torch import Tensor

from mam2.engine.config.pretrain import PretrainConfig
from mam2.kernels import TubeMask, motion_tube_mask, random_mask, tube_mask


def draw_mask(video: Tensor, config: PretrainConfig, *, step: int, first_sample: int = 0) -> TubeMask:
    """Draws masks for clips [B, 3, T, H, W] from (run.seed, step, sample), on their device.

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
