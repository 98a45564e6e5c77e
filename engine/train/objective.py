"""What a step learns: MAM2's two losses behind one regressor, or VideoMAE's pixels. Each fills the gradients.

MAM2's decoders hang on detached copies of the regressor's output. So each decoder's gradient there is at hand:
its norm is logged, and the two can be balanced, before one backward pass runs through regressor and encoder.
With fixed weights the sum is the ordinary gradient of the weighted losses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from mam2.engine.config import LossConfig, PretrainConfig
from mam2.engine.model.mam2 import MAM2
from mam2.engine.model.tokenizer import Tokenizer
from mam2.engine.model.videomae import VideoMAE
from mam2.kernels import TubeMask, masked_frame_difference_loss

Compile = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]


class Objective(Protocol):
    """A model with its losses. `backward` takes a video [B, C, T, H, W] uint8 and its mask."""

    model: Any

    def backward(self, video: Tensor, mask: TubeMask, scale: float) -> dict[str, Tensor]:
        """Adds `scale` times the gradient of the losses to the parameters; returns 0-d tensors on the device."""

    def inspect(self, video: Tensor, mask: TubeMask) -> dict[str, Tensor]:
        """Costlier figures, for the steps that are logged: 0-d tensors on the device."""


def build_objective(
    model: MAM2 | VideoMAE, tokenizer: Tokenizer | None, config: PretrainConfig, compiled: Compile
) -> Objective:
    """The objective that `config.model.objective` names, its parts passed through `compiled`."""
    if isinstance(model, VideoMAE):
        return VideoMAEObjective(model, compiled)
    assert tokenizer is not None
    return MAM2Objective(model, tokenizer, config, compiled)


class VideoMAEObjective:
    def __init__(self, model: VideoMAE, compiled: Compile) -> None:
        self.model = model
        self._loss = compiled(model.loss)

    def backward(self, video: Tensor, mask: TubeMask, scale: float) -> dict[str, Tensor]:
        loss = self._loss(video, mask)
        (loss * scale).backward()
        return {"loss/pixels": loss.detach()}

    def inspect(self, video: Tensor, mask: TubeMask) -> dict[str, Tensor]:
        return {}


class MAM2Objective:
    def __init__(self, model: MAM2, tokenizer: Tokenizer, config: PretrainConfig, compiled: Compile) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._loss: LossConfig = config.loss
        self._motion_options = config.motion_options
        self._complete = compiled(model.complete)
        self._appearance = compiled(model.appearance_loss)
        self._motion = compiled(model.motion_loss)

    def backward(self, video: Tensor, mask: TubeMask, scale: float) -> dict[str, Tensor]:
        codes = self.tokenizer.codes(video)
        weights = self._loss
        latents = self._complete(video, mask)
        for_appearance = latents.detach().requires_grad_()
        for_motion = latents.detach().requires_grad_()
        appearance = self._appearance(for_appearance, mask, codes)
        motion = self._motion(for_motion, mask, video)
        (scale * (weights.appearance * appearance + weights.motion * motion)).backward()
        assert for_appearance.grad is not None
        assert for_motion.grad is not None
        appearance_grad, motion_grad = for_appearance.grad, for_motion.grad
        appearance_norm, motion_norm = appearance_grad.norm().float(), motion_grad.norm().float()
        if weights.balance == "gradient":
            ratio = weights.appearance / weights.motion
            appearance_grad = appearance_grad * (ratio * motion_norm / (appearance_norm + 1e-12)).to(latents.dtype)
        values = {
            "loss/appearance": appearance.detach(),
            "loss/motion": motion.detach(),
            "gradient/appearance": appearance_norm / scale,
            "gradient/motion": motion_norm / scale,
        }
        gradient = appearance_grad + motion_grad
        if weights.alignment:
            for_alignment = latents.detach().requires_grad_()
            alignment = self.model.alignment_loss(for_alignment, mask, video)
            (scale * weights.alignment * alignment).backward()
            assert for_alignment.grad is not None
            gradient = gradient + for_alignment.grad
            values["loss/alignment"] = alignment.detach()
        latents.backward(gradient)
        return values

    @torch.no_grad()
    def inspect(self, video: Tensor, mask: TubeMask) -> dict[str, Tensor]:
        """Share of right codes, that of always answering the batch's commonest code, and the motion loss over that of
        predicting no motion (1: nothing learned)."""
        latents = self.model.complete(video, mask)
        masked_codes = self.tokenizer.codes(video).gather(1, mask.masked)
        right = (self.model.predict_codes(latents, mask) == masked_codes).float().mean()
        commonest = masked_codes.flatten().bincount().max() / masked_codes.numel()
        motion = self.model.predict_motion(latents, mask)
        loss = masked_frame_difference_loss(motion, video, mask, **self._motion_options)
        still = masked_frame_difference_loss(torch.zeros_like(motion), video, mask, **self._motion_options)
        return {
            "accuracy/codes": right,
            "accuracy/commonest_code": commonest,
            "loss/motion_relative": loss / still,
        }
