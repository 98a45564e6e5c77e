"""What each operator costs at least: bytes through memory and floating-point operations, from shapes alone.

Benchmarks, rooflines and utilisation figures read these numbers, so that every one of them counts the same. Each input
is read once, each output written once; what stays in a cache (logits, the frame after a cube) is not counted.

B clips, N tokens, Nv/Nm visible/masked, P values a token, M rows, D width, V codes; item sizes in bytes.
"""

from typing import NamedTuple

INDEX_BYTES = 8
SINGLE_BYTES = 4


class Cost(NamedTuple):
    """Of one call."""

    bytes_moved: int
    flops: int


def draw_mask(batch: int, tokens: int) -> Cost:
    """`tube_mask` and `random_mask`: writes B·N token numbers."""
    return Cost(batch * tokens * INDEX_BYTES, 0)


def gather_tubes(batch: int, visible: int, values: int, *, clip_bytes: int = 1, out_bytes: int = 2) -> Cost:
    """Reads the visible part of the clip, writes it normalised."""
    tokens = batch * visible
    return Cost(tokens * (values * (clip_bytes + out_bytes) + INDEX_BYTES), 2 * tokens * values)


def frame_difference(batch: int, tokens: int, values: int, *, clip_bytes: int = 1, tubelet: int | None = None) -> Cost:
    """Reads the cubes, writes their differences in float32; `tubelet` for "intra", which writes one frame less."""
    written = values if tubelet is None else values - values // tubelet
    rows = batch * tokens
    return Cost(rows * (values * clip_bytes + written * SINGLE_BYTES + INDEX_BYTES), 6 * rows * values)


def masked_loss(batch: int, masked: int, values: int, *, clip_bytes: int = 1, pred_bytes: int = 2) -> Cost:
    """Loss and gradient: reads the masked part of the clip and the prediction, writes a gradient of its size."""
    tokens = batch * masked
    return Cost(tokens * (values * (clip_bytes + 2 * pred_bytes) + INDEX_BYTES + SINGLE_BYTES), 10 * tokens * values)


def scale_gradient(rows: int, width: int, *, item_bytes: int = 2) -> Cost:
    """The backward pass of a loss: reads its gradient, writes it scaled."""
    return Cost(rows * (2 * width * item_bytes + SINGLE_BYTES), rows * width)


def linear_cross_entropy(rows: int, width: int, codes: int, *, item_bytes: int = 2) -> Cost:
    """Loss and gradients: three products; both matrices read, their gradients written (the weight's in float32)."""
    matrices = rows * width * 2 * item_bytes + codes * width * (item_bytes + SINGLE_BYTES)
    return Cost(matrices + rows * (INDEX_BYTES + SINGLE_BYTES), 6 * rows * width * codes)
