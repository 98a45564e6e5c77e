"""Compares the activations that `mam2 plan` declares with those that autograd saves, part by part, for whole recipes.

    python -m benchmarks.plan_memory [RECIPE …]

The forward pass runs in bfloat16 on tensors without data (PyTorch's FakeTensorMode): a recipe of full size needs
seconds and no memory. Counted are the storages that autograd saves for the backward pass, except weights, their copies
in 16 bits and their gradients, which `mam2 plan` lists apart. The step is eager: a compiled one holds less.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.report import table
from benchmarks.step_parts import DECLARED, parts_of
from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.config.recipe import load_recipe
from mam2.engine.costs import part_costs
from mam2.engine.model.attention_tuning import shapes_of
from mam2.engine.model.build import build_model
from mam2.kernels import TubeMask

RECIPES = ("mam2-fast", "mam2-cae", "videomae", "laptop")
CLIPS = 3
CODES = 8192
COLUMNS = ("recipe", "part", "planned_mib_per_clip", "counted_mib_per_clip", "planned_percent")


def rows(recipe: str) -> Iterator[dict[str, Any]]:
    """Yields a row per part of a recipe's step: planned and counted MiB per clip, and planned in percent of counted."""
    config = load_recipe(recipe)
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


def counted_bytes(config: PretrainConfig) -> dict[str, float]:
    """Returns the bytes per clip that autograd saves in the forward pass of each part."""
    # truncated normal draws depend on their values, which do not exist here
    with FakeTensorMode(), mock.patch("torch.nn.init.trunc_normal_"):
        model = build_model(config, CODES)
        shapes = shapes_of(config, CLIPS).values()
        # as on a GPU: a CPU's products would store the scores
        model.set_attention({("cpu", torch.bfloat16, *shape[1:]): "sdpa" for shape in shapes})
        return {part: _saved(forward, model) / CLIPS for part, forward in parts_of(model, _inputs(config)).items()}


def _inputs(config: PretrainConfig) -> tuple[Tensor, TubeMask, Tensor]:
    data, tokens = config.data, math.prod(config.grid)
    video = torch.empty(CLIPS, data.frames, data.size, data.size, data.channels, dtype=torch.uint8)
    visible, masked, codes = (
        torch.empty(CLIPS, count, dtype=torch.int64)
        for count in (tokens - config.masked_tokens, config.decoded_tokens, tokens)
    )
    return video.permute(0, 4, 1, 2, 3), TubeMask(visible, masked), codes


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
    print(table([row for recipe in options.recipes for row in rows(recipe)], COLUMNS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
