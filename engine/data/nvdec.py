"""Tests whether NVDEC works: classifies DALI's errors, tries each codec, and decides when to stop using NVDEC."""

from __future__ import annotations

import functools
import re
import tempfile
import threading
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from mam2.engine.config.training import DataConfig
from mam2.engine.data.decoding import FILE_ERRORS, DecodeError, decode_frames
from mam2.engine.data.synthetic import write_trial
from mam2.engine.errors import UserError

MOST_FAILURES = 20
"""After this many failures of NVDEC in a row, the cause is the machine and not the files."""
WAIT_PARTS = 10
"""Parts in which a time limit is waited for."""
TRIAL_FRAMES, TRIAL_SIDE = 16, 256
TRIAL_TOLERANCE = 6.0
"""Largest mean difference to PyAV's frames in gray levels; the next frame of the trial clip differs by 10."""
DRIVER = re.compile(r"nvcuvid|cuInit|CUDA (driver|runtime)|driver version|no kernel image|NVML", re.IGNORECASE)
MEMORY = re.compile(r"out of memory|bad_alloc|cannot allocate memory|memory allocation", re.IGNORECASE)
CUDA = re.compile(r"\bCUDA (API )?error|\bCUDA_ERROR|\bcuda[A-Z]\w+|\bcu[A-Z]\w+|illegal memory access|device-side")
DECODER = re.compile(r"decoders?(\.|__|_)video|video decoder", re.IGNORECASE)

Value = TypeVar("Value")


class GpuError(UserError):
    """Raised if the driver or the GPU failed; no file is the cause."""


class NvdecHangs(GpuError):
    """Raised if NVDEC does not answer."""


def fault(message: str) -> Literal["memory", "driver", "gpu", "file", "program"]:
    """Returns the cause of a RuntimeError of DALI.

    message: the whole message. DALI names the operator that failed; only messages of the decoder blame the file.
    """
    if MEMORY.search(message):
        return "memory"
    if DRIVER.search(message):
        return "driver"
    reason = message.partition("encountered:")[2] or message
    if CUDA.search(reason):
        return "gpu"
    return "file" if DECODER.search(message) else "program"


def error_of(message: str, reason: str) -> Exception:
    """Returns the error to raise for a RuntimeError of DALI; `reason` is the relevant sentence of its message."""
    kind = fault(message)
    if kind == "file":
        return DecodeError(reason)
    if kind == "memory":
        return GpuError(f"no memory left for the clips: {reason}; use a smaller optim.micro_batch or data.prefetch")
    if kind in ("driver", "gpu"):
        return GpuError(f"the GPU or its driver failed: {reason}; mam2 doctor tests each decoder")
    return RuntimeError(message)


def within(seconds: float, work: Callable[[], Value]) -> Value:
    """Runs `work` in a new thread and returns its result. Raises TimeoutError after `seconds`.

    The thread keeps running. Time in which this process is stopped (Ctrl-Z, a scheduler) counts at most a tenth.
    """
    box: list[Any] = []

    def run() -> None:
        try:
            box.extend((work(), None))
        except BaseException as error:  # raised again in the caller's thread
            box.extend((None, error))

    thread = threading.Thread(target=run, name="nvdec", daemon=True)
    thread.start()
    for _ in range(WAIT_PARTS):
        thread.join(seconds / WAIT_PARTS)
    if not box:
        raise TimeoutError(f"no answer within {seconds:g} s")
    if box[1] is not None:
        raise box[1]
    return box[0]


class Record:
    """Counts failures of NVDEC in a row."""

    def __init__(self) -> None:
        self.in_a_row = 0

    def note(self, worked: bool) -> bool:
        """Records the result of a clip. Returns True once, when NVDEC must not be used any more."""
        self.in_a_row = 0 if worked else self.in_a_row + 1
        return self.in_a_row == MOST_FAILURES


Decode = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
"""Decodes frames 0 to 15 from the bytes of a file: uint8 [T, H, W, C] in the stored size."""


def try_codec(codec: str, decode: Decode) -> str:
    """Decodes a synthetic clip and compares it with PyAV's frames; returns why NVDEC cannot decode a codec, or ""."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_trial(Path(folder), codec, frames=TRIAL_FRAMES, side=TRIAL_SIDE)
        if path is None:  # this build of PyAV has no encoder for it: NVDEC is tested on the files themselves
            return ""
        expected = decode_frames(str(path), range(TRIAL_FRAMES))
        try:
            found = decode(np.fromfile(path, np.uint8))
        except (DecodeError, UserError, TimeoutError, *FILE_ERRORS) as error:
            return str(error).splitlines()[0] if str(error) else type(error).__name__
    if found.shape != expected.shape:
        return f"a clip of shape {expected.shape} was decoded to {found.shape}"
    difference = float(np.abs(found.astype(np.float32) - expected.astype(np.float32)).mean())
    if difference > TRIAL_TOLERANCE:
        return f"its frames differ by {difference:.1f} gray levels on average from PyAV's"
    return ""


def try_codecs(codecs: Iterable[str], decode: Decode) -> dict[str, str]:
    """Returns the codecs that NVDEC does not decode here, with the reasons."""
    return {codec: problem for codec in sorted(set(codecs)) if (problem := try_codec(codec, decode))}


def broken_codecs(codecs: Collection[str], device: torch.device, config: DataConfig) -> dict[str, str]:
    """Runs `try_codecs` on a GPU, once per process and codec."""
    found = {codec: _tried(codec, device, config.timeout_s) for codec in sorted(set(codecs))}
    return {codec: problem for codec, problem in found.items() if problem}


@functools.lru_cache
def _tried(codec: str, device: torch.device, timeout_s: float) -> str:
    from mam2.engine.data.dali import ClipGraph
    from mam2.engine.data.sampling import View

    config = DataConfig(frames=TRIAL_FRAMES, stride=1, size=TRIAL_SIDE, timeout_s=timeout_s)

    def decode(content: NDArray[np.uint8]) -> NDArray[np.uint8]:
        graph = ClipGraph("nvdec", config, views=1, samples=1, threads=1, device=device)
        (clips,) = graph.run([content], [range(TRIAL_FRAMES)], [[View(0, 0, 1, 1, False)]])
        return clips[0].cpu().numpy()

    return try_codec(codec, decode)
