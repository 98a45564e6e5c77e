"""Cross-entropy of a linear classifier without storing its logits: rows are processed in chunks that fit in the cache.

    logits = hidden · weightᵀ + bias,  loss[m] = log Σ exp(logits[m]) − (1−s)·logits[m, target[m]] − s·mean(logits[m])

Each chunk takes one GEMM for the logits, one pass that computes the losses and replaces the logits by their gradient,
and two GEMMs for d_hidden and d_weight (products.py). The log-sum-exp is float32;
d_weight and d_bias are summed over the chunks in float32. The gradients of a mean are final: backward does nothing if
the upstream gradient is 1.

M rows, D width, V codes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import launch
from .derivatives import differentiable, refuse_double_backward, refuse_transforms, wants_gradient
from .products import (
    accumulation_dtype,
    add_column_sums,
    add_product,
    compute_type,
    empty_gradients,
    linear_into,
    slices,
)
from .shapes import REDUCTIONS, check_choice
from .softmax_gradient import softmax_gradient_


def _run(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    upstream: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    dtype: torch.dtype,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns losses [M] and the gradients of hidden, weight and bias, which are empty if not needed.

    The gradients are those of Σ losses, or of Σ upstream · losses: `upstream` is a scalar or [M].
    """
    rows, codes = hidden.shape[0], weight.shape[0]
    wide = accumulation_dtype(dtype)
    losses = hidden.new_empty(rows, dtype=wide)
    d_hidden, d_weight, d_bias = empty_gradients(hidden, weight, dtype, needs)
    d_weight.zero_()
    d_bias.zero_()
    hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    chunk_rows = launch.chunk_rows(codes, dtype, hidden.device, hidden.shape[1])
    buffer = hidden.new_empty(min(chunk_rows, rows), codes)
    for chunk in slices(0, rows, chunk_rows):
        logits = buffer[: chunk.stop - chunk.start]
        linear_into(logits, hidden[chunk], weight, bias)
        weights = upstream[chunk] if upstream is not None and upstream.dim() else upstream
        settings = ignore_index, label_smoothing, any(needs)
        softmax_gradient_(logits, target[chunk], weights, *settings, losses[chunk])
        if needs[0]:
            torch.mm(logits, weight, out=d_hidden[chunk])
        if needs[1]:
            add_product(d_weight, logits.t(), hidden[chunk])
        if needs[2]:
            add_column_sums(d_bias, logits)
    return losses, d_hidden, d_weight, d_bias


def _sum_of(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    dtype: torch.dtype,
    needs: Sequence[bool],
    mean: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    settings = ignore_index, label_smoothing, dtype, needs
    counted = (target != ignore_index).sum() if mean else None
    scale = None if counted is None else 1 / counted.clamp(min=1).to(accumulation_dtype(dtype))
    losses, d_hidden, d_weight, d_bias = _run(hidden, weight, bias, target, scale, *settings)
    loss = losses.sum()
    if counted is not None and scale is not None:  # over zero rows the mean is NaN and the gradient 0, as in PyTorch
        loss = torch.where(counted > 0, loss * scale, float("nan"))
    return loss, d_hidden, d_weight, d_bias


def _rows_of(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    return _run(hidden, weight, bias, target, None, ignore_index, label_smoothing, dtype, (False,) * 3)[0]


@torch.library.custom_op("mam2::linear_cross_entropy_gradients", mutates_args=())
def _gradients_op(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    upstream: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    dtype: torch.dtype,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _run(hidden, weight, bias, target, upstream, ignore_index, label_smoothing, dtype, needs)[1:]


_sum_op = torch.library.custom_op("mam2::linear_cross_entropy_sum", mutates_args=())(_sum_of)


@_sum_op.register_fake
def _(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    dtype: torch.dtype,
    needs: Sequence[bool],
    mean: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    total = hidden.new_empty((), dtype=accumulation_dtype(dtype))
    return total, *empty_gradients(hidden, weight, dtype, needs)


_rows_op = torch.library.custom_op("mam2::linear_cross_entropy_rows", mutates_args=())(_rows_of)


@_rows_op.register_fake
def _(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=accumulation_dtype(dtype))


@_gradients_op.register_fake
def _(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    upstream: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    dtype: torch.dtype,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return empty_gradients(hidden, weight, dtype, needs)


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])
    hidden, weight, bias = inputs[:3]
    ctx.dtypes = hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype


def _sum_backward(
    ctx: Any, scaled: Callable[..., torch.Tensor], upstream: torch.Tensor | None, *_: None
) -> tuple[torch.Tensor | None, ...]:
    refuse_double_backward("linear_cross_entropy")
    if upstream is None:
        return (None,) * 9
    gradients = [
        scaled(gradient, upstream).to(dtype) if needed else None
        for gradient, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[:3], strict=True)
    ]
    return *gradients, *(None,) * 6


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    hidden, weight, bias, target, *ctx.settings = inputs
    ctx.save_for_backward(hidden, weight, bias, target)


def _rows_backward(ctx: Any, _: Callable[..., torch.Tensor], upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    refuse_double_backward("linear_cross_entropy")
    hidden, weight, bias, target = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    gradients = _gradients_op(hidden, weight, bias, target, upstream.contiguous(), *ctx.settings, needs)
    inputs = hidden, weight, weight if bias is None else bias
    cast = [
        gradient.to(tensor.dtype) if needed else None
        for gradient, tensor, needed in zip(gradients, inputs, needs, strict=True)
    ]
    return *cast, *(None,) * 4


_sum = differentiable(_sum_op, _sum_of, _save_gradients, _sum_backward)
_rows = differentiable(_rows_op, _rows_of, _save_inputs, _rows_backward)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> torch.Tensor:
    """Computes `cross_entropy(hidden @ weight.T + bias, target)` without ever storing the [M,V] logits.

    Args:
        hidden: [M,D], float. Under autocast all matrix products run in the autocast type.
        weight: [V,D], as `torch.nn.Linear.weight`.
        target: [M] int64, 0 to V−1, or `ignore_index`, which excludes the row.
        bias: [V] or None.
        reduction: "mean" over the rows that are not ignored, "sum", or "none": [M]. "none" computes the logits again
            in the backward pass.
        label_smoothing: share s of the target spread over all codes, 0 to 1, as in `torch.nn.CrossEntropyLoss`.

    Returns:
        A scalar or [M], float32 (float64 for float64), differentiable once in hidden, weight and bias.
        The mean over zero rows is NaN, as in PyTorch.

    Raises:
        ValueError: a shape, type or device is invalid.
        IndexError or RuntimeError: a target is out of range (on a GPU the loss and the row's gradient are NaN instead).
    """
    check_choice("reduction", reduction, REDUCTIONS)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden and weight: expected [M,D] and [V,D], found {list(hidden.shape)} and {list(weight.shape)}"
        )
    if not hidden.dtype.is_floating_point or not len(weight):
        raise ValueError(f"hidden and weight: expected floats and at least 1 code, found {hidden.dtype}, {len(weight)}")
    if target.shape != hidden.shape[:1] or target.dtype != torch.int64:
        raise ValueError(f"target: expected int64 [{hidden.shape[0]}], found {target.dtype} {list(target.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected [{weight.shape[0]}], found {list(bias.shape)}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected 0 to 1, found {label_smoothing}")
    if target.device != hidden.device:
        raise ValueError(f"target: expected the device of hidden ({hidden.device}), found {target.device}")
    dtype = compute_type(hidden, weight=weight, bias=bias)
    refuse_transforms("linear_cross_entropy", hidden, weight, bias)
    label_smoothing = float(label_smoothing)
    if reduction == "none":
        return _rows(hidden, weight, bias, target, ignore_index, label_smoothing, dtype)
    needs = [tensor is not None and wants_gradient(tensor) for tensor in (hidden, weight, bias)]
    # a float16 gradient would underflow: it is that of the sum until backward scales it
    mean = reduction == "mean" and dtype != torch.float16
    loss = _sum(hidden, weight, bias, target, ignore_index, label_smoothing, dtype, needs, mean)[0]
    if reduction == "sum" or mean:
        return loss
    counted = (target != ignore_index).sum()
    return torch.where(counted > 0, loss / counted.clamp(min=1), float("nan"))
