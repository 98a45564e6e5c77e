"""Writes frames as a video file, with PyAV."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import OutputContainer
from av.video.stream import VideoStream
from numpy.typing import NDArray

RATE = 25
"""Frames per second where the caller names no other rate."""


@contextmanager
def video_writer(
    path: Path,
    encoder: str,
    size: tuple[int, int],
    *,
    rate: int | Fraction = RATE,
    pixel_format: str = "yuv420p",
    gop: int | None = None,
    options: Mapping[str, str] | None = None,
    container_options: Mapping[str, str] | None = None,
) -> Iterator[tuple[OutputContainer, VideoStream]]:
    """Opens a video file; mux what `stream.encode(frame)` returns. The end of the block writes what is left.

    One thread encodes, so that equal frames give equal bytes and files can be written in parallel.

    Args:
        path: of the file; its suffix decides the container.
        encoder: FFmpeg's name.
        size: width and height of the stored frames in pixels.
        rate: frames per second.
        pixel_format: FFmpeg's name.
        gop: largest distance of two key frames; None leaves the encoder's default.
        options: of the encoder.
        container_options: of the container; `fflags=bitexact` leaves out random numbers and versions.
    """
    with av.open(str(path), "w", container_options=dict(container_options or {})) as container:
        stream: Any = container.add_stream(encoder, rate=rate, options=dict(options or {}))
        stream.width, stream.height = size
        stream.pix_fmt = pixel_format
        context = stream.codec_context
        context.time_base = 1 / Fraction(rate)
        context.thread_count = 1
        if gop is not None:
            context.gop_size = gop
        yield container, stream
        container.mux(stream.encode())


def encode_frames(
    path: Path, frames: Iterable[NDArray[np.uint8]], encoder: str, size: tuple[int, int], **settings: Any
) -> None:
    """Writes RGB frames, uint8 [H, W, 3] each; see `video_writer` for the rest."""
    with video_writer(path, encoder, size, **settings) as (container, stream):
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
