"""Writes the launch table of this GPU into kernels/launch_table.json: `make tune`, or `python -m benchmarks.tune`.

For every kernel and row of the table, it times the operators that launch the kernel with each number of warps, and
linear_cross_entropy with each chunk size, in interleaved rounds. A candidate that fails check.py is not timed; a
candidate replaces the current value if it is more than 2 % faster. `--dry-run` runs everything on the CPU, where
launches have no warps, and does not change the table. `--out` writes the table to another file. A row applies to an
architecture: the values tuned on one GPU serve all GPUs of that architecture (those of an H100 also an H200).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

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
from benchmarks.check import Operator, exact_outputs, judge, outputs, upstream_of
from benchmarks.clips import Shape
from benchmarks.operators import input_sets
from benchmarks.report import Row, table
from benchmarks.timing import interleaved
from mam2.engine.files import write_whole
from mam2.kernels import costs, launch
from mam2.kernels.scale_gradient import scale_gradient

MARK = "NOT a GPU result"
TABLE = Path(launch.__file__).with_name("launch_table.json")
WARPS = (1, 2, 4, 8, 16)
CHUNK_MIB = (16, 32, 64, 88, 128, 192, 352, 512)
"""From 88 on, chunks of 8192 codes in bfloat16 are cut so that their products fill 132 multiprocessors n times."""
CHUNKS = "chunk_bytes"
SMALL = Shape(batch=1, size=32, width=16, dtype=torch.float32)
"""The shape of a dry run."""
LEAST_GAIN = 0.02
EVERY_BLOCK = 1536
"""Values of a token of 2 frames of 16²; larger blocks come from more frames."""

SCALE_GRADIENT = Operator(
    name="scale_gradient",
    inputs=lambda shape, device: {
        "gradient": torch.randn(shape.batch * shape.masked, shape.codes, device=device).to(shape.dtype),
        "scale": torch.rand(shape.batch * shape.masked, device=device),
    },
    definition=lambda shape: lambda gradient, scale: gradient * scale[:, None],
    providers=lambda shape, device: {"ours": scale_gradient},
    cost=lambda shape: costs.scale_gradient(shape.batch * shape.masked, shape.codes, item_bytes=shape.dtype.itemsize),
)


MOTION_ENERGY = Operator(
    name="motion_energy",
    inputs=bench_motion_tube_mask.OPERATOR.inputs,
    definition=lambda shape: lambda video: 255**2 * bench_motion_tube_mask.energies(shape, video),
    providers=lambda shape, device: {"ours": lambda video: torch.ops.mam2.motion_energy(video, list(shape.patch))},
    cost=lambda shape: costs.motion_energy(shape.batch, shape.tokens, shape.values),
)


def _longer_tokens(shape: Shape, block: int) -> Shape:
    return replace(shape, patch=(2 * block // EVERY_BLOCK, 16, 16))


def _more_codes(shape: Shape, block: int) -> Shape:
    return replace(shape, codes=block)


def _more_positions(shape: Shape, block: int) -> Shape:
    """Returns a shape with a square of `block` positions per slot."""
    return replace(shape, size=round(block**0.5) * shape.patch[1])


@dataclass(frozen=True)
class Tuned:
    """How a kernel is tuned: the operators that launch it, and the shape that gives a block size."""

    operators: tuple[Operator, ...]
    shape: Callable[[Shape, int], Shape]


LOSSES = bench_masked_pixel_loss.OPERATOR, bench_masked_frame_difference_loss.OPERATOR
TUNED = {
    "draw_mask": Tuned((bench_tube_mask.OPERATOR,), _more_positions),
    "frame_difference": Tuned((bench_frame_difference.OPERATOR,), _longer_tokens),
    "gather_tubes": Tuned((bench_gather_tubes.OPERATOR,), _longer_tokens),
    "masked_loss": Tuned(LOSSES, _longer_tokens),
    "motion_energy": Tuned((MOTION_ENERGY,), _longer_tokens),
    "scale_gradient": Tuned((SCALE_GRADIENT,), _more_codes),
    "softmax_gradient": Tuned((bench_linear_cross_entropy.OPERATOR,), _more_codes),
}


@contextlib.contextmanager
def launched_with(architecture: str, warps: dict[str, int], chunk_bytes: int | None = None) -> Iterator[None]:
    """Inside the context, all kernels launch with this number of warps, and logits come in chunks of this size."""
    rows = {kernel: [[1, count]] for kernel, count in warps.items()}
    changed = {architecture: {**launch.WARPS.get(architecture, {}), **rows}}
    chunk = {} if chunk_bytes is None else {architecture: chunk_bytes}
    with (
        mock.patch.dict(launch.WARPS, changed),
        mock.patch.dict(launch.CHUNK_BYTES, chunk),
    ):
        yield


def times(
    operators: Sequence[Operator], shape: Shape, device: torch.device, candidates: dict[int, Any], *, rounds: int
) -> dict[int, float]:
    """Returns milliseconds of all operators by candidate.

    `candidates` holds their `launched_with`. Skips wrong ones.
    """
    sums: dict[int, float] = dict.fromkeys(candidates, 0.0)
    for operator in operators:
        torch.manual_seed(0)
        sets, upstream = input_sets(operator, shape, device), upstream_of(operator, shape, device)
        exact = exact_outputs(operator, shape, sets[0], upstream)
        ours = operator.providers(shape, device)["ours"]
        calls = {
            str(value): [within(functools.partial(outputs, operator, ours, inputs, upstream)) for inputs in sets]
            for value, within in candidates.items()
            if within(judge)(operator, shape, ours, sets[0], upstream, exact)["verdict"] == "right"
        }
        timings = interleaved(calls, device, rounds=rounds)
        sums = {v: total + timings[str(v)].median_ms for v, total in sums.items() if str(v) in timings}
    return sums


def better(found: dict[int, float], present: int) -> int:
    """Returns the fastest value, or the current one if it is about as fast."""
    fastest = min(found, key=found.__getitem__, default=present)
    return fastest if present not in found or found[fastest] < (1 - LEAST_GAIN) * found[present] else present


def choices(
    shape: Shape,
    device: torch.device,
    *,
    rounds: int,
    kernels: Sequence[str] = (),
    first_blocks: bool = False,
    deadline: float = math.inf,
) -> Iterator[Row]:
    """Yields a row per choice as soon as it is made: chunks, then warps of each block.

    Args:
        shape: shape of the operators that launch the kernels.
        device: device of the operators.
        rounds: rounds of each candidate.
        kernels: names of kernels; default: all and `chunk_bytes`.
        first_blocks: tune only the blocks of mam2-fast: the first of each kernel, the last of softmax_gradient.
        deadline: time.monotonic() after which nothing is tuned; the remaining rows are marked "skipped".
    """
    name = launch.architecture(device)
    if not kernels or CHUNKS in kernels:
        row: Row = {"tuned": CHUNKS, "block": None}
        present = launch.CHUNK_BYTES.get(name, launch.CHUNK_BYTES["default"])
        sizes = {size: launched_with(name, {}, size) for size in sorted({present, *(mib << 20 for mib in CHUNK_MIB)})}
        yield _chosen(row, (bench_linear_cross_entropy.OPERATOR,), shape, device, present, sizes, rounds, deadline)
    for kernel, present_rows in launch.WARPS["default"].items():
        if kernels and kernel not in kernels:
            continue
        if kernel not in TUNED:
            reason = "no operator launches it here: its row stays unchanged"
            yield {"tuned": kernel, "block": None, "verdict": "skipped", "reason": reason}
            continue
        blocks = [block for block, _ in present_rows]
        if first_blocks:
            blocks = blocks[-1:] if kernel == "softmax_gradient" else blocks[:1]
        for block in blocks:
            candidates = {count: launched_with(name, {kernel: count}) for count in WARPS}
            at = TUNED[kernel].shape(shape, block)
            row = {"tuned": kernel, "block": block}
            present = launch.warps(kernel, block, device)
            yield _chosen(row, TUNED[kernel].operators, at, device, present, candidates, rounds, deadline)
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _chosen(
    row: Row,
    operators: Sequence[Operator],
    shape: Shape,
    device: torch.device,
    present: int,
    candidates: dict[int, Any],
    rounds: int,
    deadline: float,
) -> Row:
    if time.monotonic() > deadline:
        return row | {"present": present, "best": present, "verdict": "skipped", "reason": "out of time"}
    found = times(operators, shape, device, candidates, rounds=rounds)
    row |= {"present": present, "best": better(found, present), "verdict": "right" if found else "wrong"}
    if not found:
        row["reason"] = "no candidate gives correct results"
    if device.type != "cuda":
        return row  # a launch on a CPU has no warps: its times are meaningless
    row |= {"present_ms": found.get(present), "best_ms": found.get(row["best"])}
    return row | {"candidates_ms": {str(value): ms for value, ms in found.items()}}


def sweep_rows(device: torch.device, deadline: float) -> Iterator[Row]:
    """Yields the choices that decide the speed of mam2-fast: chunks of logits, warps at its blocks, attention."""
    cuda = device.type == "cuda"
    shape = Shape(batch=64) if cuda else SMALL
    kernels = (CHUNKS, "masked_loss", "softmax_gradient", "scale_gradient", "gather_tubes")
    options: dict[str, Any] = {"rounds": 10 if cuda else 1, "first_blocks": True, "deadline": deadline}
    for row in choices(shape, device, kernels=kernels, **options):
        yield row if cuda else {key: row[key] for key in row if key not in ("present", "best")}
    from mam2.engine.config.recipe import load_recipe
    from mam2.engine.model.attention_tuning import measure, shapes_of

    batch, dtype = (64, torch.bfloat16) if cuda else (1, torch.float32)
    parts = {f"mam2-fast {part}": at for part, at in shapes_of(load_recipe("mam2-fast"), batch).items()}
    parts["videomae decoder"] = shapes_of(load_recipe("videomae"), batch)["decoder"]
    for part, at in parts.items() if cuda else list(parts.items())[:1]:
        row: Row = {"tuned": "attention", "block": f"{part}, {at}"}
        if time.monotonic() > deadline:
            yield row | {"verdict": "skipped", "reason": "out of time"}
            continue
        found = measure(at, device, dtype)
        best, best_ms = next(iter(found.items()), (None, None))
        row |= {"verdict": "right" if found else "wrong"}
        yield row | ({"best": best, "best_ms": best_ms, "candidates_ms": found} if cuda else {})


def text_of(warps: dict[str, dict[str, list[list[int]]]], chunk_bytes: dict[str, int]) -> str:
    """Returns the text of launch_table.json, one kernel per line."""

    def kernels(table: dict[str, list[list[int]]]) -> str:
        return ",\n".join(f"   {json.dumps(kernel)}: {json.dumps(rows)}" for kernel, rows in sorted(table.items()))

    tables = ",\n".join(f"  {json.dumps(name)}: {{\n{kernels(table)}\n  }}" for name, table in sorted(warps.items()))
    chunks = json.dumps(chunk_bytes, sort_keys=True)
    return f'{{\n "warps": {{\n{tables}\n }},\n "{CHUNKS}": {chunks}\n}}\n'


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU; does not change the table")
    parser.add_argument("--kernels", nargs="+", choices=[*TUNED, CHUNKS], default=[], help="default: all")
    parser.add_argument("--seconds", type=float, default=math.inf, help="time limit; the rest stays unchanged")
    parser.add_argument("--out", type=Path, help="file of the table; default: kernels/launch_table.json")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print("tune: torch sees no GPU; --dry-run runs the same on the CPU", file=sys.stderr)
        return 2
    device = torch.device("cpu") if options.dry_run else torch.device("cuda", torch.cuda.current_device())
    if not options.dry_run and launch.active_path(device) != "triton":
        print(f"tune: the kernels would run through {launch.active_path(device)}: unset MAM2_KERNELS", file=sys.stderr)
        return 2
    name, shape = launch.architecture(device), SMALL if options.dry_run else Shape(batch=64)
    elsewhere = Path(tempfile.mkdtemp(prefix="mam2-dry-run-")) / TABLE.name if options.dry_run else TABLE
    path = options.out or elsewhere
    mark = f"{MARK} | " if options.dry_run else ""
    card = "the CPU" if options.dry_run else torch.cuda.get_device_name(device)
    print(f"{mark}launch table for {name}, measured on {card}", flush=True)
    rows: list[Row] = []
    deadline, rounds = time.monotonic() + options.seconds, 1 if options.dry_run else 20
    for row in choices(shape, device, rounds=rounds, kernels=options.kernels, deadline=deadline):
        rows.append(row)
        write_whole(
            path, text_of(*with_choices(name, rows))
        )  # after each choice, so that an interrupted run keeps them
    columns = ["tuned", "block", *([] if options.dry_run else ["present", "best", "present_ms", "best_ms"]), "verdict"]
    print(f"{table(rows, [*columns, 'reason'])}\n{mark}written to {path}")
    return 1 if any(row["verdict"] == "wrong" for row in rows) else 0


def with_choices(name: str, rows: Sequence[Row]) -> tuple[dict[str, dict[str, list[list[int]]]], dict[str, int]]:
    """Returns the launch tables with these rows in the table of architecture `name`; untuned rows stay unchanged."""
    warps = {kernel: [list(pair) for pair in pairs] for kernel, pairs in launch.WARPS.get(name, {}).items()}
    chunk_bytes = dict(launch.CHUNK_BYTES)
    for row in rows:
        if row["verdict"] != "right":
            continue
        if row["tuned"] == CHUNKS:
            chunk_bytes[name] = row["best"]
            continue
        held = warps.setdefault(row["tuned"], [list(pair) for pair in launch.WARPS["default"][row["tuned"]]])
        for pair in held:
            if pair[0] == row["block"]:
                pair[1] = row["best"]
    return {**launch.WARPS, **({name: warps} if warps else {})}, chunk_bytes


if __name__ == "__main__":
    sys.exit(main())
