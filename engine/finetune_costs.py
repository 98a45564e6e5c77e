"""Cost of the parts of a fine-tuning step, as in costs.py: with all tokens, frozen blocks and low-rank adapters.

A frozen block runs only forward and holds nothing. A block with adapters holds what an ordinary one does, except that a
frozen linear layer holds its input only for its adapter; its backward pass lacks the gradients of the frozen weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

from mam2.engine import costs, layer_costs
from mam2.engine.config.finetune import FinetuneConfig
from mam2.engine.layer_costs import PartCost
from mam2.engine.model.blocks import mlp_width

PATCHES, FROZEN, BLOCKS, ADAPTERS, HEAD = "patch embedding", "frozen blocks", "blocks", "adapters", "head"


def finetune_costs(config: FinetuneConfig, item_bytes: int) -> dict[str, PartCost]:
    """Returns the cost per clip of every part of a step by name, in order; parameters include the frozen ones.

    item_bytes: bytes of a value in the compute dtype. Without a known number of classes the head is one of 1 class.
    """
    model, tokens, rank = config.model, math.prod(config.grid), config.adapters.rank
    pixels = model.tubelet * model.patch**2 * config.data.channels
    embedding = layer_costs.linear(tokens, pixels, model.width, item_bytes, input_gradient=False)
    whole = layer_costs.block(tokens, model.width, model.mlp_ratio, item_bytes, layer_scale=model.layer_scale)
    frozen = config.frozen_blocks
    parts = {PATCHES: _forward_only(embedding) if frozen_embedding(config) else embedding}
    if frozen:
        parts[FROZEN] = _forward_only(whole) * frozen
    if rank:
        parts |= _adapted(config, whole, tokens, item_bytes)
    elif model.depth > frozen:
        parts[BLOCKS] = costs.stack(config, whole, model.depth - frozen, tokens * model.width)
    return parts | {HEAD: _head(config, item_bytes)}


def frozen_embedding(config: FinetuneConfig) -> bool:
    """Returns whether the patch embedding is frozen."""
    return config.optim.train_last >= 0 or config.adapters.rank > 0


def trained_parameters(config: FinetuneConfig) -> int:
    """Returns the number of trained parameters."""
    parts = finetune_costs(config, layer_costs.SINGLE)
    frozen = {FROZEN} | ({PATCHES} if frozen_embedding(config) else set())
    frozen |= {BLOCKS} if config.adapters.rank else set()
    held = config.model.classes * config.model.text_width if config.head.frozen else 0
    return sum(part.parameters for name, part in parts.items() if name not in frozen) - held


def _forward_only(cost: PartCost) -> PartCost:
    """Returns the cost without its backward pass, which moves about twice as many bytes as the forward pass."""
    return dataclasses.replace(cost, backward_flops=0, bytes_moved=cost.bytes_moved // 3, held_bytes=0)


def adapted_layers(config: FinetuneConfig) -> list[tuple[int, int]]:
    """Returns inputs and outputs of the adapted layers of a block: qkv, projection, and the MLP's two."""
    width, inner = config.model.width, mlp_width(config.model.width, config.model.mlp_ratio)
    return [(width, 3 * width), (width, width), (width, inner), (inner, width)]


def _adapted(config: FinetuneConfig, block: PartCost, tokens: int, item_bytes: int) -> dict[str, PartCost]:
    """Returns the cost of all blocks without weight gradients, and of their adapters; the blocks hold what both need.

    Nothing below the first block's qkv is trained, so that it computes no gradient of its input.
    """
    model, rank, adapters = config.model, config.adapters.rank, PartCost()
    for inputs, outputs in adapted_layers(config):
        down = layer_costs.linear(tokens, inputs, rank, item_bytes, bias=False)
        up = layer_costs.linear(tokens, rank, outputs, item_bytes, bias=False)
        added = PartCost(bytes_moved=7 * tokens * outputs * item_bytes)  # scaled and added; the gradient scaled
        adapters += dataclasses.replace(down, held_bytes=0) + up + added  # the block holds the input of `down`
    weights = sum(2 * tokens * inputs * outputs for inputs, outputs in adapted_layers(config))
    held = block.held_bytes + adapters.held_bytes
    one = dataclasses.replace(block, backward_flops=block.backward_flops - weights, held_bytes=held)
    blocks = costs.stack(config, one, model.depth, tokens * model.width)
    adapters = dataclasses.replace(adapters * model.depth, held_bytes=0)
    first = 2 * tokens * model.width
    return {
        BLOCKS: dataclasses.replace(blocks, backward_flops=blocks.backward_flops - first * 3 * model.width),
        ADAPTERS: dataclasses.replace(adapters, backward_flops=adapters.backward_flops - first * rank),
    }


def _head(config: FinetuneConfig, item_bytes: int) -> PartCost:
    """Returns the cost of the mean over tokens, LayerNorm and head on one vector per clip."""
    model, text = config.model, config.model.text_width
    classes = max(model.classes, 1)
    head = layer_costs.linear(1, model.width, text or classes, item_bytes)
    if text:
        head += layer_costs.linear(1, text, classes, item_bytes, bias=False) + PartCost(parameters=1)
    return layer_costs.norm(1, model.width, item_bytes) + head


def trained_matrices(config: FinetuneConfig) -> Counter[tuple[int, int]]:
    """Returns the number of matrices of each shape [rows, columns] that Muon trains."""
    width, rank, found = config.model.width, config.adapters.rank, Counter[tuple[int, int]]()
    inner = mlp_width(width, config.model.mlp_ratio)
    if rank:
        for inputs, outputs in adapted_layers(config):
            found.update({(rank, inputs): config.model.depth})
            found.update({(outputs, rank): config.model.depth})
        return found
    depth = config.model.depth - config.frozen_blocks
    return Counter({(width, width): 4 * depth, (inner, width): depth, (width, inner): depth})
