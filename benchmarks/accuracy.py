"""How exact each operator is and how much memory it takes, beside plain PyTorch: `python -m benchmarks.accuracy`.

For each operator and type: ‖out − exact‖ / ‖exact‖ of the worst output or gradient against the definition in float64 on
the same inputs, and the most memory that forward and backward hold beyond the inputs. Masks have no error.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import platform
import sys

import torch

from benchmarks.check import exact_outputs, judge, outputs, upstream_of
from benchmarks.clips import SHAPES, Shape
from benchmarks.operators import OPERATORS
from benchmarks.report import Row, table
from benchmarks.timing import peak_mib

COLUMNS = ("operator", "type", "error", "error_of_eager", "peak_mib", "peak_mib_of_eager", "reason")
ON_A_CPU = Shape(batch=4, size=112)
"""Large enough for chunks to show, small enough for float64."""


def measure(shape: Shape, device: torch.device) -> list[Row]:
    """A row for each operator and type; "reason" where something is wrong."""
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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="the shape of `make bench` on a CPU")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = SHAPES["cpu"][0] if options.tiny else SHAPES["cuda"][0] if device.type == "cuda" else ON_A_CPU
    rows = measure(shape, device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU {platform.machine()}"
    print(f"{where}, torch {torch.__version__}, {str(shape).rsplit(' ', 1)[0]}\n{table(rows, COLUMNS)}")
    return 1 if any("reason" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
