"""Which implementation of attention is the fastest for the shapes of a run: measured, and remembered.

Every candidate has to give PyTorch's own result first. The winner depends on timing, and another implementation gives
other bits: so a run keeps its choice in RUN/attention.json and a resumed one reads it. On a CPU nothing is measured for
a run: there the rule in attention.py holds, and a run repeats bit for bit.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, cast, get_args

import torch
from torch import Tensor

from mam2.engine.config import PretrainConfig, UserError
from mam2.engine.model.attention import CHOSEN, Backend, attention

FILE = "attention.json"
ROUNDS = 9
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 3e-2}
"""Largest distance of output and gradients from PyTorch's own, relative to their norm."""


class Shape(NamedTuple):
    """Of one attention: B clips, N queries, M keys, H heads of K values."""

    batch: int
    queries: int
    keys: int
    heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.queries} queries, {self.keys} keys, {self.heads} heads of {self.head_dim}"


def shapes_of(config: PretrainConfig, batch: int) -> dict[str, Shape]:
    """The attentions of a forward pass on `batch` clips, by the part of the model they are in."""
    model, (slots, rows, columns) = config.model, config.grid
    masked = config.masked_tokens
    visible = slots * rows * columns - masked
    parts = {"encoder": Shape(batch, visible, visible, model.heads, model.width // model.heads)}
    decoder = model.decoder
    if model.objective != "mam2":
        return parts | {
            "decoder": Shape(batch, visible + masked, visible + masked, decoder.heads, decoder.width // decoder.heads)
        }
    regressor = model.regressor
    if not regressor.depth:
        return parts | {
            "decoders": Shape(batch, visible + masked, visible + masked, decoder.heads, decoder.width // decoder.heads)
        }
    keys = visible + (masked if regressor.keys == "all" else 0)
    return parts | {
        "regressor": Shape(batch, masked, keys, regressor.heads, regressor.width // regressor.heads),
        "decoders": Shape(batch, masked, masked, decoder.heads, decoder.width // decoder.heads),
    }


def measure(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[Backend, float]:
    """Milliseconds of a forward and a backward pass, the fastest first; only of what runs and is right here."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(length: int) -> Tensor:
        drawn = torch.randn(shape.batch, length, shape.heads, shape.head_dim, generator=generator, device=device)
        return drawn.to(dtype).requires_grad_()

    q, k, v = draw(shape.queries), draw(shape.keys), draw(shape.keys)
    upstream = draw(shape.queries).detach()

    def outputs(backend: Backend) -> list[Tensor]:
        out = attention(q, k, v, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), upstream)]

    exact = outputs("sdpa")
    found: dict[Backend, float] = {}
    for backend in cast(tuple[Backend, ...], get_args(Backend)[1:]):
        try:
            mine = outputs(backend)
        except (RuntimeError, ValueError):  # it has no kernel for these inputs
            continue
        distances = [float((a - b).float().norm() / b.float().norm()) for a, b in zip(mine, exact, strict=True)]
        if max(distances) <= TOLERANCE.get(dtype, 1e-3):
            found[backend] = _median_ms(lambda backend=backend: outputs(backend), device)  # type: ignore[misc]
    return dict(sorted(found.items(), key=lambda item: item[1]))


def choose(config: PretrainConfig, batch: int, device: torch.device, dtype: torch.dtype, run: Path) -> Iterator[str]:
    """Measures the shapes of a run on a GPU, or takes RUN/attention.json; lines for the log.

    Raises UserError for a file that is not one of ours.
    """
    file = run / FILE
    shapes = shapes_of(config, batch)
    if file.is_file():
        try:
            winners = {name: row["backend"] for name, row in json.loads(file.read_text(encoding="utf-8")).items()}
            found = {name: winners[name] for name in shapes}
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{file}: not the measurement of this run ({error!r}); remove it to measure anew") from None
        how = f"from {file}"
    else:
        times = {name: measure(shape, device, dtype) for name, shape in shapes.items()}
        found = {name: next(iter(row)) for name, row in times.items()}
        rows = {name: {"backend": found[name], "milliseconds": times[name]} for name in shapes}
        file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        how = "measured"
    for name, shape in shapes.items():
        CHOSEN[device.type, dtype, shape.queries, shape.keys, shape.head_dim] = found[name]
        yield f"attention of the {name} ({shape}): {found[name]}, {how}"


def _median_ms(call: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(ROUNDS):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
