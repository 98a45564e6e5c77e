"""Costs per clip of each part of a training step, from the config alone: parameters, FLOPs, bytes, held activations.

layer_costs.py has the costs of single layers and says what counts. Recomputation to save memory counts once; the bytes
of weights are counted separately (`step_bytes`).

T'×H'×W' the token grid, Nv/Nm visible/masked tokens, P values per token, D width, V codes.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.config.training import TrainConfig
from mam2.engine.layer_costs import (
    SINGLE,
    PartCost,
    attention,
    block,
    code_head,
    latent_head,
    linear,
    mlp,
    muon_update,
    norm,
    scaling,
    tokenizer_image,
)
from mam2.engine.model.blocks import mlp_width
from mam2.engine.model.motion_targets import PIXEL_DIFFERENCES, motion_values
from mam2.engine.tokenizer.vqgan import VQGANConfig
from mam2.kernels import costs as operators

FROZEN = ("tokenizer", "teacher")
"""Parts that no gradient trains."""


def part_costs(
    config: PretrainConfig, codes: int = 0, tokenizer: VQGANConfig | None = None, *, item_bytes: int = 2
) -> dict[str, PartCost]:
    """Returns the cost of every part of a step by name, in order.

    Args:
        config: a run's config.
        codes: codebook size V; needed only if codes are predicted.
        tokenizer: the tokenizer that computes the codes in the step; None if they come from a cache.
        item_bytes: item size of the inputs and outputs of matrix products.
    """
    masked = config.decoded_tokens
    visible = math.prod(config.grid) - config.masked_tokens
    model, width, ratio = config.model, config.model.decoder.width, config.model.mlp_ratio
    values = math.prod(config.patch_size) * config.data.channels
    read = operators.gather_tubes(1, visible, values, out_bytes=item_bytes).bytes_moved
    parts = {
        "encoder": linear(visible, values, model.width, item_bytes, input_gradient=False)
        + PartCost(bytes_moved=read)
        + encoder_blocks(config, visible, item_bytes)
    }

    def decoder(tokens: int) -> PartCost:
        stream = stream_bytes(config, item_bytes)
        one = block(tokens, width, ratio, item_bytes, layer_scale=model.layer_scale, stream_bytes=stream)
        blocks = stack(config, one, model.decoder.depth, tokens * width, stream_bytes=stream)
        return blocks + norm(tokens, width, item_bytes, stream_bytes=stream)

    def pixel_head(outputs: int, *, stored: bool = False) -> PartCost:
        """Returns the cost of a last layer and its loss; `stored`: the predictions pass through memory."""
        layer = linear(masked, width, outputs, item_bytes)
        if stored:
            loss = operators.masked_loss(1, masked, outputs, pred_bytes=item_bytes).bytes_moved
            return layer + PartCost(bytes_moved=loss, held_bytes=masked * outputs * item_bytes)
        moved = operators.linear_masked_loss(1, masked, outputs, width, item_bytes=item_bytes).bytes_moved
        return dataclasses.replace(layer, bytes_moved=moved)

    tokens = visible + masked
    if model.objective != "mam2":
        project = linear(visible, model.width, width, item_bytes, bias=False) + PartCost(parameters=width)
        return parts | {"decoder": project + decoder(tokens), "head and pixel loss": pixel_head(values)}
    decoded = masked
    if model.regressor.depth:
        parts["regressor"] = regressor(config, visible, masked, item_bytes)
    else:
        parts["projection"] = projection(config, visible, item_bytes)
        decoded = tokens
    if config.loss.appearance_target == "codes":
        heads = code_head(masked, width, codes, item_bytes) * math.prod(config.code_shape)
        parts |= {"appearance decoder": decoder(decoded), "code head and loss": heads}
    elif config.loss.appearance_target == "pixels":
        parts |= {"appearance decoder": decoder(decoded), "pixel head and loss": pixel_head(values)}
    elif config.loss.appearance_target == "latents":
        predicted = tokens if config.loss.visible else masked
        parts |= {
            "appearance decoder": decoder(tokens if config.loss.visible else decoded),
            "latent head and loss": latent_head(predicted, width, model.width, item_bytes),
            "teacher": teacher(config, item_bytes),
        }
    if motion := motion_values(config.loss.motion_target, config.patch_size, config.data.channels):
        stored = config.loss.motion_target not in PIXEL_DIFFERENCES
        parts |= {"motion decoder": decoder(decoded), "motion head and loss": pixel_head(motion, stored=stored)}
    if config.loss.alignment:
        target = linear(masked, values, model.width, item_bytes) + encoder_blocks(config, masked, item_bytes)
        target += dataclasses.replace(projection(config, masked, item_bytes), parameters=0)
        parts["alignment"] = PartCost(forward_flops=target.forward_flops, bytes_moved=target.bytes_moved // 3)
    if tokenizer:
        parts["tokenizer"] = tokenizer_image(tokenizer, config.grid[1:], item_bytes) * config.tokenized_frames
        parts["tokenizer"] = dataclasses.replace(
            parts["tokenizer"], parameters=tokenizer_image(tokenizer, config.grid[1:], item_bytes).parameters
        )
    return parts


def step_flops(config: PretrainConfig, codes: int = 0, tokenizer: VQGANConfig | None = None) -> dict[str, int]:
    """Returns the FLOPs per clip of each part, forward and backward; arguments as in `part_costs`."""
    return {name: cost.flops for name, cost in part_costs(config, codes, tokenizer).items()}


def step_bytes(config: PretrainConfig, parameters: int, item_bytes: int) -> int:
    """Returns the bytes per step that do not depend on clips: weights (read twice, and cast), gradients, optimizer.

    parameters: number of trained parameters. A teacher's weights are read, cast and updated with the encoder's.
    """
    cast = SINGLE + item_bytes if item_bytes != SINGLE else 0
    by_muon = muon(config, item_bytes)
    adamw = 7 * SINGLE * (parameters - by_muon.parameters)
    followed = teacher(config, item_bytes).parameters if config.needs_teacher else 0
    following = followed * (cast + item_bytes + 3 * SINGLE)
    return parameters * (cast + 2 * item_bytes + SINGLE) + adamw + by_muon.bytes_moved + following


def state_bytes(config: PretrainConfig, parameters: int) -> int:
    """Bytes of the optimizer's state: two moments of AdamW, one of Muon."""
    return SINGLE * (2 * parameters - muon(config, SINGLE).parameters)


def muon(config: PretrainConfig, item_bytes: int) -> PartCost:
    """Returns the cost of Muon's part of an optimizer step; each process does all of it. Nothing for AdamW."""
    return muon_update(hidden_matrix_shapes(config), item_bytes) if config.optim.name == "muon" else PartCost()


def hidden_matrix_shapes(config: PretrainConfig) -> Counter[tuple[int, int]]:
    """How many matrices of each shape [rows, columns] the blocks have, a fused projection counted as its three."""
    model, found = config.model, Counter[tuple[int, int]]()
    decoders = 1
    if model.objective == "mam2":
        decoders = sum(target != "none" for target in (config.loss.appearance_target, config.loss.motion_target))
    depths = [(model.width, model.depth), (model.decoder.width, decoders * model.decoder.depth)]
    if model.objective == "mam2":
        depths.append((model.regressor.width, model.regressor.depth))
    for width, depth in depths:
        inner = mlp_width(width, model.mlp_ratio)
        found.update({(width, width): 4 * depth})
        found.update({(inner, width): depth})
        found.update({(width, inner): depth})
    return found


def encoder_blocks(config: PretrainConfig, tokens: int, item_bytes: int) -> PartCost:
    """Returns the cost of the encoder without its patch embedding, on `tokens` tokens."""
    model = config.model
    one = block(tokens, model.width, model.mlp_ratio, item_bytes, layer_scale=model.layer_scale)
    return stack(config, one, model.depth, tokens * model.width) + norm(tokens, model.width, item_bytes)


def stream_bytes(config: PretrainConfig, item_bytes: int) -> int:
    """Returns the item size of the residual stream of regressor and decoders."""
    return min(item_bytes, SINGLE) if config.model.residual == "bfloat16" else SINGLE


def stack(config: TrainConfig, one: PartCost, depth: int, inputs: int, *, stream_bytes: int = SINGLE) -> PartCost:
    """The cost of successive blocks, each with `inputs` input values; recomputed blocks hold only their inputs and
    one block's activations."""
    total = one * depth
    if config.run.recompute:
        inputs_and_one = depth * inputs * stream_bytes + one.held_bytes
        return dataclasses.replace(total, held_bytes=min(inputs_and_one, total.held_bytes))
    return total


def projection(config: PretrainConfig, visible: int, item_bytes: int) -> PartCost:
    """Returns the cost of the projection to the regressor's width, if it differs, and of the mask token."""
    model, width = config.model, config.model.regressor.width
    cost = PartCost(parameters=width)
    if model.width != width:
        cost += linear(visible, model.width, width, item_bytes)
        if model.projection_norm:
            cost += norm(visible, width, item_bytes)
    return cost


def regressor(config: PretrainConfig, visible: int, masked: int, item_bytes: int) -> PartCost:
    sizes = config.model.regressor
    width, everything = sizes.width, sizes.keys == "all"
    keys = visible + masked if everything else visible
    stream = stream_bytes(config, item_bytes)
    one = (
        norm(masked, width, item_bytes)  # of sums with the positions, which are float32
        + norm(keys, width, item_bytes)
        + norm(keys, width, item_bytes, stream_bytes=stream)
        + linear(masked, width, width, item_bytes)
        + linear(keys, width, width, item_bytes, bias=False)
        + linear(keys, width, width, item_bytes)
        + attention(masked, keys, width, item_bytes)
        + linear(masked, width, width, item_bytes)
        + mlp(masked, width, config.model.mlp_ratio, item_bytes, stream_bytes=stream)
        + scaling(masked, width, item_bytes, config.model.layer_scale)
    )
    inputs = (masked + (keys if everything else 0)) * width
    total = stack(config, one, sizes.depth, inputs, stream_bytes=stream) + norm(masked, width, item_bytes)
    if not everything and not config.run.recompute:  # all blocks share the same visible latents
        total += PartCost(held_bytes=-(sizes.depth - 1) * keys * width * stream)
    return total + projection(config, visible, item_bytes)


def teacher(config: PretrainConfig, item_bytes: int) -> PartCost:
    """Returns the cost of the teacher's forward pass on all tokens of a clip; it holds nothing for a backward pass."""
    tokens, values = math.prod(config.grid), math.prod(config.patch_size) * config.data.channels
    forward = linear(tokens, values, config.model.width, item_bytes) + encoder_blocks(config, tokens, item_bytes)
    read = operators.gather_tubes(1, tokens, values, out_bytes=item_bytes).bytes_moved
    return PartCost(
        parameters=forward.parameters,
        forward_flops=forward.forward_flops,
        bytes_moved=forward.bytes_moved // 3 + read,
    )
