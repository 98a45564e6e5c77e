"""What test videos have that `mam2.engine.data.encoding` does not write: sound, and rotations."""

import struct
from pathlib import Path

import av
import numpy as np
from av.audio.stream import AudioStream
from av.container import OutputContainer
from numpy.typing import NDArray

MATRICES = {90: (0, -1, 1, 0), 180: (-1, 0, 0, -1), 270: (0, 1, -1, 0)}
"""Counter-clockwise degrees → the corner of the 3 by 3 matrix in an mp4's track header."""
SOUND_RATE = 8000
"""Samples per second."""
SILENCE = np.zeros((1, SOUND_RATE), np.float32)


def rotated(content: bytes, degrees: int) -> bytes:
    """An mp4 whose first track is shown after a counter-clockwise turn: the matrix in its header is replaced."""
    a, b, c, d = (65536 * value for value in MATRICES[degrees])
    start = content.index(b"tkhd") + 44  # of the matrix
    return content[:start] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + content[start + 36 :]


def add_sound(container: OutputContainer) -> AudioStream:
    """Adds a stream of sound, before the first packet is written."""
    return container.add_stream("aac", rate=SOUND_RATE)


def mux_sound(container: OutputContainer, stream: AudioStream, samples: NDArray[np.float32]) -> None:
    """Writes all samples [1, n] of the stream."""
    frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
    frame.sample_rate = SOUND_RATE
    container.mux(stream.encode(frame))
    container.mux(stream.encode())


def write_sound(path: Path, samples: NDArray[np.float32] = SILENCE, **options: str) -> Path:
    """Writes a file without a video stream; `options` of the container."""
    with av.open(str(path), "w", options=options) as container:
        mux_sound(container, add_sound(container), samples)
    return path
