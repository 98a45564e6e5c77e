"""Compares the activations that `mam2 plan` declares with those that autograd saves, part by part, for whole recipes.

    python -m benchmarks.plan_memory [RECIPE …]

The forward pass runs in bfloat16 on tensors without data (PyTorch's FakeTensorMode): a recipe of full size needs
seconds and no memory. Counted are the storages that autograd saves for the backward pass, except weights, their copies
in 16 bits and their gradients, which `mam2 plan` lists apart. The step is eager: a compiled one holds less. The row
`whole step` has the peak of forward, backward and AdamW, which PyTorch's MemTracker counts, in MiB of a step.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from benchmarks.report import table
from benchmarks.step_parts import DECLARED, parts_of
from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.config.recipe import load_recipe
from mam2.engine.costs import part_costs
from mam2.engine.data.batch import channels_first
from mam2.engine.model.attention_tuning import shapes_of
from mam2.engine.model.blocks import Residual
from mam2.engine.model.build import build_model
from mam2.engine.model.mam2 import MAM2
from mam2.engine.model.videomae import VideoMAE
from mam2.engine.planning import plan
from mam2.engine.train.objective import build_objective
from mam2.kernels import TubeMask

RECIPES = ("mam2-fast", "mam2-cae", "videomae", "laptop")
CLIPS = 3
CODES = 8192
STEP_CLIPS = 8
"""Clips of the whole step."""
PER_CLIP = ("recipe", "part", "planned_mib_per_clip", "counted_mib_per_clip", "planned_percent")
PER_STEP = ("recipe", "clips", "planned_mib", "counted_mib", "planned_percent")


def rows(recipe: str, residual: Residual = "float32") -> Iterator[dict[str, Any]]:
    """Yields a row per part of a recipe's step: planned and counted MiB per clip, and planned in percent of counted."""
    config = load_recipe(recipe)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, residual=residual))
    declared = part_costs(config, CODES, item_bytes=2)
    for part, counted in counted_bytes(config).items():
        planned = sum(declared[name].held_bytes for name in DECLARED[part] if name in declared)
        yield {
            "recipe": recipe,
            "part": part,
            "planned_mib_per_clip": planned / 2**20,
            "counted_mib_per_clip": counted / 2**20,
            "planned_percent": 100 * planned / counted,
        }


def step_row(recipe: str) -> dict[str, Any]:
    """Returns a row about the peak of a whole step of `STEP_CLIPS` clips; the clips prepared ahead are not in it."""
    config = load_recipe(recipe)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, recorded=1),
        tokenizer=dataclasses.replace(config.tokenizer, cache="codes", codes=CODES, path=""),
        optim=dataclasses.replace(config.optim, batch=STEP_CLIPS, name="adamw"),
        run=dataclasses.replace(config.run, precision="bfloat16"),
    )
    memory = plan(config, gpu="h200").memory
    planned, counted = sum(memory.values()) - memory["clips"], _step_peak(config)
    percent = 100 * planned / counted
    return {
        "recipe": recipe,
        "clips": STEP_CLIPS,
        "planned_mib": planned / 2**20,
        "counted_mib": counted / 2**20,
        "planned_percent": percent,
    }


def _step_peak(config: PretrainConfig) -> int:
    with FakeTensorMode(), mock.patch("torch.nn.init.trunc_normal_"):
        model = _model(config, STEP_CLIPS)
        objective = build_objective(model, config, lambda part: part)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        inputs = _inputs(config, STEP_CLIPS)
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        with tracker:
            for step in range(2):
                if step == 1:
                    tracker.reset_mod_stats()  # the first step makes the moments
                with torch.autocast("cpu", torch.bfloat16):
                    loss = objective(*inputs)[0]
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        return max(sizes["Total"] for sizes in tracker.get_tracker_snapshot("peak").values())


def _model(config: PretrainConfig, clips: int) -> MAM2 | VideoMAE:
    model = build_model(config, CODES)
    # as on a GPU: a CPU's products would store the scores
    shapes = shapes_of(config, clips).values()
    model.set_attention({("cpu", torch.bfloat16, *shape[1:]): "sdpa" for shape in shapes})
    return model


def counted_bytes(config: PretrainConfig) -> dict[str, float]:
    """Returns the bytes per clip that autograd saves in the forward pass of each part."""
    # truncated normal draws depend on their values, which do not exist here
    with FakeTensorMode(), mock.patch("torch.nn.init.trunc_normal_"):
        model, inputs = _model(config, CLIPS), _inputs(config, CLIPS)
        return {part: _saved(forward, model) / CLIPS for part, forward in parts_of(model, inputs).items()}


def _inputs(config: PretrainConfig, clips: int) -> tuple[Tensor, TubeMask, Tensor]:
    data, tokens = config.data, math.prod(config.grid)
    video = torch.empty(clips, data.frames, data.size, data.size, data.channels, dtype=torch.uint8)
    visible, masked, codes = (
        torch.empty(clips, count, dtype=torch.int64)
        for count in (tokens - config.masked_tokens, config.decoded_tokens, tokens)
    )
    return channels_first(video), TubeMask(visible, masked), codes


def _saved(forward: Any, model: nn.Module) -> int:
    weights = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    of_weights = {shape for p in model.parameters() for shape in (tuple(p.shape), tuple(reversed(p.shape)))}
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tuple(tensor.shape) not in of_weights:
            held[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        forward()
    return sum(tensor.untyped_storage().nbytes() for storage, tensor in held.items() if storage not in weights)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_memory", description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", default=list(RECIPES))
    options = parser.parse_args(arguments)
    print(table([row for recipe in options.recipes for row in rows(recipe)], PER_CLIP))
    print("\nwhole step", table([step_row(recipe) for recipe in options.recipes], PER_STEP), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
