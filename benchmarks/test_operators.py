"""`make bench`: the operators under pytest-benchmark, each provider checked before it is timed."""

import pytest
import torch

from benchmarks.operators import (
    BUDGET,
    OPERATORS,
    SHAPES,
    Operator,
    all_providers,
    exact_outputs,
    gate,
    outputs,
    upstream_of,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("provider", ["ours", "eager", "compiled", "torch"])
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_operator(benchmark, operator: Operator, provider: str) -> None:
    torch.manual_seed(0)
    shape = SHAPES[DEVICE.type][0]
    function = all_providers(operator, shape, DEVICE, compiled=provider == "compiled").get(provider)
    if function is None:
        pytest.skip(f"{operator.name} has no provider {provider!r} here")
    inputs, upstream = operator.inputs(shape, DEVICE), upstream_of(operator, DEVICE)
    error = gate(operator, shape, function, inputs, upstream, exact_outputs(operator, shape, inputs, upstream))
    assert error <= (0.0 if operator.check else BUDGET[shape.dtype]), f"wrong: relative error {error:.2g}"
    benchmark.group = f"{operator.name} {shape}"
    benchmark.name = provider

    def run() -> None:
        outputs(operator, function, inputs, upstream)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=50, warmup_rounds=5)
