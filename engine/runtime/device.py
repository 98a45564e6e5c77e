"""Where and how a step runs: device, precision, compilation."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from mam2.engine.config.pretrain import RunConfig
from mam2.engine.errors import RankError, UserError


def pick_device(config: RunConfig) -> torch.device:
    """The device a run is told to use. Raises UserError where it asks for a GPU that is not there."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise _error_here(
            "run.device is cuda, but torch sees no GPU: install a CUDA build of torch, or use run.device=cpu"
        )
    name = config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device("cuda", _gpu_number()) if name == "cuda" else torch.device(name)


def _gpu_number() -> int:
    """Of the GPU of this process: its number on the machine, or 0 where it sees one GPU alone, as Slurm may arrange."""
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if count == 1:
        return 0
    if number >= count:
        raise _error_here(
            f"LOCAL_RANK is {number}, but torch sees {count} GPUs: start at most {count} processes on a machine"
        )
    return number


def _error_here(message: str) -> UserError:
    """A mistake that other processes of the run may not see: it names this one, if it is one of several."""
    rank = os.environ.get("RANK", "0")
    return UserError(message) if rank == "0" else RankError(f"rank {rank}: {message}")


def matmul_dtype(config: RunConfig, device: torch.device) -> torch.dtype:
    """What matrix products run in; `auto` is bfloat16 where the device multiplies it faster than float32."""
    auto = config.precision == "auto" and (device.type == "cuda" or cpu_multiplies_bfloat16())
    return torch.bfloat16 if auto or config.precision == "bfloat16" else torch.float32


def cpu_multiplies_bfloat16() -> bool:
    """Whether it is an x86 CPU with instructions for that: AVX512-BF16 or AMX. ARM's were never measured here.

    A torch that lacks `torch.cpu.get_capabilities` does not tell: False.
    """
    capabilities: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    """bfloat16 autocast, or a context that changes nothing."""
    dtype = matmul_dtype(config, device)
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def why_not_compile(device: torch.device) -> str | None:
    """What keeps torch.compile from generating code for a device, or None."""
    if device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        return "no C++ compiler found (install g++)"
    if device.type == "cuda":
        try:
            import triton  # noqa: F401
        except ImportError:
            return "triton is not installed"
    return None


def compiler(config: RunConfig, device: torch.device) -> tuple[Callable[[Callable[..., Any]], Callable[..., Any]], str]:
    """A function that compiles a part of the step, or hands it back as it is, and the word for the log."""
    if not config.compile:
        return (lambda part: part), "eager (run.compile is off)"
    reason = why_not_compile(device)
    if reason:
        return (lambda part: part), f"eager: {reason}"
    return (lambda part: torch.compile(part, fullgraph=True, dynamic=False)), "compiled, whole graphs"


def compile_problem(error: BaseException) -> str | None:
    """One line on a compiler that failed, with the remedy; None for an error of another kind.

    torch.compile wraps what a C++ compiler, Triton or its assembler says into errors of its own.
    """
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, CppCompileError | InvalidCxxCompiler | BackendCompilerFailed):
            break
        inner = inner.__cause__ or inner.__context__
    if inner is None:
        return None
    while isinstance(inner, BackendCompilerFailed):
        inner = inner.inner_exception
    text = inner.output if isinstance(inner, CppCompileError) else str(inner)
    lines = [line.strip() for line in str(text).splitlines() if line.strip()] or [type(inner).__name__]
    told = next((line for line in lines if "error" in line.lower()), lines[0])
    name = (
        f"the C++ compiler ({os.environ.get('CXX', 'g++')})" if isinstance(inner, CppCompileError) else "torch.compile"
    )
    return f"{name} failed: {told[:300]}; mend it, or add --run.no-compile, which trains more slowly"


@contextmanager
def paused_gc() -> Iterator[None]:
    """Without pauses for cyclic garbage, which a step does not make; what was alive before is never searched."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


@contextmanager
def determinism(config: RunConfig) -> Iterator[None]:
    """Only algorithms that repeat bit for bit, where `config.deterministic` asks for it."""
    debugging: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), debugging.fill_uninitialized_memory
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
        torch.use_deterministic_algorithms(True)
        # a debugging aid that costs time
        debugging.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        debugging.fill_uninitialized_memory = before[1]


@contextmanager
def profiled(steps: int, folder: Path, info: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Profiles `steps` steps after the first five, which compile and warm up: gives a function to call after each.

    Leaves a trace for chrome://tracing or Perfetto and a table of the costliest operators in `folder`; `info` hears
    where that fails.
    """
    if not steps:
        yield lambda: None
        return
    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]

    def write(profiler: profile) -> None:
        order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=80)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "operators.txt").write_text(table, encoding="utf-8")
            profiler.export_chrome_trace(str(folder / "trace.json"))
        except OSError as error:
            info(f"profile {folder}: cannot be written: {error.strerror}. The run goes on")

    plan = schedule(wait=4, warmup=1, active=steps, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write) as profiler:
        yield profiler.step
