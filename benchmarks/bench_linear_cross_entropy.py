"""`linear_cross_entropy`, compared with logits in memory, PyTorch's chunked loss, Liger's and Apple's kernels.

The main shapes have no bias, because cut-cross-entropy supports none; the variants have one, as in the engine's head.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.check import Function, Inputs, Operator, absent, bind
from benchmarks.clips import HEAD_VARIANTS, Shape
from mam2.kernels import costs, linear_cross_entropy


def inputs(shape: Shape, device: torch.device) -> Inputs:
    """Returns random inputs whose logits have a standard deviation of 1."""
    rows = shape.batch * shape.masked
    hidden = torch.randn(rows, shape.width, device=device)
    weight = torch.randn(shape.codes, shape.width, device=device) / shape.width**0.5
    leaves = {"hidden": hidden.to(shape.dtype).requires_grad_(), "weight": weight.to(shape.dtype).requires_grad_()}
    if shape.bias:
        leaves["bias"] = torch.randn(shape.codes, device=device).to(shape.dtype).requires_grad_()
    return {**leaves, "target": torch.randint(shape.codes, (rows,), device=device)}


def whole_logits(shape: Shape, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, target, label_smoothing=shape.smoothing)


def ours(shape: Shape, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
    return linear_cross_entropy(hidden, weight, target, bias, label_smoothing=shape.smoothing)


def in_torch(shape: Shape) -> Function:
    if not (hasattr(F, "linear_cross_entropy") and hasattr(nn, "LinearCrossEntropyOptions")):
        return absent(f"torch {torch.__version__} has no F.linear_cross_entropy (added in 2.13)")
    more = {"options": nn.LinearCrossEntropyOptions(), "label_smoothing": shape.smoothing}
    return lambda hidden, weight, target, bias=None: F.linear_cross_entropy(
        hidden, weight, target, linear_bias=bias, **more
    )


def in_liger(shape: Shape, device: torch.device) -> Function:
    """Liger's loss, with float32 sums as in ours."""
    if importlib.util.find_spec("liger_kernel") is None:
        return absent("liger-kernel is not installed")
    if device.type != "cuda":
        return absent("Liger's kernels are Triton only: needs a GPU")
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(label_smoothing=shape.smoothing, accum_dtype=torch.float32)
    return lambda hidden, weight, target, bias=None: loss(weight, hidden, target, bias)


def in_cut_cross_entropy(shape: Shape, device: torch.device) -> Function:
    """Apple's cut-cross-entropy: on a GPU its kernel without the filter that drops small gradients, else compiled."""
    if shape.bias or shape.smoothing:
        return absent("cut-cross-entropy supports neither a bias nor label smoothing")
    if importlib.util.find_spec("cut_cross_entropy") is None:
        return absent("cut-cross-entropy is not installed")
    from cut_cross_entropy import linear_cross_entropy as cut

    if device.type == "cuda":
        return lambda hidden, weight, target: cut(hidden, weight, target, filter_eps=None, impl="cce")
    return lambda hidden, weight, target: cut(hidden, weight, target, impl="torch_compile")


def backward_cost(shape: Shape) -> costs.Cost:
    """Cost of scaling both gradients by the upstream gradient; the weight's gradient is summed in float32."""
    hidden = costs.scale_gradient(shape.batch * shape.masked, shape.width, item_bytes=shape.dtype.itemsize)
    weight = costs.scale_gradient(shape.codes, shape.width, item_bytes=costs.SINGLE_BYTES)
    return costs.Cost(hidden.bytes_moved + weight.bytes_moved, hidden.flops + weight.flops)


OPERATOR = Operator(
    name="linear_cross_entropy",
    inputs=inputs,
    leaves=("hidden", "weight", "bias"),
    definition=lambda shape: bind(shape, whole_logits),
    providers=lambda shape, device: {
        "ours": bind(shape, ours),
        "eager": bind(shape, whole_logits),
        "torch": in_torch(shape),
        "liger": in_liger(shape, device),
        "cut": in_cut_cross_entropy(shape, device),
    },
    cost=lambda shape: costs.linear_cross_entropy(
        shape.batch * shape.masked, shape.width, shape.codes, item_bytes=shape.dtype.itemsize
    ),
    backward_cost=backward_cost,
    variants=HEAD_VARIANTS,
)
