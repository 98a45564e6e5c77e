"""Measures which implementation of attention is fastest for the shapes of a run, and stores the choices.

Every candidate must first reproduce PyTorch's result. The choices depend on timing, and another implementation gives
other bits. A run therefore stores its choices in RUN/attention.json, and a resumed run on the same GPU model reads
them. On a CPU a run measures nothing: the rule in attention.py applies, and a run repeats bit for bit.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, cast, get_args

import torch
from torch import Tensor

from mam2.engine.config.finetune import FinetuneConfig
from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.errors import UserError
from mam2.engine.files import write_whole
from mam2.engine.model.attention import Backend, Choices, active_backend, attention
from mam2.engine.model.attention_packages import OPERATORS, why_not
from mam2.engine.runtime.cuda import CudaRecorder

FILE = "attention.json"
ROUNDS = 9
CALLS = 10
"""Calls per round on a GPU, replayed as one CUDA graph, which leaves out host time that does not slow down a step."""
MOST_CLIPS = 64
"""Maximum clips that are measured: enough to fill a GPU, where `optim.micro_batch auto` may begin with thousands."""
MOST_SCORES = 10**9
"""Maximum bytes of scores for which `products`, which stores them, is tried."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 3e-2}
"""Largest distance of output and gradients from PyTorch's, relative to their norm."""


class Shape(NamedTuple):
    """Shape of one attention: B clips, N queries, M keys, H heads of K values."""

    batch: int
    queries: int
    keys: int
    heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.queries} queries, {self.keys} keys, {self.heads} heads of {self.head_dim}"


Tuned = tuple[Choices, list[str]]
"""Implementations by shape, and lines for the log."""


def shapes_of(config: PretrainConfig, batch: int) -> dict[str, Shape]:
    """Returns the attention shapes of a forward pass on `batch` clips, by part of the model."""
    model, (slots, rows, columns) = config.model, config.grid
    masked = config.decoded_tokens
    visible = slots * rows * columns - config.masked_tokens
    parts = {"encoder": Shape(batch, visible, visible, model.heads, model.width // model.heads)}
    if config.loss.alignment:
        parts["alignment"] = parts["encoder"]._replace(queries=masked, keys=masked)
    if config.needs_teacher:
        tokens = slots * rows * columns
        parts["teacher"] = parts["encoder"]._replace(queries=tokens, keys=tokens)
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


def classifier_shapes(config: FinetuneConfig, batch: int) -> dict[str, Shape]:
    """Returns the attention shape of a classifier on `batch` clips; it sees all tokens."""
    tokens, model = math.prod(config.grid), config.model
    return {"encoder": Shape(batch, tokens, tokens, model.heads, model.width // model.heads)}


def measure(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[Backend, float]:
    """Returns milliseconds of forward plus backward, the fastest first, for implementations that run and are right."""
    shape = shape._replace(batch=min(shape.batch, MOST_CLIPS))
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
    scores = shape.batch * shape.heads * shape.queries * shape.keys * dtype.itemsize
    for backend in cast(tuple[Backend, ...], get_args(Backend)[1:]):
        if backend == "products" and scores > MOST_SCORES:
            continue
        try:
            mine = outputs(backend)
            distances = [float((a - b).float().norm() / b.float().norm()) for a, b in zip(mine, exact, strict=True)]
            if max(distances) <= TOLERANCE.get(dtype, 1e-3):
                found[backend] = _median_ms(lambda backend=backend: outputs(backend), device)  # type: ignore[misc]
        except (RuntimeError, ValueError):  # no kernel for these inputs, or none that can be captured
            continue
    return dict(sorted(found.items(), key=lambda item: item[1]))


def tune_attention(
    shapes: Mapping[str, Shape],
    device: torch.device,
    dtype: torch.dtype,
    *,
    run: Path | None = None,
    broadcast: Callable[[Callable[[], Tuned]], Tuned] = lambda make: make(),
) -> Tuned:
    """Chooses the fastest implementation for each shape; changes no model (`VideoTransformer.set_attention` does).

    Args:
        shapes: from `shapes_of` or `classifier_shapes`.
        device: device of the model; on a CPU nothing is measured or chosen.
        dtype: dtype of the matrix products.
        run: the run's folder, which stores the choices; None measures without storing.
        broadcast: broadcasts rank 0's choices to all processes of a run, see `World.broadcast`.

    Returns:
        The choices, and lines for the log.

    Raises:
        UserError: RUN/attention.json is not a measurement of a run.
    """
    if device.type != "cuda":
        return {}, []
    return broadcast(lambda: measure_or_read(shapes, device, dtype, run))


def measure_or_read(
    shapes: Mapping[str, Shape], device: torch.device, dtype: torch.dtype, run: Path | None = None
) -> Tuned:
    """Measures shapes, or reads their choices from RUN/attention.json; changes only this file.

    Choices from another device, or for a package that does not run here, are measured again. See `tune_attention`.
    """
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    file = run / FILE if run else None
    lines = []
    if file and file.is_file():
        saved, found = _read(file, shapes)
        missing = _missing(found, shapes, device, dtype)
        if saved == machine and not missing:
            lines = [_line(name, shape, found[name], f"from {file}") for name, shape in shapes.items()]
            return _by_key(found, shapes, device, dtype), lines
        why = missing or f"it was measured on {saved}, this is {machine}"
        lines = [f"attention measured again, {file} does not apply: {why}; results may differ in bits from here on"]
    by_shape = {shape: measure(shape, device, dtype) for shape in dict.fromkeys(shapes.values())}
    times = {name: by_shape[shape] for name, shape in shapes.items()}
    chosen: dict[str, Backend] = {name: next(iter(row), active_backend(device, dtype)) for name, row in times.items()}
    if file:
        parts = {name: {"backend": chosen[name], "milliseconds": times[name]} for name in shapes}
        text = json.dumps({"device": machine, "parts": parts}, indent=1) + "\n"
        write_whole(file, text)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # DALI needs memory outside of PyTorch's
    how = {name: "measured" if row else "because none could be measured" for name, row in times.items()}
    lines += [_line(name, shape, chosen[name], how[name]) for name, shape in shapes.items()]
    return _by_key(chosen, shapes, device, dtype), lines


def _by_key(
    backends: Mapping[str, Backend], shapes: Mapping[str, Shape], device: torch.device, dtype: torch.dtype
) -> Choices:
    return {(device.type, dtype, *shape[1:]): backends[name] for name, shape in shapes.items()}


def _line(name: str, shape: Shape, backend: Backend, how: str) -> str:
    return f"attention of the {name} ({shape}): {backend}, {how}"


def _read(file: Path, shapes: Mapping[str, Shape]) -> tuple[str, dict[str, Backend]]:
    """Reads the device of a file's measurement, and its choice."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        found = {name: content["parts"][name]["backend"] for name in shapes}
        if unknown := set(found.values()) - set(get_args(Backend)):
            raise ValueError(f"unknown implementation {unknown.pop()!r}")
        return content["device"], found
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file}: not a measurement of this run ({error!r}); remove it to measure again") from None


def _missing(
    found: Mapping[str, Backend], shapes: Mapping[str, Shape], device: torch.device, dtype: torch.dtype
) -> str:
    """Returns which package of a choice does not run here, and why; "" if all run."""
    for name, backend in found.items():
        if backend in OPERATORS and (reason := why_not(backend, device, dtype, shapes[name].head_dim)):  # type: ignore[arg-type]
            return f"{backend} does not run here ({reason})"
    return ""


def _median_ms(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        return _replayed_ms(call, device)
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def _replayed_ms(call: Callable[[], object], device: torch.device) -> float:
    """Returns the device's milliseconds of `CALLS` calls replayed as one CUDA graph."""

    def calls() -> dict[str, Tensor]:
        for _ in range(CALLS):
            call()
        return {}

    with torch.cuda.device(device):
        recorder = CudaRecorder()
        recorder.warm_up(call)
        replay, _ = recorder.record(calls)
    times = []
    for _ in range(ROUNDS):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        replay()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) / CALLS)
    return statistics.median(times[2:])
