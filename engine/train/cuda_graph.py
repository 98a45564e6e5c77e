"""Runs a whole step as a CUDA graph, unless that is measured to be slower than launching its kernels one by one.

Before the first step of a run, both variants run the same steps on its first batch, from the same weights; they must
agree, and are timed. The launched variant comes first, and its memory is released before the graph is captured, because
a graph reserves memory for the activations of a step. Weights and moments are restored afterwards.

With several processes a step is captured in two graphs, up to the gradients and from there on; between them one
all-reduce averages the gradients. DDP's exchange is not captured: DDP would have to be built on the stream of the
capture, and NCCL's watchdog cannot see a captured exchange hang. DDP overlaps its exchange with the backward pass and
the graph does not, which the comparison includes. Processes must exchange in the same way, so all choose the same. The
two norms of balanced gradients (`Balance`) are exchanged within the captured backward pass, as NCCL allows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from mam2.engine.errors import UserError
from mam2.engine.runtime.cuda import Recorder, Values
from mam2.engine.runtime.distributed import first_line

Value = TypeVar("Value")
Arguments = tuple[Any, ...]
StepFunction = Callable[[Arguments, bool], Values]
"""A step of one pass; its arguments are the objective's inputs, and whether to compute the costlier figures."""

RATE = 1e-3
"""Learning rate of the compared steps: large enough to change the next loss visibly."""
TOLERANCE = 1e-2
"""Largest relative difference of a loss or gradient norm between the two variants, after two steps."""
STEPS, ROUNDS = 5, 3
MARGIN = 1.05
"""The graph is used if it needs less than this share of the time. The comparison runs alone; in a run, launches from
Python also wait for its lock and for cores that other processes use, and a replay does not."""


class Parts(NamedTuple):
    """A step in parts, each of which is captured; between them something happens that is not."""

    parts: Sequence[StepFunction]
    between: Callable[[], None] = lambda: None
    """Called after every part but the last."""
    begin: Callable[[], None] = lambda: None
    """Called before the parts are captured, when no other variant of the step runs any more."""
    undo: Callable[[], None] = lambda: None
    """Undoes `begin`, if the graph is not kept."""


class StepGraph:
    """A captured step. Its inputs are copied to the tensors that the graph reads."""

    def __init__(self, step: Parts, arguments: Arguments, recorder: Recorder) -> None:
        self._arguments = tree_map_only(Tensor, torch.clone, arguments)
        self._between = step.between
        self._recorded = {
            inspect: [
                recorder.record(lambda part=part, inspect=inspect: part(self._arguments, inspect))  # type: ignore[misc]
                for part in step.parts
            ]
            for inspect in (False, True)
        }

    def __call__(self, arguments: Arguments, inspect: bool) -> Values:
        for held, new in zip(_tensors(self._arguments), _tensors(arguments), strict=True):
            held.copy_(new)
        found: Values = {}
        for number, (replay, values) in enumerate(self._recorded[inspect]):
            if number:
                self._between()
            replay()
            found |= values
        return {name: value.clone() for name, value in found.items()}


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
    parts: Parts | None = None,
    everywhere: Callable[[Any], list[Any]] = lambda value: [value],
) -> StepChoice:
    """Takes steps both ways on the same input and keeps one of them: the graph, unless it is wrong or slower.

    Weights, moments and learning rates are restored. If the graph is kept, the learning rates of the optimizer's groups
    are tensors, to be filled as in `set_rate`.

    Args:
        compare: False captures and uses the graph without comparing or timing it.
        parts: the step to capture; default: `step_function` as a whole.
        everywhere: returns the values of all processes for that of this one; every process calls it.

    Raises:
        UserError: compare is False, and the step cannot be captured.
    """
    parts = parts or Parts([step_function])
    comparison = _Comparison(step_function, parts, arguments, optimizer, recorder, everywhere)
    with unchanged(model, optimizer) as put_back:
        rates = [group["lr"] for group in optimizer.param_groups]
        _set_capturable(optimizer, True)
        graph, problem = None, None
        try:
            graph, reason = comparison.compared(put_back) if compare else comparison.recorded(put_back)
        except RuntimeError as error:  # also out of memory, because a graph reserves memory
            problem = first_line(error)
            reason = f"launched kernel by kernel: it cannot be captured as a CUDA graph ({problem})"
        if graph is None:
            comparison.undo()
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


class _Comparison:
    """The two variants of a step, and how all processes compare them. Each returns the graph, or None, and the reason.

    Every stage ends with an exchange of what went wrong, so that all processes raise RuntimeError in the same place.
    """

    def __init__(
        self,
        launched: StepFunction,
        parts: Parts,
        arguments: Arguments,
        optimizer: torch.optim.Optimizer,
        recorder: Recorder,
        everywhere: Callable[[Any], list[Any]],
    ) -> None:
        self._launched, self._parts, self._arguments = launched, parts, arguments
        self._optimizer, self._recorder, self._everywhere = optimizer, recorder, everywhere
        self._begun = False

    def compared(self, put_back: Callable[[], None]) -> tuple[StepGraph | None, str]:
        set_rate(self._optimizer, RATE)
        expected, launched = self._stage(lambda: self._launch(put_back))
        put_back()
        self._recorder.release()
        graph = self._record(put_back)
        put_back()
        found, replayed = self._stage(lambda: (_numbers(graph, self._arguments), self._time_ms(graph)))
        for name, value in expected.items():
            if not abs(found[name] - value) <= TOLERANCE * abs(value) + 1e-6:
                wrong = f"as a CUDA graph {name} is {found[name]:.6g}, not {value:.6g}"
                break
        else:
            wrong = ""
        if wrong := next(filter(None, self._everywhere(wrong)), ""):
            return None, f"launched kernel by kernel: {wrong}"
        launched, replayed = (max(self._everywhere(milliseconds)) for milliseconds in (launched, replayed))
        measured = f"a step of {replayed:.4g} ms replayed, {launched:.4g} ms launched kernel by kernel"
        if replayed < MARGIN * launched:
            return graph, f"one CUDA graph: {measured}"
        return None, f"launched kernel by kernel: a CUDA graph is slower ({measured})"

    def recorded(self, put_back: Callable[[], None]) -> tuple[StepGraph | None, str]:
        set_rate(self._optimizer, RATE)
        self._stage(lambda: self._warm_up(self._launched, put_back))
        return self._record(put_back), "one CUDA graph: run.graph is on, without a comparison"

    def undo(self) -> None:
        if self._begun:
            self._parts.undo()

    def _stage(self, work: Callable[[], Value]) -> Value:
        """Runs work on every process; raises RuntimeError on all if it failed on any."""
        problem, result = "", None
        try:
            result = work()
        except RuntimeError as error:
            problem = first_line(error)
        if problem := next(filter(None, self._everywhere(problem)), ""):
            raise RuntimeError(problem)
        return result  # type: ignore[return-value]

    def _launch(self, put_back: Callable[[], None]) -> tuple[dict[str, float], float]:
        self._warm_up(self._launched, put_back)
        return _numbers(self._launched, self._arguments), self._time_ms(self._launched)

    def _record(self, put_back: Callable[[], None]) -> StepGraph:
        self._parts.begin()
        self._begun = True
        if len(self._parts.parts) > 1:  # autograd's nodes are new, and belong to the stream of this warm-up
            self._stage(lambda: self._warm_up(self._in_parts, put_back))
        return self._stage(lambda: StepGraph(self._parts, self._arguments, self._recorder))

    def _in_parts(self, arguments: Arguments, inspect: bool) -> Values:
        found: Values = {}
        for number, part in enumerate(self._parts.parts):
            if number:
                self._parts.between()
            found |= part(arguments, inspect)
        return found

    def _warm_up(self, way: StepFunction, put_back: Callable[[], None]) -> None:
        for inspect in (True, False):
            self._recorder.warm_up(lambda inspect=inspect: way(self._arguments, inspect))  # type: ignore[misc]
        put_back()
        self._recorder.release()

    def _time_ms(self, way: StepFunction) -> float:
        """Returns the milliseconds of a step, the median of a few rounds."""
        samples = []
        for _ in range(ROUNDS):
            self._recorder.wait()
            start = time.perf_counter()
            for _ in range(STEPS):
                way(self._arguments, False)
            self._recorder.wait()
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
