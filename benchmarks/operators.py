"""Registry of the measured operators, one bench file each, and the comparison of their providers.

A provider that fails `check.py` gets no number; ours gets none either if it launched no Triton kernel although it
should have. `median_ms` is forward and backward together, `forward_ms` the forward pass alone with its gradient,
`backward_ms` the difference. Percentages of a copy refer to a copy of the same number of bytes, timed in the same
rounds.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import (
    bench_frame_difference,
    bench_gather_tubes,
    bench_linear_cross_entropy,
    bench_linear_masked_loss,
    bench_masked_frame_difference_loss,
    bench_masked_pixel_loss,
    bench_masked_subset,
    bench_motion_tube_mask,
    bench_tube_mask,
)
from benchmarks.check import Function, Inputs, Operator, absent, exact_outputs, judge, outputs, upstream_of
from benchmarks.clips import SHAPES, Shape
from benchmarks.launches import counted, fallback
from benchmarks.timing import (
    Timing,
    ceilings,
    copies,
    dispatch_us,
    interleaved,
    kernels_of,
    launched_ms,
    peak_mib,
    ratios,
)
from mam2.engine.runtime.device import why_not_compile

if TYPE_CHECKING:
    from benchmarks.sections import Selection

OPERATORS = (
    bench_masked_pixel_loss.OPERATOR,
    bench_masked_frame_difference_loss.OPERATOR,
    bench_linear_cross_entropy.OPERATOR,
    bench_linear_masked_loss.OPERATOR,
    bench_gather_tubes.OPERATOR,
    bench_masked_subset.OPERATOR,
    bench_frame_difference.OPERATOR,
    bench_motion_tube_mask.OPERATOR,
    bench_tube_mask.OPERATOR,
)
"""Those that take most of a step first, because a time limit cuts off the end."""
MOST_INPUT_SETS = 64
SECONDS = 0.4
"""Longest time to measure one pass of one provider on a GPU."""
DISPATCH_BATCH = 8
"""Batch at which the host time of a call is measured: so small that launches outweigh the work."""


def all_providers(operator: Operator, shape: Shape, device: torch.device, *, compiled: bool) -> dict[str, Function]:
    """Returns the operator's providers and, if requested, its definition under torch.compile."""
    found = operator.providers(shape, device)
    if compiled:
        reason = why_not_compile(device)
        function = operator.definition(shape)
        found["compiled"] = absent(reason) if reason else torch.compile(function, fullgraph=True, dynamic=False)
    return found


def input_sets(operator: Operator, shape: Shape, device: torch.device) -> list[Inputs]:
    """Returns sets of inputs to use in turn: on a GPU together more than twice the size of its L2 cache."""
    count = 2
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        count = min(2 * cache // operator.cost(shape).bytes_moved + 2, MOST_INPUT_SETS)
    return [operator.inputs(shape, device) for _ in range(count)]


def whole_bytes(operator: Operator, shape: Shape) -> int:
    """Returns the declared bytes of forward and backward together."""
    backward = operator.backward_cost(shape).bytes_moved if operator.backward_cost else 0
    return operator.cost(shape).bytes_moved + backward


def figures(
    operator: Operator, shape: Shape, timing: Timing, device: torch.device, peaks: dict[str, float] | None
) -> dict[str, Any]:
    """Returns the figures derived from a time.

    On a GPU with units, on all devices as shares of the measured ceilings.
    """
    moved, flops = whole_bytes(operator, shape), operator.cost(shape).flops
    rates = {"gb_per_s": moved / timing.median_ms / 1e6, "tflop_per_s": flops / timing.median_ms / 1e9}
    found: dict[str, Any] = {"flops_per_byte": flops / moved}
    if device.type == "cuda":
        found |= timing._asdict() | rates
    if peaks:
        found["percent_of_copy"] = 100 * rates["gb_per_s"] / peaks["copy_gb_per_s"]
        found["percent_of_matmul"] = 100 * rates["tflop_per_s"] / peaks["matmul_tflop_per_s"]
    return found


def passes(timings: dict[str, Timing], name: str) -> dict[str, Any]:
    """Returns forward and backward times of a provider, each compared with a copy of its declared bytes."""
    whole = timings[name].median_ms
    if f"{name} forward" not in timings:
        return {"forward_ms": whole, "forward_percent_of_copy": 100 * timings["copy forward"].median_ms / whole}
    forward = timings[f"{name} forward"].median_ms
    found = {"forward_ms": forward, "forward_percent_of_copy": 100 * timings["copy forward"].median_ms / forward}
    backward = whole - forward
    found["backward_ms"] = backward
    if backward > 0:
        found["backward_percent_of_copy"] = 100 * timings["copy backward"].median_ms / backward
    if unit := timings.get(f"{name} unit upstream"):
        found["unit_upstream_ms"] = unit.median_ms
        # with an upstream gradient of 1, backward moves nothing
        found["unit_upstream_percent_of_copy"] = 100 * timings["copy forward"].median_ms / unit.median_ms
    return found


def compare(
    operator: Operator,
    shape: Shape,
    device: torch.device,
    *,
    compiled: bool = True,
    rounds: int = 30,
    peaks: dict[str, float] | None = None,
    providers: dict[str, Function] | None = None,
) -> list[dict[str, Any]]:
    """Returns a row per provider: its verdict and, if that is "right", its times, in interleaved rounds.

    `peaks` is the result of `timing.ceilings`. On a CPU the rows contain only ratios to `eager`.
    """
    providers = providers or all_providers(operator, shape, device, compiled=compiled)
    sets, upstream = input_sets(operator, shape, device), upstream_of(operator, shape, device)
    exact = exact_outputs(operator, shape, sets[0], upstream)
    head = {"operator": operator.name, "shape": str(shape), "batch": shape.batch}
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, list[Callable[[], Any]]] = {}
    cuda = device.type == "cuda"
    for name, provider in providers.items():
        start = time.perf_counter()
        with counted() as counter:
            rows[name] = {**head, "provider": name, **judge(operator, shape, provider, sets[0], upstream, exact)}
        if cuda:
            rows[name]["first_call_s"] = time.perf_counter() - start
        if name == "ours":
            rows[name]["path"] = "triton" if counter.names else "pytorch"
            if rows[name]["verdict"] == "right" and (reason := fallback(device, counter)):
                rows[name] |= {"verdict": "failed", "reason": reason}
        if rows[name]["verdict"] == "right":
            calls[name] = [functools.partial(outputs, operator, provider, inputs, upstream) for inputs in sets]
    del exact
    for name, mine in calls.items() if cuda else ():
        rows[name] |= {"peak_mib": peak_mib(mine[0], device), "kernels": kernels_of(mine[0])}
        rows[name]["launched_ms"] = launched_ms(mine, device)
        if shape.batch == DISPATCH_BATCH:
            rows[name]["dispatch_us"] = dispatch_us(mine)
    more = _more_calls(operator, shape, device, {name: providers[name] for name in calls}, sets, upstream)
    timings = interleaved({**calls, **more}, device, rounds=rounds, seconds=SECONDS if cuda else math.inf)
    faster = ratios({name: timings[name] for name in calls}, "eager")
    for name in calls:
        rows[name] |= {"ratio_to_eager": faster[name]}
        if cuda:
            rows[name] |= figures(operator, shape, timings[name], device, peaks) | passes(timings, name)
            if "ours" in calls:
                rows[name]["times_of_ours"] = timings[name].median_ms / timings["ours"].median_ms
    return list(rows.values())


def _more_calls(
    operator: Operator,
    shape: Shape,
    device: torch.device,
    providers: dict[str, Function],
    sets: list[Inputs],
    upstream: torch.Tensor | None,
) -> dict[str, list[Callable[[], Any]]]:
    """Returns the additional timed calls: forward alone, ours with an upstream of 1, copies of the declared bytes."""
    if not providers:
        return {}
    found = {"copy forward": copies(operator.cost(shape).bytes_moved, device)}
    if operator.leaves:
        for name, provider in providers.items():
            found[f"{name} forward"] = [functools.partial(provider, **inputs) for inputs in sets]
        if operator.backward_cost:
            found["copy backward"] = copies(operator.backward_cost(shape).bytes_moved, device)
        if "ours" in providers and upstream is not None:
            one = torch.ones_like(upstream)
            found["ours unit upstream"] = [
                functools.partial(outputs, operator, providers["ours"], inputs, one) for inputs in sets
            ]
    return found


def rows(
    device: torch.device, deadline: float, wanted: Selection, *, variants: bool = False
) -> Iterator[dict[str, Any]]:
    """Yields the measured ceilings of a GPU, then a row per operator, shape and provider.

    Without `variants` only the first shape is measured, uncompiled. With `variants` the first shape is measured
    compiled, then other layouts and types, then the other batches for the plots. A row that does not start before
    `deadline` (time.monotonic) is marked as skipped.
    """
    torch.manual_seed(0)
    cuda = device.type == "cuda"
    peaks = ceilings(device) if cuda else None
    if peaks:
        yield {"operator": "ceilings", **peaks}
    for operator, shape, compiled in plan(device, variants):
        head = {"operator": operator.name, "shape": str(shape), "batch": shape.batch}
        if not (wanted.takes("operators", operator.name) and wanted.takes("shapes", str(shape))):
            continue
        if time.monotonic() > deadline:
            yield head | {"verdict": "skipped", "reason": "out of time"}
            continue
        try:
            known = all_providers(operator, shape, device, compiled=compiled and wanted.compiled)
            chosen = {name: provider for name, provider in known.items() if wanted.takes("ways", name)}
            rounds = 30 if cuda else 5
            found = compare(operator, shape, device, rounds=rounds, peaks=peaks, providers=chosen)
            yield from (row | {"variant": shape in operator.variants} for row in found)
        except Exception as problem:  # a provider that does not fit into memory must not end the others
            yield head | {"verdict": "failed", "reason": f"{type(problem).__name__}: {problem}"[:300]}
        if compiled and wanted.compiled:  # otherwise it would only import the compiler, which takes seconds
            torch.compiler.reset()
        if cuda:
            torch.cuda.empty_cache()


def plan(device: torch.device, variants: bool) -> Iterator[tuple[Operator, Shape, bool]]:
    """Returns operators, shapes and whether to compile too, the most informative first."""
    first, *others = SHAPES[device.type]
    if not variants:
        yield from ((operator, first, False) for operator in OPERATORS)
        return
    cuda = device.type == "cuda"
    for operator in OPERATORS:
        for shape in operator.variants if cuda else operator.variants[:2]:
            small = {"batch": 1, "size": 2 * shape.patch[1], "frames": 4, "width": 16, "codes": 64}
            yield operator, shape if cuda else replace(shape, **small), False
    for shape in (first, *others) if cuda else ():
        for operator in OPERATORS:
            yield operator, shape, shape in SHAPES[device.type][:2]
