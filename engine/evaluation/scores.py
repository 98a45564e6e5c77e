"""Scores of a model's predictions for masked tokens, compared with an uninformed prediction.

Shapes: B clips, T frames, V codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.data.batch import channels_first
from mam2.engine.model.mam2 import MAM2, masked_codes
from mam2.engine.model.motion_targets import motion_loss
from mam2.engine.model.videomae import VideoMAE
from mam2.engine.tokenizer.tokenizer import Tokenizer, numbered
from mam2.kernels import TubeMask, masked_pixel_loss


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of B clips, on the CPU; None for targets that a model does not predict."""

    right: Tensor | None = None
    """float64 [B]: share of a clip's masked codes that are predicted correctly."""
    histogram: Tensor | None = None
    """int64 [D, V]: number of masked tokens with each code of each of the D codebooks."""
    motion: Tensor | None = None
    """float64 [B, 2]: the motion loss summed over masked tokens, and that of predicting no motion."""
    pixels: Tensor | None = None
    """float64 [B, 2]: the same for the pixel loss, and that of predicting 0, the mean color of standardized patches."""
    latents: Tensor | None = None
    """float64 [B, 2]: the absolute error of the teacher's features, and that of predicting 0, a token's mean."""

    @property
    def code_accuracy(self) -> float | None:
        """Returns the share of correctly predicted masked codes, 0 to 1."""
        return None if self.right is None else float(self.right.mean())

    @property
    def commonest_code(self) -> float | None:
        """Returns the share of the most frequent code among the masked ones: the accuracy of always predicting it.

        With several codebooks, the most frequent one of each.
        """
        return None if self.histogram is None else int(self.histogram.amax(1).sum()) / int(self.histogram.sum())

    @property
    def relative_motion(self) -> float | None:
        """Returns the motion loss divided by that of predicting no motion; None also without any motion."""
        return _relative(self.motion)

    @property
    def relative_pixels(self) -> float | None:
        """Returns the pixel loss divided by that of predicting 0."""
        return _relative(self.pixels)

    @property
    def relative_latents(self) -> float | None:
        """Returns the error of the teacher's features divided by that of predicting 0."""
        return _relative(self.latents)


@torch.no_grad()
def score(
    model: MAM2 | VideoMAE, tokenizer: Tokenizer | None, clip: Tensor, mask: TubeMask, config: PretrainConfig
) -> Scores:
    """Scores a model in evaluation mode. clip: uint8 [B, T, H, W, C]. tokenizer: used only if codes are predicted."""
    video = channels_first(clip)
    if isinstance(model, VideoMAE):
        return Scores(pixels=_pixels(model.predict_pixels(video, mask), video, mask, config))
    latents = model.complete(video, mask)
    right = histogram = motion = pixels = features = None
    if config.needs_codes:
        assert tokenizer is not None
        codes = masked_codes(tokenizer.codes(video), mask)
        right = (model.predict_codes(latents, mask) == codes).double().flatten(1).mean(1).cpu()
        depth, size = config.tokenizer.codes_per_patch, tokenizer.codebook_size
        histogram = numbered(codes, size, depth).bincount(minlength=depth * size).unflatten(0, (depth, size)).cpu()
    elif config.loss.appearance_target == "pixels":
        pixels = _pixels(model.predict_pixels(latents, mask), video, mask, config)
    elif config.loss.appearance_target == "latents":
        targets = model.latent_targets(video)
        targets = targets.gather(1, mask.masked[..., None].expand(-1, -1, targets.shape[2]))
        errors = (model.predict_latents(latents, mask).float() - targets).abs()
        features = _summed(errors.mean(2), targets.abs().mean(2))
    if config.loss.motion_target != "none":
        pred = model.predict_motion(latents, mask)
        losses = (
            motion_loss(one, video, mask, config.loss, config.patch_size, reduction="none")
            for one in (pred, torch.zeros_like(pred))
        )
        motion = _summed(*losses)
    return Scores(right=right, histogram=histogram, motion=motion, pixels=pixels, latents=features)


def joined(parts: Sequence[Scores]) -> Scores:
    """Joins the scores of at least one part; all parts belong to one model."""
    by_clip = {
        name: None if getattr(parts[0], name) is None else torch.cat([getattr(part, name) for part in parts])
        for name in ("right", "motion", "pixels", "latents")
    }
    histograms = [part.histogram for part in parts if part.histogram is not None]
    return Scores(**by_clip, histogram=torch.stack(histograms).sum(0) if histograms else None)


def _pixels(pred: Tensor, video: Tensor, mask: TubeMask, config: PretrainConfig) -> Tensor:
    losses = (
        masked_pixel_loss(
            one,
            video,
            mask,
            patch_size=config.patch_size,
            target="joint" if config.model.objective == "joint" else "pixel",
            normalize=None if config.loss.pixel_normalize == "none" else config.loss.pixel_normalize,
            reduction="none",
        )
        for one in (pred, torch.zeros_like(pred))
    )
    return _summed(*losses)


def _summed(model: Tensor, nothing: Tensor) -> Tensor:
    """Sums two losses of masked tokens [B, Nm] to float64 [B, 2]."""
    return torch.stack([model.double().sum(1), nothing.double().sum(1)], 1).cpu()


def _relative(losses: Tensor | None) -> float | None:
    if losses is None:
        return None
    model, nothing = losses.sum(0).tolist()
    return model / nothing if nothing > 0 else None
