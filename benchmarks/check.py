"""Declares a measured operator, and checks every provider against float64 before it gets a number.

ours       mam2.kernels
eager      the original codebases' way, in their order: normalize and cut the whole clip, then apply a boolean mask
compiled   the definition, with token numbers for the mask, under torch.compile
others     libraries that do the same; one that cannot run here gives the reason

Differentiable operators run forward and backward, with a random upstream gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.clips import Shape
from mam2.kernels.costs import Cost

Inputs = dict[str, Tensor]
Function = Callable[..., Any]
"""A provider: a function of the inputs, passed by name."""

BUDGET = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest allowed ‖out − exact‖ / ‖exact‖ of an output by its inputs' type: a few roundings of that type."""


@dataclass(frozen=True, kw_only=True)
class Operator:
    """The declaration of one bench file."""

    name: str
    inputs: Callable[[Shape, torch.device], Inputs]
    definition: Callable[[Shape], Function]
    """Plain PyTorch that does not wait for the device: in float64 the reference, compiled one of the providers."""
    providers: Callable[[Shape, torch.device], dict[str, Function]]
    """`ours`, `eager` and libraries, by name."""
    cost: Callable[[Shape], Cost]
    backward_cost: Callable[[Shape], Cost] | None = None
    """Cost of the backward pass alone, for an operator with leaves; `cost` is then the forward pass alone."""
    variants: tuple[Shape, ...] = ()
    """Shapes in addition to those at which all operators are measured."""
    leaves: tuple[str, ...] = ()
    """Inputs that get a gradient."""
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    """Types that its inputs or outputs can have; empty if the type cannot be chosen."""
    check: Callable[[Shape, list[Tensor]], float] | None = None
    """For an operator with random output.

    Returns the error of the outputs, instead of the distance to the definition.
    """

    def leaves_in(self, inputs: Inputs) -> tuple[str, ...]:
        """Returns the names of the leaves that these inputs contain."""
        return tuple(name for name in self.leaves if name in inputs)

    def budget(self, shape: Shape) -> float:
        """Returns the largest error at which a provider counts as right."""
        if self.check:
            return 0.0
        return BUDGET[shape.dtype if shape.dtype in self.dtypes else self.dtypes[0]]


class Absent(Exception):
    """Raised by a provider that cannot run on this machine."""


def absent(reason: str) -> Function:
    """Returns a stand-in for a provider that cannot run on this machine; it raises Absent with the reason."""

    def provider(**_: Any) -> None:
        raise Absent(reason)

    return provider


def bind(shape: Shape, function: Function) -> Function:
    return lambda **inputs: function(shape, **inputs)


def outputs(operator: Operator, function: Function, inputs: Inputs, upstream: Tensor | None) -> list[Tensor]:
    """Returns a provider's outputs, then the gradients of the leaves for `upstream`."""
    result = function(**inputs)
    if operator.leaves:
        return [result, *torch.autograd.grad(result, [inputs[name] for name in operator.leaves_in(inputs)], upstream)]
    return list(result) if isinstance(result, tuple) else [result]


def upstream_of(operator: Operator, shape: Shape, device: torch.device) -> Tensor | None:
    """Returns a random gradient of the loss, 0.5 to 1.5; for float16 times the initial scale of a gradient scaler."""
    if not operator.leaves:
        return None
    return (torch.rand((), device=device) + 0.5) * (2**16 if shape.dtype == torch.float16 else 1)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Returns ‖found − exact‖ / ‖exact‖ in float64; NaN if `found` contains NaN, infinity for another shape."""
    if found.shape != exact.shape:
        return float("inf")
    return float((found.detach().double() - exact).norm() / exact.norm())


def exact_outputs(operator: Operator, shape: Shape, inputs: Inputs, upstream: Tensor | None) -> list[Tensor]:
    """Returns the outputs of the definition on the same values in float64."""
    wide = {
        name: tensor.detach().double().requires_grad_(name in operator.leaves) if tensor.is_floating_point() else tensor
        for name, tensor in inputs.items()
    }
    if "video" in wide and inputs["video"].dtype == torch.uint8:
        wide["video"] = inputs["video"].double() / 255
    function = operator.definition(shape)
    found = outputs(operator, function, wide, None if upstream is None else upstream.double())
    return [tensor.detach() for tensor in found]


def errors_of(
    operator: Operator, shape: Shape, function: Function, inputs: Inputs, upstream: Tensor | None, exact: list[Tensor]
) -> dict[str, float]:
    """Returns the relative error of each output by name: "loss" and the leaves, or numbers."""
    found = outputs(operator, function, inputs, upstream)
    if operator.check:
        return {"mask": operator.check(shape, found)}
    names = ("loss", *operator.leaves_in(inputs)) if operator.leaves else tuple(map(str, range(len(found))))
    return {name: relative_error(mine, truth) for name, mine, truth in zip(names, found, exact, strict=True)}


def worst(errors: dict[str, float]) -> float:
    """Returns the largest error; NaN counts as infinite."""
    return max((float("inf") if error != error else error) for error in errors.values())


def judge(operator: Operator, shape: Shape, provider: Function, *given: Any) -> dict[str, Any]:
    """Returns the verdict on a provider, and its error or the reason why it has none; `given` goes to `errors_of`."""
    try:
        errors = errors_of(operator, shape, provider, *given)
    except Absent as problem:
        return {"verdict": "absent", "reason": str(problem)}
    except Exception as problem:  # a provider that cannot run here must not end the others
        return {"verdict": "failed", "reason": f"{type(problem).__name__}: {problem}"[:300]}
    error = worst(errors)
    verdict = "right" if error <= operator.budget(shape) else "wrong"
    return {"error": error, "errors": errors, "verdict": verdict}
