"""Turns clip requests into pixels on the device: decoding threads, and the graphs that crop, mirror and resize.

Legend: S samples per batch, R views per sample, T frames, H = W = the clip's size, C channels.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray

from mam2.engine.config.training import DataConfig
from mam2.engine.data.arrays import read_frames
from mam2.engine.data.crops import TorchCrops
from mam2.engine.data.dali import ClipGraph, dali_version, with_number
from mam2.engine.data.decode_process import SUPPORTED, CannotStart, DecodingProcesses
from mam2.engine.data.decoding import FILE_ERRORS, DecodeError, available_cores, decode_frames
from mam2.engine.data.nvdec import NvdecHangs, error_of, fault
from mam2.engine.data.outage import Patience
from mam2.engine.data.sampling import ClipRequest, least_size
from mam2.engine.data.storage import local_file
from mam2.engine.data.values import PixelValues
from mam2.engine.data.vetting import read_vetted
from mam2.engine.errors import UserError
from mam2.engine.runtime.cuda import own_stream

MOST_THREADS = 4
"""Most decoding threads with which `data.workers auto` decodes in threads: each holds Python's lock for up to a tenth
of its time, for which the training loop waits (docs/benchmarks.md)."""
RECORDED = "recorded"
"""Used as the decoder's name for clips that are read instead of videos."""


class ClipSource(Protocol):
    """Recorded clips, cropped, resized and mirrored. Threads may share it."""

    @property
    def paths(self) -> Sequence[str]:
        """Paths of all its files."""

    def path_of(self, video: int, augmentation: int) -> str:
        """Returns the path of the file with a clip, given by the index of its video in the manifest."""

    def read(self, video: int, augmentation: int, out: NDArray[Any]) -> None:
        """Writes all views of a clip to `out` [R, T, H, W, C]. Raises UserError if it is damaged; OSError."""


@dataclass(frozen=True)
class Job:
    """A clip that will become row `row` of a batch."""

    row: int
    request: ClipRequest
    decoder: str
    payload: Future[NDArray[Any]]
    """Frames [T, h, w, C] from PyAV or an array, views [R, T, H, W, C] of a recorded clip, else the bytes of the
    file."""


class Renderer:
    """`start` decodes a clip in a thread, `finish` writes started clips into a batch. Threads may share one object."""

    def __init__(
        self,
        config: DataConfig,
        *,
        samples: int,
        device: torch.device,
        info: Callable[[str], None],
        paths: Sequence[str] = (),
        values: PixelValues | None = None,
    ):
        """samples: maximum per batch. info: receives lines for the log. paths: of the data; see `Patience`. values: of
        the files; None: 8-bit ones."""
        device = with_number(device)
        self._config = config
        self._samples = samples
        self._device = device
        self._copies = own_stream(self, device) if device.type == "cuda" else None
        self._threads = config.threads or threads_of_a_process()
        self._pool = ThreadPoolExecutor(self._threads, "decode")
        own = config.workers == "processes" or (config.workers == "auto" and self._threads > MOST_THREADS)
        self._processes = DecodingProcesses(self._threads) if own and SUPPORTED else None
        self._info = info
        self._patience = Patience(config.wait_s, info, paths)
        self._recorded: ClipSource | None = None
        self._recorded_patience = self._patience
        self._vetted: set[tuple[str, int, int]] = set()
        self._values = values or PixelValues(config.channels)
        self._dali = dali_version() if self._plain else ""
        self._graphs: dict[tuple[str, int], ClipGraph | TorchCrops] = {}
        self._lock = threading.Lock()
        self._reported = False
        """Whether the log says that processes for decoding cannot start."""
        self.hangs = ""
        """Message of a call of NVDEC that never ended; NVDEC must not be called again. Else empty."""

    @property
    def cropper(self) -> str:
        """Returns the name of the library that crops, mirrors and resizes, for the log."""
        if self._dali:
            return f"DALI {self._dali}"
        return "PyTorch " + ("(DALI is not installed)" if self._plain else "(DALI's graph is for 8-bit RGB)")

    @property
    def dtype(self) -> torch.dtype:
        """Type of the clips."""
        return self._values.dtype

    @property
    def _plain(self) -> bool:
        """Whether clips are 8-bit RGB."""
        return self._values.channels == 3 and not self._values.floats

    def start(
        self, row: int, path: str, request: ClipRequest, decoder: str, seek_points: Sequence[tuple[int, int]] = ()
    ) -> Job:
        """Decodes a clip, or reads the file for a graph that decodes, in a thread. seek_points: see `Video`."""
        if decoder in ("pyav", "array"):
            payload = self._pool.submit(self._decode, path, request, decoder, seek_points)
        else:
            payload = self._pool.submit(self._patience, path, lambda: read_vetted(path, self._vetted))
        return Job(row, request, decoder, payload)

    def read_clips(self, source: ClipSource) -> None:
        """Sets the source of `start_recorded`."""
        self._recorded = source
        self._recorded_patience = Patience(self._config.wait_s, self._info, source.paths)

    def start_recorded(self, row: int, request: ClipRequest, augmentation: int) -> Job:
        """Reads a recorded clip in a thread."""
        return Job(row, request, RECORDED, self._pool.submit(self._read_recorded, request, augmentation))

    def _read_recorded(self, request: ClipRequest, augmentation: int) -> NDArray[Any]:
        source, config = self._recorded, self._config
        assert source is not None
        shape = len(request.views), config.frames, config.size, config.size, config.channels
        clips = torch.empty(shape, dtype=self._values.dtype, pin_memory=self._device.type == "cuda").numpy()
        path = source.path_of(request.video, augmentation)
        try:
            self._recorded_patience(path, lambda: source.read(request.video, augmentation, clips))
        except OSError as error:  # never replaced by another video, which would make the run depend on the outage
            raise UserError(
                f"{path}: cannot be read ({error.strerror or error}); restore it and start again with --resume, or "
                "run mam2 tokenize with the same values to write it again"
            ) from error
        return clips

    def _decode(
        self, path: str, request: ClipRequest, decoder: str, seek_points: Sequence[tuple[int, int]]
    ) -> NDArray[Any]:
        def read() -> NDArray[Any]:
            if decoder == "array":
                return self._values.check(read_frames(path, request.frames, channels=self._config.channels))
            return self._decode_frames(
                path,
                request.frames,
                timeout_s=self._config.timeout_s,
                seek_points=tuple(seek_points),
                least_size=least_size(request.views, self._config.size),
                empty=pinned_empty if self._device.type == "cuda" else np.empty,
                channels=self._config.channels,
            )

        try:
            return self._patience(path, read)
        except DecodeError:
            raise
        except FILE_ERRORS as error:  # one bad file must not end a run: it is reported, counted and left out
            if isinstance(error, RuntimeError) and fault(str(error)) in ("memory", "driver", "gpu"):
                raise error_of(str(error), str(error).splitlines()[0]) from error
            raise DecodeError(f"{type(error).__name__}: {error}") from error

    def _decode_frames(self, path: str, frames: Sequence[int], **options: Any) -> NDArray[Any]:
        """Runs `decode_frames`, in another process if this renderer has processes and they can read the path."""
        if self._processes and local_file(path):
            try:
                return self._processes.decode_frames(path, frames, **options)
            except CannotStart as error:
                with self._lock:
                    if not self._reported:
                        self._reported = True
                        self._info(f"data    decoding in threads: a process for it cannot start ({error})")
        return decode_frames(path, frames, **options)

    def finish(self, jobs: Sequence[Job], clip: torch.Tensor) -> list[str | None]:
        """Waits for jobs and resizes them into their rows of a batch.

        Returns for each None, or the reason of its failure. clip: a batch from `empty`.
        """
        reasons: dict[int, str] = {}
        groups: dict[str, list[Job]] = {}
        for job in jobs:
            try:
                job.payload.result()
                groups.setdefault(job.decoder, []).append(job)
            except DecodeError as error:
                reasons[job.row] = str(error)
        self._copy_recorded(groups.pop(RECORDED, ()), clip)
        for decoder, group in groups.items():
            with self._lock:
                try:
                    reasons.update(self._resize(self._graph(decoder, clip.shape[1]), group, clip))
                except NvdecHangs as error:
                    if self._config.decoder != "auto":
                        raise
                    self.hangs = str(error)
                    reasons.update({job.row: self.hangs for job in group})
        return [reasons.get(job.row) for job in jobs]

    def empty(self, samples: int, views: int) -> torch.Tensor:
        """Returns an uninitialized batch [S, R, T, H, W, C], uint8 or float32."""
        config = self._config
        with self._copying():
            shape = (samples, views, config.frames, config.size, config.size, config.channels)
            return torch.empty(shape, dtype=self._values.dtype, device=self._device)

    def keep_rows(self, clip: torch.Tensor, rows: list[int]) -> torch.Tensor:
        """Returns a copy of some samples of a batch."""
        with self._copying():
            kept = clip[rows]
            self._wait()
            return kept

    def upload(self, values: torch.Tensor) -> torch.Tensor:
        """Copies a small tensor to the device."""
        if not self._copies:
            return values
        with self._copying():
            there = values.pin_memory().to(self._device, non_blocking=True)
            self._wait()
            return there

    def hand_over(self, *tensors: torch.Tensor) -> None:
        """Passes the tensors of a batch to the stream of the consumer's thread, which must call this."""
        if self._copies:
            for tensor in tensors:
                # The copying stream owns the memory and must not reuse it before the consumer's stream is done.
                tensor.record_stream(torch.cuda.current_stream(self._device))

    def close(self) -> None:
        """Ends the threads; drops jobs that have not started."""
        self._patience.close()
        self._recorded_patience.close()
        self._pool.shutdown(cancel_futures=True)
        if self._processes:
            self._processes.close()

    def _resize(self, graph: ClipGraph | TorchCrops, group: list[Job], clip: torch.Tensor) -> dict[int, str]:
        """Runs the jobs of one decoder through its graph; returns the failed rows with the reasons."""
        payloads = [job.payload.result() for job in group]
        requests = [job.request for job in group]
        try:
            with self._copying():
                views = graph.run(
                    payloads, [request.frames for request in requests], [request.views for request in requests]
                )
                first, last = group[0].row, group[-1].row
                if [job.row for job in group] == list(range(first, last + 1)):  # a whole chunk: one copy per view
                    for number, clips in enumerate(views):
                        clip[first : last + 1, number].copy_(clips, non_blocking=True)
                else:
                    for place, job in enumerate(group):
                        for number, clips in enumerate(views):
                            clip[job.row, number].copy_(clips[place], non_blocking=True)
                self._wait()  # the graph's next run overwrites the buffer that is being copied
        except DecodeError as error:
            if len(group) == 1:
                return {group[0].row: str(error)}
            # DALI does not name the failed sample: halve the group until one is left.
            half = len(group) // 2
            return self._resize(graph, group[:half], clip) | self._resize(graph, group[half:], clip)
        return {}

    def _copy_recorded(self, group: Sequence[Job], clip: torch.Tensor) -> None:
        if group:
            with self._copying():
                for job in group:
                    clip[job.row].copy_(torch.from_numpy(job.payload.result()), non_blocking=True)
                self._wait()  # the pinned frames are released afterwards

    def _graph(self, decoder: str, views: int) -> ClipGraph | TorchCrops:
        key = "pyav" if decoder == "array" else decoder, views
        if key not in self._graphs:
            if self._dali:
                threads = self._config.nvdec_threads if decoder == "nvdec" else self._threads
                self._graphs[key] = ClipGraph(
                    key[0], self._config, views=views, samples=self._samples, threads=threads, device=self._device
                )
            else:
                self._graphs[key] = TorchCrops(self._config.size, views=views, device=self._device, values=self._values)
        return self._graphs[key]

    @contextmanager
    def _copying(self) -> Iterator[None]:
        """Runs the body on the copying stream if the device is a GPU. Raises GpuError if the GPU's memory is full."""
        try:
            with torch.cuda.stream(self._copies) if self._copies else nullcontext():
                yield
        except torch.OutOfMemoryError as error:
            raise error_of(str(error), str(error).splitlines()[0]) from error

    def _wait(self) -> None:
        if self._copies:
            self._copies.synchronize()


def pinned_empty(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Returns an array of unset values in pinned memory, from which a GPU copies directly. Needs CUDA."""
    kind = torch.from_numpy(np.empty(0, dtype)).dtype
    return torch.empty(shape, dtype=kind, pin_memory=True).numpy()


def threads_of_a_process() -> int:
    """Returns the cores that this process may use, divided by the processes that torchrun started on this machine."""
    return max(available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
