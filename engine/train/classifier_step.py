"""The objective and the step of fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mam2.engine.config.finetune import FinetuneConfig
from mam2.engine.finetune_costs import HEAD, finetune_costs
from mam2.engine.layer_costs import SINGLE
from mam2.engine.model.adapters import add_adapters
from mam2.engine.model.classifier import Classifier, train_only_last
from mam2.engine.runtime.device import matmul_dtype
from mam2.engine.runtime.distributed import World
from mam2.engine.train import augment
from mam2.engine.train.augment import Prepared
from mam2.engine.train.finetune_targets import Targets
from mam2.engine.train.objective import Compile, Objective, Values
from mam2.engine.train.optimizer import Optimizer, build_layered_optimizer
from mam2.engine.train.step import Step


def classifier_flops(config: FinetuneConfig) -> float:
    """Returns the FLOPs per clip of a step: all tokens through the encoder, both passes; the head is negligible.

    Frozen blocks and a frozen patch embedding run only forward; frozen weights with adapters have no weight gradient.
    """
    return sum(cost.flops for name, cost in finetune_costs(config, SINGLE).items() if name != HEAD)


class ClassifierObjective(Objective):
    """Cross-entropy with soft targets; binary cross-entropy for several classes per video; MSE or MAE in regression.

    Called with a video [B, C, T, H, W] uint8, targets [B, V], what is dropped.

    The targets of a clip sum to the weight of the clip.
    """

    def __init__(self, model: Classifier, compiled: Compile, regression: Literal["mse", "mae"] = "mse") -> None:
        """regression: loss of a model whose task is regression."""
        super().__init__()
        self.model, self._regression = model, regression
        self._loss = compiled(self._compare)

    def forward(
        self,
        video: Tensor,
        targets: Tensor,
        path_scales: Tensor | None,
        feature_scales: Tensor | None,
        *,
        inspect: bool = False,
    ) -> tuple[Tensor, Values, Values]:
        loss = self._loss(video, targets, path_scales, feature_scales)
        return loss, {"loss/training": loss.detach()}, {}

    def _compare(
        self, video: Tensor, targets: Tensor, path_scales: Tensor | None, feature_scales: Tensor | None
    ) -> Tensor:
        logits = self.model(video, path_scales, feature_scales)
        if self.model.task == "multi-label":
            return F.binary_cross_entropy_with_logits(logits, targets)
        if self.model.task == "regression":
            return (F.mse_loss if self._regression == "mse" else F.l1_loss)(logits, targets)
        return -(targets * logits.log_softmax(-1)).sum(-1).mean()


class FinetuneStep(Step[Prepared]):
    """A step of fine-tuning; the extras of a video are the results of `prepare`."""

    config: FinetuneConfig
    model: Classifier

    def __init__(
        self,
        config: FinetuneConfig,
        model: Classifier,
        device: torch.device,
        world: World,
        targets: Targets | None = None,
    ) -> None:
        """targets: see `mam2.engine.train.augment.prepare`."""
        self._targets = targets
        if config.adapters.rank:
            add_adapters(model, config.adapters)
        train_only_last(model, config.optim.train_last)
        super().__init__(config, model, device, world)
        self._blend: Callable[..., None] = get_ema_multi_avg_fn(config.optim.ema)
        self.average: dict[str, Tensor] = {}
        """Moving average of the trained parameters; empty without `optim.ema`."""
        if config.optim.ema:
            self.average = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def build_objective(self, compiled: Compile) -> Objective:
        return ClassifierObjective(self.model, compiled, self.config.head.loss)

    def build_optimizer(self) -> Optimizer:
        dtype = matmul_dtype(self.config.run, self.device)
        return build_layered_optimizer(self.model, self.config.model.depth, self.config.optim, dtype)

    def prepare(self, number: int, video: Tensor, labels: Tensor) -> Prepared:
        """Returns the extras of the video [B, C, T, H, W] uint8 of pass `number`, from 0.

        Labels: int64 [B] on the CPU.
        """
        step, index = divmod(number, self.micro_batches)
        first_sample = (index * self.world.size + self.world.rank) * len(video)
        return augment.prepare(video, labels, self.config, self._targets, step=step, first_sample=first_sample)

    def part(self, extras: Prepared, rows: slice) -> Prepared:
        paths, features = extras.path_scales, extras.feature_scales
        return Prepared(
            extras.video[rows],
            extras.targets[rows],
            None if paths is None else paths[..., rows],
            None if features is None else features[rows],
        )

    def arguments(self, step: int, first_sample: int, video: Tensor, extras: Prepared) -> tuple[Any, ...]:
        return tuple(extras)

    def extra_state(self) -> Mapping[str, Tensor]:
        return self.average

    def __call__(self, *args: Any, **options: Any) -> dict[str, Tensor]:
        values = super().__call__(*args, **options)
        if self.average:
            trained = dict(self.model.named_parameters())
            self._blend(list(self.average.values()), [trained[name].detach() for name in self.average], None)
        return values
