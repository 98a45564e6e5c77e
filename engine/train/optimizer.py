"""AdamW and its learning rate, as VideoMAE pre-trains."""

from __future__ import annotations

import math

import torch
from torch import nn

from mam2.engine.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW; no weight decay on 1-D parameters (biases, norms) and mask tokens."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [p for name, p in trained if p.ndim <= 1 or "mask_token" in name]
    decayed = [p for name, p in trained if not (p.ndim <= 1 or "mask_token" in name)]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, config.beta2), eps=1e-8, fused=True)


def learning_rate(step: int, steps: int, steps_per_epoch: float, config: OptimConfig, *, global_batch: int) -> float:
    """Of step `step` of `steps`: linear warm-up from 0, then half a cosine to the minimum; times batch/256."""
    peak, floor = (rate * global_batch / 256 for rate in (config.base_lr, config.min_lr))
    warmup = min(round(config.warmup_epochs * steps_per_epoch), steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))
