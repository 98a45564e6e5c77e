"""A whole step as a CUDA graph, taken where it is measured to be faster than launching its kernels one by one.

Before the first step of a run both ways take the same steps on its first batch, from the same weights, have to agree,
and are timed: the launched one first, whose memory is released before the other is recorded, because a graph keeps the
activations of a step to itself. Weights and moments are put back afterwards: nothing of it is left but the choice.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from mam2.engine.errors import UserError
from mam2.engine.runtime.cuda import Recorder, Values
from mam2.engine.runtime.distributed import first_line

Arguments = tuple[Any, ...]
StepFunction = Callable[[Arguments, bool], Values]
"""A step of one pass: what its objective takes, and whether it is inspected."""

RATE = 1e-3
"""Learning rate of the steps that are compared: large enough to be seen in the next loss."""
TOLERANCE = 1e-2
"""Largest relative difference of a loss or a gradient norm between the two ways, two steps deep."""
STEPS, ROUNDS = 5, 3
MARGIN = 0.99
"""The graph keeps memory of its own: it is taken where it needs less than this share of the time."""


class StepGraph:
    """A recorded step. Its inputs are copied to where the recording reads them."""

    def __init__(self, step_function: StepFunction, arguments: Arguments, recorder: Recorder) -> None:
        self._arguments = tree_map_only(Tensor, torch.clone, arguments)
        self._recorded = {
            inspect: recorder.record(lambda inspect=inspect: step_function(self._arguments, inspect))  # type: ignore[misc]
            for inspect in (False, True)
        }

    def __call__(self, arguments: Arguments, inspect: bool) -> Values:
        for held, new in zip(_tensors(self._arguments), _tensors(arguments), strict=True):
            held.copy_(new)
        replay, values = self._recorded[inspect]
        replay()
        return {name: value.clone() for name, value in values.items()}


class StepChoice(NamedTuple):
    step_function: StepFunction
    """The faster way that is right."""
    reason: str
    """For the log."""


def choose_step(
    step_function: StepFunction,
    arguments: Arguments,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    recorder: Recorder,
    *,
    compare: bool = True,
) -> StepChoice:
    """Takes steps both ways on the same input and keeps the better one.

    Weights, moments and learning rates are afterwards what they were. Where the graph is kept, the learning rates of
    the optimiser's groups are tensors: fill them, as `set_rate` does.

    Args:
        compare: False records the graph and takes it, neither compared nor timed.

    Raises:
        UserError: without `compare`, where the step cannot be recorded.
    """
    with _unchanged(model, optimizer) as put_back:
        rates = [group["lr"] for group in optimizer.param_groups]
        _set_capturable(optimizer, True)
        graph, problem = None, None
        try:
            graph, reason = (_compare if compare else _record)(step_function, arguments, optimizer, recorder, put_back)
        except RuntimeError as error:  # also of memory: a graph keeps its own
            problem = first_line(error)
            reason = f"launched kernel by kernel: it cannot be a CUDA graph ({problem})"
        if graph is None:
            _set_capturable(optimizer, False)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
    recorder.wait()
    recorder.release()
    if problem is not None and not compare:
        raise UserError(f"run.graph on: the step cannot be a CUDA graph ({problem}); set run.graph auto or off")
    return StepChoice(graph or step_function, reason)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of a step, times each group's `scale`."""
    for group in optimizer.param_groups:
        value = rate * group.get("scale", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def _compare(
    step_function: StepFunction,
    arguments: Arguments,
    optimizer: torch.optim.Optimizer,
    recorder: Recorder,
    put_back: Callable[[], None],
) -> tuple[StepGraph | None, str]:
    """The graph, or None and why not."""
    set_rate(optimizer, RATE)
    _warm_up(step_function, arguments, recorder, put_back)
    expected = _numbers(step_function, arguments)
    launched = _time_ms(step_function, arguments, recorder)
    put_back()
    recorder.release()
    graph = StepGraph(step_function, arguments, recorder)
    put_back()
    found = _numbers(graph, arguments)
    for name, value in expected.items():
        if not abs(found[name] - value) <= TOLERANCE * abs(value) + 1e-6:
            return None, f"launched kernel by kernel: as a CUDA graph {name} is {found[name]:.6g}, not {value:.6g}"
    replayed = _time_ms(graph, arguments, recorder)
    measured = f"a step of {replayed:.4g} ms replayed, {launched:.4g} ms launched kernel by kernel"
    if replayed < MARGIN * launched:
        return graph, f"one CUDA graph: {measured}"
    return None, f"launched kernel by kernel: as a CUDA graph it gains nothing ({measured})"


def _record(
    step_function: StepFunction,
    arguments: Arguments,
    optimizer: torch.optim.Optimizer,
    recorder: Recorder,
    put_back: Callable[[], None],
) -> tuple[StepGraph | None, str]:
    """The graph as it is."""
    set_rate(optimizer, RATE)
    _warm_up(step_function, arguments, recorder, put_back)
    return StepGraph(step_function, arguments, recorder), "one CUDA graph: run.graph is on, nothing was compared"


def _warm_up(
    step_function: StepFunction, arguments: Arguments, recorder: Recorder, put_back: Callable[[], None]
) -> None:
    for inspect in (True, False):
        recorder.warm_up(lambda inspect=inspect: step_function(arguments, inspect))  # type: ignore[misc]
    put_back()
    recorder.release()


def _time_ms(way: StepFunction, arguments: Arguments, recorder: Recorder) -> float:
    """Milliseconds of a step, the median of a few rounds."""
    samples = []
    for _ in range(ROUNDS):
        recorder.wait()
        start = time.perf_counter()
        for _ in range(STEPS):
            way(arguments, False)
        recorder.wait()
        samples.append(1000 * (time.perf_counter() - start) / STEPS)
    return statistics.median(samples)


def _numbers(way: StepFunction, arguments: Arguments) -> dict[str, float]:
    """Losses and gradient norm of two steps; the second sees what the first has learned."""
    found: dict[str, float] = {}
    for step in (1, 2):
        values = way(arguments, False)
        found |= {
            f"{name} of step {step}": float(value)
            for name, value in values.items()
            if name.startswith("loss/") or name == "gradient/norm"
        }
    return found


@contextmanager
def _unchanged(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Callable[[], None]]:
    """Puts weights and moments back at its end, and whenever the function it gives is called."""
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    moments = {
        parameter: {name: value.clone() for name, value in entries.items()}
        for parameter, entries in optimizer.state.items()
    }

    @torch.no_grad()
    def put_back() -> None:
        for parameter, weight in zip(model.parameters(), weights, strict=True):
            parameter.copy_(weight)
        for owner, entries in optimizer.state.items():
            before = moments.get(owner)
            for name, value in entries.items():
                # a recording keeps their places: what was not there yet begins at zero
                value.copy_(before[name]) if before else value.zero_()

    try:
        yield put_back
    finally:
        put_back()
        optimizer.zero_grad()


def _set_capturable(optimizer: torch.optim.Optimizer, capturable: bool) -> None:
    for group in optimizer.param_groups:
        group["capturable"] = capturable
        if capturable:
            device = group["params"][0].device
            group["lr"] = torch.zeros((), device=device)


def _tensors(arguments: Arguments) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
