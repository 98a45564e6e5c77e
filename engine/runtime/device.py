"""Device, precision and compilation of a step."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, schedule

from mam2.engine.config.training import RunConfig
from mam2.engine.errors import RankError, UserError
from mam2.engine.files import write_whole
from mam2.engine.runtime.compile_cache import keep_compiled_code

BLOCK_VARIANTS = 64
"""Most compilations of a block's code: for widths, numbers of tokens and clips, with and without gradient."""


def pick_device(config: RunConfig) -> torch.device:
    """Returns the device of a run. Raises UserError if the config requires a GPU and there is none."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise _error_here(
            "run.device is cuda, but torch sees no GPU: install a CUDA build of torch, or use run.device=cpu"
        )
    name = config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device("cuda", _gpu_number()) if name == "cuda" else torch.device(name)


def _gpu_number() -> int:
    """The number of this process's GPU on the machine, or 0 if the process sees only one, as Slurm may arrange."""
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if count == 1:
        return 0
    if number >= count:
        raise _error_here(
            f"LOCAL_RANK is {number}, but torch sees {count} GPUs: start at most {count} processes per machine"
        )
    return number


def _error_here(message: str) -> UserError:
    """Returns an error that may occur in this process only: it names the rank if there are several processes."""
    rank = os.environ.get("RANK", "0")
    return UserError(message) if rank == "0" else RankError(f"rank {rank}: {message}")


def matmul_dtype(config: RunConfig, device: torch.device) -> torch.dtype:
    """Returns the dtype of matrix products; `auto` is bfloat16 if the device multiplies it faster than float32."""
    auto = config.precision == "auto" and multiplies_bfloat16(device)
    return torch.bfloat16 if auto or config.precision == "bfloat16" else torch.float32


def multiplies_bfloat16(device: torch.device) -> bool:
    """Returns whether this is a GPU, NVIDIA's from Ampere on, or an x86 CPU with AVX512-BF16 or AMX.

    ARM CPUs were never measured and count as False, as do all CPUs without `torch.cpu.get_capabilities` (older torch).
    Without a GPU, the one that is planned for counts as True.
    """
    if device.type == "cuda":
        here = torch.cuda.is_available() and torch.version.hip is None
        return not here or torch.cuda.get_device_capability(device) >= (8, 0)  # older ones emulate it, slowly
    capabilities: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    """Returns a bfloat16 autocast context, or one that changes nothing."""
    dtype = matmul_dtype(config, device)
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def why_not_compile(device: torch.device) -> str | None:
    """Returns why torch.compile cannot generate code for a device, or None."""
    if device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        return "no C++ compiler found (install g++)"
    if device.type == "cuda":
        try:
            import triton  # noqa: F401
        except ImportError:
            return "triton is not installed"
    return None


def compiler(config: RunConfig, device: torch.device) -> tuple[Callable[[Callable[..., Any]], Callable[..., Any]], str]:
    """Returns a function that compiles a part of the step, or returns it unchanged, and a text for the log."""
    if not config.compile:
        return (lambda part: part), "eager (run.compile is off)"
    reason = why_not_compile(device)
    if reason:
        return (lambda part: part), f"eager: {reason}"
    keep_compiled_code()  # before torch chooses its folder
    return (lambda part: torch.compile(part, fullgraph=True, dynamic=False)), "compiled, whole graphs"


def compile_each(blocks: Iterable[nn.Module], compiled: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Compiles each block alone. torch keeps code by function and shapes, so that equal blocks are compiled once."""
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, BLOCK_VARIANTS)
    for block in blocks:
        block.forward = compiled(block.forward)  # type: ignore[method-assign]


def compile_problem(error: BaseException) -> str | None:
    """Returns one line about a failed compiler, with the remedy; None for an error of another kind.

    torch.compile wraps the messages of the C++ compiler, Triton and its assembler in its own errors.
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
    reason = next((line for line in lines if "error" in line.lower()), lines[0])
    name = (
        f"the C++ compiler ({os.environ.get('CXX', 'g++')})" if isinstance(inner, CppCompileError) else "torch.compile"
    )
    return f"{name} failed: {reason[:300]}; fix it, or pass --run.no-compile, which trains more slowly"


@contextmanager
def paused_gc() -> Iterator[None]:
    """Switches cyclic garbage collection off, since a step creates no cycles; existing objects are never searched."""
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
    """Allows only bit-exact deterministic algorithms if `config.deterministic` is set."""
    debugging: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), debugging.fill_uninitialized_memory
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first use of cuBLAS
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
    """Profiles `steps` steps after the first five, which compile and warm up.

    Yields a function to call after each step. Writes a trace for chrome://tracing or Perfetto and a table of the most
    expensive operators to `folder`; reports a failure to `info`.
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
            write_whole(folder / "operators.txt", table)
            profiler.export_chrome_trace(str(folder / "trace.json"))
        except OSError as error:
            info(f"profile {folder}: cannot be written: {error.strerror}. The run continues")

    plan = schedule(wait=4, warmup=1, active=steps, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write) as profiler:
        yield profiler.step
