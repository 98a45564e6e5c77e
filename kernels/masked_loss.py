"""The masked losses: mean squared error of the masked tokens' predictions against a target built from the clip.

masked_error.py computes the error of each token and its gradient in one pass, reference.py defines both. Here the
arguments are checked, and the reduction becomes factors of the tokens, so that the gradient is final.

B clips, C channels, T frames, N tokens, Nm masked, P values per token.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from . import reference, shapes
from .derivatives import refuse_transforms, wants_gradient
from .masked_error import Goal, masked_loss, sum_of_clips
from .masks import TubeMask, masked_index


def _masked_count(pred: torch.Tensor, weight: torch.Tensor | None, grid: shapes.Grid) -> int | None:
    """Returns the number of masked tokens per clip from the shape of pred or weight; None if both hold every token."""
    for tensor in (pred, weight):
        if tensor is not None and tensor.dim() > 1 and tensor.shape[1] != grid.tokens:
            return tensor.shape[1]
    return None


class Reduction(NamedTuple):
    """How the errors of the masked tokens become a loss: Σ factor/divisor · error (or one by one), then / `after`."""

    factors: torch.Tensor | None
    """None (1), a scalar or [B,Nm]."""
    divisor: int
    after: torch.Tensor | int | None
    """Divisor of the loss, where the gradient must not hold it: a float16 gradient would underflow."""


def reduction_of(
    reduction: str,
    pred_dtype: torch.dtype,
    masked: torch.Tensor,
    grid: shapes.Grid,
    values: int,
    goal: Goal,
    weight: torch.Tensor | None,
    counted: torch.Tensor | None,
    dtype: torch.dtype,
) -> Reduction:
    """Returns the factors and the divisor of "mean", "sum" or "none", which is the mean of each token."""
    if weight is not None:
        if weight.shape != masked.shape:
            weight = weight.gather(1, masked.clamp(0, grid.tokens - 1))
        weight = weight.to(dtype)
    if counted is not None:
        weight = counted.to(dtype) if weight is None else torch.where(counted, weight, 0.0)
    if reduction == "sum":
        return Reduction(weight, 1, None)
    existing: int | torch.Tensor = values
    if goal.kind == "adjacent":  # the clip's last frame has no next one
        last_slot = reference.lacks_next_frame(masked, grid.tokens, grid.rows * grid.columns)
        existing = values - last_slot.to(dtype) * (values // goal.patch_size[0])
        if reduction == "none":  # with tubelets of one frame, tokens of the last slot have no values
            existing = existing.clamp(min=1)
    total: int | torch.Tensor = existing
    if reduction == "mean":
        if weight is not None:
            existing = weight * existing
        total = sum_of_clips(existing) if isinstance(existing, torch.Tensor) else masked.numel() * existing
    if pred_dtype == torch.float16:
        return Reduction(weight, 1, total)
    if isinstance(total, int):
        return Reduction(weight, total, None)
    # no value at all: the mean is NaN
    return Reduction(1 / total if weight is None else weight / total, 1 if masked.numel() else 0, None)


def _loss(
    pred: torch.Tensor,
    video: torch.Tensor,
    mask: TubeMask | torch.Tensor | None,
    goal: Goal,
    weight: torch.Tensor | None,
    reduction: str,
) -> torch.Tensor:
    grid = shapes.check_video(video, goal.patch_size)
    values = shapes.target_values(grid, goal.patch_size, goal.kind)
    shapes.check_choice("reduction", reduction, shapes.REDUCTIONS)
    shapes.check_deviation(goal.normalize, goal.patch_size, video.shape[1])
    means, stds = shapes.check_statistics(goal.mean, goal.std, video.shape[1])
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
    dtype = reference.compute_dtype(pred, video)
    factors, divisor, after = reduction_of(reduction, pred.dtype, masked, grid, values, goal, weight, counted, dtype)
    needs = [wants_gradient(pred), factors is not None and wants_gradient(factors)]
    settings = list(goal.patch_size), goal.kind, goal.normalize, goal.eps, means, stds
    loss, _, _ = masked_loss(pred, video, masked, factors, divisor, reduction != "none", needs, *settings)
    return loss if after is None else loss / after


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
    return _loss(pred, video, mask, Goal(patch_size, target, normalize, eps, mean, std), weight, reduction)


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
    return _loss(pred, video, mask, Goal(patch_size, difference, normalize, eps, mean, std), weight, reduction)
