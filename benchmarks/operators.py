"""The registry of measured operators, one bench file each, and what compares the providers of one of them.

A provider that is not right by `check.py`'s gate gets no number.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import (
    bench_frame_difference,
    bench_gather_tubes,
    bench_linear_cross_entropy,
    bench_masked_frame_difference_loss,
    bench_masked_pixel_loss,
    bench_motion_tube_mask,
    bench_tube_mask,
)
from benchmarks.check import Function, Inputs, Operator, absent, exact_outputs, judge, outputs, upstream_of
from benchmarks.clips import SHAPES, Shape
from benchmarks.timing import Timing, ceilings, dispatch_us, interleaved, peak_mib, ratios
from mam2.engine.train.runtime import why_not_compile
from mam2.kernels import active_path

OPERATORS = (
    bench_tube_mask.OPERATOR,
    bench_motion_tube_mask.OPERATOR,
    bench_gather_tubes.OPERATOR,
    bench_masked_pixel_loss.OPERATOR,
    bench_masked_frame_difference_loss.OPERATOR,
    bench_frame_difference.OPERATOR,
    bench_linear_cross_entropy.OPERATOR,
)
MOST_INPUT_SETS = 64
DISPATCH_BATCH = 8
"""Where launches outweigh the work: the batch at which the host's time for a call is measured."""


def all_providers(operator: Operator, shape: Shape, device: torch.device, *, compiled: bool) -> dict[str, Function]:
    """The operator's and, if asked for, its definition under torch.compile."""
    found = operator.providers(shape, device)
    if compiled:
        reason = why_not_compile(device)
        function = operator.definition(shape)
        found["compiled"] = absent(reason) if reason else torch.compile(function, fullgraph=True, dynamic=False)
    return found


def input_sets(operator: Operator, shape: Shape, device: torch.device) -> list[Inputs]:
    """Inputs to go through in turn: on a GPU more than twice what its L2 cache holds."""
    count = 2
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        count = min(2 * cache // operator.cost(shape).bytes_moved + 2, MOST_INPUT_SETS)
    return [operator.inputs(shape, device) for _ in range(count)]


def figures(
    operator: Operator, shape: Shape, timing: Timing, device: torch.device, peaks: dict[str, float] | None
) -> dict[str, Any]:
    """What a time says: on a GPU in its units, on either as a share of the device's measured ceilings."""
    cost = operator.cost(shape)
    rates = {
        "gb_per_s": cost.bytes_moved / timing.median_ms / 1e6,
        "tflop_per_s": cost.flops / timing.median_ms / 1e9,
    }
    found: dict[str, Any] = {"flops_per_byte": cost.flops / cost.bytes_moved}
    if device.type == "cuda":
        found |= timing._asdict() | rates
    if peaks:
        found["percent_of_copy"] = 100 * rates["gb_per_s"] / peaks["copy_gb_per_s"]
        found["percent_of_matmul"] = 100 * rates["tflop_per_s"] / peaks["matmul_tflop_per_s"]
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
    """A row for each provider: its verdict and, if that is "right", its times, in interleaved rounds.

    peaks: what `timing.ceilings` measured. On a CPU only ratios to `eager` are given.
    """
    providers = providers or all_providers(operator, shape, device, compiled=compiled)
    sets, upstream = input_sets(operator, shape, device), upstream_of(operator, shape, device)
    exact = exact_outputs(operator, shape, sets[0], upstream)
    head = {"operator": operator.name, "shape": str(shape), "batch": shape.batch}
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, list[Callable[[], Any]]] = {}
    for name, provider in providers.items():
        rows[name] = {**head, "provider": name, **judge(operator, shape, provider, sets[0], upstream, exact)}
        if rows[name]["verdict"] == "right":
            calls[name] = [functools.partial(outputs, operator, provider, inputs, upstream) for inputs in sets]
    del exact
    cuda = device.type == "cuda"
    for name, mine in calls.items():
        if cuda:
            rows[name]["peak_mib"] = peak_mib(mine[0], device)
        if cuda and shape.batch == DISPATCH_BATCH:
            rows[name]["dispatch_us"] = dispatch_us(mine)
    timings = interleaved(calls, device, rounds=rounds)
    faster = ratios(timings, "eager")
    for name, timing in timings.items():
        rows[name] |= {"ratio_to_eager": faster[name]}
        if cuda:
            rows[name] |= figures(operator, shape, timing, device, peaks)
    if "ours" in rows:
        rows["ours"]["path"] = active_path(device)
    return list(rows.values())


def rows(device: torch.device, deadline: float, *, compiled: bool) -> Iterator[dict[str, Any]]:
    """The measured ceilings of a GPU, then every operator at every shape, until `deadline` (time.monotonic).

    The shapes for the plots alone go without `compiled`: compiling takes longer than all the rest.
    """
    torch.manual_seed(0)
    cuda = device.type == "cuda"
    peaks = ceilings(device) if cuda else None
    if peaks:
        yield {"operator": "ceilings", **peaks}
    for place, shape in enumerate(SHAPES[device.type] if cuda else SHAPES[device.type][:1]):
        for operator in OPERATORS:
            head = {"operator": operator.name, "shape": str(shape), "batch": shape.batch}
            if time.monotonic() > deadline:
                yield head | {"verdict": "skipped", "reason": "out of time"}
                continue
            try:
                with_compiled = compiled and place < 2
                rounds = 30 if cuda else 10
                yield from compare(operator, shape, device, compiled=with_compiled, rounds=rounds, peaks=peaks)
            except Exception as problem:  # one that does not fit into memory leaves the others standing
                yield head | {"verdict": "failed", "reason": f"{type(problem).__name__}: {problem}"[:300]}
            torch.compiler.reset()
            if cuda:
                torch.cuda.empty_cache()
