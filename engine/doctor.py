"""Which path each part of the engine takes on this machine, and what to install for a faster one."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from mam2.engine.config import RunConfig, UserError
from mam2.engine.data.decoding import available_cores, choose_front_end
from mam2.engine.data.graph import import_dali
from mam2.engine.model.attention import active_backend
from mam2.engine.model.attention_choice import measure, shapes_of
from mam2.engine.model.attention_packages import DISTRIBUTIONS, OPERATORS, operator_name, why_not
from mam2.engine.recipe import load_recipe
from mam2.engine.train.runtime import compiler, matmul_dtype
from mam2.kernels import active_path
from mam2.kernels.launch import table_for

PACKAGES = ("mam2", "torch", "triton", "xformers", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "av", "numpy")
CODECS = ("h264", "hevc", "vp9", "vp8", "mpeg4", "mjpeg", "av1")


def report() -> str:
    """The lines that `mam2 doctor` prints."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = ["machine", f"  {platform.platform()}, Python {platform.python_version()}, {available_cores()} CPU cores"]
    if device.type == "cuda":
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            capability = f"sm_{properties.major}{properties.minor}"
            lines.append(f"  GPU {index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB, {capability}")
    else:
        lines.append("  no GPU that torch can use")
    lines += ["versions", *(f"  {name:<20} {_version(name)}" for name in PACKAGES)]

    dtype = matmul_dtype(RunConfig(), device)
    advice = []
    lines += ["paths", f"  kernels    {_told(lambda: active_path(device))}, launch table {table_for(device)!r}"]
    first, *others = _attention(device, dtype)
    lines += [f"  attention  {first}", *(f"             {line}" for line in others)]
    lines.append(f"  step       {compiler(RunConfig(), device)[1]}")
    lines.append(f"  precision  {dtype}".replace("torch.", ""))
    try:
        import_dali()
        by_front_end: dict[str, list[str]] = {}
        for codec in CODECS:
            by_front_end.setdefault(choose_front_end(codec, device), []).append(codec)
        decoded = "; ".join(f"{', '.join(codecs)} by {name}" for name, codecs in by_front_end.items())
        lines.append(
            f"  decoding   {decoded}; then one DALI graph on {'the GPU' if device.type == 'cuda' else 'the CPU'}"
        )
    except UserError as error:
        lines.append(f"  decoding   not possible: {error}")
        advice.append("DALI: pip install '.[cpu]' (no GPU), '.[cuda13]' or '.[cuda12]' in the checkout")
    if device.type != "cuda":
        advice.append("a GPU: with a CUDA build of torch and pip install '.[cuda13]' it runs Triton kernels and NVDEC")
    return "\n".join([*lines, "to go faster", *(f"  {line}" for line in advice or ["nothing to install"])])


def _attention(device: torch.device, dtype: torch.dtype) -> list[str]:
    """What runs for the shapes of mam2-fast, and how long each implementation takes for them here."""
    unmeasured = active_backend(device, dtype)
    yes = f"measured for a run and kept, else {unmeasured}" if device.type == "cuda" else f"a run takes {unmeasured}"
    lines = [f"{str(dtype).removeprefix('torch.')}; {yes}"]
    if device.type == "cuda":
        for package in OPERATORS:
            refused = why_not(package, device, dtype, 64)  # type: ignore[arg-type]
            said = f"not used: {refused}" if refused else operator_name(package, device, dtype, 64)  # type: ignore[arg-type]
            lines.append(f"{DISTRIBUTIONS[package]}: {said}")
    for part, shape in shapes_of(load_recipe("mam2-fast"), 16 if device.type == "cuda" else 1).items():
        times = ", ".join(f"{name} {ms:.3g} ms" for name, ms in measure(shape, device, dtype).items())
        lines.append(f"{part} ({shape}): {times}")
    return lines


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _told(ask: object) -> str:
    try:
        return ask()  # type: ignore[operator]
    except RuntimeError as error:
        return f"not possible: {error}"
