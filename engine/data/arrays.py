"""Reads clips from NumPy arrays: .npy files, and .npz files with one array of frames and optionally its `fps`.

An array has the shape [frames, height, width] or [frames, height, width, channels] and the type uint8, uint16 or
float32, in C order. Only the frames asked for are read; in a compressed .npz also those before them.
"""

from __future__ import annotations

import math
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from mam2.engine.config.training import MOST_CHANNELS
from mam2.engine.data.decoding import MAX_SIDE, DecodeError
from mam2.engine.data.storage import open_file

ARRAY_SUFFIXES = (".npy", ".npz")
ARRAY_CODECS = tuple(suffix[1:] for suffix in ARRAY_SUFFIXES)
"""Names of the formats in place of a codec."""
VALUE_TYPES = ("uint8", "uint16", "float32")
SHAPES = "[frames, height, width] or [frames, height, width, channels]"
RATE = "fps"
"""Name of the frame rate in a .npz file."""


def is_array(path: str) -> bool:
    """Returns whether a path names an array, by its suffix."""
    return path.lower().endswith(ARRAY_SUFFIXES)


class FrameArray:
    """An open array of frames; made by `open_array`."""

    def __init__(self, file: IO[bytes], fps: float, size: int) -> None:
        """fps: frames per second, 0 if unknown. size: bytes of the file, header included. Raises DecodeError."""
        shape, fortran, dtype = _header(file)
        self._file, self._begin, self._stored = file, file.tell(), dtype
        self.fps = fps
        self.value_type = str(dtype.newbyteorder("="))
        """uint8, uint16 or float32."""
        if self.value_type not in VALUE_TYPES:
            raise DecodeError(f"values of type {dtype}; expected {', '.join(VALUE_TYPES)}")
        if len(shape) not in (3, 4) or min(shape) < 1:
            raise DecodeError(f"shape {list(shape)}; expected {SHAPES}")
        if fortran:
            raise DecodeError("in Fortran order; save numpy.ascontiguousarray(array)")
        self.frames, self.height, self.width = shape[:3]
        self.channels = shape[3] if len(shape) == 4 else 1
        if self.channels > MOST_CHANNELS:
            raise DecodeError(
                f"shape {list(shape)}; expected {SHAPES}, at most {MOST_CHANNELS} channels, in this order"
            )
        if max(self.height, self.width) > MAX_SIDE:
            raise DecodeError(f"frames of {self.width}x{self.height} pixels; the limit is {MAX_SIDE} per side")
        expected = self._begin + math.prod(shape) * dtype.itemsize
        if size < expected:
            raise DecodeError(f"damaged: {size} bytes, expected {expected}")

    def read(self, numbers: Sequence[int]) -> NDArray[Any]:
        """Reads frames [T, H, W, C] by their numbers, ascending; a number past the end returns the last frame.

        Raises DecodeError if a value is not finite.
        """
        found = np.empty((len(numbers), self.height, self.width, self.channels), self._stored)
        length = found[:1].nbytes
        for place, number in enumerate(numbers):
            self._file.seek(self._begin + min(number, self.frames - 1) * length)
            content = self._file.read(length)
            if len(content) < length:
                raise DecodeError(f"damaged: the file ends within frame {number}")
            found[place] = np.frombuffer(content, self._stored).reshape(found.shape[1:])
        frames = found.astype(self.value_type, copy=False)
        if self.value_type == "float32" and not np.isfinite(frames).all():
            place = int(np.isfinite(frames).all((1, 2, 3)).argmin())
            raise DecodeError(f"frame {min(numbers[place], self.frames - 1)} has values that are not finite")
        return frames


@contextmanager
def open_array(path: str) -> Iterator[FrameArray]:
    """Opens an array of frames. Raises DecodeError, also for a read within the block; and OSError."""
    try:
        with open_file(path) as file:
            if not path.lower().endswith(".npz"):
                yield FrameArray(file, 0.0, _length(file))
                return
            with zipfile.ZipFile(file) as archive:
                name, fps = _members(archive)
                with archive.open(name) as member:
                    yield FrameArray(member, fps, archive.getinfo(name).file_size)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError) as error:
        raise DecodeError(f"damaged, or not a NumPy array ({error})") from error


def read_frames(path: str, numbers: Sequence[int], *, channels: int) -> NDArray[Any]:
    """Reads frames [T, H, W, C] of an array file, in its own type, see `FrameArray.read`.

    Raises DecodeError for another number of channels.
    """
    with open_array(path) as array:
        if array.channels != channels:
            raise DecodeError(f"{array.channels} channels; expected {channels} (data.channels)")
        return array.read(numbers)


def _length(file: IO[bytes]) -> int:
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    return length


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Reads the header of a .npy file: shape, whether the order is Fortran's, type. Raises ValueError."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f"version {version[0]}.{version[1]} of the format; expected 1.0 or 2.0")


def _members(archive: zipfile.ZipFile) -> tuple[str, float]:
    """Returns the name of the member with the frames, and the frame rate, 0 if the archive has none."""
    fps, found = 0.0, []
    for name in archive.namelist():
        with archive.open(name) as member:
            if name == f"{RATE}.npy":
                fps = float(np.lib.format.read_array(member, allow_pickle=False).reshape(()))
            elif len(_header(member)[0]) in (3, 4):
                found.append(name)
    if len(found) != 1:
        names = ", ".join(name.removesuffix(".npy") for name in archive.namelist())
        raise DecodeError(f"{len(found)} arrays of frames (found {names}); expected one of shape {SHAPES}")
    if not (math.isfinite(fps) and fps >= 0):
        raise DecodeError(f"{RATE} {fps}; expected frames per second, at least 0")
    return found[0], fps
