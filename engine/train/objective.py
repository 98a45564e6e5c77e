"""The objective of a step: MAM2's losses on the same latents, or VideoMAE's pixel loss.

MAM2's latents are passed to each loss through a fork. In backward this node receives each loss's gradient, records its
norm, optionally rescales one to a fixed proportion, and returns the sum. With fixed weights that is the ordinary
gradient of the weighted losses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mam2.engine.config.pretrain import LossConfig, PretrainConfig
from mam2.engine.model.mam2 import MAM2, masked_codes
from mam2.engine.model.motion_targets import motion_loss
from mam2.engine.model.teacher import rank_and_deviation
from mam2.engine.model.videomae import VideoMAE
from mam2.engine.runtime.cuda import Values
from mam2.engine.tokenizer.tokenizer import numbered
from mam2.kernels import TubeMask

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]

INSPECTED_CLIPS = 8
"""Clips per pass for the log's costlier figures: the logits of all clips would take gigabytes."""


class Objective(nn.Module):
    """A model with its losses.

    Call it with a video [B, C, T, H, W] uint8, its mask and its codes int64 [B, N] or [B, N, F] (None if the objective
    needs none). It returns the weighted loss for backpropagation, and 0-d tensors of each loss and, with `inspect`,
    costlier figures. Everything happens in one call, so that FSDP2 has gathered the weights.
    """

    def gradient_norms(self) -> Values:
        """Returns the norms recorded in the last backward pass, over all ranks: 0-d tensors on the device."""
        return {}

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within it, backward passes exchange nothing with other ranks."""
        yield


def build_objective(model: MAM2 | VideoMAE, config: PretrainConfig, compiled: Compile) -> Objective:
    """Builds the objective `config.model.objective`; its parts are passed through `compiled`."""
    if isinstance(model, VideoMAE):
        return VideoMAEObjective(model, compiled)
    return MAM2Objective(model, config, compiled)


class VideoMAEObjective(Objective):
    def __init__(self, model: VideoMAE, compiled: Compile) -> None:
        super().__init__()
        self.model = model
        self._loss = compiled(model.loss)

    def forward(
        self, video: Tensor, mask: TubeMask, codes: Tensor | None = None, *, inspect: bool = False
    ) -> tuple[Tensor, Values, Values]:
        loss = self._loss(video, mask)
        return loss, {"loss/pixels": loss.detach()}, {}


class MAM2Objective(Objective):
    def __init__(self, model: MAM2, config: PretrainConfig, compiled: Compile) -> None:
        super().__init__()
        self.model = model
        self._loss: LossConfig = config.loss
        self._codebooks = config.tokenizer.codes_per_patch
        self._complete = compiled(model.complete)
        self._appearance = compiled(model.appearance_loss)
        self._pixels = compiled(model.pixel_loss)
        self._targets = compiled(model.latent_targets)
        self._latents = compiled(model.latent_loss)
        self._motion = compiled(model.motion_loss)
        self._alignment = compiled(model.alignment_loss)
        # on a CPU, a few clips every few steps do not justify a compilation
        on_gpu = next(model.parameters()).device.type != "cpu"
        self._figures = compiled(self._inspect) if on_gpu else self._inspect_uncompiled
        balanced = config.loss.balance == "gradient"
        self._balance = Balance(config.loss.appearance / config.loss.motion if balanced else None)

    def forward(
        self,
        video: Tensor,
        mask: TubeMask,
        codes: Tensor | None,
        motion_share: Tensor | None = None,
        *,
        inspect: bool = False,
    ) -> tuple[Tensor, Values, Values]:
        """motion_share: factor of the motion loss, float32 0-d; see `PretrainStep.weighted`."""
        weights = self._loss
        latents = self._complete(video, mask)
        for_appearance, for_motion, for_alignment = cast(
            tuple[Tensor, Tensor, Tensor], _Fork.apply(latents, self._balance)
        )
        losses: Values = {}
        if weights.appearance_target == "codes":
            assert codes is not None
            losses["appearance"] = self._appearance(for_appearance, mask, codes)
        elif weights.appearance_target == "pixels":
            losses["appearance"] = self._pixels(for_appearance, mask, video)
        elif weights.appearance_target == "latents":
            losses["appearance"] = self._latents(for_appearance, mask, self._targets(video))
        if weights.motion_target != "none":
            motion = self._motion(for_motion, mask, video)
            losses["motion"] = motion if motion_share is None else motion * motion_share
        if weights.alignment:
            losses["alignment"] = self._alignment(for_alignment, mask, video)
        total = functools.reduce(torch.add, [getattr(weights, name) * loss for name, loss in losses.items()])
        values = {f"loss/{name}": loss.detach() for name, loss in losses.items()}
        if not inspect:
            return total, values, {}
        some = slice(INSPECTED_CLIPS)
        with torch.no_grad():
            shown = TubeMask(mask.visible[some], mask.masked[some])
            return total, values, self._figures(video[some], shown, None if codes is None else codes[some])

    @contextmanager
    def alone(self) -> Iterator[None]:
        ranks, self._balance.ranks = self._balance.ranks, None
        try:
            yield
        finally:
            self._balance.ranks = ranks

    def gradient_norms(self) -> Values:
        """Returns the norms of the weighted losses' gradients at the decoders' common input."""
        return {f"gradient/{name}": norm for name, norm in self._balance.norms.items()}

    def _inspect_uncompiled(self, video: Tensor, mask: TubeMask, codes: Tensor | None) -> Values:
        with torch.compiler.set_stance("force_eager"):  # also of blocks that are compiled one by one
            return self._inspect(video, mask, codes)

    def _inspect(self, video: Tensor, mask: TubeMask, codes: Tensor | None) -> Values:
        """Returns figures of each existing target.

        These are the share of correct codes, that of always predicting the clips' most frequent code, effective rank
        and mean standard deviation of the teacher's features (see `rank_and_deviation`), and the motion loss divided by
        that of predicting no motion (1: nothing learned).
        """
        latents = self.model.complete(video, mask)
        figures = {}
        if self._loss.appearance_target == "latents":
            figures["teacher/rank"], figures["teacher/deviation"] = rank_and_deviation(self.model.latent_targets(video))
        if self._loss.appearance_target == "codes":
            assert codes is not None
            answers = masked_codes(codes, mask)
            right = (self.model.predict_codes(latents, mask) == answers).float().mean()
            answers = numbered(answers, self.model.codebook_size, self._codebooks)
            # bincount would wait for the device to determine its size
            counts = answers.new_zeros(self._codebooks * self.model.codebook_size)
            counts.scatter_add_(0, answers, torch.ones_like(answers))
            most_frequent = counts.unflatten(0, (self._codebooks, -1)).amax(1).sum()
            figures = {"accuracy/codes": right, "accuracy/commonest_code": most_frequent / answers.numel()}
        if self._loss.motion_target != "none":
            motion = self.model.predict_motion(latents, mask)
            loss, still = (
                motion_loss(pred, video, mask, self._loss, self.model.patch_size)
                for pred in (motion, torch.zeros_like(motion))
            )
            figures["loss/motion_relative"] = loss / still
        return figures


class Balance:
    """Norms of two gradients, and the factor that scales the first to `proportion` times the second (None: 1).

    If one of the two has no target, only the other exists.
    """

    def __init__(self, proportion: float | None) -> None:
        self.proportion = proportion
        self.norms: Values = {}
        # a separate group, because in DDP's group it would wait in backward for the gradients queued earlier
        several = dist.is_available() and dist.is_initialized()
        self.ranks: dist.ProcessGroup | None = dist.new_group() if several else None

    def factor(self, appearance: Tensor | None, motion: Tensor | None) -> Tensor | None:
        both = {"appearance": appearance, "motion": motion}
        gradients = {name: gradient for name, gradient in both.items() if gradient is not None}
        norms = torch.stack([gradient.norm().float() for gradient in gradients.values()])
        if self.ranks:
            squares = norms.square()
            dist.all_reduce(squares, group=self.ranks)
            norms = squares.sqrt() / dist.get_world_size()  # ranks average their gradients
        self.norms = dict(zip(gradients, norms.unbind(), strict=True))
        if self.proportion is None:
            return None
        assert appearance is not None
        return (self.proportion * self.norms["motion"] / (self.norms["appearance"] + 1e-12)).to(appearance.dtype)


class _Fork(torch.autograd.Function):
    """Copies latents for appearance, motion and alignment; backward adds their gradients, the first rescaled."""

    @staticmethod
    def forward(ctx: Any, latents: Tensor, balance: Balance) -> tuple[Tensor, Tensor, Tensor]:
        ctx.balance = balance
        ctx.set_materialize_grads(False)  # a loss may be missing
        return latents.view_as(latents), latents.view_as(latents), latents.view_as(latents)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, None]:
        appearance, motion, alignment = gradients
        factor = ctx.balance.factor(appearance, motion)
        if appearance is not None and factor is not None:
            appearance = appearance * factor
        return functools.reduce(torch.add, [part for part in (appearance, motion, alignment) if part is not None]), None
