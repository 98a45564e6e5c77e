"""Lower bounds of each operator's cost, from shapes alone: bytes moved through memory and floating-point operations.

Benchmarks, rooflines and utilization figures all read these numbers, so that they count in the same way. Each input is
read once and each output is written once; data that a cache holds is not counted again. The counts leave out

- the frame after a cube, where "adjacent" reads it and its own token is not masked;
- logits: a chunk of them stays in the cache (`softmax_gradient` counts the bytes that pass through it);
- tables of one number per channel, and the reduction of a loss from one number per token to a scalar;
- the zeros of a gradient for predictions of every token.

Operations are additions, multiplications, divisions, roots, exponentials and logarithms. Where the kind of
normalization matters, `normalize="patch"` is counted: 2 operations per value to standardize and 4 for the statistics.
A uint8 clip needs the same number in integers; a float clip that is first restored by mean and std needs 2 more for
every value read.

B clips, N tokens, Nv/Nm visible/masked, P values per token, M rows, D width, V codes; item sizes in bytes.
"""

from typing import NamedTuple

INDEX_BYTES = 8
SINGLE_BYTES = 4


class Cost(NamedTuple):
    """Cost of one call of an operator."""

    bytes_moved: int
    flops: int


def draw_mask(batch: int, tokens: int) -> Cost:
    """Cost of `tube_mask` and `random_mask`: reads the step number, writes B·N token numbers."""
    return Cost((1 + batch * tokens) * INDEX_BYTES, 0)


def masked_subset(batch: int, masked: int, count: int) -> Cost:
    """Cost of `masked_subset`: reads the step number and the masked token numbers, writes the drawn ones."""
    return Cost((1 + batch * (masked + count)) * INDEX_BYTES, 0)


def motion_energy(batch: int, tokens: int, values: int, *, clip_bytes: int = 1) -> Cost:
    """Cost of the energies of `motion_tube_mask`: reads the clip, writes 8 bytes per token (4 for a float clip)."""
    energy_bytes = INDEX_BYTES if clip_bytes == 1 else SINGLE_BYTES
    return Cost(batch * tokens * (values * clip_bytes + energy_bytes), 3 * batch * tokens * values)


def gather_tubes(batch: int, visible: int, values: int, *, clip_bytes: int = 1, out_bytes: int = 2) -> Cost:
    """Cost of `gather_tubes`: reads the visible part of the clip, writes it normalized."""
    tokens = batch * visible
    return Cost(tokens * (values * (clip_bytes + out_bytes) + INDEX_BYTES), 2 * tokens * values)


def frame_difference(batch: int, tokens: int, values: int, *, clip_bytes: int = 1, tubelet: int | None = None) -> Cost:
    """Cost of `frame_difference`: reads the cubes, writes their differences in float32.

    Pass `tubelet` for "intra", which writes one frame less.
    """
    written = _target_values(values, tubelet)
    rows = batch * tokens
    return Cost(rows * (values * clip_bytes + written * SINGLE_BYTES + INDEX_BYTES), 6 * rows * values)


def masked_loss(
    batch: int, masked: int, values: int, *, clip_bytes: int = 1, pred_bytes: int = 2, tubelet: int | None = None
) -> Cost:
    """Cost of a masked loss and its gradient.

    Reads the masked part of the clip and the prediction, writes a gradient of the prediction's size. Pass `tubelet` for
    "intra", which predicts one frame less.
    """
    rows = batch * masked
    predicted = 2 * pred_bytes * _target_values(values, tubelet)
    return Cost(rows * (values * clip_bytes + predicted + INDEX_BYTES + SINGLE_BYTES), 10 * rows * values)


def linear_masked_loss(
    batch: int,
    masked: int,
    values: int,
    width: int,
    *,
    clip_bytes: int = 1,
    item_bytes: int = 2,
    tubelet: int | None = None,
) -> Cost:
    """Cost of `linear_masked_loss` and its gradients: three matrix products, and the masked loss in the cache.

    Reads the features, the weight and the masked part of the clip; writes the gradients (the weight's in float32).
    """
    rows, predicted = batch * masked, _target_values(values, tubelet)
    matrices = rows * width * 2 * item_bytes + predicted * width * (item_bytes + SINGLE_BYTES)
    clip = rows * (values * clip_bytes + INDEX_BYTES + SINGLE_BYTES)
    return Cost(matrices + clip, 6 * rows * width * predicted + 10 * rows * values)


def _target_values(values: int, tubelet: int | None) -> int:
    return values if tubelet is None else values - values // tubelet


def scale_gradient(rows: int, width: int, *, item_bytes: int = 2) -> Cost:
    """Cost of a loss's backward pass: reads the stored gradient, writes it scaled."""
    return Cost(rows * (2 * width * item_bytes + SINGLE_BYTES), rows * width)


def softmax_gradient(rows: int, codes: int, *, item_bytes: int = 2) -> Cost:
    """Cost of a pass over logits in the cache: reads them, writes their gradient in place and one loss per row."""
    return Cost(rows * (2 * codes * item_bytes + INDEX_BYTES + SINGLE_BYTES), 6 * rows * codes)


def linear_cross_entropy(rows: int, width: int, codes: int, *, item_bytes: int = 2) -> Cost:
    """Cost of `linear_cross_entropy` and its gradients: three matrix products.

    Reads both matrices and writes their gradients (the weight's in float32). The passes over the logits would add a
    share of 1/D to the operations; they are not counted.
    """
    matrices = rows * width * 2 * item_bytes + codes * width * (item_bytes + SINGLE_BYTES)
    return Cost(matrices + rows * (INDEX_BYTES + SINGLE_BYTES), 6 * rows * width * codes)
