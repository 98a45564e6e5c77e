# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"
# (kernels extend tuples with `+`: Triton has no unpacking)
"""Device functions that compute the target of a token from its cube: standardized pixels, or their differences.

The kinds of target are those of masked_loss.py and frame_difference.py; see cube.py for cubes and their segments.
"""

from .cube import cube_place, interleave, load_cube, mean_and_inverse, strip_offsets
from .launch import jit, tl

KINDS = {"pixel": 0, "adjacent": 1, "intra": 2, "joint": 3}


@jit
def has_target(frame, slot, slots, KIND: tl.constexpr, TUBELET: tl.constexpr):
    """Returns which strips [ROWS,1] have a target: a difference to the next frame needs that frame."""
    if KIND == 1:  # adjacent: the clip's last frame has no next frame
        return (frame < TUBELET - 1) | (slot < slots - 1)
    if KIND == 2:  # intra: the cube's last frame has no next frame
        return frame < TUBELET - 1
    return frame >= 0


@jit
def token_strips(
    token,
    used,
    slots,
    rows,
    columns,
    KIND: tl.constexpr,
    TUBELET: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PIXELS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Returns the strips [ROWS,1] of a token, and which of them belong to a token that is `used` and have a target."""
    STRIPS: tl.constexpr = WIDTH // PIXELS
    strip = tl.arange(0, ROWS)[:, None]
    inside = used & (strip < TUBELET * HEIGHT * STRIPS)
    return strip, inside & has_target(strip // (HEIGHT * STRIPS), token // (rows * columns), slots, KIND, TUBELET)


@jit
def cube_target(
    pointer,
    mask,
    exists,
    frame,
    stride_c,
    stride_t,
    stride_w,
    KIND: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EPS: tl.constexpr,
    AFFINE: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    VALUES: tl.constexpr,
    ROWS: tl.constexpr,
    RUN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BYTES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Returns the target of one token as runs.

    `mask` [ROWS,1] is true for the token's strips, `exists` [ROWS,1] for the strips that have a target; `frame`
    [ROWS,1] is each strip's frame in the cube. In strips without a target the segments hold undefined values.
    """
    INTEGER: tl.constexpr = BYTES and AFFINE is None
    UNIT: tl.constexpr = 255.0 if INTEGER else 1.0
    GROUPS: tl.constexpr = CHANNELS if NORMALIZE == 1 else 1
    cube = load_cube(
        pointer, mask, stride_c, stride_w, AFFINE, CHANNELS, PIXELS, ROWS, RUN, CHANNELS_LAST, WIDE, BYTES, DTYPE
    )
    other = cube
    if KIND != 0:
        if KIND == 3:  # joint: subtract the cube's first frame; the first frame itself stays unchanged
            steps = -(frame.to(tl.int64) if WIDE else frame)
            wanted = exists & (frame > 0)
        else:  # the next frame
            steps = 1
            wanted = exists
        other = load_cube(
            pointer + steps * stride_t,
            wanted,
            stride_c,
            stride_w,
            AFFINE,
            CHANNELS,
            PIXELS,
            ROWS,
            RUN,
            CHANNELS_LAST,
            WIDE,
            BYTES,
            DTYPE,
        )
    if NORMALIZE:
        means, inverses = mean_and_inverse(cube, mask, CHANNELS, VALUES, NORMALIZE, EPS, INTEGER, DTYPE)
    target = ()
    for block in tl.static_range(len(cube)):
        if KIND == 0:
            goal = cube[block].to(DTYPE)
            if NORMALIZE:
                goal -= means[block * GROUPS // len(cube)]
        elif KIND == 3:
            goal = (cube[block] - other[block]).to(DTYPE)
            if NORMALIZE:
                goal -= tl.where(frame > 0, 0.0, means[block * GROUPS // len(cube)])
        else:
            goal = (other[block] - cube[block]).to(DTYPE)
        if NORMALIZE:
            goal *= inverses[block * GROUPS // len(cube)]
        elif INTEGER:
            goal *= 1.0 / UNIT
        target = target + (goal,)
    return interleave(target, CHANNELS, PIXELS, ROWS, RUN)


@jit
def token_target(
    video_ptr,
    clip,
    token,
    used,
    slots,
    rows,
    columns,
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    KIND: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EPS: tl.constexpr,
    AFFINE: tl.constexpr,
    CHANNELS: tl.constexpr,
    TUBELET: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PIXELS: tl.constexpr,
    ROWS: tl.constexpr,
    RUN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BYTES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Returns the strips [ROWS,1] of a token, whether each has a target, and the target segments, see `cube_target`.

    `clip` and `token` are those of `listed_token`; a token that is not `used` is not read.
    """
    base, slot = cube_place(token, rows, columns, stride_t, stride_h, stride_w, TUBELET, HEIGHT, WIDTH)
    strip, frame, offset = strip_offsets(stride_t, stride_h, stride_w, HEIGHT, WIDTH, PIXELS, ROWS, WIDE)
    source = video_ptr + clip * stride_b + base + offset
    mask = used & (strip < TUBELET * HEIGHT * WIDTH // PIXELS)
    exists = mask & has_target(frame, slot, slots, KIND, TUBELET)
    target = cube_target(
        source,
        mask,
        exists,
        frame,
        stride_c,
        stride_t,
        stride_w,
        KIND,
        NORMALIZE,
        EPS,
        AFFINE,
        CHANNELS,
        PIXELS,
        TUBELET * HEIGHT * WIDTH * CHANNELS,
        ROWS,
        RUN,
        CHANNELS_LAST,
        WIDE,
        BYTES,
        DTYPE,
    )
    return strip, exists, target
