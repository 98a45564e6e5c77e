# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"
# (kernels extend tuples with `+`: Triton has no unpacking)
"""Gathers the visible tokens of a clip and normalizes them for the patch embedding.

    out[b, k, (t,h,w,c)] = (x − mean[c]) / std[c],   x = video at token visible[b, k], in [0,1]

B clips, C channels, T frames, H height, W width, N tokens, Nv visible, P values per token.
"""

from collections.abc import Sequence

import torch

from . import launch, reference
from .cube import (
    cube_meta,
    cube_place,
    interleave,
    listed_token,
    load_cube,
    normalizing,
    run_values,
    store_rounded,
    strip_offsets,
)
from .launch import jit, tl
from .masks import TubeMask, without_repeats
from .shapes import check_index, check_statistics, check_video, token_grid


@jit(do_not_specialize_on_alignment=["count", "slots", "rows", "columns"])
def _gather_tubes_kernel(
    out_ptr,
    video_ptr,
    index_ptr,
    count,
    slots,
    rows,
    columns,
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
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
    place = tl.program_id(0)
    clip, token, inside = listed_token(index_ptr, place, count, slots, rows, columns)
    base, _ = cube_place(token, rows, columns, stride_t, stride_h, stride_w, TUBELET, HEIGHT, WIDTH)
    strip, _, offset = strip_offsets(stride_t, stride_h, stride_w, HEIGHT, WIDTH, PIXELS, ROWS, WIDE)
    source = video_ptr + clip * stride_b + base + offset
    mask = strip < TUBELET * HEIGHT * WIDTH // PIXELS
    cube = load_cube(
        source,
        mask & inside,
        stride_c,
        stride_w,
        None,
        CHANNELS,
        PIXELS,
        ROWS,
        RUN,
        CHANNELS_LAST,
        WIDE,
        False,
        DTYPE,
    )
    pixels = ()
    for block in tl.static_range(len(cube)):
        part = cube[block]
        factor = tl.full([], 1.0 / 255.0 if BYTES else 1.0, DTYPE)
        if AFFINE is not None:  # subtract first: a fused product plus shift would not give 0 for a value at its mean
            part -= AFFINE[0][block * CHANNELS // len(cube)]
            factor = tl.full([], AFFINE[1][block * CHANNELS // len(cube)], DTYPE)
        pixels = pixels + (part * tl.where(inside, factor, float("nan")),)
    pixels = interleave(pixels, CHANNELS, PIXELS, ROWS, RUN)
    out = out_ptr + place.to(tl.int64) * (TUBELET * HEIGHT * WIDTH * CHANNELS)
    for run in tl.static_range(len(pixels)):
        value = run_values(strip, run, CHANNELS, PIXELS, RUN)
        store_rounded(out + value, pixels[run], mask)


def _launch(
    video: torch.Tensor,
    visible: torch.Tensor,
    patch_size: Sequence[int],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    batch, count = visible.shape
    grid = token_grid(video, patch_size)
    out = video.new_empty(batch, count, grid.values, dtype=dtype)
    compute = torch.float64 if torch.float64 in (video.dtype, dtype) else torch.float32
    meta = cube_meta(video, patch_size, compute, dtype)
    launch.run_kernel(
        _gather_tubes_kernel,
        batch * count,
        out,
        video,
        visible.contiguous(),
        count,
        grid.slots,
        grid.rows,
        grid.columns,
        *video.stride(),
        **meta,
        AFFINE=normalizing(video, mean, std),
        num_warps=launch.warps("gather_tubes", grid.values, video.device),
    )
    return out


@torch.library.custom_op("mam2::gather_tubes", mutates_args=())
def _gather_tubes(
    video: torch.Tensor,
    visible: torch.Tensor,
    patch_size: Sequence[int],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    if launch.active_path(video) == "triton":
        return _launch(video, visible, patch_size, mean, std, dtype)
    return reference.gather_tubes(video, visible, patch_size, mean, std, dtype)


@_gather_tubes.register_fake
def _(
    video: torch.Tensor,
    visible: torch.Tensor,
    patch_size: Sequence[int],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    values = patch_size[0] * patch_size[1] * patch_size[2] * video.shape[1]
    return video.new_empty(*visible.shape, values, dtype=dtype)


def gather_tubes(
    video: torch.Tensor,
    visible: TubeMask | torch.Tensor,
    *,
    patch_size: Sequence[int] = (2, 16, 16),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Selects and normalizes the visible tokens.

    Args:
        video: [B,C,T,H,W], uint8 (0 to 255) or float (0 to 1), any strides; no gradient flows to it.
        visible: [B,Nv] int64 token numbers, in any order; or a TubeMask, whose visible tokens are used.
        patch_size: (frames, height, width) of a token.
        mean, std: one value per channel, in [0,1] units; None leaves the pixels in [0,1].
        dtype: type of the result; default: the autocast type under autocast, else the clip's float type, else float32.

    Returns:
        [B,Nv,P], value order (t,h,w,c).

    Raises:
        ValueError: a shape, type or device is invalid; or N token numbers for N tokens contain one twice, as a mask of
            zeros and ones does (on a GPU the clip's values are NaN instead).
        IndexError: a token number is out of range (on a GPU its values are NaN instead).
    """
    grid = check_video(video, patch_size)
    if isinstance(visible, TubeMask):
        visible = visible.visible
    check_index("visible", visible, video)
    if visible.shape[1] == grid.tokens:
        visible = without_repeats(visible, grid.tokens)
    means, stds = check_statistics(mean, std, video.shape[1])
    if dtype is None:
        if torch.is_autocast_enabled(video.device.type):
            dtype = torch.get_autocast_dtype(video.device.type)
        else:
            dtype = video.dtype if video.dtype.is_floating_point else torch.float32
    if not dtype.is_floating_point:
        raise ValueError(f"dtype: expected a float type, found {dtype}")
    gather = reference.gather_tubes if launch.is_plain_cpu(video, visible) else _gather_tubes
    return gather(video, visible, list(patch_size), means, stds, dtype)
