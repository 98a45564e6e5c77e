"""Compiles every kernel as it would be launched at training shapes, for GPUs this machine does not have.

A program of its own (`python tests/compile_kernels.py [sm_90 …]`), because Triton must see a pretended driver and no
interpreter. Prints one JSON object a kernel, launch and architecture: registers, spills, stack and shared memory in
bytes, and counts of machine instructions.

The launchers run on meta tensors with `launch.run` replaced by a recorder, so what is compiled is what is launched.
"""

import collections
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ["MAM2_KERNELS"] = "triton"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from mam2.kernels import launch, masked_loss, masks, scale_gradient, softmax_gradient

# the package's functions of these names hide its modules
frame_difference = importlib.import_module("mam2.kernels.frame_difference")
gather_tubes = importlib.import_module("mam2.kernels.gather_tubes")

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

CLIPS = [
    ((2, 16, 16), "channels_last", torch.uint8, torch.bfloat16),
    ((2, 16, 16), "contiguous", torch.float32, torch.bfloat16),
    ((4, 16, 16), "channels_last", torch.uint8, torch.float32),
    ((2, 16, 16), "channels_last", torch.uint8, torch.float16),
    ((2, 16, 16), "channels_last", torch.uint8, torch.float32),
    ((2, 16, 16), "contiguous", torch.bfloat16, torch.bfloat16),
    ((2, 14, 14), "channels_last", torch.uint8, torch.bfloat16),
    ((2, 8, 8), "channels_last", torch.uint8, torch.float32),
    ((1, 16, 16), "contiguous", torch.float32, torch.float32),
]
"""Patch, layout and type of the clip (64 of 16 frames at 224 pixels), type of the prediction."""
CODES = [
    (8192, torch.bfloat16, 0.0),
    (16384, torch.float32, 0.1),
    (1000, torch.bfloat16, 0.0),
    (256, torch.bfloat16, 0.0),
    (8192, torch.float16, 0.1),
    (8192, torch.float32, 0.0),
    (16384, torch.bfloat16, 0.0),
]


class PretendedDriver:
    """What Triton asks of a driver before it compiles; each architecture is a device of its own."""

    def __init__(self, architecture: str) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.architecture]

    def get_current_device(self) -> int:
        return list(TARGETS).index(self.architecture)

    def get_current_stream(self, device: int) -> int:
        return 0


def record(everything: bool) -> dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """The launches to compile: name → (kernel, arguments, compile-time arguments).

    Without `everything`, one of every kind: each kernel, each row of the launch tables, each way to read a clip.
    """
    launches: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}
    label = ""

    def recorder(kernel: Any, programs: int, *arguments: Any, **meta: Any) -> None:
        assert programs > 0
        launches[f"{kernel.fn.__name__.strip('_')} {label}"] = (kernel, arguments, meta)

    launch.run = recorder  # type: ignore[assignment]
    index = torch.empty(64, 1408, dtype=torch.int64, device="meta")
    for patch, layout, video_type, pred_type in CLIPS if everything else CLIPS[:3]:
        video = torch.empty(64, 16, 224, 224, 3, dtype=video_type, device="meta").permute(0, 4, 1, 2, 3)
        if layout == "contiguous":
            video = torch.empty(64, 3, 16, 224, 224, dtype=video_type, device="meta")
        label = base = f"{'x'.join(map(str, patch))} {layout} {str(video_type)[6:]} {str(pred_type)[6:]}"
        first = (patch, layout) == CLIPS[0][:2]
        if first or everything:
            gather_tubes._launch(video, index, patch, [0.5] * 3, [0.5] * 3, pred_type)
            label = f"{base} adjacent channel"
            frame_difference._launch(video, index, patch, "adjacent", "channel", 1e-6, None, None)
        for target, normalize in itertools.product(("pixel", "adjacent", "intra"), ("channel", "patch", None)):
            common = normalize == "channel" and target != "intra"
            if (target == "intra" and patch[0] == 1) or not (common or everything):
                continue
            values = (patch[0] - (target == "intra")) * patch[1] * patch[2] * 3
            pred = torch.empty(64, 1408, values, dtype=pred_type, device="meta")
            label = f"{base} {target} {normalize}"
            undo = None if video_type == torch.uint8 else [0.5] * 3
            masked_loss._launch(pred, video, index, patch, target, normalize, 1e-6, undo, undo, True)
    half, single = torch.bfloat16, torch.float32
    for codes, kind, smoothing in CODES if everything else CODES[:3]:
        logits = torch.empty(2048, codes, dtype=kind, device="meta")
        labels = torch.empty(2048, dtype=torch.int64, device="meta")
        upstream = torch.empty(2048, device="meta") if smoothing else None
        label = f"{codes} {str(kind)[6:]}{' smoothed weighted' if smoothing else ''}"
        softmax_gradient.softmax_gradient_(logits, labels, upstream, -100, smoothing, True)
    for rows, width, kind in ((64 * 1408, 1536, half), (1, 8192 * 384, single)):
        label = f"{rows}x{width} {str(kind)[6:]}"
        gradient = torch.empty(rows, width, dtype=kind, device="meta")
        scale_gradient._launch(gradient, torch.empty(rows, device="meta"))
    step = torch.empty((), dtype=torch.int64, device="meta")
    for slots, positions, hidden in ((8, 196, 176), (1, 1568, 1411)):
        label = f"{positions} positions"
        masks._launch(step, 1, 0, 64, slots, positions, hidden)
    return launches


def run_tool(tool: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def inspect_cubin(binary: bytes) -> dict[str, Any]:
    """What NVIDIA's tools say about a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage = run_tool("cuobjdump", "-res-usage", file.name)
        code = run_tool("nvdisasm", "-c", file.name)
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)((?:\.\w+)*)", code)
    names = collections.Counter(name for name, _ in instructions)
    memory = collections.Counter(
        f"{name}.{next((part for part in suffix.split('.') if part in ('64', '128', 'U16', 'U8')), '32')}"
        for name, suffix in instructions
        if name in ("LDG", "STG")
    )
    numbers = {name: int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")}  # type: ignore[index]
    return {
        "registers": numbers["REG"],
        "stack": numbers["STACK"],
        "local": numbers["LOCAL"],
        "instructions": sum(names.values()) - names["NOP"],
        "atomics": sum(names[name] for name in ("ATOM", "ATOMG", "ATOMS", "RED", "REDG")),
        "memory": dict(sorted(memory.items())),
    }


def inspect_hsaco(assembly: str) -> dict[str, Any]:
    """The same from the assembly for an AMD GPU; scalar registers spilled into vector registers cost no memory."""

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])  # type: ignore[index]

    memory = collections.Counter(re.findall(r"\b(?:global|buffer)_(?:load|store)_\w+", assembly))
    return {
        "registers": field("vgpr_count"),
        "stack": field("private_segment_fixed_size"),
        "local": field("vgpr_spill_count"),
        "instructions": len(re.findall(r"^\t(?:[sv]|global|ds|buffer)_", assembly, re.MULTILINE)),
        "atomics": len(re.findall(r"(?:global|ds|buffer|flat)_atomic", assembly)),
        "memory": dict(sorted(memory.items())),
    }


def main(architectures: list[str], everything: bool) -> None:
    launches = record(everything)
    for architecture in architectures:
        driver.set_active(PretendedDriver(architecture))
        for name, (kernel, arguments, meta) in launches.items():
            compiled = kernel.warmup(*arguments, grid=(1,), **meta, enable_fp_fusion=True)
            cuda = "cubin" in compiled.asm
            facts = inspect_cubin(compiled.asm["cubin"]) if cuda else inspect_hsaco(compiled.asm["amdgcn"])
            head = {"kernel": name, "architecture": architecture, "warps": compiled.metadata.num_warps}
            print(json.dumps(head | {"shared": compiled.metadata.shared} | facts), flush=True)


if __name__ == "__main__":
    wanted = [argument for argument in sys.argv[1:] if argument != "--all"]
    main(wanted or list(TARGETS), "--all" in sys.argv)
