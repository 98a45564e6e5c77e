"""Recognizes the kind of a weights file by its first and last bytes, and explains why a file cannot be read."""

from __future__ import annotations

import errno
import json
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from mam2.engine.errors import UserError

WeightsFormat = Literal["safetensors", "zip", "legacy", "unknown"]
"""`zip` and `legacy` are the formats of `torch.save` since PyTorch 1.6 and before."""
LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
"""First bytes of a `torch.save` file before PyTorch 1.6: a pickle of the number 0x1950a86a20f9469cfc6c."""
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
LARGEST_HEADER = 100_000_000
"""Maximum bytes of a header that safetensors reads."""


def kind_of(path: Path) -> WeightsFormat:
    """Returns the kind of a complete or damaged file. Raises UserError if it cannot be opened."""
    start = _start(path)
    if start.startswith(b"PK\x03\x04"):
        return "zip"
    if start.startswith(LEGACY_MAGIC):
        return "legacy"
    if len(start) > 8 and start[8:9] == b"{" and struct.unpack("<Q", start[:8])[0] <= LARGEST_HEADER:
        return "safetensors"
    return "unknown"


def check_whole(path: Path) -> None:
    """Raises UserError for a file that is empty, a Git LFS pointer, a web page, or visibly truncated."""
    start, size = _start(path), path.stat().st_size
    if not size:
        raise UserError(f"{path}: the file is empty; copy or download it again")
    if start.startswith(LFS_POINTER):
        raise UserError(f"{path}: a Git LFS pointer ({size} bytes), not the weights; `git lfs pull` fetches them")
    if start.lstrip()[:1] == b"<":
        raise UserError(f"{path}: a web page, not weights; download the file to which the page links")
    kind = kind_of(path)
    if kind == "zip" and not zipfile.is_zipfile(path):
        raise UserError(f"{path}: truncated after {size} bytes (its table of contents is missing); download it again")
    if kind == "safetensors" and size < (needed := _safetensors_bytes(path)):
        raise UserError(f"{path}: truncated: {size} bytes of {needed}; copy or download it again")


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Calls `safe_open` with tensors on the CPU. Raises UserError if the file is not a complete safetensors file."""
    check_whole(path)
    if (kind := kind_of(path)) != "safetensors":
        found = "another kind of file" if kind == "unknown" else "a file of torch.save; rename it to .pth"
        raise UserError(f"{path}: expected safetensors, found {found}")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def sort_metadata(path: Path) -> None:
    """Sorts a safetensors file's metadata by name, in place. Raises OSError.

    The library's order is random, so that two files with the same content would have different hashes.
    """
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        ordered = {"__metadata__": dict(sorted(metadata.items())), **header} if metadata else header
        text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:
            raise OSError(errno.EIO, "the header of a safetensors file cannot be rewritten", str(path))
        file.seek(8)
        file.write(text.ljust(length))


def _start(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(64)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _safetensors_bytes(path: Path) -> int:
    """Returns the length that a safetensors file's header states; 0 if the header is invalid."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        text = file.read(length)
    if len(text) < length:
        return 8 + length
    try:
        header = json.loads(text)
        return (
            8 + length + max((t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"), default=0)
        )
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return 0
