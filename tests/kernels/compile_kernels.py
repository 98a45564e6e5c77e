"""Compiles every kernel as it would be launched at training shapes, for GPUs this machine does not have.

    python -m tests.kernels.compile_kernels                 # the covering set for every architecture
    python -m tests.kernels.compile_kernels sm_90 gfx942    # for some
    python -m tests.kernels.compile_kernels --all           # every launch there is: an hour
    python -m tests.kernels.compile_kernels --write         # the covering set, into benchmarks/results/static/
    python -m tests.kernels.compile_kernels --write --kernels masked_loss    # only this kernel's rows

A program of its own, because Triton must see a pretended driver and no interpreter. Prints one JSON object a kernel,
launch and architecture: what machine_code.py finds in it, and `row`, its line of the table.

The launchers run on meta tensors with a recorder as `launch.run_kernel`, so that exactly the launched kernels are
compiled.
The covering set holds for each kernel every row of its launch table, every type of every argument and every value of
every compile-time argument at least once (shapes of patches: on ALL_SHAPES).
"""

import argparse
import collections
import importlib
import itertools
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)
os.environ["MAM2_KERNELS"] = "triton"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from mam2.kernels import launch, masks, motion_mask, scale_gradient, softmax_gradient
from mam2.kernels.masked_error import Goal, masked_errors
from tests.helpers.paths import ROOT
from tests.kernels.machine_code import AMD_MIX, NVIDIA_MIX, inspect_assembly, inspect_cubin

# the package's functions of these names hide its modules
frame_difference = importlib.import_module("mam2.kernels.frame_difference")
gather_tubes = importlib.import_module("mam2.kernels.gather_tubes")
masked_subset = importlib.import_module("mam2.kernels.masked_subset")

RESULTS = ROOT / "benchmarks" / "results" / "static"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

WARPS = launch.warps
BATCH, FRAMES, SIDE = 64, 16, 224
BYTE, HALF, BRAIN, SINGLE, DOUBLE = torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64


class Clip(NamedTuple):
    """Arguments of the kernels that read clips."""

    patch: tuple[int, int, int] = (2, 16, 16)
    layout: str = "channels_last"
    video: torch.dtype = BYTE
    pred: torch.dtype = BRAIN
    channels: int = 3

    def __str__(self) -> str:
        types = f"{str(self.video)[6:]} {str(self.pred)[6:]}"
        channels = "" if self.channels == 3 else f" {self.channels} channels"
        return f"{self.layout} {'x'.join(map(str, self.patch))} {types}{channels}"

    def tensor(self) -> torch.Tensor:
        """[B,C,T,H,W] as a loader ("channels_last") or another codebase ("contiguous") lays it out.

        "far" and "far_planes" are these with frames 2^30 values apart, so that a cube does not fit 32-bit offsets.
        """
        empty = torch.empty(0, dtype=self.video, device="meta")
        frame = SIDE * SIDE * self.channels
        if self.layout == "contiguous":
            return empty.new_empty(BATCH, self.channels, FRAMES, SIDE, SIDE)
        step = 2**30 if self.layout.startswith("far") else frame
        strides = (step * FRAMES, 1, step, SIDE * self.channels, self.channels)
        if self.layout == "far_planes":
            strides = (step * FRAMES, SIDE * SIDE, step, SIDE, 1)
        return empty.new_empty_strided((BATCH, self.channels, FRAMES, SIDE, SIDE), strides)


PLAIN = Clip()
TYPES = [
    Clip((tubelet, 16, 16), layout, video, pred)
    for tubelet in (2, 4, 8)
    for layout in ("channels_last", "contiguous")
    for video in (BYTE, HALF, BRAIN, SINGLE)
    for pred in (BRAIN, HALF, SINGLE)
]
SHAPES = [
    PLAIN,
    Clip(layout="contiguous", video=SINGLE),
    Clip(layout="far"),
    Clip(layout="far_planes", video=SINGLE),
    Clip(video=DOUBLE, pred=DOUBLE),
    Clip(channels=4),
    Clip(channels=1, video=SINGLE, pred=SINGLE),
    Clip((1, 16, 16), video=SINGLE, pred=SINGLE),
    Clip((2, 14, 14)),
    Clip((2, 8, 8)),
]
CODES = [
    (codes, kind, smoothing)
    for codes in (8192, 16384, 2048, 1024, 1000)
    for kind in (BRAIN, HALF, SINGLE)
    for smoothing in (0.0, 0.1)
]
PREDICTED = {
    f"gather_tubes {PLAIN} normalized",
    f"masked_loss {PLAIN} pixel channel",
    f"masked_loss {PLAIN} adjacent channel",
    "softmax_gradient 8192 bfloat16",
    "scale_gradient 90112x1536 bfloat16",
}
"""Launches in every covering set: benchmarks/predict.py reads them."""
PREDICTED_TOO = f"masked_loss {Clip(layout='contiguous', video=SINGLE)} pixel channel"
"""Read there too; added last, so that it does not change what else is in the covering sets."""
ALL_SHAPES = ("sm_90", "gfx942")
"""Architectures whose covering set holds every shape of patch; to save time, the others' need not."""


OF_SHAPES = ("CHANNELS", "HEIGHT", "WIDTH", "PIXELS", "ROWS", "RUN")


class Launch(NamedTuple):
    kernel: Any
    arguments: tuple[Any, ...]
    meta: dict[str, Any]

    def features(self, shapes: bool) -> set[tuple[Any, ...]]:
        """Features that a covering set must contain at least once; `shapes`: those of the patches too."""
        held: set[tuple[Any, ...]] = {
            (position, getattr(value, "dtype", type(value))) for position, value in enumerate(self.arguments)
        }
        meta = self.meta | ({"AFFINE": self.meta["AFFINE"] is not None} if "AFFINE" in self.meta else {})
        held |= {item for item in meta.items() if shapes or item[0] not in OF_SHAPES}
        if shapes and self.meta.get("WIDE"):
            held.add(("WIDE", self.meta["CHANNELS_LAST"], self.meta.get("KIND")))
        return {(self.kernel, *feature) for feature in held}


class PretendedDriver:
    """The methods of a driver that Triton calls before it compiles; each architecture is a separate device."""

    def __init__(self, architecture: str) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.architecture]

    def get_current_device(self) -> int:
        return list(TARGETS).index(self.architecture)

    def get_current_stream(self, device: int) -> int:
        return 0


def record(architecture: str) -> dict[str, Launch]:
    """Every launch to compile, by "kernel layout …"."""
    launches: dict[str, Launch] = {}
    label = ""

    def recorder(kernel: Any, programs: int, *arguments: Any, **meta: Any) -> None:
        assert programs > 0
        name = kernel.fn.__name__.strip("_").removesuffix("_kernel")
        launches[f"{name} {label}"] = Launch(kernel, arguments, meta)

    def warps(kernel: str, block: int, device: torch.device, *, scattered: bool = False) -> int:
        blocks[kernel].add(block)
        return WARPS(kernel, block, device, scattered=scattered)

    blocks: dict[str, set[int]] = collections.defaultdict(set)
    launch.run_kernel, launch.warps = recorder, warps  # type: ignore[assignment]
    launch.architecture = lambda device: architecture  # type: ignore[assignment]
    index = torch.empty(BATCH, 1408, dtype=torch.int64, device="meta")
    scalar = torch.empty((), device="meta")
    statistics = [0.5] * 4
    for clip in SHAPES + TYPES:
        video, patch = clip.tensor(), clip.patch
        values = patch[0] * patch[1] * patch[2] * clip.channels
        some = statistics[: clip.channels]
        for affine in (None, some):
            label = f"{clip}{' normalized' if affine else ''}"
            gather_tubes._launch(video, index, patch, affine, affine, clip.pred)
        if clip.pred in (BRAIN, clip.video):
            label = str(clip)
            motion_mask._launch(video, patch)
        undo = some if clip.video.is_floating_point else None
        for target, normalize in itertools.product(("pixel", "joint", "adjacent", "intra"), ("channel", "patch", None)):
            if (target == "intra" and patch[0] == 1) or not (clip in SHAPES or normalize == "channel"):
                continue
            label = f"{clip} {target} {normalize}"
            options = (patch, target, normalize, 1e-6, undo, undo)
            if target in ("adjacent", "intra") and clip.pred == BRAIN:
                frame_difference._launch(video, index, *options)
            predicted = values - values // patch[0] * (target == "intra")
            pred = video.new_empty(BATCH, 1408, predicted, dtype=clip.pred)
            # the mean's divisor: the number of values, which "adjacent" counts on the device
            factors, divisor = (scalar, 1) if target == "adjacent" else (None, pred.numel())
            masked_errors(pred, video, index, factors, divisor, (True, False), Goal(*options))
    goal = Goal((2, 16, 16), "pixel", "channel", 1e-6, None, None)
    video, every = PLAIN.tensor(), torch.empty(BATCH, 1568, 1536, dtype=BRAIN, device="meta")
    label = f"{PLAIN} pixel channel every_token"
    masked_errors(every, video, index, None, 1, (True, False), goal)
    label = f"{PLAIN} pixel channel without_gradient"
    masked_errors(every[:, :1408], video, index, None, 1, (False, False), goal)
    factors = torch.empty(index.shape, device="meta")
    for learned in (False, True):
        label = f"{PLAIN} pixel channel {'learned' if learned else 'fixed'} weights"
        masked_errors(every[:, :1408], video, index, factors, 1, (True, learned), goal)

    for codes, kind, smoothing in CODES:
        logits = torch.empty(2048, codes, dtype=kind, device="meta")
        labels = torch.empty(2048, dtype=torch.int64, device="meta")
        losses = torch.empty(2048, device="meta")
        # of a sum, of a mean, of single rows
        for upstream, kind_of in ((None, "sum"), (scalar, ""), (torch.empty(2048, device="meta"), "weighted")):
            label = " ".join(filter(None, (str(codes), str(kind)[6:], "smoothed" * bool(smoothing), kind_of)))
            softmax_gradient.softmax_gradient_(logits, labels, upstream, -100, smoothing, True, losses)
        label = f"{codes} {str(kind)[6:]}{' smoothed' * bool(smoothing)} without_gradient"
        softmax_gradient.softmax_gradient_(logits, labels, None, -100, smoothing, False, losses)
    for (rows, width), kind in itertools.product(((64 * 1408, 1536), (64, 1000), (64, 512)), (BRAIN, HALF, SINGLE)):
        label = f"{rows}x{width} {str(kind)[6:]}"
        gradient = torch.empty(rows, width, dtype=kind, device="meta")
        scale_gradient._launch(gradient, torch.empty(rows, device="meta"), torch.empty_like(gradient))
        label += " in_place"
        scale_gradient._launch(gradient, scalar, gradient)
    step = torch.empty((), dtype=torch.int64, device="meta")
    for slots, positions, hidden in ((8, 196, 176), (8, 576, 518), (1, 1568, 1411)):
        for guide in (None, torch.int64, SINGLE, DOUBLE):
            energy = None if guide is None else torch.empty(BATCH, slots * positions, dtype=guide, device="meta")
            label = f"{positions} positions{f' guided {guide}' if guide else ''}".replace("torch.", "")
            masks._launch(step, 1, 0, BATCH, slots, positions, hidden, energy, 32768)
    for hidden, count, by_cell in ((1408, 704, True), (1408, 704, False)):
        label = f"{count} of {hidden}{' by cell' * by_cell}"
        masked_subset._launch(index[:, :hidden], step, (8, 14, 14), count, by_cell, 1, 0)
    check_rows(architecture, blocks)
    return launches


def check_rows(architecture: str, blocks: dict[str, set[int]]) -> None:
    """Ends the program if no recorded launch uses a row of the architecture's launch tables."""
    for kernel, table in (launch.WARPS["default"] | launch.WARPS.get(architecture, {})).items():
        smallest = 0
        for largest, _ in table:
            if not any(smallest < block <= largest for block in blocks.get(kernel, ())):
                sys.exit(
                    f"{kernel} {architecture}: no launch has {smallest + 1} to {largest} values: add one to record()"
                )
            smallest = largest


def cover(launches: dict[str, Launch], shapes: bool) -> list[str]:
    """Returns PREDICTED and, chosen greedily, further launches until each feature of each kernel is covered."""
    features = {name: launched.features(shapes) for name, launched in launches.items()}
    chosen = PREDICTED & launches.keys()
    left = set().union(*features.values()).difference(*(features[name] for name in chosen))
    while left:
        best = max(features, key=lambda name: len(left & features[name]))
        chosen.add(best)
        left -= features[best]
    return [name for name in launches if name in chosen or name == PREDICTED_TOO]


def table_row(name: str, architecture: str, facts: dict[str, Any]) -> list[str]:
    """A line of the table: see HEAD."""
    kernel, launched = name.split(" ", 1)
    widths = ["+".join(f"{count}x{width}" for width, count in facts[kind].items()) for kind in ("loads", "stores")]
    numbers = [facts[name] for name in ("warps", "registers", "shared", "round_trips") if name in facts]
    return [kernel, launched, architecture, *map(str, numbers), *widths, str(facts["instructions"])] + [
        str(count) for count in facts["mix"].values()
    ]


HEAD = "kernel,launch,architecture,warps,registers,shared,{}loads,stores,instructions,"
TABLES = {
    "nvidia.csv": (["sm_80", "sm_90", "sm_100", "sm_120"], HEAD.format("round_trips,") + ",".join(NVIDIA_MIX)),
    "amd.csv": (["gfx90a", "gfx942"], HEAD.format("") + ",".join(AMD_MIX)),
}
"""File → its architectures and columns: bytes of shared memory, accesses to global memory as count x bits."""


def compiled(
    architectures: Iterable[str], everything: bool = False, kernels: Sequence[str] = ()
) -> Iterable[dict[str, Any]]:
    for architecture in architectures:
        launches = record(architecture)
        driver.set_active(PretendedDriver(architecture))
        for name in launches if everything else cover(launches, architecture in ALL_SHAPES):
            if kernels and name.split()[0] not in kernels:
                continue
            kernel, arguments, meta = launches[name]
            code = kernel.warmup(*arguments, grid=(1,), **meta, enable_fp_fusion=True)
            facts = {"name": name, "architecture": architecture, "warps": code.metadata.num_warps}
            facts["shared"] = code.metadata.shared
            facts |= inspect_cubin(code.asm["cubin"]) if "cubin" in code.asm else inspect_assembly(code.asm["amdgcn"])
            yield facts | {"row": ",".join(table_row(name, architecture, facts))}


def table_path(table: str, version: str) -> Path:
    """File of a table made by this Triton: without a version in its name for the one that constraints.txt pins."""
    pinned = f"triton=={version}" in (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    return RESULTS / (table if pinned else table.replace(".csv", f"-triton-{version}.csv"))


def write_tables(kernels: Sequence[str] = ()) -> None:
    """Writes the tables of all architectures, or replaces the rows of these kernels."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    for table, (architectures, head) in TABLES.items():
        file = table_path(table, triton.__version__)
        kept = file.read_text(encoding="utf-8").splitlines()[2:] if kernels else []
        rows = [row for row in kept if row.split(",")[0] not in kernels]
        rows = sorted(rows + [facts["row"] for facts in compiled(architectures, kernels=kernels)])
        first = f"# triton {triton.__version__}; written by: python -m tests.kernels.compile_kernels --write"
        file.write_text("\n".join([first, head, *rows]) + "\n", encoding="utf-8")
        print(f"{file}: {len(rows)} rows", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compiles every kernel for GPUs that are not here.")
    parser.add_argument("architectures", nargs="*", help=f"{', '.join(TARGETS)}; default: all")
    parser.add_argument("--all", action="store_true", help="every launch instead of the covering set")
    parser.add_argument("--write", action="store_true", help="write the tables in benchmarks/results/static")
    parser.add_argument("--kernels", nargs="+", default=[], help="only these kernels; default: all")
    options = parser.parse_args()
    if options.write:
        write_tables(options.kernels)
        return
    for facts in compiled(options.architectures or TARGETS, options.all, options.kernels):
        print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
