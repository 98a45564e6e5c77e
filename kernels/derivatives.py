"""Derivatives of the losses: first derivatives by backward(), also under torch.func.vmap. Others raise here."""

from collections.abc import Callable
from typing import Any

import torch
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

from . import launch
from .scale_gradient import multiplied, scaled


def refuse_double_backward(operator: str) -> None:
    """Raises RuntimeError if a backward pass is being recorded itself (`create_graph=True`)."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{operator}: double backward is not supported (its backward ran under create_graph=True); "
            "use a loss written in PyTorch for second derivatives"
        )


def differentiable(
    operator: Any, function: Callable[..., Any], save: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """Returns a differentiable function of a custom operator; `save` is as in `register_autograd`.

    `function` is what the operator runs; on a CPU it is called directly where it can be.

    `backward` takes after the context a function that multiplies a saved gradient by an upstream gradient. Eager calls
    go through an autograd.Function, which costs less host time than the registered gradient, and may overwrite the
    saved gradient. torch.compile and torch.func.vmap use the registered gradient: there the product is plain PyTorch,
    which the compiler fuses with what reads it.
    """

    def traced(ctx: Any, *upstream: Any) -> Any:
        return backward(ctx, multiplied, *upstream)

    def eager(ctx: Any, *upstream: Any) -> Any:
        return backward(ctx, scaled, *upstream)

    operator.register_autograd(traced, setup_context=save)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            tensors = (value for value in inputs if isinstance(value, torch.Tensor))
            output = (function if launch.is_plain_cpu(*tensors) else operator)(*inputs)
            save(ctx, inputs, output)
            return output

    Eager.backward = staticmethod(eager)  # type: ignore[method-assign, assignment]

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or retrieve_all_functorch_interpreters():
            return operator(*inputs)
        return Eager.apply(*inputs)

    return call


def wants_gradient(tensor: torch.Tensor) -> bool:
    """Returns whether backward may need the gradient of `tensor`; always True in torch.func.vmap, which hides it."""
    mapped = not torch.compiler.is_compiling() and bool(retrieve_all_functorch_interpreters())
    return torch.is_grad_enabled() and (tensor.requires_grad or mapped)


def refuse_transforms(operator: str, *inputs: torch.Tensor | None) -> None:
    """Raises RuntimeError under torch.func.grad, vjp, jacrev, jvp … and in forward mode: none works with the losses."""
    if torch.compiler.is_compiling():
        return
    levels = [interpreter.key() for interpreter in retrieve_all_functorch_interpreters()]
    duals = (torch.autograd.forward_ad.unpack_dual(tensor) for tensor in inputs if tensor is not None)
    if TransformType.Grad in levels or TransformType.Jvp in levels or any(dual.tangent is not None for dual in duals):
        raise RuntimeError(
            f"{operator}: torch.func's derivatives and forward mode are not supported (torch.func.vmap is); "
            "use backward() or torch.autograd.grad"
        )
