"""Costs per clip of the layers and heads that models are built from, and of an optimizer's update.

FLOPs are two per multiply-add of the matrix products and convolutions. Bytes are the memory traffic of activations:
each operator reads its inputs and writes its outputs once, as in a compiled step. Attention never writes its scores.
The residual stream and the inputs of LayerNorms are float32 (`stream_bytes`), all others have the item size of the
precision: 4, or 2 under autocast.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from mam2.engine.model.blocks import mlp_width
from mam2.engine.tokenizer.vqgan import VQGANConfig

SINGLE = 4
"""Bytes of a float32."""
MUON_ITERATIONS = 5


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


def block(
    tokens: int, width: int, ratio: float, item_bytes: int, *, layer_scale: float = 0.0, stream_bytes: int = SINGLE
) -> PartCost:
    """Returns the cost of a self-attention block. stream_bytes: item size of the residual stream."""
    return (
        norm(tokens, width, item_bytes, stream_bytes=stream_bytes)
        + linear(tokens, width, 3 * width, item_bytes, bias=False)
        + PartCost(parameters=2 * width)  # biases of queries and values
        + PartCost(held_bytes=_centered(tokens, width, item_bytes))  # in addition to the projection that contains them
        + attention(tokens, tokens, width, item_bytes)
        + linear(tokens, width, width, item_bytes)
        + mlp(tokens, width, ratio, item_bytes, stream_bytes=stream_bytes)
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


def mlp(tokens: int, width: int, ratio: float, item_bytes: int, *, stream_bytes: int = SINGLE) -> PartCost:
    """Returns the cost of LayerNorm, linear, GELU, linear."""
    inner = mlp_width(width, ratio)
    gelu = PartCost(bytes_moved=5 * tokens * inner * item_bytes, held_bytes=tokens * inner * item_bytes)
    layers = linear(tokens, width, inner, item_bytes) + gelu + linear(tokens, inner, width, item_bytes)
    return norm(tokens, width, item_bytes, stream_bytes=stream_bytes) + layers


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


def norm(rows: int, width: int, item_bytes: int, *, stream_bytes: int = SINGLE) -> PartCost:
    """Returns the cost of an addition and LayerNorm: reads both summands, writes sum and result; holds the sum.

    stream_bytes: item size of the sum.
    """
    forward = 2 * stream_bytes + 2 * item_bytes
    backward = 3 * stream_bytes + item_bytes
    return PartCost(
        parameters=2 * width, bytes_moved=rows * width * (forward + backward), held_bytes=rows * width * stream_bytes
    )


def latent_head(rows: int, width: int, outputs: int, item_bytes: int) -> PartCost:
    """Returns the cost of the head and the L1 loss, which holds the float32 differences.

    The loss reads predictions and targets and writes differences; backward writes the gradient.
    """
    moved = rows * outputs * (2 * item_bytes + 4 * SINGLE)
    loss = PartCost(bytes_moved=moved, held_bytes=rows * outputs * SINGLE)
    return linear(rows, width, outputs, item_bytes) + loss


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
    codebook = config.embed_dim * config.codes * config.codes_per_patch
    total += PartCost(parameters=codebook, forward_flops=2 * codebook * pixels)
    if config.quantizer == "gumbel":  # a convolution for the logits, in addition to the codebook
        total += PartCost(parameters=codebook + config.codes)
    return dataclasses.replace(total, held_bytes=largest)
