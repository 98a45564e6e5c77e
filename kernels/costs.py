"""What each operator costs at least: bytes through memory and floating-point operations, from shapes alone.

Benchmarks, rooflines and utilisation figures read these numbers, so that every one of them counts the same. Each input
is read once, each output written once; what a cache holds is not counted a second time. That leaves out

- the frame after a cube, where "adjacent" reads it and its own token is not masked;
- logits: a chunk of them stays in the cache (`softmax_gradient` counts what passes through it);
- tables of one number a channel, and the reduction of a loss from one number a token to a scalar;
- the zeros of a gradient for predictions of every token.

Operations are additions, multiplications, divisions, roots, exponentials and logarithms, those of `normalize="patch"`
where the kind of normalising matters: 2 a value to standardise and 4 for the statistics. A uint8 clip does the same in
integers, a float clip that is first restored by mean and std takes 2 more for every value read.

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
    """`tube_mask` and `random_mask`: reads the step's number, writes B·N token numbers."""
    return Cost((1 + batch * tokens) * INDEX_BYTES, 0)


def motion_energy(batch: int, tokens: int, values: int, *, clip_bytes: int = 1) -> Cost:
    """What `motion_tube_mask` draws by: reads the clip, writes a number a token (8 bytes for uint8, else 4)."""
    energy_bytes = INDEX_BYTES if clip_bytes == 1 else SINGLE_BYTES
    return Cost(batch * tokens * (values * clip_bytes + energy_bytes), 3 * batch * tokens * values)


def gather_tubes(batch: int, visible: int, values: int, *, clip_bytes: int = 1, out_bytes: int = 2) -> Cost:
    """Reads the visible part of the clip, writes it normalised."""
    tokens = batch * visible
    return Cost(tokens * (values * (clip_bytes + out_bytes) + INDEX_BYTES), 2 * tokens * values)


def frame_difference(batch: int, tokens: int, values: int, *, clip_bytes: int = 1, tubelet: int | None = None) -> Cost:
    """Reads the cubes, writes their differences in float32; `tubelet` for "intra", which writes one frame less."""
    written = _target_values(values, tubelet)
    rows = batch * tokens
    return Cost(rows * (values * clip_bytes + written * SINGLE_BYTES + INDEX_BYTES), 6 * rows * values)


def masked_loss(
    batch: int, masked: int, values: int, *, clip_bytes: int = 1, pred_bytes: int = 2, tubelet: int | None = None
) -> Cost:
    """Loss and gradient: reads the masked part of the clip and the prediction, writes a gradient of its size.

    `tubelet` for "intra", which predicts one frame less.
    """
    rows = batch * masked
    predicted = 2 * pred_bytes * _target_values(values, tubelet)
    return Cost(rows * (values * clip_bytes + predicted + INDEX_BYTES + SINGLE_BYTES), 10 * rows * values)


def _target_values(values: int, tubelet: int | None) -> int:
    return values if tubelet is None else values - values // tubelet


def scale_gradient(rows: int, width: int, *, item_bytes: int = 2) -> Cost:
    """The backward pass of a loss: reads its gradient, writes it scaled."""
    return Cost(rows * (2 * width * item_bytes + SINGLE_BYTES), rows * width)


def softmax_gradient(rows: int, codes: int, *, item_bytes: int = 2) -> Cost:
    """A pass over logits in the cache: reads them, writes their gradient in place, and a loss a row."""
    return Cost(rows * (2 * codes * item_bytes + INDEX_BYTES + SINGLE_BYTES), 6 * rows * codes)


def linear_cross_entropy(rows: int, width: int, codes: int, *, item_bytes: int = 2) -> Cost:
    """Loss and gradients: three products; both matrices read, their gradients written (the weight's in float32).

    The passes over the logits add 1/D to the operations.
    """
    matrices = rows * width * 2 * item_bytes + codes * width * (item_bytes + SINGLE_BYTES)
    return Cost(matrices + rows * (INDEX_BYTES + SINGLE_BYTES), 6 * rows * width * codes)
