"""How well a MAM2 model solves its own task on clips it has not seen, and what its predictions look like."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from mam2.engine.config import PretrainConfig
from mam2.engine.data.loader import ClipLoader
from mam2.engine.evaluate.probe import bootstrap
from mam2.engine.model.mam2 import MAM2
from mam2.engine.model.tokenizer import Tokenizer
from mam2.kernels import TubeMask, frame_difference, masked_frame_difference_loss, tube_mask


@dataclass(frozen=True, kw_only=True)
class PretextResult:
    code_accuracy: float
    """Share of hidden tokens whose code is the likeliest one, 0 to 1."""
    code_interval: tuple[float, float]
    """95 % bootstrap interval over clips."""
    commonest_code: float
    """Share of hidden tokens that carry the commonest code: the accuracy of always answering it."""
    relative_motion: float
    """Motion loss over that of predicting no motion; 1 means nothing learned, 0 perfect."""
    motion_interval: tuple[float, float]
    """95 % bootstrap interval over clips."""


@torch.no_grad()
def measure_pretext(
    model: MAM2, tokenizer: Tokenizer, loader: ClipLoader, config: PretrainConfig, *, progress: bool = True
) -> PretextResult:
    """Runs the pretext task over all videos of a loader, one clip and one mask each."""
    model.eval()
    right, moved, still, histogram = [], [], [], torch.zeros(tokenizer.codebook_size)
    first = 0
    for batch in tqdm(loader.evaluate(), desc="pretext task", unit="batch", disable=None if progress else True):
        video, mask = batch.clip.permute(0, 4, 1, 2, 3), evaluation_mask(batch.clip, config, first)
        first += len(video)
        latents = model.complete(video, mask)
        codes = tokenizer.codes(video).gather(1, mask.masked)
        right.append((model.predict_codes(latents, mask) == codes).double().mean(1).cpu())
        histogram += codes.flatten().bincount(minlength=len(histogram)).cpu()
        motion = model.predict_motion(latents, mask)
        moved.append(_motion_loss(motion, video, mask, config))
        still.append(_motion_loss(torch.zeros_like(motion), video, mask, config))
    accuracy, model_loss, still_loss = torch.cat(right), torch.cat(moved), torch.cat(still)
    return PretextResult(
        code_accuracy=float(accuracy.mean()),
        code_interval=bootstrap(accuracy),
        commonest_code=float(histogram.max() / histogram.sum()),
        relative_motion=float(model_loss.sum() / still_loss.sum()),
        motion_interval=bootstrap(model_loss, still_loss),
    )


def evaluation_mask(clip: Tensor, config: PretrainConfig, first_sample: int = 0) -> TubeMask:
    """The masks that evaluation uses for clips [B, ...]: of a step that no training reaches."""
    return tube_mask(
        len(clip),
        config.grid,
        config.mask.ratio,
        seed=config.run.seed,
        step=2**31 - 1,
        first_sample=first_sample,
        device=clip.device,
    )


def _motion_loss(pred: Tensor, video: Tensor, mask: TubeMask, config: PretrainConfig) -> Tensor:
    """Summed squared error of each clip, float64 [B] on the CPU."""
    loss = masked_frame_difference_loss(pred, video, mask, **config.motion_options, reduction="none")
    return loss.double().sum(1).cpu()


@dataclass(frozen=True, kw_only=True)
class Strips:
    """What a person looks at, each [B, T', h, w, 3] float in 0 to 1; a slot is shown by its first frame."""

    original: Tensor
    masked: Tensor
    """The original with hidden patches grey."""
    codes: Tensor
    """The original's codes decoded: the best the appearance decoder could do."""
    appearance: Tensor
    """Predicted codes decoded, visible patches kept from the original's codes."""
    motion: Tensor
    """True difference to the next frame, grey for none."""
    predicted_motion: Tensor
    """Predicted difference in the hidden patches, grey elsewhere."""


@torch.no_grad()
def reconstruct(model: MAM2, tokenizer: Tokenizer, clip: Tensor, config: PretrainConfig) -> Strips:
    """Masks clips uint8 [B, T, H, W, C], completes them, and brings the predictions back to pixels."""
    model.eval()
    video, mask = clip.permute(0, 4, 1, 2, 3), evaluation_mask(clip, config)
    latents = model.complete(video, mask)
    codes = tokenizer.codes(video)
    predicted = codes.scatter(1, mask.masked, model.predict_codes(latents, mask))
    frames = clip[:, :: config.model.tubelet].float() / 255
    height = frames.shape[2]

    hidden = rearrange(mask.as_bool(), "b (t h w) -> b t h w 1", t=config.grid[0], h=config.grid[1])
    hidden = hidden.repeat_interleave(config.model.patch, 2).repeat_interleave(config.model.patch, 3)

    # A normalised prediction is brought back with its own cube's deviation: the ratio of raw to normalised target.
    raw = frame_difference(video, **(config.motion_options | {"normalize": None}))
    target = frame_difference(video, **config.motion_options)
    prediction = torch.zeros_like(target)
    prediction.scatter_(
        1, mask.masked[..., None].expand(-1, -1, target.shape[2]), model.predict_motion(latents, mask).float()
    )
    scale = _cube_scale(raw, target, config)
    return Strips(
        original=frames,
        masked=torch.where(hidden, 0.5, frames),
        codes=_decoded(tokenizer, codes, height),
        appearance=_decoded(tokenizer, predicted, height),
        motion=_motion_picture(raw, config),
        predicted_motion=_motion_picture(prediction * scale, config),
    )


def _cube_scale(raw: Tensor, target: Tensor, config: PretrainConfig) -> Tensor:
    """Deviation of each token's cube and channel, from the target in both forms: [B, N, Pd]; 0 where nothing moves."""
    patch = config.model.patch
    split = "b n (t h w c) -> b n (t h w) c"
    raw, target = (rearrange(x, split, h=patch, w=patch, c=3) for x in (raw, target))
    ratio = (raw * target).sum(2, keepdim=True) / target.square().sum(2, keepdim=True).clamp_min(1e-12)
    return rearrange(ratio.expand_as(raw), "b n p c -> b n (p c)")


def _decoded(tokenizer: Tokenizer, codes: Tensor, height: int) -> Tensor:
    images = tokenizer.decode(codes)  # [B, T', 3, h, w]
    slots = images.shape[1]
    images = torch.nn.functional.interpolate(images.flatten(0, 1), size=(height, height), mode="bilinear")
    return rearrange(images.clamp(0, 1), "(b t) c h w -> b t h w c", t=slots)


def _motion_picture(difference: Tensor, config: PretrainConfig) -> Tensor:
    """First difference of every tubelet of [B, N, Pd] as pictures around grey, contrast doubled."""
    slots, rows, columns = config.grid
    pictures = rearrange(
        difference,
        "b (s i j) (t h w c) -> b s t (i h) (j w) c",
        s=slots,
        i=rows,
        j=columns,
        h=config.model.patch,
        w=config.model.patch,
        c=3,
    )[:, :, 0]
    return (0.5 + 2 * pictures).clamp(0, 1)
