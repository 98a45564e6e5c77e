"""Recorded clips on disk: cropped, resized and mirrored frames beside their codes, so that no video is decoded again.

    CODES/clips/a000-000000.bin   frames of one augmentation of the videos of a shard, one after the other
                a000-000000.npy   [videos of the shard, views]: where the frames of each clip lie, and a checksum

A clip that could not be decoded has no frames. The frames are compressed once: whoever reads them gets the same values
in every epoch.

Legend: R views, T frames, H = W = the clip's size, C channels.
"""

from __future__ import annotations

import hashlib
import io
import zlib
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mam2.engine.errors import UserError
from mam2.engine.files import whole_file, write_whole

CLIPS = "clips"
"""Folder of the clips in a cache."""
Coding = Literal["jpeg", "raw"]
QUALITY = 95
"""JPEG quality, with colors in full resolution: on real clips of 224 x 224 pixels an eighth of the raw size, and 45 dB
of peak signal to noise, an error of 1.5 gray levels (root mean square); `python -m benchmarks.recorded_clips`."""
JPEG_CHANNELS = (1, 3)


class ClipFormat(NamedTuple):
    """How the frames of a cache are stored."""

    coding: Coding
    """`jpeg` loses what JPEG loses; `raw` are the values themselves."""
    shape: tuple[int, int, int, int]
    """T, H, W, C of a clip."""
    dtype: str
    """Type of the values: uint8, or float32."""

    def check(self) -> None:
        """Raises UserError if JPEG cannot hold the values."""
        if self.coding == "jpeg" and (self.dtype != "uint8" or self.shape[3] not in JPEG_CHANNELS):
            raise UserError(
                f"--clips jpeg: expected 8-bit clips of 1 or 3 channels, found {self.dtype} of {self.shape[3]} "
                "channels; use --clips raw"
            )

    @property
    def raw_bytes(self) -> int:
        """Bytes of a clip as values."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    def encode(self, clip: NDArray[Any]) -> list[bytes]:
        """Returns the frames of a clip [T, H, W, C] as stored."""
        if self.coding == "raw":
            return [frame.tobytes() for frame in clip]
        return [_jpeg(frame) for frame in clip]

    def decode(self, content: bytes | memoryview, ends: NDArray[np.int64], out: NDArray[Any]) -> None:
        """Writes the frames of a clip to `out` [T, H, W, C]. ends: place in `content` of the end of each frame."""
        if self.coding == "raw":
            out[:] = np.frombuffer(content, self.dtype).reshape(self.shape)
            return
        start = 0
        for frame, end in zip(out, ends.tolist(), strict=True):
            with Image.open(io.BytesIO(content[start:end])) as image:
                frame[:] = np.asarray(image).reshape(frame.shape)
            start = end


def _jpeg(frame: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    picture = frame[..., 0] if frame.shape[-1] == 1 else frame
    Image.fromarray(picture).save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    return buffer.getvalue()


def _places_type(frames: int) -> np.dtype[Any]:
    """The type of an index: where a clip starts in the file, where each frame ends, and the CRC-32 of all its bytes."""
    return np.dtype([("start", "<i8"), ("ends", "<i8", (frames,)), ("crc", "<u4")])


def clip_shard_paths(folder: Path, name: str) -> tuple[Path, Path]:
    """Returns the paths of the frames and of the index of a shard, such as "a000-000000", of the cache `folder`."""
    return folder / CLIPS / f"{name}.bin", folder / CLIPS / f"{name}.npy"


class ClipShardWriter:
    """Writes the clips of one shard; they exist only after `finish`."""

    def __init__(self, folder: Path, name: str, *, videos: int, views: int, form: ClipFormat) -> None:
        self._frames, self._index = clip_shard_paths(folder, name)
        self._frames.parent.mkdir(exist_ok=True)
        self._places = np.zeros((videos, views), _places_type(form.shape[0]))
        self._whole = whole_file(self._frames)
        self._file = self._whole.__enter__()

    def add(self, row: int, view: int, images: list[bytes]) -> None:
        """Adds the encoded frames of a clip. row: number of its video in the shard."""
        content = b"".join(images)
        start = self._file.tell()
        self._places[row, view] = start, start + np.cumsum([len(image) for image in images]), zlib.crc32(content)
        self._file.write(content)

    def finish(self) -> str:
        """Writes what is left; returns the SHA-256 of the index."""
        self._whole.__exit__(None, None, None)
        buffer = io.BytesIO()
        np.save(buffer, self._places)
        write_whole(self._index, buffer.getvalue())
        return hashlib.sha256(buffer.getvalue()).hexdigest()

    def discard(self, error: BaseException) -> None:
        """Removes the unfinished file after an error."""
        self._whole.__exit__(type(error), error, error.__traceback__)


class ClipShard:
    """The clips of a finished shard, open for reading. Threads may share it."""

    def __init__(self, folder: Path, name: str, form: ClipFormat) -> None:
        """Raises OSError or ValueError if the index cannot be read."""
        self.path, index = clip_shard_paths(folder, name)
        self._form = form
        self._places = np.load(index)  # not mapped: a map holds a file open, and there may be thousands of shards

    @property
    def bytes(self) -> int:
        """Bytes of all frames."""
        return int(self._places["ends"].max(initial=0))

    def read(self, row: int, out: NDArray[Any]) -> None:
        """Writes all views of a clip to `out` [R, T, H, W, C]. row: number of its video in the shard.

        Raises:
            OSError: the file cannot be read.
            UserError: the frames are damaged.
        """
        places = self._places[row]
        first, last = int(places["start"][0]), int(places["ends"][-1, -1])
        with self.path.open("rb") as file:
            file.seek(first)
            content = memoryview(file.read(last - first))
        for place, clip in zip(places, out, strict=True):
            start = int(place["start"])
            part = content[start - first : int(place["ends"][-1]) - first]
            if zlib.crc32(part) != place["crc"]:
                raise UserError(f"{self.path}: damaged; run mam2 tokenize with the same values to write it again")
            self._form.decode(part, place["ends"] - start, clip)

    def is_sound(self) -> bool:
        """Reads all frames and returns whether they have their checksums."""
        try:
            with self.path.open("rb") as file:
                for place in self._places.reshape(-1):
                    length = int(place["ends"][-1] - place["start"])
                    file.seek(int(place["start"]))
                    if zlib.crc32(file.read(length)) != place["crc"]:
                        return False
        except OSError:
            return False
        return True


def is_listed(folder: Path, name: str, digest: str | None) -> bool:
    """Returns whether the index of a shard has this SHA-256, and the file of its frames the length in the index."""
    frames, index = clip_shard_paths(folder, name)
    try:
        content = index.read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            return False
        places = np.load(io.BytesIO(content))
        return frames.stat().st_size == int(places["ends"].max(initial=0))
    except (OSError, ValueError):
        return False
