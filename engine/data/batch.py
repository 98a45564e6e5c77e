"""One batch of clips, as a loader returns it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


def channels_first(clip: torch.Tensor) -> torch.Tensor:
    """Returns clips as models and kernels take them: [B, T, H, W, C] -> [B, C, T, H, W], a view."""
    return clip.permute(0, 4, 1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B clips; the views of one decoded clip are adjacent."""

    clip: torch.Tensor
    """uint8 (0 to 255), or float32 (0 to 1) where the files have other values than 8-bit ones or data.value_range is
    set; [B, T, H, W, C], contiguous, on the loader's device; 3 channels of a video are RGB."""
    index: torch.Tensor
    """int64 [B] on the CPU, indices into `manifest.videos`."""
    label: torch.Tensor
    """int64 [B] on the CPU, -1 for a video without a label."""
    augmentation: torch.Tensor
    """int64 [B] on the CPU: the epoch, modulo `data.recorded` if that is set; 0 in evaluation."""
    view: torch.Tensor
    """int64 [B] on the CPU, 0 to views - 1."""
    box: torch.Tensor
    """float32 [B, 4] on the CPU: the crop's x0, y0, x1, y1 as fractions of the upright frame's width and height."""
    flip: torch.Tensor
    """bool [B] on the CPU, whether the crop is mirrored left to right."""
    step: int
    """Number of the batch, from 0."""
    codes: torch.Tensor | None = None
    """Codes from a cache: int64 [B, N] or [B, N, tubelet] on the loader's device; None if the step computes them."""

    @property
    def video(self) -> torch.Tensor:
        """The clips as models and kernels take them: [B, C, T, H, W], a view of `clip`."""
        return channels_first(self.clip)
