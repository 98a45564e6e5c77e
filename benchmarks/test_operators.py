"""`make bench`: the operators under pytest-benchmark; each provider is checked before it is timed."""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.check import Operator, exact_outputs, judge, outputs, upstream_of
from benchmarks.clips import SHAPES, Shape
from benchmarks.operators import OPERATORS, all_providers, input_sets
from benchmarks.timing import peak_mib, prepare, summary

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cases() -> Iterator[Any]:
    """Returns every operator × batch × provider.

    On a CPU, where compiling takes longest, `compiled` at one batch only.
    """
    for operator in OPERATORS:
        for place, shape in enumerate(SHAPES[DEVICE.type]):
            for provider in all_providers(operator, shape, DEVICE, compiled=DEVICE.type == "cuda" or place == 0):
                yield pytest.param(operator, shape, provider, id=f"{operator.name}-B{shape.batch}-{provider}")


@pytest.mark.parametrize(("operator", "shape", "provider"), cases())
def test_operator(
    benchmark: Any, rows: list[dict[str, Any]], peaks: dict[str, float], operator: Operator, shape: Shape, provider: str
) -> None:
    torch.manual_seed(0)
    function = all_providers(operator, shape, DEVICE, compiled=provider == "compiled")[provider]
    sets, upstream = input_sets(operator, shape, DEVICE), upstream_of(operator, shape, DEVICE)
    exact = exact_outputs(operator, shape, sets[0], upstream)
    verdict = judge(operator, shape, function, sets[0], upstream, exact)
    row = {"operator": operator.name, "shape": shape, "batch": shape.batch, "provider": provider, **verdict}
    rows.append(row)
    if row["verdict"] == "absent":
        pytest.skip(row["reason"])
    assert row["verdict"] == "right", row.get("reason", f"relative error {row.get('error')}")

    calls = [functools.partial(outputs, operator, function, inputs, upstream) for inputs in sets]
    if DEVICE.type == "cuda":
        row["peak_mib"] = peak_mib(calls[0], DEVICE)
    run, count, replayed = prepare(calls, DEVICE)

    def timed() -> None:
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{operator.name} {shape}"
    benchmark.pedantic(timed, rounds=20, warmup_rounds=2)
    row["timing"] = summary([1000 * seconds / count for seconds in benchmark.stats.stats.data], replayed=replayed)
