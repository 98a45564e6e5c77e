"""Writes frames as a video file, with PyAV."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from av.container import OutputContainer
from av.video.stream import VideoStream
from numpy.typing import NDArray

RATE = 25
"""Frames per second unless the caller passes another rate."""


@contextmanager
def video_writer(
    path: Path,
    encoder: str,
    size: tuple[int, int],
    *,
    rate: int | Fraction = RATE,
    time_base: Fraction | None = None,
    pixel_format: str = "yuv420p",
    gop: int | None = None,
    options: Mapping[str, str] | None = None,
    container_format: str | None = None,
    container_options: Mapping[str, str] | None = None,
) -> Iterator[tuple[OutputContainer, VideoStream]]:
    """Opens a video file; mux what `stream.encode(frame)` returns. The end of the block writes what is left.

    One thread encodes, so that equal frames give equal bytes and files can be written in parallel.

    Args:
        path: of the file; its suffix decides the container, unless `container_format` is given.
        encoder: FFmpeg's name.
        size: width and height of the stored frames in pixels.
        rate: frames per second.
        time_base: unit of the frames' times in seconds; None: 1 / rate.
        pixel_format: FFmpeg's name.
        gop: largest distance of two key frames; None leaves the encoder's default.
        options: of the encoder.
        container_format: FFmpeg's name, such as `image2` for a single picture.
        container_options: of the container; `fflags=bitexact` leaves out random numbers and versions.
    """
    settings = dict(container_options or {})
    with av.open(str(path), "w", container_format, container_options=settings) as container:
        stream: Any = container.add_stream(encoder, rate=rate, options=dict(options or {}))
        stream.width, stream.height = size
        stream.pix_fmt = pixel_format
        context = stream.codec_context
        context.time_base = time_base or 1 / Fraction(rate)
        context.thread_count = 1
        if gop is not None:
            context.gop_size = gop
        yield container, stream
        container.mux(stream.encode())


def encode_frames(
    path: Path,
    frames: Iterable[NDArray[Any]],
    encoder: str,
    size: tuple[int, int],
    *,
    frame_format: str = "rgb24",
    times: Sequence[int] = (),
    **settings: Any,
) -> None:
    """Writes frames; see `video_writer` for the other arguments.

    Args:
        frames: RGB, uint8 [H, W, 3] each; in another `frame_format`, the arrays of `VideoFrame.from_ndarray` for it.
        frame_format: FFmpeg's name of the pixel format of the arrays.
        times: when each frame is shown, in units of `time_base`; empty: at a constant rate.
    """
    with video_writer(path, encoder, size, **settings) as (container, stream):
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format=frame_format)
            if times:
                frame.pts, frame.time_base = times[number], stream.codec_context.time_base
            container.mux(stream.encode(frame))
