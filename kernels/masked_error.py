# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"
# (kernels extend tuples with `+`: Triton has no unpacking)
"""Computes the squared error of masked tokens against a target built from the clip, and its gradient, in one pass.

    error[b, k]      = factor[b, k] / divisor · Σ over the token's values of (pred − target)²
    gradient[b, k]   = factor[b, k] / divisor · 2 · (pred − target)
    target           = the standardized cube ("pixel"), the same with the first frame subtracted from the later ones
                       ("joint"), or the cube's frame difference ("adjacent", "intra": frame_difference.py)

A program computes one token. Programs that go through many tokens, with the next one on its way into shared memory,
were no faster on an H200.

The gradient is final: with the factors and the divisor of a mean, it is that of the mean itself. Backward multiplies it
in place by the upstream gradient, and does nothing if that is 1. A token of factor 0 is not read.

B clips, C channels, T frames, N tokens, Nm masked, P values per token.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from . import launch, reference, shapes
from .cube import NORMALIZE, cube_meta, listed_token, restoring, run_values, store_rounded
from .derivatives import differentiable, refuse_double_backward
from .launch import jit, tl
from .targets import KINDS, token_strips, token_target


@jit(do_not_specialize=["first", "divisor"], do_not_specialize_on_alignment=["count", "slots", "rows", "columns"])
def _masked_loss_kernel(
    error_ptr,
    unweighted_ptr,
    gradient_ptr,
    pred_ptr,
    video_ptr,
    index_ptr,
    factor_ptr,
    fits_ptr,
    first: tl.int32,
    divisor: tl.int64,
    count,
    slots,
    rows,
    columns,
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    pred_stride_b,
    pred_stride_k,
    EVERY_TOKEN: tl.constexpr,
    GRADIENT: tl.constexpr,
    FACTOR_STRIDE: tl.constexpr,
    SKIP: tl.constexpr,
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
    place = first + tl.program_id(0)
    clip, token, inside = listed_token(index_ptr, place, count, slots, rows, columns)
    share = 1.0 / divisor.to(DTYPE)
    factor = share
    if FACTOR_STRIDE is not None:
        factor *= tl.load(factor_ptr + place * FACTOR_STRIDE)
    used = inside
    if SKIP:
        used = inside & (factor != 0)
    FRAMES: tl.constexpr = TUBELET - 1 if KIND == 2 else TUBELET
    pred_row = (place % count).to(tl.int64) - first
    predicted_tokens = count
    factor = tl.where(inside, factor, float("nan"))
    slope = 2.0 * factor
    if EVERY_TOKEN:
        pred_row = token.to(tl.int64)
        predicted_tokens = slots * rows * columns
        if GRADIENT:  # NaN for all tokens of a clip that has one out of range, which has no row of its own
            slope *= tl.load(fits_ptr + clip)
    pred = pred_ptr + clip * pred_stride_b + pred_row * pred_stride_k
    gradient_row = clip * predicted_tokens + pred_row
    # the predictions before the clip, so that a program waits for memory once
    strip, exists = token_strips(token, used, slots, rows, columns, KIND, TUBELET, HEIGHT, WIDTH, PIXELS, ROWS)
    predictions = ()
    for run in tl.static_range(CHANNELS * PIXELS // RUN):
        value = run_values(strip, run, CHANNELS, PIXELS, RUN)
        predictions = predictions + (tl.load(pred + value, mask=exists, other=0),)
    _, _, target = token_target(
        video_ptr, clip, token, used, slots, rows, columns, stride_b, stride_c, stride_t, stride_h, stride_w, KIND,
        NORMALIZE, EPS, AFFINE, CHANNELS, TUBELET, HEIGHT, WIDTH, PIXELS, ROWS, RUN, CHANNELS_LAST, WIDE, BYTES,
        DTYPE,
    )  # fmt: skip
    error = tl.zeros([ROWS], DTYPE)
    for run in tl.static_range(len(target)):
        residual = tl.where(exists, predictions[run].to(DTYPE) - target[run], 0.0)
        error += tl.sum(residual * residual, axis=1)
        if GRADIENT:
            stored = strip < FRAMES * HEIGHT * WIDTH // PIXELS
            if EVERY_TOKEN:  # a token out of range has no row in the gradient
                stored = stored & inside
            gradient = gradient_ptr + gradient_row * (FRAMES * HEIGHT * WIDTH * CHANNELS)
            value = run_values(strip, run, CHANNELS, PIXELS, RUN)
            store_rounded(gradient + value, slope * residual, stored)
    total = tl.sum(error, axis=0)
    tl.store(error_ptr + place, factor * total)
    if unweighted_ptr is not None:
        tl.store(unweighted_ptr + place, tl.where(inside, share * total, float("nan")))


class Goal(NamedTuple):
    """Describes the target, as the operators take it."""

    patch_size: Sequence[int]
    kind: str
    """Key of KINDS."""
    normalize: str | None
    eps: float
    mean: Sequence[float] | None
    std: Sequence[float] | None


GOAL = "int[] patch_size, str kind, str? normalize, float eps, float[]? mean, float[]? std"
"""Goal in an operator's schema."""


def launch_masked_loss(
    errors: torch.Tensor,
    unweighted: torch.Tensor | None,
    gradient: torch.Tensor | None,
    pred: torch.Tensor,
    video: torch.Tensor,
    masked: torch.Tensor,
    factors: torch.Tensor | None,
    divisor: int,
    goal: Goal,
    first: int = 0,
    last: int | None = None,
) -> None:
    """Runs the kernel on the places `first` to `last` (exclusive) of masked [B,Nm], counted through all clips.

    Writes errors and unweighted [B,Nm] and the gradient, where they are given. pred is [B,Nm,P], [B,N,P] (every token)
    or [last − first, P]; gradient is a contiguous tensor of its shape, and may be pred itself.
    """
    grid = shapes.token_grid(video, goal.patch_size)
    every_token, fits = pred.dim() == 3 and pred.shape[1] != masked.shape[1], None
    if every_token and gradient is not None:
        inside = ((masked >= 0) & (masked < grid.tokens)).all(dim=1)
        fits = torch.where(inside, 1.0, float("nan")).to(errors.dtype)
        gradient.copy_(torch.where(inside, 0.0, float("nan"))[:, None, None].expand_as(gradient))
    pred_strides = pred.stride()[:2] if pred.dim() == 3 else (masked.shape[1] * pred.stride(0), pred.stride(0))
    meta = cube_meta(video, goal.patch_size, errors.dtype, pred.dtype)
    tokens = (masked.numel() if last is None else last) - first
    warps = launch.warps("masked_loss", grid.values, video.device)
    if errors.dtype == torch.float64:  # twice the registers
        warps = max(warps, 2)
    launch.run_kernel(
        _masked_loss_kernel,
        tokens,
        errors,
        unweighted,
        gradient,
        pred,
        video,
        masked.contiguous(),
        None if factors is None else factors.contiguous(),
        fits,
        first,
        divisor,
        masked.shape[1],
        grid.slots,
        grid.rows,
        grid.columns,
        *video.stride(),
        *pred_strides,
        **meta,
        EVERY_TOKEN=every_token,
        GRADIENT=gradient is not None,
        FACTOR_STRIDE=None if factors is None else min(factors.dim(), 1),
        SKIP=factors is not None and unweighted is None,
        KIND=KINDS[goal.kind],
        NORMALIZE=NORMALIZE[goal.normalize],
        EPS=goal.eps,
        AFFINE=restoring(video, goal.mean, goal.std),
        num_warps=warps,
    )


def masked_errors(
    pred: torch.Tensor,
    video: torch.Tensor,
    masked: torch.Tensor,
    factors: torch.Tensor | None,
    divisor: int,
    needs: Sequence[bool],
    goal: Goal,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Runs the kernel, or `reference.masked_errors`, which defines the results, on the path of the device."""
    if launch.active_path(pred) != "triton":
        return reference.masked_errors(pred, video, masked, factors, divisor, needs, *goal)
    errors, unweighted, gradient = _empty_results(pred, video, masked, needs)
    if pred.stride(2) != 1:
        pred = pred.contiguous()
    written = unweighted if needs[1] else None, gradient if needs[0] else None
    launch_masked_loss(errors, *written, pred, video, masked, factors, divisor, goal)
    return errors, unweighted, gradient


def sum_of_clips(values: torch.Tensor) -> torch.Tensor:
    """Returns the sum of [B,Nm]; on a GPU clip by clip, because PyTorch sums a whole matrix in few programs."""
    return values.sum(dim=1).sum() if values.is_cuda else values.sum()


def _empty_results(
    pred: torch.Tensor, video: torch.Tensor, masked: torch.Tensor, needs: Sequence[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    errors = pred.new_empty(masked.shape, dtype=reference.compute_dtype(pred, video))
    return (
        errors,
        errors.new_empty(errors.shape if needs[1] else (0,)),
        pred.new_empty(pred.shape if needs[0] else (0,)),
    )


def _compute(
    pred: torch.Tensor,
    video: torch.Tensor,
    masked: torch.Tensor,
    factors: torch.Tensor | None,
    divisor: int,
    reduce: bool,
    needs: Sequence[bool],
    *goal: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    errors, unweighted, gradient = masked_errors(pred, video, masked, factors, divisor, needs, Goal(*goal))
    loss = sum_of_clips(errors) if divisor else errors.new_full((), float("nan"))
    return loss if reduce else errors, unweighted, gradient


_masked_loss = torch.library.custom_op(
    "mam2::masked_loss",
    mutates_args=(),
    schema="(Tensor pred, Tensor video, Tensor masked, Tensor? factors, SymInt divisor, bool reduce, bool[] needs, "
    f"{GOAL}) -> (Tensor, Tensor, Tensor)",
)(_compute)


@_masked_loss.register_fake
def _(
    pred: torch.Tensor,
    video: torch.Tensor,
    masked: torch.Tensor,
    factors: torch.Tensor | None,
    divisor: int,
    reduce: bool,
    needs: Sequence[bool],
    *goal: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    errors, unweighted, gradient = _empty_results(pred, video, masked, needs)
    return errors.new_empty(()) if reduce else errors, unweighted, gradient


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, unweighted, gradient = output
    ctx.mark_non_differentiable(unweighted, gradient)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(unweighted, gradient, inputs[2])
    ctx.count = len(inputs)


def _backward(
    ctx: Any, scaled: Callable[..., torch.Tensor], upstream: torch.Tensor | None, *_: None
) -> tuple[torch.Tensor | None, ...]:
    refuse_double_backward("masked loss")
    unweighted, gradient, masked = ctx.saved_tensors
    if upstream is None:
        return (None,) * ctx.count
    of_pred, of_factors, scale = None, None, upstream
    if ctx.needs_input_grad[3]:
        of_factors = upstream * unweighted
    if ctx.needs_input_grad[0]:
        if upstream.dim() and gradient.shape[1] != masked.shape[1]:  # of every token, 0 where no token is masked
            index = masked.clamp(0, gradient.shape[1] - 1)
            scale = upstream.new_ones(gradient.shape[:2]).scatter(1, index, upstream)
        of_pred = scaled(gradient, scale)
    return of_pred, None, None, of_factors, *(None,) * (ctx.count - 4)


masked_loss = differentiable(_masked_loss, _compute, _save, _backward)
"""masked_loss(pred, video, masked, factors, divisor, reduce, needs, *goal) -> (loss, unweighted, gradient).

The loss is the sum of the errors (`reduce`; NaN if divisor is 0) or the errors [B,Nm]. It is differentiable once in
pred and in factors of [B,Nm]; factors may also be a scalar or None. `needs`: whether pred and factors get a gradient.
"""
