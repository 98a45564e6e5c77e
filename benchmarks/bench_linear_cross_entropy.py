"""`linear_cross_entropy` beside logits in memory, PyTorch's own chunks, Liger's and Apple's kernels.

Without a bias, which cut-cross-entropy does not take.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.check import Function, Inputs, Operator, absent
from benchmarks.clips import Shape
from mam2.kernels import costs, linear_cross_entropy


def inputs(shape: Shape, device: torch.device) -> Inputs:
    """Logits have a deviation of 1."""
    rows = shape.batch * shape.masked
    hidden = torch.randn(rows, shape.width, device=device)
    weight = torch.randn(shape.codes, shape.width, device=device) / shape.width**0.5
    leaves = {"hidden": hidden.to(shape.dtype).requires_grad_(), "weight": weight.to(shape.dtype).requires_grad_()}
    return {**leaves, "target": torch.randint(shape.codes, (rows,), device=device)}


def whole_logits(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), target)


def in_torch() -> Function:
    if not (hasattr(F, "linear_cross_entropy") and hasattr(nn, "LinearCrossEntropyOptions")):
        return absent(f"torch {torch.__version__} has no F.linear_cross_entropy (2.13 has)")
    options = nn.LinearCrossEntropyOptions()
    return lambda hidden, weight, target: F.linear_cross_entropy(hidden, weight, target, options=options)


def in_liger(device: torch.device) -> Function:
    if importlib.util.find_spec("liger_kernel") is None:
        return absent("liger-kernel is not installed")
    if device.type != "cuda":
        return absent("Liger's kernels are Triton only: needs a GPU")
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight, target: loss(weight, hidden, target)


def in_cut_cross_entropy(device: torch.device) -> Function:
    """Its kernel on a GPU, without its filter, which leaves out small gradients; on a CPU its compiled form."""
    if importlib.util.find_spec("cut_cross_entropy") is None:
        return absent("cut-cross-entropy is not installed")
    from cut_cross_entropy import linear_cross_entropy as cut

    if device.type == "cuda":
        return lambda hidden, weight, target: cut(hidden, weight, target, filter_eps=None, impl="cce")
    return lambda hidden, weight, target: cut(hidden, weight, target, impl="torch_compile")


OPERATOR = Operator(
    name="linear_cross_entropy",
    inputs=inputs,
    leaves=("hidden", "weight"),
    definition=lambda shape: whole_logits,
    providers=lambda shape, device: {
        "ours": lambda hidden, weight, target: linear_cross_entropy(hidden, weight, target),
        "eager": whole_logits,
        "torch": in_torch(),
        "liger": in_liger(device),
        "cut": in_cut_cross_entropy(device),
    },
    cost=lambda shape: costs.linear_cross_entropy(
        shape.batch * shape.masked, shape.width, shape.codes, item_bytes=shape.dtype.itemsize
    ),
)
