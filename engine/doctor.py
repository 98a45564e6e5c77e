"""Reports which implementations the engine uses on this machine, and what to install for faster ones."""

from __future__ import annotations

import importlib.metadata
import platform
import tempfile
from pathlib import Path

import av
import torch

from mam2.engine.config.recipe import load_recipe
from mam2.engine.config.training import DataConfig, RunConfig
from mam2.engine.data.dali import dali_version
from mam2.engine.data.decoding import available_cores
from mam2.engine.data.loader import ClipLoader
from mam2.engine.data.manifest import read_manifest
from mam2.engine.data.synthetic import write_trial
from mam2.engine.model.attention import active_backend
from mam2.engine.model.attention_packages import DISTRIBUTIONS, OPERATORS, operator_name, why_not
from mam2.engine.model.attention_tuning import measure, shapes_of
from mam2.engine.runtime.device import compiler, matmul_dtype
from mam2.kernels import active_path
from mam2.kernels.launch import table_for

PACKAGES = ("mam2", "torch", "triton", "xformers", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "av", "numpy")
SOUND_PYAV = (17, 1)
CODECS = ("h264", "hevc", "vp9", "vp8", "mpeg4", "mjpeg", "av1")


def report() -> str:
    """Returns the text that `mam2 doctor` prints."""
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
    lines += ["paths", f"  kernels    {_answer(lambda: active_path(device))}, launch table {table_for(device)!r}"]
    first, *others = _attention(device, dtype)
    lines += [f"  attention  {first}", *(f"             {line}" for line in others)]
    lines.append(f"  step       {compiler(RunConfig(), device)[1]}")
    lines.append(f"  precision  {dtype}".replace("torch.", ""))
    first, *others = try_decoding(device)
    lines += [f"  decoding   {first}", *(f"             {line}" for line in others)]
    if not dali_version():
        advice.append("DALI: pip install '.[cpu]' (no GPU), '.[cuda13]' or '.[cuda12]' in the checkout")
    if tuple(map(int, av.__version__.split(".")[:2])) < SOUND_PYAV:
        advice.append("PyAV: pip install 'av>=17.1'; older versions crash on some files")
    if device.type != "cuda":
        advice.append("a GPU: with a CUDA build of torch and pip install '.[cuda13]', it runs Triton kernels and NVDEC")
    return "\n".join([*lines, "to go faster", *(f"  {line}" for line in advice or ["nothing to install"])])


def try_decoding(device: torch.device) -> list[str]:
    """Decodes a synthetic clip of each codec as a run does; returns the decoder, or what failed."""
    lines: list[str] = []
    config = DataConfig(frames=8, stride=2, size=64)
    with tempfile.TemporaryDirectory() as folder:
        for codec in CODECS:
            try:
                path = write_trial(Path(folder), codec, frames=16, side=160)
                if path is None:
                    lines.append(f"{codec:<6} not tested: this PyAV has no encoder for a trial clip")
                    continue
                manifest = read_manifest(path, progress=False)
                with ClipLoader(manifest, config, batch=1, device=device, seed=0, info=lines.append) as loader:
                    (batch,) = loader.evaluate()
                    (decoder,) = loader.decoders
                    cropper = loader.cropper
                found = ((batch.clip.float().mean((0, 2, 3, 4)) - 5) / 10).round().tolist()
                if found != list(range(0, 16, 2)):
                    lines.append(f"{codec:<6} WRONG: frames {found} by {decoder} instead of 0, 2, … 14")
                else:
                    lines.append(f"{codec:<6} decoded correctly by {decoder}, cropped by {cropper} on {device.type}")
            except Exception as error:  # the report must show any error and continue
                lines.append(f"{codec:<6} NOT POSSIBLE: {type(error).__name__}: {error}".splitlines()[0])
    return lines


def _attention(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Returns the attention used for the shapes of mam2-fast, and the time of each implementation here."""
    unmeasured = active_backend(device, dtype)
    yes = f"measured for a run and kept, else {unmeasured}" if device.type == "cuda" else f"a run uses {unmeasured}"
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


def _answer(ask: object) -> str:
    try:
        return ask()  # type: ignore[operator]
    except RuntimeError as error:
        return f"not possible: {error}"
