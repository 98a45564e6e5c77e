"""Runs a whole step as a CUDA graph, if that is measured to be faster than launching its kernels one by one.

Before the first step of a run, both variants run the same steps on its first batch, from the same weights; they must
agree, and are timed. The launched variant comes first, and its memory is released before the graph is captured, because
a graph reserves memory for the activations of a step. Weights and moments are restored afterwards.
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
"""A step of one pass; its arguments are the objective's inputs, and whether to compute the costlier figures."""

RATE = 1e-3
"""Learning rate of the compared steps: large enough to change the next loss visibly."""
TOLERANCE = 1e-2
"""Largest relative difference of a loss or gradient norm between the two variants, after two steps."""
STEPS, ROUNDS = 5, 3
MARGIN = 0.99
"""The graph is used only if it needs less than this share of the time, because it reserves memory."""


class StepGraph:
    """A captured step. Its inputs are copied to the tensors that the graph reads."""

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
    """The faster correct variant."""
    reason: str
    """Reason of the choice, for the log."""


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

    Weights, moments and learning rates are restored. If the graph is kept, the learning rates of the optimizer's groups
    are tensors, to be filled as in `set_rate`.

    Args:
        compare: False captures and uses the graph without comparing or timing it.

    Raises:
        UserError: compare is False, and the step cannot be captured.
    """
    with unchanged(model, optimizer) as put_back:
        rates = [group["lr"] for group in optimizer.param_groups]
        _set_capturable(optimizer, True)
        graph, problem = None, None
        try:
            graph, reason = (_compare if compare else _record)(step_function, arguments, optimizer, recorder, put_back)
        except RuntimeError as error:  # also out of memory, because a graph reserves memory
            problem = first_line(error)
            reason = f"launched kernel by kernel: it cannot be captured as a CUDA graph ({problem})"
        if graph is None:
            _set_capturable(optimizer, False)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
    recorder.wait()
    recorder.release()
    if problem is not None and not compare:
        raise UserError(
            f"run.graph on: the step cannot be captured as a CUDA graph ({problem}); set run.graph auto or off"
        )
    return StepChoice(graph or step_function, reason)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of a step, times each group's `scale`."""
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
    """Returns the graph, or None, and the reason."""
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
    return None, f"launched kernel by kernel: a CUDA graph is not faster ({measured})"


def _record(
    step_function: StepFunction,
    arguments: Arguments,
    optimizer: torch.optim.Optimizer,
    recorder: Recorder,
    put_back: Callable[[], None],
) -> tuple[StepGraph | None, str]:
    """Captures the graph."""
    set_rate(optimizer, RATE)
    _warm_up(step_function, arguments, recorder, put_back)
    return StepGraph(step_function, arguments, recorder), "one CUDA graph: run.graph is on, without a comparison"


def _warm_up(
    step_function: StepFunction, arguments: Arguments, recorder: Recorder, put_back: Callable[[], None]
) -> None:
    for inspect in (True, False):
        recorder.warm_up(lambda inspect=inspect: step_function(arguments, inspect))  # type: ignore[misc]
    put_back()
    recorder.release()


def _time_ms(way: StepFunction, arguments: Arguments, recorder: Recorder) -> float:
    """Returns the milliseconds of a step, the median of a few rounds."""
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
    """Returns losses and gradient norm of two steps; the second depends on the first one's update."""
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
def unchanged(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Callable[[], None]]:
    """Yields a function that restores weights and moments; also restores them at the end."""
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
                # a graph keeps their addresses, so new state is set to zero instead of being removed
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
