"""Counts launches of Triton kernels, to detect a fallback to PyTorch, and compiles kernels ahead in threads."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import torch

from mam2.kernels import active_path, launch


class Counter:
    """The names of the launched kernels, in order."""

    def __init__(self) -> None:
        self.names: list[str] = []


@contextlib.contextmanager
def counted() -> Iterator[Counter]:
    """Counts the launches inside the context, also those of the thread in which autograd runs a backward pass."""
    original, counter = launch.run_kernel, Counter()

    def run(kernel: Any, programs: int, *arguments: Any, **meta: Any) -> None:
        original(kernel, programs, *arguments, **meta)
        counter.names.append(getattr(kernel, "__name__", str(kernel)).strip("_").removesuffix("_kernel"))

    with mock.patch.object(launch, "run_kernel", run):
        yield counter


def fallback(device: torch.device, counter: Counter) -> str:
    """Returns the reason if our operator launched no Triton kernel although it should have; else ""."""
    if active_path(device) != "triton" or counter.names:
        return ""
    return "fell back to PyTorch: it launched no Triton kernel"


def compile_ahead(calls: Iterable[Callable[[], object]], *, threads: int | None = None) -> int:
    """Compiles the kernels of `calls` in threads, without a launch; returns the number of distinct kernels.

    The outputs of the calls are not computed. A kernel that does not compile raises when it is launched later.
    """
    from triton import AsyncCompileMode
    from triton.runtime import _async_compile

    recorded: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def record(kernel: Any, programs: int, *arguments: Any, **meta: Any) -> None:
        if programs:
            recorded.append((kernel, arguments, meta))

    with mock.patch.object(launch, "run_kernel", record):
        for call in calls:
            with contextlib.suppress(Exception):  # a failing call is reported when it is checked
                call()
    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
        mode = AsyncCompileMode(pool)
        futures = mode.raw_futures  # newer versions of Triton replace the list at the end
        try:
            with mode:
                for kernel, arguments, meta in recorded:
                    with torch.cuda.device(arguments[0].device) if arguments[0].is_cuda else contextlib.nullcontext():
                        kernel.warmup(*arguments, grid=(1,), **meta, enable_fp_fusion=True)
        except Exception:  # the launch raises again and names the kernel
            _async_compile.active_mode.set(None)
    return len(futures)
