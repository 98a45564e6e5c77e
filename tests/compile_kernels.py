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

from mam2.kernels import launch, masked_loss, masks, scale_gradient

# the package's functions of these names hide its modules
frame_difference = importlib.import_module("mam2.kernels.frame_difference")
gather_tubes = importlib.import_module("mam2.kernels.gather_tubes")
linear_cross_entropy = importlib.import_module("mam2.kernels.linear_cross_entropy")

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


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


def record() -> dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Every launch to compile: name → (kernel, arguments, compile-time arguments)."""
    launches: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}
    label = ""

    def recorder(kernel: Any, programs: int, *arguments: Any, **meta: Any) -> None:
        assert programs > 0
        launches[f"{kernel.fn.__name__.strip('_')}/{label}"] = (kernel, arguments, meta)

    launch.run = recorder  # type: ignore[assignment]
    half, single = torch.bfloat16, torch.float32
    index = torch.empty(64, 1408, dtype=torch.int64, device="meta")
    mean = std = [0.5, 0.5, 0.5]
    for patch, layout, video_type, pred_type in (
        ((2, 16, 16), "channels_last", torch.uint8, half),
        ((2, 16, 16), "channels_last", torch.uint8, torch.float16),
        ((2, 16, 16), "channels_last", torch.uint8, single),
        ((2, 16, 16), "channels_first", single, half),
        ((2, 16, 16), "channels_first", half, half),
        ((2, 14, 14), "channels_last", torch.uint8, half),
        ((2, 8, 8), "channels_last", torch.uint8, single),
        ((1, 16, 16), "channels_first", single, single),
        ((4, 16, 16), "channels_last", torch.uint8, half),
    ):
        video = torch.empty(64, 16, 224, 224, 3, dtype=video_type, device="meta").permute(0, 4, 1, 2, 3)
        if layout == "channels_first":
            video = torch.empty(64, 3, 16, 224, 224, dtype=video_type, device="meta")
        values = patch[0] * patch[1] * patch[2] * 3
        shape = "x".join(map(str, patch))
        label = f"{shape} {layout} {str(video_type)[6:]} {str(pred_type)[6:]}"
        base = label
        gather_tubes._launch(video, index, patch, mean, std, pred_type)
        label = f"{base} adjacent channel"
        frame_difference._launch(video, index, patch, "adjacent", "channel", 1e-6, None, None)
        for target, normalize in itertools.product(("pixel", "adjacent", "intra"), ("channel", "patch", None)):
            if (target == "intra" and patch[0] == 1) or (normalize != "channel" and patch != (2, 16, 16)):
                continue
            count = values - values // patch[0] if target == "intra" else values
            pred = torch.empty(64, 1408, count, dtype=pred_type, device="meta")
            label = f"{base} {target} {normalize}"
            undo = mean if video_type == half else None
            masked_loss._launch(pred, video, index, patch, target, normalize, 1e-6, undo, undo, True)
    for codes, pred_type in itertools.product((256, 1000, 8192, 16384), (half, torch.float16, single)):
        logits = torch.empty(2048, codes, dtype=pred_type, device="meta")
        labels = torch.empty(2048, dtype=torch.int64, device="meta")
        upstream = torch.empty(2048, device="meta")
        label = f"{codes} {str(pred_type)[6:]}"
        linear_cross_entropy._softmax_gradient_(logits, labels, None, -100, 0.0, True)
        label += " smoothed weighted"
        linear_cross_entropy._softmax_gradient_(logits, labels, upstream, -100, 0.1, True)
    for rows, width, pred_type in ((64 * 1408, 1536, half), (64 * 1408, 384, single), (1, 8192 * 384, torch.float16)):
        label = f"{rows}x{width} {str(pred_type)[6:]}"
        gradient = torch.empty(rows, width, dtype=pred_type, device="meta")
        scale_gradient._launch(gradient, torch.empty(rows, device="meta"))
    step = torch.empty((), dtype=torch.int64, device="meta")
    for slots, positions, hidden in ((8, 196, 176), (1, 1568, 1411), (1, 6272, 5644)):
        label = f"{positions} positions"
        masks._launch(step, 1, 0, 64, slots, positions, hidden)
    return launches
