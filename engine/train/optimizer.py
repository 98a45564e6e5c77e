"""AdamW, or Muon with AdamW, and the learning rate, for pre-training and fine-tuning."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mam2.engine.config.finetune import FinetuneOptimConfig
from mam2.engine.config.training import OptimConfig
from mam2.engine.model.blocks import Attention, Block, RegressorBlock
from mam2.engine.train.muon import MuonAdamW

Optimizer = torch.optim.AdamW | MuonAdamW


def build_optimizer(model: nn.Module, config: OptimConfig, dtype: torch.dtype = torch.bfloat16) -> Optimizer:
    """Builds the optimizer `config.name`, without weight decay on 1-D parameters (biases, norms) and mask tokens.

    dtype: dtype of Muon's matrix products.
    """
    return _built(
        [(name, parameter, 1.0) for name, parameter in model.named_parameters() if parameter.requires_grad],
        model,
        config,
        dtype,
    )


def build_layered_optimizer(
    model: nn.Module, depth: int, config: FinetuneOptimConfig, dtype: torch.dtype = torch.bfloat16
) -> Optimizer:
    """Builds the optimizer of a classifier whose encoder has `depth` blocks.

    Parameters with fewer than two dimensions have no weight decay. A group's `scale` multiplies its learning rate:
    `layer_decay` to the power of the number of layers above it. The head is layer depth + 1 (scale 1), block k is layer
    k + 1, the patch embedding is layer 0.
    """
    return _built(
        [
            (name, parameter, config.layer_decay ** (depth + 1 - layer_of(name, depth)))
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        ],
        model,
        config,
        dtype,
    )


def _built(
    trained: list[tuple[str, nn.Parameter, float]], model: nn.Module, config: OptimConfig, dtype: torch.dtype
) -> Optimizer:
    """Builds an optimizer. trained: each parameter with its name and its learning-rate factor."""
    matrices = hidden_matrices(model) if config.name == "muon" else {}
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter, scale in trained:
        parts = matrices.get(parameter, 0)
        decayed = parameter.ndim > 1 and "mask_token" not in name
        group = {
            "params": [],
            "weight_decay": config.weight_decay if decayed else 0.0,
            "scale": scale * (config.muon_rate if parts else 1.0),
        }
        group |= {"parts": parts, "momentum": config.momentum} if parts else {"betas": (0.9, config.beta2), "eps": 1e-8}
        groups.setdefault((scale, decayed, parts), group)["params"].append(parameter)
    if matrices:
        return MuonAdamW(list(groups.values()), dtype=dtype)
    return torch.optim.AdamW(list(groups.values()), lr=0.0, fused=True)


def hidden_matrices(model: nn.Module) -> dict[Tensor, int]:
    """Returns the parameters for Muon: the weight matrices of all blocks (encoder, regressor, decoders).

    The value is the number of matrices in a parameter: 3 for combined queries, keys and values, else 1. AdamW trains
    all other parameters: patch embedding, heads, projections between widths, mask tokens, norms, biases, LayerScale.
    """
    found: dict[Tensor, int] = {}
    for block in model.modules():
        if isinstance(block, Block | RegressorBlock):
            fused = {module.qkv for module in block.modules() if isinstance(module, Attention)}
            layers = [module for module in block.modules() if isinstance(module, nn.Linear)]
            found |= {layer.weight: 3 if layer in fused else 1 for layer in layers}
    return found


def describe(optimizer: torch.optim.Optimizer) -> str:
    """Returns which optimizer trains how many parameters, for the log."""
    matrices = [p for group in optimizer.param_groups if "parts" in group for p in group["params"]]
    if not matrices:
        return "AdamW"
    return f"Muon on {sum(p.numel() for p in matrices) / 1e6:.2f} M parameters of blocks, AdamW on the rest"


def layer_of(name: str, depth: int) -> int:
    """Returns the layer, 0 to depth + 1, of a classifier's parameter by its name."""
    part, _, rest = name.removeprefix("encoder.").partition(".")
    if part == "blocks" and name.startswith("encoder."):
        return int(rest.partition(".")[0]) + 1
    return 0 if name.startswith("encoder.patch_embed.") else depth + 1


def long_warmup(config: OptimConfig | FinetuneOptimConfig) -> str | None:
    """Returns a warning if the warm-up takes more than half of the training, else None."""
    if config.warmup_epochs <= config.epochs / 2:
        return None
    return (
        f"optim.warmup_epochs {config.warmup_epochs:g} of optim.epochs {config.epochs:g}: the learning rate increases "
        f"for {min(config.warmup_epochs / config.epochs, 1):.0%} of the training and is mostly small; "
        f"for a short trial use --optim.warmup-epochs {config.epochs / 20:g}"
    )


def total_steps(config: OptimConfig, steps_per_epoch: float) -> int:
    """Returns the optimizer steps of a training."""
    return max(round(config.epochs * steps_per_epoch), 1)


def first_decay_step(steps: int, steps_per_epoch: float, config: OptimConfig) -> int:
    """Returns the step, of `steps`, at which the learning rate begins to decrease; `steps` if it never does."""
    warmup = min(round(config.warmup_epochs * steps_per_epoch), steps)
    if config.schedule == "cosine":
        return warmup
    return max(steps - round(config.decay_share * steps), warmup)


def learning_rate(step: int, steps: int, steps_per_epoch: float, config: OptimConfig, *, global_batch: int) -> float:
    """Returns the rate of a step, times batch/256.

    Linear warm-up from 0, then half a cosine to the minimum; or a constant rate and a linear decrease to the minimum.
    """
    peak, floor = (rate * global_batch / 256 for rate in (config.base_lr, config.min_lr))
    warmup = min(round(config.warmup_epochs * steps_per_epoch), steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    first = first_decay_step(steps, steps_per_epoch, config)
    if step < first:
        return peak
    progress = (step - first) / max(steps - first, 1)
    share = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return floor + (peak - floor) * share


def why_not_extended(before: OptimConfig, now: OptimConfig, done: int, steps_per_epoch: float) -> str | None:
    """Returns why a run of another length cannot continue after `done` steps, or None.

    It can if the learning rates of all done steps are the same in both. before: config of the checkpoint.
    """
    if (before.epochs, before.decay_share) == (now.epochs, now.decay_share):
        return None
    for config, whose in ((before, "of the checkpoint"), (now, "of this run")):
        first = first_decay_step(total_steps(config, steps_per_epoch), steps_per_epoch, config)
        if done > first:
            return (
                f"optim.epochs {config.epochs:g} and optim.decay_share {config.decay_share:g} {whose} decrease the "
                f"learning rate from step {first} on, but {done} steps are done: a run can be extended until then"
            )
    return None
