"""Predictions of models that only predict pixels: VideoMAE and MAE-DFER's joint decoder.

Shapes: B clips, T frames, H×W pixels, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.data.batch import channels_first
from mam2.engine.evaluation.motion_pictures import motion_picture
from mam2.engine.evaluation.pixel_pictures import completed_cubes, laid_out, token_cubes
from mam2.engine.evaluation.pretext import ClipReconstruction, evaluation_mask, hide
from mam2.engine.model.videomae import VideoMAE


@torch.no_grad()
def reconstruct_pixels(model: VideoMAE, clip: Tensor, config: PretrainConfig) -> ClipReconstruction:
    """Masks clips uint8 [B, T, H, W, C], predicts the masked part, and converts the predictions to pixels."""
    video, mask = channels_first(clip), evaluation_mask(clip, config)
    cubes = token_cubes(clip, config)
    completed = completed_cubes(cubes, mask, model.predict_pixels(video, mask), config)
    moves = {}
    if config.model.tubelet > 1:
        hidden = mask.as_bool()[:, :, None, None]
        predicted_motion = torch.where(hidden, completed[:, :, 1] - completed[:, :, 0], 0)
        moves = {
            "motion": motion_picture(laid_out(cubes[:, :, 1] - cubes[:, :, 0], config)),
            "predicted_motion": motion_picture(laid_out(predicted_motion, config)),
        }
    original = laid_out(cubes[:, :, 0], config)
    return ClipReconstruction(
        original=original,
        masked=hide(original, mask, config),
        appearance=laid_out(completed[:, :, 0], config).clamp(0, 1),
        **moves,
    )
