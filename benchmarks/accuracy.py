"""Accuracy and memory of each operator, compared with plain PyTorch: `python -m benchmarks.accuracy`.

Prints for each operator and type ‖out − exact‖ / ‖exact‖ of the worst output or gradient, where exact is the definition
in float64 on the same inputs, and the peak memory of forward and backward beyond the inputs. Masks have no error. A
second table shows bfloat16 attention with and without centering, on tokens with a growing common part; a third the
gradients of MAM2's parts with each type of the residual stream of regressor and decoders.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import platform
import sys
from typing import Any, get_args

import torch

from benchmarks.bench_step import inputs_of, seeded_model
from benchmarks.check import exact_outputs, judge, outputs, upstream_of
from benchmarks.clips import SHAPES, Shape
from benchmarks.operators import OPERATORS
from benchmarks.report import Row, table
from benchmarks.step_sizes import sized
from benchmarks.timing import peak_mib
from mam2.engine.model.attention import Backend, attention
from mam2.engine.model.blocks import Residual
from mam2.engine.runtime.device import autocast
from mam2.engine.train.objective import build_objective

COLUMNS = ("operator", "type", "error", "error_of_eager", "peak_mib", "peak_mib_of_eager", "reason")
ATTENTION_COLUMNS = ("shared", "attention", "centered", "plain")
SHARED = (1, 3, 10, 30)
PARTS = ("encoder", "regressor", "appearance_decoder", "motion_decoder")
Sizes = tuple[dict[str, dict[str, Any]], dict[str, int]]
STEP: Sizes = (
    {"data": {"size": 64}, "model": {"patch": 8, "width": 192, "depth": 4, "heads": 3}},
    {"depth": 4, "width": 192, "heads": 3},
)
"""Sizes of MAM2 for `residual_rows`, see `step_sizes.sized`: as deep as mam2-fast in regressor and decoders."""
ON_A_CPU = Shape(batch=4, size=112)
"""Large enough for chunks to show, small enough for float64."""


def measure(shape: Shape, device: torch.device) -> list[Row]:
    """Returns a row per operator and type; a row with an error has a "reason"."""
    rows = []
    for operator in OPERATORS:
        for dtype in operator.dtypes:
            typed = dataclasses.replace(shape, dtype=dtype)
            torch.manual_seed(0)
            inputs, upstream = operator.inputs(typed, device), upstream_of(operator, typed, device)
            exact = exact_outputs(operator, typed, inputs, upstream)
            row: Row = {"operator": operator.name, "type": str(dtype).removeprefix("torch.")}
            providers = operator.providers(typed, device)
            for name, suffix in (("ours", ""), ("eager", "_of_eager")):
                verdict = judge(operator, typed, providers[name], inputs, upstream, exact)
                row[f"error{suffix}"] = verdict.get("error")
                if verdict["verdict"] != "right":
                    row["reason"] = f"{name}: {verdict['verdict']} {verdict.get('reason', '')}"
                    continue
                run = functools.partial(outputs, operator, providers[name], inputs, upstream)
                row[f"peak_mib{suffix}"] = peak_mib(run, device)
            rows.append(row)
    return rows


def attention_rows(device: torch.device) -> list[Row]:
    """Returns ‖gradient − exact‖ / ‖exact‖ of the worst of q, k and v for each implementation that runs here.

    Every token is the sum of a part common to the clip and an individual part, which is `shared` times smaller.
    """
    rows = []
    for shared in SHARED:
        generator = torch.Generator(device).manual_seed(0)

        def draw(tokens: int, scale: float = 1.0, generator: torch.Generator = generator) -> torch.Tensor:
            return scale * torch.randn(4, tokens, 3, 64, generator=generator, device=device)

        leaves = [(draw(1, 3.0) + draw(256, 3 / shared)).bfloat16().requires_grad_() for _ in range(3)]
        upstream = draw(256).bfloat16()
        wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
        exact = torch.autograd.grad(attention(*wide, backend="products"), wide, upstream.double())
        for backend in get_args(Backend)[1:]:
            row: Row = {"shared": f"{shared}×", "attention": backend}
            try:
                for name, center in (("centered", True), ("plain", False)):
                    out = attention(*leaves, backend=backend, center=center)
                    found = torch.autograd.grad(out, leaves, upstream)
                    row[name] = max(float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))
            except (RuntimeError, ValueError):  # no kernel for these inputs
                continue
            rows.append(row)
    return rows


def residual_rows(device: torch.device, sizes: Sizes | None = STEP) -> list[Row]:
    """Returns ‖gradient − exact‖ / ‖exact‖ of the weights of each part of a new MAM2 under bfloat16 autocast.

    exact is the gradient in float64 without autocast, of the same weights, clips, mask and codes.
    """

    def gradients(residual: Residual, *, wide: bool) -> dict[str, torch.Tensor]:
        config = sized("mam2-fast", sizes, "float32" if wide else "bfloat16")
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, residual=residual))
        video, mask, codes = inputs_of(config, 2, device)
        model = seeded_model(config, device)
        if wide:
            model, video = model.double(), video.double() / 255
        objective = build_objective(model, config, lambda part: part)
        with autocast(config.run, device):
            loss = objective(video, mask, codes)[0]
        loss.backward()
        found: dict[str, list[torch.Tensor]] = {}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found.setdefault(name.partition(".")[0], []).append(parameter.grad.double().flatten())
        return {part: torch.cat(found[part]) for part in PARTS}

    exact = gradients("float32", wide=True)
    rows = []
    for residual in get_args(Residual):
        found = gradients(residual, wide=False)
        errors = {part: float((found[part] - exact[part]).norm() / exact[part].norm()) for part in PARTS}
        rows.append({"residual": residual} | errors)
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="use the shape of `make bench` on a CPU")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = SHAPES["cpu"][0] if options.tiny else SHAPES["cuda"][0] if device.type == "cuda" else ON_A_CPU
    rows = measure(shape, device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU {platform.machine()}"
    print(f"{where}, torch {torch.__version__}, {str(shape).rsplit(' ', 1)[0]}\n{table(rows, COLUMNS)}")
    print(f"\nattention in bfloat16: error of the worst gradient\n{table(attention_rows(device), ATTENTION_COLUMNS)}")
    if not options.tiny:
        errors = table(residual_rows(device), ("residual", *PARTS))
        print(f"\nresidual stream of regressor and decoders: error of the weights' gradients\n{errors}")
    return 1 if any("reason" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
