"""Times the parts of a step: forward and backward of each part alone, AdamW, and a tokenizer.

Beside them, without a share: the update by Muon with AdamW, and the same by PyTorch's Muon, matrix by matrix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import elapsed_ms, percentile
from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.costs import step_flops
from mam2.engine.model.mam2 import MAM2
from mam2.engine.model.videomae import VideoMAE
from mam2.engine.runtime.device import autocast, matmul_dtype
from mam2.engine.tokenizer.tokenizer import Tokenizer
from mam2.engine.tokenizer.vqgan import CONFIGS, VQGAN, small
from mam2.engine.train.optimizer import build_optimizer, hidden_matrices
from mam2.kernels import TubeMask

ROUNDS = 5
DECLARED = {
    "encoder": ("encoder",),
    "regressor": ("regressor",),
    "appearance decoder and loss": ("appearance decoder", "code head and loss"),
    "motion decoder and loss": ("motion decoder", "motion head and loss"),
    "decoder and loss": ("decoder", "head and pixel loss"),
    "tokenizer": ("tokenizer",),
}
"""The timed parts and their names in `mam2.engine.costs`."""


def part_rows(
    name: str,
    model: MAM2 | VideoMAE,
    config: PretrainConfig,
    inputs: tuple[Tensor, TubeMask, Tensor],
    codes: int,
    device: torch.device,
) -> Iterator[dict[str, Any]]:
    """Yields a row per part of an eager step: milliseconds, its share of their sum, and its share of declared FLOPs;
    then one per way to update with Muon."""
    video = inputs[0]
    times = {
        part: _forward_and_backward(forward, model, config, device) for part, forward in parts_of(model, inputs).items()
    }
    optimizer = build_optimizer(model, dataclasses.replace(config.optim, name="adamw"))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    times["AdamW"] = _median(optimizer.step, device), 0.0
    tokenizer = None
    if isinstance(model, MAM2):
        cuda = device.type == "cuda"
        tokenizer = CONFIGS["gumbel-f8-8192"] if cuda else small(32, codes, 8)
        half = matmul_dtype(config.run, device) == torch.bfloat16
        frozen = Tokenizer(VQGAN(tokenizer).to(device), config.grid, "bfloat16" if half else "float32")
        times["tokenizer"] = _median(lambda: frozen.codes(video), device), 0.0
    flops = step_flops(config, codes, tokenizer)
    whole = sum(forward + backward for forward, backward in times.values())
    precision = str(matmul_dtype(config.run, device)).removeprefix("torch.")
    head = {"objective": name, "batch": len(video), "precision": precision}
    for part, (forward, backward) in times.items():
        yield head | {
            "part": part,
            "forward_ms": forward,
            "backward_ms": backward,
            "percent": 100 * (forward + backward) / whole,
            "percent_of_flops": 100 * sum(flops[name] for name in DECLARED.get(part, ())) / sum(flops.values()),
        }
    for part, update in muon_updates(model, config).items():
        yield head | {"part": part, "median_ms": _median(update, device)}


def muon_updates(model: nn.Module, config: PretrainConfig) -> dict[str, Callable[[], Any]]:
    """Returns ways to update all parameters, whose gradients are set: ours, and PyTorch's Muon with its AdamW."""
    optimizer = build_optimizer(model, dataclasses.replace(config.optim, name="muon"))
    matrices = hidden_matrices(model)
    parts = []
    for matrix, count in matrices.items():
        assert matrix.grad is not None
        for part, gradient in zip(matrix.detach().chunk(count), matrix.grad.chunk(count), strict=True):
            parts.append(nn.Parameter(part))
            parts[-1].grad = gradient
    rest = torch.optim.AdamW([p for p in model.parameters() if p not in matrices], lr=0.0, fused=True)
    each = torch.optim.Muon(parts, lr=0.0, adjust_lr_fn="match_rms_adamw")
    return {"Muon and AdamW": optimizer.step, "torch.optim.Muon and AdamW": lambda: (each.step(), rest.step())}


def parts_of(
    model: MAM2 | VideoMAE, inputs: tuple[Tensor, TubeMask, Tensor]
) -> dict[str, Callable[[], tuple[Tensor, Tensor | None]]]:
    """Returns each part's forward pass on fixed inputs that require gradients.

    The upstream gradient of a loss is None.
    """
    video, mask, codes = inputs
    encoder = model.encoder
    visible = torch.randn(*mask.visible.shape, encoder.width, device=video.device, requires_grad=True)

    def encode() -> tuple[Tensor, Tensor | None]:
        out = encoder(encoder.tokens(video, mask.visible), mask.visible)
        return out, torch.ones_like(out)

    if isinstance(model, VideoMAE):

        def decode() -> tuple[Tensor, Tensor | None]:
            return model.loss_of(visible, video, mask), None

        return {"encoder": encode, "decoder and loss": decode}
    latents = torch.randn(*mask.masked.shape, model.positions.shape[1], device=video.device, requires_grad=True)

    def regress() -> tuple[Tensor, Tensor | None]:
        out = model.regressor(visible, model.positions[mask.visible], model.positions[mask.masked])
        return out, torch.ones_like(out)

    return {
        "encoder": encode,
        "regressor": regress,
        "appearance decoder and loss": lambda: (model.appearance_loss(latents, mask, codes), None),
        "motion decoder and loss": lambda: (model.motion_loss(latents, mask, video), None),
    }


def _forward_and_backward(
    part: Callable[[], tuple[Tensor, Tensor | None]],
    model: torch.nn.Module,
    config: PretrainConfig,
    device: torch.device,
) -> tuple[float, float]:
    """Returns median milliseconds; the backward pass allocates its gradients."""
    held: list[tuple[Tensor, Tensor | None]] = []

    def forward() -> None:
        with autocast(config.run, device):
            held.append(part())

    def backward() -> None:
        out, gradient = held.pop()
        out.backward(gradient)

    samples: tuple[list[float], list[float]] = [], []
    for _ in range(ROUNDS + 1):
        samples[0].append(elapsed_ms(forward, device))
        samples[1].append(elapsed_ms(backward, device))
        model.zero_grad()
    return percentile(samples[0][1:], 50), percentile(samples[1][1:], 50)


def _median(run: Callable[[], Any], device: torch.device) -> float:
    return percentile([elapsed_ms(run, device) for _ in range(ROUNDS + 1)][1:], 50)
