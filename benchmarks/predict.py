"""Predicts the time of each operator on an H200 from the static table: predicted, not measured.

    python -m benchmarks.predict      # prints the prediction and writes results/static/predicted-h200.md

All programs of a kernel run the same code without branches, so that three lower bounds follow from the compiled code:

    memory     declared bytes / bandwidth of a copy
    issue      programs · warps · cycles / (SMs · 4 schedulers · clock); the cycles of a warp are its instructions, or
               those of its busiest pipe: 2 for an integer instruction, 4 for a shuffle, 8 for a conversion or a root
    latency    Little's law: per latency an SM has  resident programs · bytes per program / round trips  in flight

A round trip is a group of loads that waits for the previous group. If the three overlap perfectly, the time is the
largest of them; without any overlap it is their sum. Registers, shared memory, warps and blocks limit the number of
resident programs.

The head (linear_cross_entropy) is a sequence of such parts for each chunk of logits. `predict_steps` and
`predict_loader` predict training steps and decoding; `h200` has the parameters of the GPU, and says which are assumed.
"""

import csv
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

from benchmarks import predict_loader, predict_steps
from benchmarks.bench_step import CODES
from benchmarks.h200 import (
    BLOCKS,
    CLIPS,
    CLOCK,
    COPY,
    GAP,
    GEMM,
    LATENCY,
    REGISTERS,
    SHARED,
    SMS,
    WARPS,
    operator_seconds,
)
from mam2.engine.files import write_whole
from mam2.kernels import costs, launch

RESULTS = Path(__file__).parent / "results" / "static"
TABLE, PREDICTION = RESULTS / "nvidia.csv", RESULTS / "predicted-h200.md"

MASKED, VISIBLE, VALUES = 1408, 160, 1536
WIDTH = 384
GOAL_HEAD = 3.0e-3
LARGE, SMALL_CHUNK = (2 * MASKED, 2048, 131_072), 128
"""Rows, width and codes of the largest head that is measured, and the rows of a chunk of 32 MiB of its logits."""


class Bounds(NamedTuple):
    """Lower bounds in seconds, each as if nothing else limited the kernel, and the load of an SM."""

    memory: float
    issue: float
    latency: float
    resident: int
    in_flight: float
    """Bytes for which an SM waits at a time."""

    @property
    def best(self) -> float:
        return max(self[:3])

    @property
    def worst(self) -> float:
        return sum(self[:3])

    @property
    def limit(self) -> str:
        return self._fields[self.index(self.best)]


def compiled(name: str) -> dict[str, str]:
    """Returns the row of the static table for sm_90 by "kernel launch"."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        next(file)  # the first line names the Triton version
        for row in csv.DictReader(file):
            if (f"{row['kernel']} {row['launch']}", row["architecture"]) == (name, "sm_90"):
                return row
    raise ValueError(f"{TABLE}: no row {name!r} of sm_90; write the table with `make static`")


def resident_programs(registers: int, warps: int, shared: int) -> int:
    """Returns the programs that an SM holds at a time; registers are allocated in units of eight per thread."""
    return min(BLOCKS, WARPS // warps, REGISTERS // (-(-registers // 8) * 8 * 32 * warps), SHARED // (shared + 1024))


def bounds(name: str, programs: int, moved: int) -> Bounds:
    """Returns the bounds of a kernel of the table, for `programs` programs that move `moved` bytes together."""
    row = compiled(name)
    count = {column: int(row[column]) for column in row if row[column].isdigit()}
    warps = count["warps"]
    cycles = max(
        count["instructions"],
        2 * (count["ALU"] + count["IMAD"]),
        4 * (count["SHFL"] + count["REDUX"]),
        8 * (count["convert"] + count["MUFU"]),
    )
    resident = resident_programs(count["registers"], warps, count["shared"])
    in_flight = resident * moved / programs / count["round_trips"]
    return Bounds(
        memory=moved / COPY,
        issue=programs * warps * cycles / (SMS * 4 * CLOCK),
        latency=moved / (SMS * in_flight) * LATENCY,
        resident=resident,
        in_flight=in_flight,
    )


def kernels() -> dict[str, Bounds]:
    """Returns the bounds of the memory-bound operators in a training step: 64 clips of 16 × 224², bfloat16."""
    clip = "channels_last 2x16x16 uint8 bfloat16"
    tokens = CLIPS * MASKED
    loss = costs.masked_loss(CLIPS, MASKED, VALUES).bytes_moved
    planar = costs.masked_loss(CLIPS, MASKED, VALUES, clip_bytes=4).bytes_moved
    gather = costs.gather_tubes(CLIPS, VISIBLE, VALUES).bytes_moved
    return {
        "masked_pixel_loss, loss and gradient": bounds(f"masked_loss {clip} pixel channel", tokens, loss),
        "masked_frame_difference_loss, loss and gradient": bounds(f"masked_loss {clip} adjacent channel", tokens, loss),
        "their backward pass, unless the upstream gradient is 1": bounds(
            f"scale_gradient {tokens}x{VALUES} bfloat16", tokens, costs.scale_gradient(tokens, VALUES).bytes_moved
        ),
        "masked_pixel_loss of planar float32 clips": bounds(
            "masked_loss contiguous 2x16x16 float32 bfloat16 pixel channel", tokens, planar
        ),
        "gather_tubes": bounds(f"gather_tubes {clip} normalized", CLIPS * VISIBLE, gather),
    }


def rows_per_chunk(width: int, codes: int) -> int:
    """Returns the rows of a head's chunk of bfloat16 logits on an H200."""
    with mock.patch.multiple(launch, architecture=lambda device: "sm_90", processors=lambda device: SMS):
        return launch.chunk_rows(codes, torch.bfloat16, torch.device("cuda", 0), width)


def large_head() -> str:
    """Returns a sentence about LARGE: the traffic of its weight per chunk, and what it was with small chunks."""
    rows, width, codes = LARGE
    product = costs.linear_cross_entropy(rows, width, codes).flops / GEMM
    # a chunk reads the weight twice, and reads and writes the float32 sum of its gradient
    per_chunk = width * codes * (2 * 2 + 2 * 4) / COPY
    chunk = rows_per_chunk(width, codes)
    now, small = -(-rows // chunk), -(-rows // SMALL_CHUNK)
    return (
        f"A head of {codes} codes, {width} wide, for {rows} rows: the products take {1e3 * product:.1f} ms. Its weight"
        f" and gradient are\n{1e3 * per_chunk:.2f} ms of memory traffic per chunk: {1e3 * per_chunk * now:.1f} ms for"
        f" {now} chunks of {chunk} rows; {small} chunks of {SMALL_CHUNK} rows would take"
        f" {1e3 * per_chunk * small:.1f} ms."
    )


def head() -> list[tuple[str, float, float]]:
    """Returns the parts of linear_cross_entropy forward and backward: name, seconds at best, seconds at worst."""
    rows = CLIPS * MASKED
    chunk = rows_per_chunk(WIDTH, CODES)
    chunks = -(-rows // chunk)
    product = costs.linear_cross_entropy(rows, WIDTH, CODES).flops / GEMM
    passes = bounds(f"softmax_gradient {CODES} bfloat16", rows, costs.softmax_gradient(rows, CODES).bytes_moved)
    # the product of a chunk is added to the running float32 sum, which is read and written
    adding = chunks * 2 * CODES * WIDTH * 4 / COPY
    summing = rows * CODES * 2 / COPY
    kernels = 6 * chunks
    return [
        (f"three products at {GEMM / 1e12:.0f} TFLOP/s", product, product),
        (f"softmax and its gradient over {chunks} chunks of {chunk} rows", passes.best, passes.worst),
        (f"adding up the weight's gradient in float32 over {chunks} chunks", 0.0, adding),
        (f"column sums over {chunks} chunks of logits, for the bias", summing, summing),
        (f"gaps between {kernels} kernels", 0.0, kernels * GAP),
    ]


def report() -> str:
    """Returns the prediction as Markdown."""
    needed = COPY * LATENCY / SMS / 1024
    lines = [
        "# H200: predicted, not measured",
        "",
        "Written by `python -m benchmarks.predict` from nvidia.csv (sm_90); its docstring describes the model.",
        f"{CLIPS} uint8 clips of 16 × 224², {MASKED} masked and {VISIBLE} visible tokens of {VALUES} bfloat16 values.",
        f"Known: a copy at {COPY / 1e12:.1f} TB/s, {SMS} SMs at {CLOCK / 1e9:.3f} GHz. Assumed: {LATENCY * 1e6:.1f} µs",
        f"per load, so that the speed of a copy needs {needed:.0f} KB in flight per SM.",
        "",
        "| operator | memory µs | issue µs | latency µs | resident | KB in flight | predicted µs | of a copy | limit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, of in kernels().items():
        times = " | ".join(f"{1e6 * seconds:.0f}" for seconds in of[:3])
        share = f"{100 * of.memory / of.worst:.0f} to {100 * of.memory / of.best:.0f} %"
        lines.append(
            f"| {name} | {times} | {of.resident} | {of.in_flight / 1024:.0f} | "
            f"{1e6 * of.best:.0f} to {1e6 * of.worst:.0f} | {share} | {of.limit} |"
        )
    parts = head()
    measured, summing = operator_seconds("2026-11-27-6", "linear_cross_entropy"), parts[3][1]
    lines += [
        "",
        f"linear_cross_entropy with bias, forward and backward: {CLIPS * MASKED} rows, {WIDTH} wide, {CODES} codes.",
        "At best the weight's gradient stays in the L2 and gaps are hidden; at worst neither. All types are bfloat16.",
        "",
        "| part | ms at best | ms at worst |",
        "|---|---|---|",
        *(f"| {what} | {1e3 * best:.2f} | {1e3 * worst:.2f} |" for what, best, worst in parts),
        f"| together (goal: {1e3 * GOAL_HEAD:.1f}) | {1e3 * sum(best for _, best, _ in parts):.2f} "
        f"| {1e3 * sum(worst for _, _, worst in parts):.2f} |",
        "",
        f"Measured without bias: {1e3 * measured:.2f} ms. With the column sums, which read all logits once more:"
        f" {1e3 * (measured + summing):.2f} ms.",
        "",
        large_head(),
        "",
        *predict_steps.report(),
        "",
        *predict_loader.report(),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    text = report()
    write_whole(PREDICTION, text)
    print(text, end="")


if __name__ == "__main__":
    main()
