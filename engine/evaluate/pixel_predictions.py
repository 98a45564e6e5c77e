"""What a model that predicts pixels sees in the hidden patches: VideoMAE and MAE-DFER's joint decoder.

Shapes: B clips, T frames, T'×H'×W' the token grid, N tokens, Nm masked, τ×s×s the pixels of a token, C = 3.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from mam2.engine.config import PretrainConfig
from mam2.engine.evaluate.motion_pictures import motion_picture
from mam2.engine.evaluate.pretext import Strips, evaluation_mask, hide
from mam2.engine.model.videomae import VideoMAE

EPS = 1e-6
"""Of the pixel target's deviation, as `masked_pixel_loss` has it."""


@torch.no_grad()
def reconstruct_pixels(model: VideoMAE, clip: Tensor, config: PretrainConfig) -> Strips:
    """Masks clips uint8 [B, T, H, W, C], predicts them, and brings the predictions back to pixels.

    A prediction is standardised: each hidden cube lends its own mean and deviation, so colour and contrast of a patch
    are given, not predicted.
    """
    video, mask = clip.permute(0, 4, 1, 2, 3), evaluation_mask(clip, config)
    tubelet, side, _ = config.patch_size
    slots, rows, columns = config.grid
    cubes = rearrange(clip.float() / 255, "b (t p) (h q) (w r) c -> b (t h w) p (q r) c", p=tubelet, q=side, r=side)
    mean, deviation = _statistics(cubes, config.loss.pixel_normalize)
    shape = {"p": tubelet, "c": cubes.shape[-1]}
    predicted = rearrange(model.predict_pixels(video, mask).float(), "b n (p q c) -> b n p q c", **shape)
    if config.model.objective == "joint":
        predicted[:, :, 1:] += predicted[:, :, :1]
    completed = cubes.clone()
    index = mask.masked[:, :, None, None, None].expand_as(predicted)
    completed.scatter_(1, index, predicted)
    hidden = mask.as_bool()[:, :, None, None, None]
    completed = torch.where(hidden, completed * deviation + mean, cubes)

    def frames(part: Tensor) -> Tensor:
        """[B, N, s·s, C] -> [B, T', H, W, C]"""
        return rearrange(part, "b (t h w) (q r) c -> b t (h q) (w r) c", t=slots, h=rows, w=columns, q=side, r=side)

    moves = {}
    if tubelet > 1:
        predicted_motion = torch.where(hidden[:, :, 0], completed[:, :, 1] - completed[:, :, 0], 0)
        moves = {
            "motion": motion_picture(frames(cubes[:, :, 1] - cubes[:, :, 0])),
            "predicted_motion": motion_picture(frames(predicted_motion)),
        }
    original = frames(cubes[:, :, 0])
    return Strips(
        original=original,
        masked=hide(original, mask, config),
        appearance=frames(completed[:, :, 0]).clamp(0, 1),
        **moves,
    )


def _statistics(cubes: Tensor, normalize: str) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each cube [B, N, τ, s·s, C] that the pixel target was standardised by."""
    if normalize == "none":
        return cubes.new_zeros(()), cubes.new_ones(())
    over = (2, 3) if normalize == "channel" else (2, 3, 4)
    mean, variance = cubes.mean(over, keepdim=True), cubes.var(over, keepdim=True)
    return mean, variance.sqrt() + EPS if normalize == "channel" else (variance + EPS).sqrt()
