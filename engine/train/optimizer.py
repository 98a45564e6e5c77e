"""AdamW and its learning rate, as VideoMAE pre-trains and fine-tunes."""

from __future__ import annotations

import math

import torch
from torch import nn

from mam2.engine.config.finetune import FinetuneOptimConfig
from mam2.engine.config.pretrain import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW; no weight decay on 1-D parameters (biases, norms) and mask tokens."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [p for name, p in trained if p.ndim <= 1 or "mask_token" in name]
    decayed = [p for name, p in trained if not (p.ndim <= 1 or "mask_token" in name)]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, config.beta2), eps=1e-8, fused=True)


def build_layered_optimizer(model: nn.Module, depth: int, config: FinetuneOptimConfig) -> torch.optim.AdamW:
    """Fused AdamW for a classifier whose encoder has `depth` blocks; no weight decay on parameters with less than two
    dimensions.

    A group's `scale`, `layer_decay` to the power of the layers above it, is to multiply its learning rate: the head is
    layer depth + 1 (scale 1), block k layer k + 1, the patch embedding layer 0.
    """
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((layer_of(name, depth), parameter.ndim > 1), []).append(parameter)
    described = [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if decayed else 0.0,
            "scale": config.layer_decay ** (depth + 1 - layer),
        }
        for (layer, decayed), parameters in groups.items()
    ]
    return torch.optim.AdamW(described, lr=0.0, betas=(0.9, config.beta2), eps=1e-8, fused=True)


def layer_of(name: str, depth: int) -> int:
    """The layer, 0 to depth + 1, that a parameter of a classifier belongs to, by its name."""
    part, _, rest = name.removeprefix("encoder.").partition(".")
    if part == "blocks" and name.startswith("encoder."):
        return int(rest.partition(".")[0]) + 1
    return 0 if name.startswith("encoder.patch_embed.") else depth + 1


def long_warmup(config: OptimConfig | FinetuneOptimConfig) -> str | None:
    """One sentence where the warm-up takes more than half of the training, else None."""
    if config.warmup_epochs <= config.epochs / 2:
        return None
    return (
        f"optim.warmup_epochs {config.warmup_epochs:g} of optim.epochs {config.epochs:g}: the learning rate rises for "
        f"{min(config.warmup_epochs / config.epochs, 1):.0%} of the training and is small in most of it; "
        f"a short trial takes --optim.warmup-epochs {config.epochs / 20:g}"
    )


def learning_rate(step: int, steps: int, steps_per_epoch: float, config: OptimConfig, *, global_batch: int) -> float:
    """Of step `step` of `steps`: linear warm-up from 0, then half a cosine to the minimum; times batch/256."""
    peak, floor = (rate * global_batch / 256 for rate in (config.base_lr, config.min_lr))
    warmup = min(round(config.warmup_epochs * steps_per_epoch), steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))
