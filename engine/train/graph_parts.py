"""A step of several processes in the two parts that `cuda_graph` captures: gradients, and the update from their mean.

The gradients are parts of one tensor, which one all-reduce sums between the two graphs. DDP is released meanwhile: its
nodes of autograd belong to the stream on which it was built, and would make that stream a part of the capture.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mam2.engine.runtime.cuda import Values
from mam2.engine.train.cuda_graph import Arguments, Parts, StepFunction

ALIGNED = 64
"""Values of which each gradient's place in the tensor is a multiple, so that kernels read it in wide loads."""


def parts_of_ranks(
    model: nn.Module,
    gradients: StepFunction,
    update: Callable[[bool], Values],
    distribute: Callable[[bool], None],
    ranks: int,
) -> Parts:
    """Returns the parts of a step.

    Args:
        model: its parameters that require a gradient must all get one in every step; DDP expects the same.
        gradients: accumulates this process's gradients of one pass; returns logged values.
        update: clips the gradients, updates the weights and returns logged values.
        distribute: False replaces DDP by the module in it, True wraps it again; also releases all gradients.
        ranks: number of processes.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    places = list(itertools.accumulate((-(-p.numel() // ALIGNED) * ALIGNED for p in parameters), initial=0))
    flat: list[Tensor] = []

    def begin() -> None:
        distribute(False)
        flat.append(torch.zeros(places[-1], device=parameters[0].device))

    def undo() -> None:
        flat.clear()
        distribute(True)

    def mean_gradients(arguments: Arguments, inspect: bool) -> Values:
        flat[0].zero_()
        for parameter, place in zip(parameters, places, strict=False):
            parameter.grad = flat[0][place : place + parameter.numel()].view_as(parameter)
        values = gradients(arguments, inspect)
        flat[0].div_(ranks)
        return values

    return Parts(
        parts=[mean_gradients, lambda _, inspect: update(inspect)],
        between=lambda: dist.all_reduce(flat[0]),
        begin=begin,
        undo=undo,
    )
