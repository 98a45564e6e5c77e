"""The DALI graph: all processing between decoded frames and clips, and DALI's own decoders before it.

    encoded files → decoders.video (NVDEC or CPU) ┐
                                                  ├→ crop, mirror and resize in one pass → uint8 [T, H, W, C] per view
    RGB frames from PyAV (→ GPU) ─────────────────┘

Legend: S samples per call, R views per sample, T frames, H = W = the clip's size, C = 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mam2.engine.config.training import DataConfig
from mam2.engine.data.nvdec import NvdecHangs, error_of, within
from mam2.engine.data.sampling import View
from mam2.engine.errors import UserError


def import_dali() -> ModuleType:
    """Returns the nvidia.dali package; raises UserError with the command to install it if it is missing."""
    try:
        import nvidia.dali.fn
    except ImportError as error:
        raise UserError(
            f"NVIDIA DALI is not installed ({error}): pip install '.[cpu]' in the checkout, or [cuda13], [cuda12]"
        ) from error
    return nvidia.dali


def dali_version() -> str:
    """Returns the version of the nvidia.dali package; empty if it is not installed."""
    try:
        return import_dali().__version__
    except UserError:
        return ""


def with_number(device: torch.device) -> torch.device:
    """Returns the device; replaces "cuda" by the current GPU with its number, which DALI and other threads need."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


class ClipGraph:
    """A DALI pipeline for one decoder ("nvdec", "dali-cpu", "pyav"); built at first use, and rebuilt after an error.

    The result of a sample depends neither on the other samples of the call nor on the number of threads.
    """

    def __init__(
        self, decoder: str, config: DataConfig, *, views: int, samples: int, threads: int, device: torch.device
    ):
        """samples: maximum per call. On a CUDA device, frames are resized there and results stay there."""
        self._decoder = decoder
        self._config = config
        self._views = views
        self._device = with_number(device)
        self._options: dict[str, Any] = {
            "batch_size": samples,
            "num_threads": threads,
            "device_id": self._device.index if device.type == "cuda" else None,
            "prefetch_queue_depth": 1,  # the loader prefetches itself; a second batch here would only cost memory
        }
        self._dali = import_dali()
        self._pipeline: Any = None

    def run(
        self, payloads: Sequence[NDArray[np.uint8]], frames: Sequence[Sequence[int]], views: Sequence[Sequence[View]]
    ) -> list[torch.Tensor]:
        """Returns the clips of S samples.

        For each of the R views a tensor uint8 [S, T, H, W, C], valid until the next call. payloads: frames [T, h, w, C]
        for "pyav", else the bytes of a file, of which the frames numbered `frames[s]` are decoded.

        Raises:
            DecodeError: DALI cannot decode one of them; the graph stays usable.
            GpuError: memory, GPU or driver failed.
            NvdecHangs: NVDEC did not answer within data.timeout_s seconds.
        """
        try:
            if self._decoder == "nvdec":
                outputs = within(self._config.timeout_s, lambda: self._run_pipeline(payloads, frames, views))
            else:
                outputs = self._run_pipeline(payloads, frames, views)
        except TimeoutError as error:
            self._pipeline = None  # its thread may still return; the result is not used
            raise NvdecHangs(f"NVDEC: {error} (data.timeout_s) for {len(payloads)} clips") from error
        except RuntimeError as error:
            self._pipeline = None  # DALI makes a pipeline unusable after any error
            raise error_of(str(error), _reason(str(error))) from error
        # In this thread, because the tensors are ordered after this thread's current stream.
        return [torch.from_dlpack(output.as_tensor()) for output in outputs]

    def _run_pipeline(
        self, payloads: Sequence[NDArray[np.uint8]], frames: Sequence[Sequence[int]], views: Sequence[Sequence[View]]
    ) -> Any:
        if self._pipeline is None:
            self._pipeline = self._build()
        pipeline = self._pipeline
        if self._decoder == "pyav":
            pipeline.feed_input("frames", list(payloads))
        else:
            pipeline.feed_input("encoded", list(payloads))
            pipeline.feed_input("numbers", [np.array(numbers, np.int32) for numbers in frames])
        corners = np.array([[_corners(view) for view in sample] for sample in views], np.float32)  # [S, R, 2, 2]
        for view in range(self._views):
            for name, corner in (("from", 0), ("to", 1)):
                pipeline.feed_input(f"{name}_{view}", np.ascontiguousarray(corners[:, view, corner]))
        return pipeline.run()

    def _build(self) -> Any:
        fn, types = self._dali.fn, self._dali.types

        @self._dali.pipeline_def(**self._options)
        def clips() -> tuple[Any, ...]:
            video = self._frames()
            outputs = []
            for view in range(self._views):
                begin = fn.external_source(name=f"from_{view}", dtype=types.FLOAT, ndim=1)
                end = fn.external_source(name=f"to_{view}", dtype=types.FLOAT, ndim=1)
                outputs.append(
                    fn.resize(
                        video,
                        size=(self._config.size, self._config.size),
                        roi_start=begin,
                        roi_end=end,
                        roi_relative=True,
                        interp_type=types.INTERP_LINEAR,
                        antialias=True,
                    )
                )
            return tuple(outputs)

        pipeline = clips()
        pipeline.build()
        return pipeline

    def _frames(self) -> Any:
        """Builds the graph's input: a node of uint8 frames, FHWC, on the graph's device."""
        fn, types = self._dali.fn, self._dali.types
        if self._decoder == "pyav":
            frames = fn.external_source(name="frames", dtype=types.UINT8, ndim=4, layout="FHWC", no_copy=True)
            return frames.gpu() if self._device.type == "cuda" else frames
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)
        numbers = fn.external_source(name="numbers", dtype=types.INT32, ndim=1)
        # On a GPU machine a user can select the CPU decoder; its frames are then uploaded like PyAV's.
        nvdec = self._decoder == "nvdec"
        frames = fn.decoders.video(
            encoded,
            device="mixed" if nvdec else "cpu",
            frames=numbers,
            pad_mode="edge",
            affine=False,  # pinned threads of several processes would share the same cores
        )
        return frames.gpu() if self._device.type == "cuda" and not nvdec else frames


def _corners(view: View) -> tuple[tuple[float, float], tuple[float, float]]:
    """Returns (y, x) of the output's begin and end in the frame; a mirrored view is read from right to left."""
    left, right = (view.x1, view.x0) if view.flip else (view.x0, view.x1)
    return (view.y0, left), (view.y1, right)


def _reason(message: str) -> str:
    """Returns DALI's own sentence from a message that also contains a stack trace."""
    reason = message.partition("encountered:")[2] or message
    first = next((line.strip() for line in reason.splitlines() if line.strip()), "unknown error")
    return f"DALI: {first.rpartition(' failed: ')[2]}"
