"""Computes the squared error of masked tokens against a target built from the clip, and its gradient, in one pass.

    error[b, k]      = Σ over the token's values of (pred − target)²
    gradient[b, k]   = 2 · (pred − target)
    target           = the standardized cube ("pixel"), the same with the first frame subtracted from the later ones
                       ("joint"), or the cube's frame difference ("adjacent", "intra": frame_difference.py)

Plain PyTorch reduces `error` to the mean, the sum or one value per token. The forward pass stores the gradient;
backward multiplies it by the upstream gradient.

B clips, C channels, T frames, N tokens, Nm masked, P values per token.
"""

from collections.abc import Sequence
from typing import Any

import torch

from . import launch, reference, shapes
from .cube import NORMALIZE, cube_meta, listed_token, restoring_table, run_values, store_rounded
from .derivatives import differentiable, refuse_double_backward, refuse_transforms, wants_gradient
from .launch import jit, tl
from .masks import TubeMask, masked_index
from .scale_gradient import scale_gradient
from .targets import KINDS, token_target


@jit(do_not_specialize_on_alignment=["count", "slots", "rows", "columns"])
def _masked_loss_kernel(
    error_ptr,
    gradient_ptr,
    pred_ptr,
    video_ptr,
    index_ptr,
    affine_ptr,
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
    KIND: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EPS: tl.constexpr,
    AFFINE: tl.constexpr,
    CHANNELS: tl.constexpr,
    TUBELET: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    RUN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BYTES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    LENGTH: tl.constexpr = WIDTH * CHANNELS
    place, clip, token, inside = listed_token(index_ptr, count, slots, rows, columns)
    row, exists, target = token_target(
        video_ptr, affine_ptr, clip, token, inside, slots, rows, columns, stride_b, stride_c, stride_t, stride_h,
        stride_w, KIND, NORMALIZE, EPS, AFFINE, CHANNELS, TUBELET, HEIGHT, WIDTH, ROWS, RUN, CHANNELS_LAST, WIDE, BYTES,
        DTYPE,
    )  # fmt: skip
    FRAMES: tl.constexpr = TUBELET - 1 if KIND == 2 else TUBELET
    pred_row = (place % count).to(tl.int64)
    predicted_tokens = count
    if EVERY_TOKEN:
        pred_row = token.to(tl.int64)
        predicted_tokens = slots * rows * columns
    pred = pred_ptr + clip * pred_stride_b + pred_row * pred_stride_k
    gradient = gradient_ptr + (clip * predicted_tokens + pred_row) * (FRAMES * HEIGHT * LENGTH)
    error = tl.zeros([ROWS], DTYPE)
    factor = tl.where(inside, 2.0, float("nan")).to(DTYPE)
    for segment in tl.static_range(LENGTH // RUN):
        value, _ = run_values(segment, CHANNELS, RUN)
        value += row * LENGTH
        predicted = tl.load(pred + value, mask=exists, other=0).to(DTYPE)
        residual = tl.where(exists, predicted - target[segment], 0.0)
        error += tl.sum(residual * residual, axis=1)
        if GRADIENT:
            stored = row < FRAMES * HEIGHT
            if EVERY_TOKEN:  # a token out of range has no row in the gradient
                stored = stored & inside
            store_rounded(gradient + value, factor * residual, stored)
    tl.store(error_ptr + place, tl.where(inside, tl.sum(error, axis=0), float("nan")))


def _launch(
    pred: torch.Tensor,
    video: torch.Tensor,
    masked: torch.Tensor,
    patch_size: Sequence[int],
    target: str,
    normalize: str | None,
    eps: float,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    needs_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    grid = shapes.token_grid(video, patch_size)
    dtype = reference.compute_dtype(pred, video)
    every_token = pred.shape[1] != masked.shape[1]
    error = pred.new_empty(masked.shape, dtype=dtype)
    allocate = pred.new_zeros if every_token else pred.new_empty
    gradient = allocate(pred.shape if needs_gradient else (0,))
    if pred.stride(2) != 1:
        pred = pred.contiguous()
    table = restoring_table(video, mean, std, dtype)
    meta = cube_meta(video, patch_size, dtype)
    launch.run_kernel(
        _masked_loss_kernel,
        masked.numel(),
        error,
        gradient,
        pred,
        video,
        masked.contiguous(),
        table,
        masked.shape[1],
        grid.slots,
        grid.rows,
        grid.columns,
        *video.stride(),
        *pred.stride()[:2],
        **meta,
        EVERY_TOKEN=every_token,
        GRADIENT=needs_gradient,
        KIND=KINDS[target],
        NORMALIZE=NORMALIZE[normalize],
        EPS=eps,
        AFFINE=table is not None,
        num_warps=launch.warps("masked_loss", grid.values, video.device, scattered=not meta["CHANNELS_LAST"]),
    )
    return error, gradient


@torch.library.custom_op("mam2::masked_loss", mutates_args=())
def _masked_loss(
    pred: torch.Tensor,
    video: torch.Tensor,
    masked: torch.Tensor,
    patch_size: Sequence[int],
    target: str,
    normalize: str | None,
    eps: float,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    needs_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    if launch.active_path(pred) == "triton":
        return _launch(pred, video, masked, patch_size, target, normalize, eps, mean, std, needs_gradient)
    return reference.masked_loss(pred, video, masked, patch_size, target, normalize, eps, mean, std, needs_gradient)


@_masked_loss.register_fake
def _(
    pred: torch.Tensor,
    video: torch.Tensor,
    masked: torch.Tensor,
    patch_size: Sequence[int],
    target: str,
    normalize: str | None,
    eps: float,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    needs_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    error = pred.new_empty(masked.shape, dtype=reference.compute_dtype(pred, video))
    return error, pred.new_empty(pred.shape if needs_gradient else (0,))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    gradient = output[1]
    ctx.mark_non_differentiable(gradient)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gradient, inputs[2])


def _backward(ctx: Any, upstream: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:
    refuse_double_backward("masked loss")
    gradient, masked = ctx.saved_tensors
    if upstream is None:
        return (None,) * 10
    tokens = gradient.shape[1]
    if tokens != masked.shape[1]:
        fits = ((masked >= 0) & (masked < tokens)).all(dim=1, keepdim=True)
        factors = upstream.new_zeros(gradient.shape[:2]).scatter(1, masked.clamp(0, tokens - 1), upstream)
        # a token out of range has no gradient row to set to NaN, so the whole clip's rows become NaN
        upstream = torch.where(fits, factors, float("nan"))
    return scale_gradient(gradient, upstream), *(None,) * 9


_errors_and_gradient = differentiable(_masked_loss, _save, _backward)


def _masked_count(pred: torch.Tensor, weight: torch.Tensor | None, grid: shapes.Grid) -> int | None:
    """Returns the number of masked tokens per clip from the shape of pred or weight; None if both hold every token."""
    for tensor in (pred, weight):
        if tensor is not None and tensor.dim() > 1 and tensor.shape[1] != grid.tokens:
            return tensor.shape[1]
    return None


def _loss(
    pred: torch.Tensor,
    video: torch.Tensor,
    mask: TubeMask | torch.Tensor | None,
    patch_size: Sequence[int],
    target: str,
    normalize: str | None,
    eps: float,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    weight: torch.Tensor | None,
    reduction: str,
) -> torch.Tensor:
    grid = shapes.check_video(video, patch_size)
    values = shapes.target_values(grid, patch_size, target)
    shapes.check_choice("reduction", reduction, shapes.REDUCTIONS)
    shapes.check_deviation(normalize, patch_size, video.shape[1])
    means, stds = shapes.check_statistics(mean, std, video.shape[1])
    counted, count = None, None
    if isinstance(mask, torch.Tensor) and mask.dtype == torch.bool:
        count = _masked_count(pred, weight, grid)
        if count is None and reduction != "none":  # no need to pick the masked tokens: the others get weight 0
            shapes.check_bool_mask(mask, video, grid)
            counted, mask = mask, None
    masked = masked_index(mask, grid, video, count)
    shapes.check_pred(pred, masked, grid, values)
    if weight is not None:
        shapes.check_weight(weight, masked, grid)
    refuse_transforms("masked loss", pred)
    settings = list(patch_size), target, normalize, eps, means, stds, wants_gradient(pred)
    errors, _ = _errors_and_gradient(pred, video, masked, *settings)
    if weight is not None:
        if weight.shape != masked.shape:
            weight = weight.gather(1, masked.clamp(0, grid.tokens - 1))
        weight = weight.to(errors.dtype)
        errors = errors * weight
    if counted is not None:
        errors = torch.where(counted, errors, 0.0)
        weight = counted.to(errors.dtype) if weight is None else torch.where(counted, weight, 0.0)
    if reduction == "sum":
        return errors.sum()
    existing: int | torch.Tensor = values
    if target == "adjacent":
        last_slot = reference.lacks_next_frame(masked, grid.tokens, grid.rows * grid.columns)
        existing = values - last_slot.to(errors.dtype) * (values // patch_size[0])
    if reduction == "none":
        # with tubelets of one frame, tokens of the last slot have no values
        return errors / (existing.clamp(min=1) if isinstance(existing, torch.Tensor) else existing)
    if weight is not None:
        existing = weight * existing
    total = existing.sum() if isinstance(existing, torch.Tensor) else errors.numel() * existing
    return errors.sum() / total


def masked_pixel_loss(
    pred: torch.Tensor,
    video: torch.Tensor,
    mask: TubeMask | torch.Tensor | None,
    *,
    patch_size: Sequence[int] = (2, 16, 16),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    target: str = "pixel",
    normalize: str | None = "channel",
    eps: float = 1e-6,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """Computes the mean squared error of predicted pixels on the masked tokens.

    Args:
        pred: [B,Nm,P] predictions of the masked tokens in the order of the mask, or [B,N,P] of every token.
        video: [B,C,T,H,W], uint8 (0 to 255) or float (0 to 1), any strides; no gradient flows to it.
        mask: a TubeMask; int64 [B,Nm] token numbers, each at most once per clip; bool [B,N] with True = masked and the
            same number of masked tokens in every clip; or None: every token. With reduction="none" and a pred of every
            token, a boolean mask makes the host wait for the device, unless `weight` has shape [B,Nm].
        patch_size: (frames, height, width) of a token.
        mean, std: statistics by which a float clip was normalized, per channel; the operator undoes that first. Ignored
            for a uint8 clip, which is never normalized.
        target: "pixel": the standardized cube; "joint": its first frame, and for every later frame the standardized
            frame minus the first (MAE-DFER).
        normalize: "channel": (x − mean)/(sqrt(var) + eps) over each channel of the cube, as VideoMAE;
            "patch": (x − mean)/sqrt(var + eps) over the whole cube, as MAE and mae_st; None: pixels in [0,1].
            The variance is unbiased.
        eps: see `normalize`.
        weight: bool or real [B,Nm], a factor for the error of each masked token, for losses over a number of tokens
            that differs from clip to clip. Or [B,N], one per token: only the factors of the masked tokens are used.
        reduction: "mean" over all masked values (with `weight`: the weighted mean), "sum", or "none": [B,Nm], each
            token's mean over its values (with `weight`: times its weight). The mean over zero values is NaN, as in
            PyTorch.

    Returns:
        A scalar or [B,Nm], float32 (float64 if pred or video is), differentiable once in pred and weight.

    Raises:
        ValueError: a shape, type, device or choice is invalid; the mask contains a token of a clip twice, as a mask of
            zeros and ones does, or masks a different number of tokens than pred has.
        IndexError: a token number is out of range.
            On a GPU invalid numbers in a mask do not raise: the clip's loss and gradient are NaN instead.
    """
    shapes.check_choice("target", target, shapes.PIXEL_TARGETS)
    return _loss(pred, video, mask, patch_size, target, normalize, eps, mean, std, weight, reduction)


def masked_frame_difference_loss(
    pred: torch.Tensor,
    video: torch.Tensor,
    mask: TubeMask | torch.Tensor | None,
    *,
    patch_size: Sequence[int] = (2, 16, 16),
    difference: str = "adjacent",
    normalize: str | None = "channel",
    eps: float = 0.05,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """Computes the mean squared error of predicted motion on the masked tokens; `frame_difference` defines the target.

    Args:
        pred: [B,Nm,Pd] or [B,N,Pd]; Pd is P for "adjacent", P·(τ−1)/τ for "intra".
        difference: "adjacent": the next frame of the clip minus this frame. The clip's last frame has no next frame:
            its values of pred do not count, neither in the sum nor in the mean's divisor. "intra": within the token.
        normalize, eps: the divisor of the difference, see frame_difference.py. The default keeps a patch of one color,
            whose standard deviation is 0, from dominating the loss; eps=1e-6 is the formula of VideoMAE and MAE-DFER.
        reduction: "mean" over all existing values, "sum", or "none": [B,Nm], each token's mean over existing values.

    The other arguments, the result and the errors are those of `masked_pixel_loss`.
    """
    shapes.check_choice("difference", difference, shapes.DIFFERENCES)
    return _loss(pred, video, mask, patch_size, difference, normalize, eps, mean, std, weight, reduction)
