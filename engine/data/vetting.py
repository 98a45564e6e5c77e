"""Validates files before DALI reads them: its decoders crash the process on inconsistent metadata.

DALI 2.4 follows every offset in a file held in memory, also offsets past 2 GiB, which wrap to addresses before the
file; and it writes frames into buffers of the size that the container states. Both are checked here first.
"""

from __future__ import annotations

import os

import av
import numpy as np
from av.video.stream import VideoStream
from numpy.typing import NDArray

from mam2.engine.data.decoding import READ_OPTIONS, DecodeError, decode_packet, read_packets
from mam2.engine.data.storage import is_plain, open_file, status

MAX_BYTES = 2**31 - 1


def read_vetted(path: str, vetted: set[tuple[str, int, int]]) -> NDArray[np.uint8]:
    """Returns the bytes of a file that DALI may decode, else raises DecodeError. `vetted` caches checked files."""
    try:
        size, mtime_ns = status(path)
        if (is_plain(path) and not os.path.isfile(path)) or not 0 < size <= MAX_BYTES:
            raise DecodeError(f"not a file of 1 to {MAX_BYTES} bytes")
        if is_plain(path):
            content = np.fromfile(path, np.uint8)
        else:
            with open_file(path) as file:
                content = np.frombuffer(bytearray(file.read()), np.uint8)
    except OSError as error:
        raise DecodeError(error.strerror or str(error)) from error
    key = path, size, mtime_ns
    if key not in vetted:
        vet(content)
        vetted.add(key)
    return content


def vet(content: NDArray[np.uint8]) -> None:
    """Reads all packets and decodes the key frames, since only these may change the size. Raises DecodeError."""
    file = _Watched(content)
    try:
        with av.open(file, **READ_OPTIONS) as container:
            stream = container.streams.best("video")
            if not isinstance(stream, VideoStream) or stream.codec_context is None:
                raise DecodeError("no video stream")
            size = stream.codec_context.width, stream.codec_context.height
            stream.codec_context.thread_count = 1
            stream.codec_context.skip_frame = "NONKEY"
            for packet in read_packets(container, stream):
                for frame in decode_packet(stream, packet if packet.size else None):
                    if (frame.width, frame.height) != size:
                        raise DecodeError(f"a frame of {frame.width}x{frame.height}, but the header says {size}")
    except (av.error.FFmpegError, OSError) as error:
        raise DecodeError("damaged") from error
    if file.left:
        raise DecodeError("an offset points outside of the file")


class _Watched:
    """A file in memory that records whether a reader tried to seek outside of it."""

    def __init__(self, content: NDArray[np.uint8]) -> None:
        self._content = content
        self._position = 0
        self.left = False

    def read(self, size: int) -> bytes:
        piece = self._content[self._position : self._position + size].tobytes()
        self._position += len(piece)
        return piece

    def seek(self, offset: int, whence: int) -> int:
        self._position = offset + (0, self._position, len(self._content))[whence]
        self.left |= not 0 <= self._position <= len(self._content)
        return self._position

    def tell(self) -> int:
        return self._position
