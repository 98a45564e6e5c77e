"""Measures a MAM2 model's pretext task on unseen clips, and draws its predictions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.data.batch import channels_first
from mam2.engine.data.loader import ClipLoader
from mam2.engine.evaluation.feature_pictures import feature_pictures
from mam2.engine.evaluation.linear_probe import bootstrap
from mam2.engine.evaluation.motion_pictures import motion_pictures
from mam2.engine.evaluation.pixel_pictures import completed_cubes, laid_out, token_cubes
from mam2.engine.evaluation.scores import joined, score
from mam2.engine.model.mam2 import MAM2
from mam2.engine.model.masking import sample_masks
from mam2.engine.model.pixels import unit_pixels
from mam2.engine.runtime.progress import Progress
from mam2.engine.tokenizer.tokenizer import Tokenizer
from mam2.kernels import TubeMask


@dataclass(frozen=True, kw_only=True)
class PretextResult:
    code_accuracy: float
    """Share of the masked tokens' codes that are predicted correctly, 0 to 1."""
    code_interval: tuple[float, float]
    """95 % bootstrap interval over clips."""
    commonest_code: float
    """Share of the most frequent code among the masked tokens: the accuracy of always predicting it."""
    relative_motion: float
    """Motion loss divided by that of predicting no motion; 1: nothing learned, 0: perfect."""
    motion_interval: tuple[float, float]
    """95 % bootstrap interval over clips."""


@torch.no_grad()
def measure_pretext(
    model: MAM2, tokenizer: Tokenizer, loader: ClipLoader, config: PretrainConfig, *, progress: bool = True
) -> PretextResult:
    """Runs the pretext task, including motion, over all videos of a loader, with one clip and one mask per video.

    Raises ValueError for a config without codes or motion as targets.
    """
    if not config.needs_codes or config.loss.motion_target == "none":
        raise ValueError(
            "config: expected a MAM2 that predicts codes and motion, found loss.appearance_target "
            f"{config.loss.appearance_target!r} and loss.motion_target {config.loss.motion_target!r}; "
            "measure a run with both"
        )
    model.eval()
    parts = []
    first = 0
    bar = Progress(loader.evaluate(), "pretext task", loader.evaluated_batches, unit="batch", shown=progress)
    for batch in bar:
        mask = evaluation_mask(batch.clip, config, first)
        first += len(batch.clip)
        parts.append(score(model, tokenizer, batch.clip, mask, config))
    scores = joined(parts)
    assert scores.right is not None
    assert scores.code_accuracy is not None
    assert scores.commonest_code is not None
    assert scores.motion is not None
    model_loss, still_loss = scores.motion.unbind(1)
    return PretextResult(
        code_accuracy=scores.code_accuracy,
        code_interval=bootstrap(scores.right),
        commonest_code=scores.commonest_code,
        relative_motion=float(model_loss.sum() / still_loss.sum()),
        motion_interval=bootstrap(model_loss, still_loss),
    )


def evaluation_mask(clip: Tensor, config: PretrainConfig, first_sample: int = 0) -> TubeMask:
    """Draws evaluation's masks for clips [B, T, H, W, C], from a step number that no training reaches."""
    return sample_masks(channels_first(clip), config, step=2**31 - 1, first_sample=first_sample)


@dataclass(frozen=True, kw_only=True)
class ClipReconstruction:
    """Pictures of clips, float [B, T', H, W, C] in 0 to 1: the first frame of each slot."""

    original: Tensor
    masked: Tensor
    """The original with gray masked patches."""
    appearance: Tensor | None = None
    """The prediction (decoded codes, or pixels) in the masked patches, the original in the visible ones."""
    codes: Tensor | None = None
    """The decoded codes of the original: the best possible prediction of the appearance decoder."""
    features: Tensor | None = None
    """The teacher's features, their three principal components as red, green and blue."""
    predicted_features: Tensor | None = None
    """The predicted features in the masked patches in the same colors, gray elsewhere."""
    motion: Tensor | None = None
    """True difference to the next frame; gray means no motion."""
    predicted_motion: Tensor | None = None
    """Predicted difference in the masked patches, gray elsewhere."""


@torch.no_grad()
def reconstruct(model: MAM2, tokenizer: Tokenizer | None, clip: Tensor, config: PretrainConfig) -> ClipReconstruction:
    """Masks clips uint8 [B, T, H, W, C], completes them, and brings the predictions back to pixels.

    tokenizer: used only if codes are predicted.
    """
    model.eval()
    video, mask = channels_first(clip), evaluation_mask(clip, config)
    latents = model.complete(video, mask)
    frames = unit_pixels(clip[:, :: config.model.tubelet])
    true_codes = appearance = features = predicted_features = motion = predicted_motion = None
    if config.loss.appearance_target == "codes":
        assert tokenizer is not None
        codes, predicted = tokenizer.codes(video), model.predict_codes(latents, mask)
        index = mask.masked if predicted.ndim == 2 else mask.masked[..., None].expand_as(predicted)
        true_codes, appearance = (
            _decoded(tokenizer, one, config) for one in (codes, codes.scatter(1, index, predicted))
        )
    elif config.loss.appearance_target == "pixels":
        completed = completed_cubes(token_cubes(clip, config), mask, model.predict_pixels(latents, mask), config)
        appearance = laid_out(completed[:, :, 0], config).clamp(0, 1)
    elif config.loss.appearance_target == "latents":
        predicted = model.predict_latents(latents, mask)
        features, predicted_features = feature_pictures(model.latent_targets(video), predicted, mask, config)
    if config.loss.motion_target != "none":
        motion, predicted_motion = motion_pictures(video, mask, model.predict_motion(latents, mask), config)
    return ClipReconstruction(
        original=frames,
        masked=hide(frames, mask, config),
        codes=true_codes,
        appearance=appearance,
        features=features,
        predicted_features=predicted_features,
        motion=motion,
        predicted_motion=predicted_motion,
    )


def hide(frames: Tensor, mask: TubeMask, config: PretrainConfig) -> Tensor:
    """Returns the pictures [B, T', H, W, C] with gray masked patches."""
    hidden = rearrange(mask.as_bool(), "b (t h w) -> b t h w 1", t=config.grid[0], h=config.grid[1])
    hidden = hidden.repeat_interleave(config.model.patch, 2).repeat_interleave(config.model.patch, 3)
    return torch.where(hidden, 0.5, frames)


def _decoded(tokenizer: Tokenizer, codes: Tensor, config: PretrainConfig) -> Tensor:
    images = tokenizer.decode(codes)  # [B, T' or T, C, h, w]
    slots, size = config.grid[0], config.data.size
    images = images[:, :: images.shape[1] // slots].flatten(0, 1)
    images = torch.nn.functional.interpolate(images, size=(size, size), mode="bilinear")
    return rearrange(images.clamp(0, 1), "(b t) c h w -> b t h w c", t=slots)
