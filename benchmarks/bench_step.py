"""A training step by objective and batch: forward, backward and AdamW on random clips, with random codes for MAM2.

ViT-B on 16 frames of 224² in bfloat16 on a GPU, the recipes' own values otherwise. FLOPs are those of the matrix
products, forward and backward, counted for one clip; MFU is their rate over that of an
8192³ bfloat16 product measured in the same run.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import elapsed_ms, matmul_tflop_per_s, summary
from mam2.engine.config import PretrainConfig, load_recipe
from mam2.engine.model.mam2 import MAM2
from mam2.engine.model.videomae import VideoMAE
from mam2.engine.train.objective import Compile, Objective, build_objective
from mam2.engine.train.optimizer import build_optimizer
from mam2.engine.train.runtime import autocast, why_not_compile
from mam2.kernels import TubeMask, costs, tube_mask

RECIPES = ("videomae", "mam2-fast", "mam2-cae")
BATCHES = {"cuda": (64, 16, 128), "cpu": (2,)}
"""The recipes' batch first: what a time limit cuts off is at the end."""
CODES = 8192
TINY: dict[str, dict[str, Any]] = {
    "data": {"frames": 4, "size": 32},
    "model": {"patch": 8, "width": 48, "depth": 2, "heads": 3},
}
TINY_PART = {"depth": 1, "width": 48, "heads": 3}


class RandomCodes:
    """In the tokenizer's place: the same random codes for every clip."""

    def __init__(self, batch: int, tokens: int, device: torch.device) -> None:
        self._codes = torch.randint(CODES, (batch, tokens), device=device)

    def codes(self, video: Tensor) -> Tensor:
        return self._codes


def recipe(name: str, *, tiny: bool) -> PretrainConfig:
    config = load_recipe(name)
    if not tiny:
        return config
    model = dataclasses.replace(
        config.model,
        **TINY["model"],
        regressor=dataclasses.replace(config.model.regressor, **TINY_PART),
        decoder=dataclasses.replace(config.model.decoder, **TINY_PART),
    )
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **TINY["data"]), model=model)


def objective_of(
    config: PretrainConfig, batch: int, device: torch.device, compiled: Compile
) -> tuple[Objective, Callable[[], Tensor]]:
    """The objective and a function that gives a random clip batch [B,3,T,H,W]."""
    model = VideoMAE(config) if config.model.objective == "videomae" else MAM2(config, CODES)
    tokens = config.grid[0] * config.grid[1] * config.grid[2]
    codes = RandomCodes(batch, tokens, device)
    extent = (batch, config.data.frames, config.data.size, config.data.size, 3)

    def clips() -> Tensor:
        return torch.randint(0, 256, extent, dtype=torch.uint8, device=device).permute(0, 4, 1, 2, 3)

    return build_objective(model, codes, config, compiled), clips  # type: ignore[arg-type]


def mask_of(config: PretrainConfig, batch: int, step: int, device: torch.device) -> TubeMask:
    return tube_mask(batch, config.grid, config.mask.ratio, seed=0, step=step, device=device)


def flops_of_a_clip(config: PretrainConfig) -> int:
    """Of the matrix products of a step on one clip, forward and backward, counted on tensors without values."""
    device = torch.device("cpu")
    fake = FakeTensorMode()
    with fake, mock.patch("torch.nn.init.trunc_normal_"):  # which looks at the values it draws
        objective, clips = objective_of(config, 1, device, lambda part: part)
    # the counter knows the products of the plain form of attention
    with fake, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        mask = mask_of(config, 1, 0, device)
        objective.backward(clips(), mask, 1.0)
    counted = counter.get_total_flops()
    if config.model.objective == "mam2":  # it does not see into this operator
        counted += costs.linear_cross_entropy(mask.masked.shape[1], config.model.decoder.width, CODES).flops
    return counted


def measure(
    name: str, config: PretrainConfig, batch: int, device: torch.device, *, compiled: bool, matmul: float | None
) -> dict[str, Any]:
    """One row: milliseconds of a step, clips/s, peak memory and MFU."""
    cuda = device.type == "cuda"
    part: Compile = (lambda f: torch.compile(f, fullgraph=True, dynamic=False)) if compiled else (lambda f: f)
    objective, clips = objective_of(config, batch, device, part)
    objective.model.to(device)
    optimizer = build_optimizer(objective.model, config.optim)
    for group in optimizer.param_groups:
        group["lr"] = 1e-5
    videos = [clips(), clips()]
    numbers = itertools.count()

    def step() -> None:
        number = next(numbers)
        with autocast(config.run, device):
            objective.backward(videos[number % 2], mask_of(config, batch, number, device), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    group, rounds = (5, 8) if cuda else (1, 3)  # steps in a row, as in training: the host runs ahead of the device

    def steps() -> None:
        for _ in range(group):
            step()

    timing = summary([elapsed_ms(steps, device) / group for _ in range(rounds)])
    row: dict[str, Any] = {"objective": name, "batch": batch, "step": "compiled" if compiled else "eager"}
    row |= {"median_ms": timing.median_ms, "p20_ms": timing.p20_ms, "p80_ms": timing.p80_ms}
    row |= {"clips_per_s": 1000 * batch / timing.median_ms, "gflop_per_clip": flops_of_a_clip(config) / 1e9}
    if cuda:
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    if matmul:
        row["tflop_per_s"] = row["gflop_per_clip"] * row["clips_per_s"] / 1e3
        row["mfu_percent"] = 100 * row["tflop_per_s"] / matmul
    return row


def rows(device: torch.device, deadline: float, *, compiled: bool) -> Iterator[dict[str, Any]]:
    """Every objective and batch, uncompiled and then compiled, until `deadline` (time.monotonic)."""
    torch.manual_seed(0)
    cuda = device.type == "cuda"
    matmul = matmul_tflop_per_s(device) if cuda else None
    if matmul:
        yield {"objective": "ceiling", "matmul_tflop_per_s": matmul}
    ways = (False, True) if compiled and not why_not_compile(device) else (False,)
    for batch, whole, name in itertools.product(BATCHES[device.type], ways, RECIPES):
        row = {"objective": name, "batch": batch, "step": "compiled" if whole else "eager"}
        if time.monotonic() > deadline:
            yield row | {"verdict": "skipped", "reason": "out of time"}
            continue
        try:
            yield measure(name, recipe(name, tiny=not cuda), batch, device, compiled=whole, matmul=matmul)
        except Exception as problem:  # one that does not fit into memory leaves the others standing
            yield row | {"verdict": "failed", "reason": f"{type(problem).__name__}: {problem}"[:300]}
        torch.compiler.reset()
        if cuda:
            torch.cuda.empty_cache()
