"""Squared error of a linear layer's predictions for masked tokens, without storing the predictions.

    pred = hidden · weightᵀ + bias,  loss = masked_pixel_loss(pred, …)  or  masked_frame_difference_loss(pred, …)

A decoder's last layer and its loss in one operator: each chunk of the tokens takes one GEMM for the predictions, the
pass of masked_error.py that replaces them by their gradient, and two GEMMs for d_hidden and d_weight. d_weight and
d_bias are summed over the chunks in float32.

B clips, N tokens, Nm masked, D width, P values per token.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import launch, reference, shapes
from .derivatives import differentiable, refuse_double_backward, refuse_transforms, wants_gradient
from .masked_error import GOAL, Goal, launch_masked_loss, sum_of_clips
from .masked_loss import reduction_of
from .masks import TubeMask, masked_index
from .products import (
    Gradients,
    accumulation_dtype,
    add_column_sums,
    add_product,
    compute_type,
    empty_gradients,
    linear_into,
    slices,
)
from .targets import KINDS

REDUCTIONS = ("mean", "sum")
EPS = {"pixel": 1e-6, "joint": 1e-6, "adjacent": 0.05, "intra": 0.05}
"""Default eps by target: those of masked_pixel_loss and masked_frame_difference_loss."""


def _replace_by_gradient(
    pred: torch.Tensor,
    chunk: slice,
    video: torch.Tensor,
    masked: torch.Tensor,
    factors: torch.Tensor | None,
    divisor: int,
    errors: torch.Tensor,
    unweighted: torch.Tensor | None,
    needs_gradient: bool,
    goal: Goal,
) -> None:
    """Writes the chunk's errors; replaces its predictions [rows,P] by their gradient, if needed."""
    if launch.active_path(pred) == "triton":
        gradient = pred if needs_gradient else None
        whole = errors, unweighted, gradient, pred, video, masked, factors, divisor, goal
        launch_masked_loss(*whole, chunk.start, chunk.stop)
        return
    count = masked.shape[1]
    clips = slice(chunk.start // count, chunk.stop // count)  # chunks of whole clips, see _run
    own = factors[clips] if factors is not None and factors.dim() else factors
    needs = needs_gradient, unweighted is not None
    by_clip = pred.view(-1, count, pred.shape[1])
    gradient = by_clip if needs_gradient else None
    found = reference.masked_errors(by_clip, video[clips], masked[clips], own, divisor, needs, *goal, gradient)
    errors[clips] = found[0]
    if unweighted is not None:
        unweighted[clips] = found[1]


def _run(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    video: torch.Tensor,
    masked: torch.Tensor,
    factors: torch.Tensor | None,
    divisor: int,
    dtype: torch.dtype,
    needs: Sequence[bool],
    goal: Goal,
) -> tuple[torch.Tensor, torch.Tensor, Gradients]:
    """Returns errors and unweighted errors [B,Nm], and the gradients of hidden, weight and bias, in `dtype`."""
    rows, (values, width), count = masked.numel(), weight.shape, masked.shape[1]
    wide, of_factors, products = accumulation_dtype(dtype), needs[3], any(needs[:3])
    d_hidden, d_weight, d_bias = empty_gradients(hidden, weight, dtype, needs)
    d_weight.zero_()
    d_bias.zero_()
    errors = hidden.new_empty(masked.shape, dtype=torch.promote_types(wide, reference.compute_dtype(video)))
    unweighted = torch.empty_like(errors) if of_factors else None
    flat, weight = hidden.to(dtype).flatten(0, 1), weight.to(dtype)
    bias, masked = None if bias is None else bias.to(dtype), masked.contiguous()
    of_flat = d_hidden.view(-1, width) if needs[0] else d_hidden
    step = launch.chunk_rows(values, dtype, hidden.device, width)
    if launch.active_path(hidden) != "triton":
        step = max(step // max(count, 1), 1) * count
    buffer = hidden.new_empty(min(step, rows), values, dtype=dtype)
    for chunk in slices(0, rows, max(step, 1)):
        pred = buffer[: chunk.stop - chunk.start]
        linear_into(pred, flat[chunk], weight, bias)
        given = video, masked, factors, divisor, errors, unweighted
        _replace_by_gradient(pred, chunk, *given, products, goal)
        if needs[0]:
            torch.mm(pred, weight, out=of_flat[chunk])
        if needs[1]:
            add_product(d_weight, pred.t(), flat[chunk])
        if needs[2]:
            add_column_sums(d_bias, pred)
    return errors, errors.new_empty(0) if unweighted is None else unweighted, (d_hidden, d_weight, d_bias)


def _compute(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    factors: torch.Tensor | None,
    video: torch.Tensor,
    masked: torch.Tensor,
    divisor: int,
    dtype: torch.dtype,
    needs: Sequence[bool],
    *goal: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    inputs = hidden, weight, bias, video, masked, factors, divisor, dtype, needs
    errors, unweighted, gradients = _run(*inputs, Goal(*goal))
    return sum_of_clips(errors) if divisor else errors.new_full((), float("nan")), unweighted, *gradients


_linear_masked_loss = torch.library.custom_op(
    "mam2::linear_masked_loss",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor? factors, Tensor video, Tensor masked, "
    f"SymInt divisor, ScalarType dtype, bool[] needs, {GOAL}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)(_compute)


@_linear_masked_loss.register_fake
def _(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    factors: torch.Tensor | None,
    video: torch.Tensor,
    masked: torch.Tensor,
    divisor: int,
    dtype: torch.dtype,
    needs: Sequence[bool],
    *goal: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(accumulation_dtype(dtype), reference.compute_dtype(video))
    unweighted = hidden.new_empty(masked.shape if needs[3] else (0,), dtype=wide)
    return hidden.new_empty((), dtype=wide), unweighted, *empty_gradients(hidden, weight, dtype, needs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])
    hidden, weight, bias = inputs[:3]
    ctx.dtypes = hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype
    ctx.count = len(inputs)


def _backward(
    ctx: Any, scaled: Callable[..., torch.Tensor], upstream: torch.Tensor | None, *_: None
) -> tuple[torch.Tensor | None, ...]:
    refuse_double_backward("linear_masked_loss")
    if upstream is None:
        return (None,) * ctx.count
    unweighted, *stored = ctx.saved_tensors
    gradients = [
        scaled(gradient, upstream).to(dtype) if needed else None
        for gradient, dtype, needed in zip(stored, ctx.dtypes, ctx.needs_input_grad[:3], strict=True)
    ]
    of_factors = upstream * unweighted if ctx.needs_input_grad[3] else None
    return *gradients, of_factors, *(None,) * (ctx.count - 4)


_loss = differentiable(_linear_masked_loss, _compute, _save, _backward)


def linear_masked_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    video: torch.Tensor,
    mask: TubeMask | torch.Tensor | None,
    bias: torch.Tensor | None = None,
    *,
    patch_size: Sequence[int] = (2, 16, 16),
    target: str = "pixel",
    normalize: str | None = "channel",
    eps: float | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    token_weight: torch.Tensor | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """Computes the masked loss of the predictions `hidden @ weight.T + bias` without ever storing them.

    Args:
        hidden: [B,Nm,D], float, the features of the masked tokens in the order of the mask. Under autocast all matrix
            products run in the autocast type.
        weight: [P,D], as `torch.nn.Linear.weight`; P is the number of values of a token's target.
        video, mask, patch_size, normalize, mean, std: as in `masked_pixel_loss`.
        bias: [P] or None.
        target: "pixel" or "joint" (`masked_pixel_loss`), "adjacent" or "intra" (`masked_frame_difference_loss`).
        eps: default: that of the target's loss, 1e-6 or 0.05.
        token_weight: bool or real [B,Nm] or [B,N], `weight` of the masked losses.
        reduction: "mean" or "sum".

    Returns:
        A scalar, float32 (float64 if hidden or video is), differentiable once in hidden, weight, bias and token_weight.

    Raises:
        ValueError, IndexError: as the masked losses. On a GPU invalid numbers in a mask do not raise: the loss and the
            gradients that depend on them are NaN instead.
    """
    shapes.check_choice("target", target, tuple(KINDS))
    shapes.check_choice("reduction", reduction, REDUCTIONS)
    grid = shapes.check_video(video, patch_size)
    values = shapes.target_values(grid, patch_size, target)
    shapes.check_deviation(normalize, patch_size, video.shape[1])
    means, stds = shapes.check_statistics(mean, std, video.shape[1])
    if hidden.dim() != 3 or not hidden.dtype.is_floating_point or hidden.device != video.device:
        raise ValueError(
            f"hidden: expected floats [B, Nm, D] on {video.device}, "
            f"found {hidden.dtype} {list(hidden.shape)} on {hidden.device}"
        )
    if list(weight.shape) != [values, hidden.shape[2]]:
        raise ValueError(f"weight: expected {[values, hidden.shape[2]]}, found {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected {[values]}, found {list(bias.shape)}")
    dtype = compute_type(hidden, weight=weight, bias=bias)
    masked = masked_index(mask, grid, video, hidden.shape[1])
    if hidden.shape[:2] != masked.shape:
        raise ValueError(
            f"hidden: expected {[*masked.shape]} tokens, the masked ones, found {list(hidden.shape[:2])}; "
            "select the masked tokens first"
        )
    if token_weight is not None:
        shapes.check_weight(token_weight, masked, grid)
    refuse_transforms("linear_masked_loss", hidden, weight, bias)
    goal = Goal(list(patch_size), target, normalize, EPS[target] if eps is None else eps, means, stds)
    wide = torch.promote_types(accumulation_dtype(dtype), reference.compute_dtype(video))
    found = reduction_of(reduction, dtype, masked, grid, values, goal, token_weight, None, wide)
    needs = [tensor is not None and wants_gradient(tensor) for tensor in (hidden, weight, bias, found.factors)]
    inputs = hidden, weight, bias, found.factors, video, masked, found.divisor, dtype, needs
    loss = _loss(*inputs, *goal)[0]
    return loss if found.after is None else loss / found.after
