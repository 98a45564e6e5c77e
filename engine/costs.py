"""Costs per clip of each part of a training step, from the config alone: parameters, FLOPs, bytes, held activations.

FLOPs are two per multiply-add of the matrix products and convolutions; recomputation to save memory counts once. Bytes
are the memory traffic of activations: each operator reads its inputs and writes its outputs once, as in a compiled
step; weights are counted separately (`step_bytes`). Attention never writes its scores. The residual stream and the
inputs of LayerNorms are float32, all others have the item size of the precision: 4, or 2 under autocast.

T'×H'×W' the token grid, Nv/Nm visible/masked tokens, P values per token, D width, V codes.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping

from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.config.training import TrainConfig
from mam2.engine.model.blocks import mlp_width
from mam2.engine.model.motion_targets import PIXEL_DIFFERENCES, motion_values
from mam2.engine.tokenizer.vqgan import VQGANConfig
from mam2.kernels import costs as operators

SINGLE = 4
"""Bytes of a float32."""
MUON_ITERATIONS = 5
FROZEN = ("tokenizer", "teacher")
"""Parts that no gradient trains."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartCost:
    """PartCost of a part for one clip; the parameters are those of the part."""

    parameters: int = 0
    forward_flops: int = 0
    backward_flops: int = 0
    bytes_moved: int = 0
    """Memory traffic of activations, forward and backward."""
    held_bytes: int = 0
    """Bytes of activations held from the forward to the backward pass."""

    @property
    def flops(self) -> int:
        return self.forward_flops + self.backward_flops

    def __add__(self, other: PartCost) -> PartCost:
        mine, others = dataclasses.astuple(self), dataclasses.astuple(other)
        return PartCost(**dict(zip(_FIELDS, (a + b for a, b in zip(mine, others, strict=True)), strict=True)))

    def __mul__(self, times: int) -> PartCost:
        return PartCost(**{name: times * getattr(self, name) for name in _FIELDS})


_FIELDS = tuple(field.name for field in dataclasses.fields(PartCost))


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
        one = block(tokens, width, ratio, item_bytes, layer_scale=model.layer_scale)
        return stack(config, one, model.decoder.depth, tokens * width) + norm(tokens, width, item_bytes)

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


def muon_update(matrices: Mapping[tuple[int, int], int], item_bytes: int) -> PartCost:
    """Returns the cost of Muon's update of a number of matrices of each shape [rows, columns], whatever the batch.

    An iteration on [m, n], m ≤ n, is two products of m·m·n and one of m·m·m multiply-adds.
    """
    total = PartCost()
    for (rows, columns), count in matrices.items():
        short, values = min(rows, columns), rows * columns
        gram = short**2
        iteration = PartCost(
            forward_flops=4 * short * values + 2 * short**3,
            bytes_moved=item_bytes * (3 * values + 4 * gram),
        )
        around = PartCost(parameters=values, bytes_moved=values * (24 * SINGLE + 5 * item_bytes))
        total += (iteration * MUON_ITERATIONS + around) * count
    return total


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


def stack(config: TrainConfig, one: PartCost, depth: int, inputs: int) -> PartCost:
    """The cost of successive blocks, each with `inputs` input values; recomputed blocks hold only their inputs and
    one block's activations."""
    total = one * depth
    if config.run.recompute:
        inputs_and_one = depth * inputs * SINGLE + one.held_bytes
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
    one = (
        norm(masked, width, item_bytes)
        + norm(keys, width, item_bytes) * 2
        + linear(masked, width, width, item_bytes)
        + linear(keys, width, width, item_bytes, bias=False)
        + linear(keys, width, width, item_bytes)
        + attention(masked, keys, width, item_bytes)
        + linear(masked, width, width, item_bytes)
        + mlp(masked, width, config.model.mlp_ratio, item_bytes)
        + scaling(masked, width, item_bytes, config.model.layer_scale)
    )
    inputs = (masked + (keys if everything else 0)) * width
    total = stack(config, one, sizes.depth, inputs) + norm(masked, width, item_bytes)
    if not everything and not config.run.recompute:  # all blocks share the same visible latents
        total += PartCost(held_bytes=-(sizes.depth - 1) * keys * width * SINGLE)
    return total + projection(config, visible, item_bytes)


def latent_head(rows: int, width: int, outputs: int, item_bytes: int) -> PartCost:
    """Returns the cost of the head and the L1 loss, which holds the float32 differences.

    The loss reads predictions and targets and writes differences; backward writes the gradient.
    """
    moved = rows * outputs * (2 * item_bytes + 4 * SINGLE)
    loss = PartCost(bytes_moved=moved, held_bytes=rows * outputs * SINGLE)
    return linear(rows, width, outputs, item_bytes) + loss


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


def code_head(rows: int, width: int, codes: int, item_bytes: int) -> PartCost:
    """Returns the cost of head and cross-entropy, which hold their gradients instead of the logits."""
    product = 2 * rows * width * codes
    return PartCost(
        parameters=(width + 1) * codes,
        forward_flops=product,
        backward_flops=2 * product,
        bytes_moved=3 * rows * width * item_bytes,
        held_bytes=2 * rows * width * item_bytes,
    )


def block(tokens: int, width: int, ratio: float, item_bytes: int, *, layer_scale: float = 0.0) -> PartCost:
    """Returns the cost of a self-attention block."""
    return (
        norm(tokens, width, item_bytes)
        + linear(tokens, width, 3 * width, item_bytes, bias=False)
        + PartCost(parameters=2 * width)  # biases of queries and values
        + PartCost(held_bytes=_centered(tokens, width, item_bytes))  # in addition to the projection that contains them
        + attention(tokens, tokens, width, item_bytes)
        + linear(tokens, width, width, item_bytes)
        + mlp(tokens, width, ratio, item_bytes)
        + scaling(tokens, width, item_bytes, layer_scale)
    )


def scaling(tokens: int, width: int, item_bytes: int, layer_scale: float) -> PartCost:
    """Returns the cost of LayerScale on a block's two branches.

    Holds both, reads them again, writes their gradients.
    """
    if not layer_scale:
        return PartCost()
    branches = 2 * tokens * width * item_bytes
    return PartCost(parameters=2 * width, bytes_moved=2 * branches, held_bytes=branches)


def mlp(tokens: int, width: int, ratio: float, item_bytes: int) -> PartCost:
    """Returns the cost of LayerNorm, linear, GELU, linear."""
    inner = mlp_width(width, ratio)
    gelu = PartCost(bytes_moved=5 * tokens * inner * item_bytes, held_bytes=tokens * inner * item_bytes)
    layers = linear(tokens, width, inner, item_bytes) + gelu + linear(tokens, inner, width, item_bytes)
    return norm(tokens, width, item_bytes) + layers


def attention(queries: int, keys: int, width: int, item_bytes: int) -> PartCost:
    """Returns the cost of the two products of all heads, and of four in backward. The next layer holds the result.

    In 16 bits the keys are read twice and written once to center them.
    """
    products = 4 * queries * keys * width
    return PartCost(
        forward_flops=products,
        backward_flops=2 * products,
        bytes_moved=6 * (queries + keys) * width * item_bytes + 3 * _centered(keys, width, item_bytes),
        held_bytes=(queries + 2 * keys) * width * item_bytes,
    )


def _centered(keys: int, width: int, item_bytes: int) -> int:
    """Returns the bytes of a block's centered keys; 0 in float32."""
    return keys * width * item_bytes if item_bytes == 2 else 0


def linear(
    rows: int, inputs: int, outputs: int, item_bytes: int, *, bias: bool = True, input_gradient: bool = True
) -> PartCost:
    """Returns the cost of a linear layer, which holds its input.

    Backward: gradients of the weight and, if asked, the input.
    """
    product = 2 * rows * inputs * outputs
    backward = 2 if input_gradient else 1
    return PartCost(
        parameters=(inputs + bias) * outputs,
        forward_flops=product,
        backward_flops=backward * product,
        bytes_moved=(1 + backward) * rows * (inputs + outputs) * item_bytes,
        held_bytes=rows * inputs * item_bytes,
    )


def norm(rows: int, width: int, item_bytes: int) -> PartCost:
    """Returns the cost of an addition and LayerNorm: reads both summands, writes sum and result; holds the sum."""
    forward = 2 * SINGLE + 2 * item_bytes
    backward = 3 * SINGLE + item_bytes
    return PartCost(
        parameters=2 * width, bytes_moved=rows * width * (forward + backward), held_bytes=rows * width * SINGLE
    )


def tokenizer_image(config: VQGANConfig, code_map: tuple[int, ...], item_bytes: int) -> PartCost:
    """Returns the forward cost of the codes of one image with an h×w code map; holds the largest set of activations."""
    pixels = math.prod(code_map) * config.factor**2
    total = PartCost()
    largest = 0

    def conv(width_in: int, width_out: int, kernel: int, *, normed: bool = True) -> None:
        nonlocal total, largest
        weights = width_in * width_out * kernel**2
        # a preceding normalization reads and writes the input once more
        moved = pixels * (width_in * (3 if normed else 1) + width_out) * item_bytes
        total += PartCost(parameters=weights + width_out, forward_flops=2 * weights * pixels, bytes_moved=moved)
        largest = max(largest, pixels * (2 * width_in + width_out) * item_bytes)

    def normalization(width: int) -> None:
        nonlocal total
        total += PartCost(parameters=2 * width)

    def residual(width_in: int, width_out: int) -> None:
        for width in (width_in, width_out):
            normalization(width)
            conv(width, width_out, 3)
        if width_in != width_out:
            conv(width_in, width_out, 1, normed=False)

    def attend(width: int) -> None:
        nonlocal total
        normalization(width)
        for _ in range(4):
            conv(width, width, 1, normed=False)
        total += PartCost(forward_flops=4 * pixels**2 * width, bytes_moved=4 * pixels * width * item_bytes)

    width = config.channels
    conv(config.image_channels, width, 3, normed=False)
    last = len(config.channel_multipliers) - 1
    for level, multiplier in enumerate(config.channel_multipliers):
        for _ in range(config.res_blocks):
            residual(width, config.channels * multiplier)
            width = config.channels * multiplier
            if level in config.attention_levels:
                attend(width)
        if level < last:
            pixels //= 4
            conv(width, width, 3, normed=False)
    residual(width, width)
    attend(width)
    residual(width, width)
    normalization(width)
    conv(width, config.z_channels, 3)
    conv(config.z_channels, config.embed_dim, 1, normed=False)
    if config.patch_path:
        values = config.image_channels * config.factor**2
        inward = values * config.embed_dim
        moved = pixels * (values + config.embed_dim) * SINGLE
        total += PartCost(parameters=inward + config.embed_dim, forward_flops=2 * inward * pixels, bytes_moved=moved)
    codebook = config.embed_dim * config.codes
    total += PartCost(parameters=codebook, forward_flops=2 * codebook * pixels)
    if config.quantizer == "gumbel":  # a convolution for the logits, in addition to the codebook
        total += PartCost(parameters=codebook + config.codes)
    return dataclasses.replace(total, held_bytes=largest)
