"""Motion target: the change of a token's pixels from one frame to the next, divided by the cube's standard deviation.

    adjacent   d[t] = (x[t+1] − x[t]) / s   for every frame t of the cube; 0 where the clip has no frame t+1
    intra      d[t] = (x[t+1] − x[t]) / s   for t+1 inside the cube: τ−1 differences
    s          "channel": sqrt(var of the cube's channel) + eps;  "patch": sqrt(var of the cube + eps);  None: 1

The variance is unbiased, over all τ frames of the cube. Standardizing the cube and then subtracting (MAE-DFER) gives
the same target, since the mean cancels. eps, in pixel units of [0,1] ("patch": their square), keeps s away from 0. A
patch of one color has a variance of 0; with eps = 1e-6 a fade by one gray level has a target of 1/255/1e-6 = 3922 and
dominates the loss. The default is therefore 0.05, 13 gray levels; eps=1e-6 is VideoMAE's formula. For "patch" the
same floor is eps = 0.05² = 0.0025. "intra" cannot explode: a change within the cube also raises its variance.

B clips, C channels, T frames, N tokens, Nm masked, Pd values of a token's difference, τ frames per tubelet.
"""

from collections.abc import Sequence

import torch

from . import launch, reference
from .cube import NORMALIZE, cube_meta, listed_token, restoring, run_values
from .launch import jit, tl
from .masks import TubeMask, masked_index
from .shapes import (
    DIFFERENCES,
    check_choice,
    check_deviation,
    check_statistics,
    check_video,
    target_values,
    token_grid,
)
from .targets import KINDS, token_target


@jit(do_not_specialize_on_alignment=["count", "slots", "rows", "columns"])
def _frame_difference_kernel(
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
    place = tl.program_id(0)
    clip, token, inside = listed_token(index_ptr, place, count, slots, rows, columns)
    strip, exists, target = token_target(
        video_ptr, clip, token, inside, slots, rows, columns, stride_b, stride_c, stride_t, stride_h, stride_w, KIND,
        NORMALIZE, EPS, AFFINE, CHANNELS, TUBELET, HEIGHT, WIDTH, PIXELS, ROWS, RUN, CHANNELS_LAST, WIDE, BYTES, DTYPE,
    )  # fmt: skip
    FRAMES: tl.constexpr = TUBELET - 1 if KIND == 2 else TUBELET
    out = out_ptr + place.to(tl.int64) * (FRAMES * HEIGHT * WIDTH * CHANNELS)
    for run in tl.static_range(len(target)):
        value = run_values(strip, run, CHANNELS, PIXELS, RUN)
        difference = tl.where(inside, tl.where(exists, target[run], 0.0), float("nan"))
        tl.store(out + value, difference, mask=strip < FRAMES * HEIGHT * WIDTH // PIXELS)


def _launch(
    video: torch.Tensor,
    index: torch.Tensor,
    patch_size: Sequence[int],
    difference: str,
    normalize: str | None,
    eps: float,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> torch.Tensor:
    grid = token_grid(video, patch_size)
    dtype = reference.compute_dtype(video)
    values = target_values(grid, patch_size, difference)
    out = video.new_empty(*index.shape, values, dtype=dtype)
    meta = cube_meta(video, patch_size, dtype, out.dtype)
    launch.run_kernel(
        _frame_difference_kernel,
        index.numel(),
        out,
        video,
        index.contiguous(),
        index.shape[1],
        grid.slots,
        grid.rows,
        grid.columns,
        *video.stride(),
        **meta,
        KIND=KINDS[difference],
        NORMALIZE=NORMALIZE[normalize],
        EPS=eps,
        AFFINE=restoring(video, mean, std),
        num_warps=launch.warps("frame_difference", grid.values, video.device),
    )
    return out


def _in_pytorch(
    video: torch.Tensor,
    index: torch.Tensor,
    patch_size: Sequence[int],
    difference: str,
    normalize: str | None,
    eps: float,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> torch.Tensor:
    dtype = reference.compute_dtype(video)
    target = reference.target(video, index, patch_size, difference, normalize, eps, mean, std, dtype)
    return target.unflatten(0, index.shape)


@torch.library.custom_op("mam2::frame_difference", mutates_args=())
def _frame_difference(
    video: torch.Tensor,
    index: torch.Tensor,
    patch_size: Sequence[int],
    difference: str,
    normalize: str | None,
    eps: float,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> torch.Tensor:
    if launch.active_path(video) == "triton":
        return _launch(video, index, patch_size, difference, normalize, eps, mean, std)
    return _in_pytorch(video, index, patch_size, difference, normalize, eps, mean, std)


@_frame_difference.register_fake
def _(
    video: torch.Tensor,
    index: torch.Tensor,
    patch_size: Sequence[int],
    difference: str,
    normalize: str | None,
    eps: float,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> torch.Tensor:
    frames = patch_size[0] - (difference == "intra")
    values = frames * patch_size[1] * patch_size[2] * video.shape[1]
    return video.new_empty(*index.shape, values, dtype=reference.compute_dtype(video))


def frame_difference(
    video: torch.Tensor,
    *,
    patch_size: Sequence[int] = (2, 16, 16),
    difference: str = "adjacent",
    normalize: str | None = "channel",
    eps: float = 0.05,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    mask: TubeMask | torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes the motion target, for inspection, plots and tests; `masked_frame_difference_loss` never stores it.

    Args:
        video: [B,C,T,H,W], uint8 (0 to 255) or float (0 to 1), any strides.
        patch_size: (frames, height, width) of a token.
        difference: "adjacent" or "intra".
        normalize: "channel", "patch" or None.
        eps: added to the standard deviation ("patch": to the variance), see the module's docstring; VideoMAE uses 1e-6.
        mean, std: statistics by which a float clip was normalized, per channel; the operator undoes that first. Ignored
            for a uint8 clip, which is never normalized.
        mask: returns only the rows of these masked tokens, as in `masked_pixel_loss`; default: every token.

    Returns:
        [B,N,Pd] or [B,Nm,Pd], value order (t,h,w,c), float32 (float64 for a float64 clip).

    Raises:
        ValueError: a shape, type, device or choice is invalid.
        IndexError: a token number is out of range (on a GPU its values are NaN instead).
    """
    grid = check_video(video, patch_size)
    check_choice("difference", difference, DIFFERENCES)
    target_values(grid, patch_size, difference)
    check_deviation(normalize, patch_size, video.shape[1])
    means, stds = check_statistics(mean, std, video.shape[1])
    index = masked_index(mask, grid, video)
    compute = _in_pytorch if launch.is_plain_cpu(video, index) else _frame_difference
    return compute(video, index, list(patch_size), difference, normalize, eps, means, stds)
