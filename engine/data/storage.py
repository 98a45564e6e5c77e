"""Opens what the engine reads as a file: local files, members of tar files, and anything that fsspec opens.

A path is one of:
- a local path;
- TAR/OFFSET+SIZE/MEMBER, the bytes OFFSET to OFFSET + SIZE - 1 of a tar file, which is not unpacked. The suffix of
  MEMBER is that of the video; see `mam2.engine.data.tar_shards`;
- an address such as s3://bucket/clip.mp4 or memory://clip.mp4, also in place of TAR. The package of the protocol (s3fs,
  gcsfs, …) must be installed.
"""

from __future__ import annotations

import errno
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from mam2.engine.errors import UserError

_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):/+(?=[^/])")
_MEMBER = re.compile(r"(?P<tar>.+)/(?P<offset>\d+)\+(?P<size>\d+)/(?P<name>.+)", re.DOTALL)
BLOCK = 2**18
"""Bytes that FFmpeg asks for at a time, of a file that Python reads."""


class Status(NamedTuple):
    size: int
    """Bytes of the file or member."""
    mtime_ns: int
    """Time of the last change, of a member that of the tar file; 0 if unknown."""


class Member(NamedTuple):
    """A part of a tar file."""

    tar: str
    offset: int
    size: int
    name: str

    def __str__(self) -> str:
        return f"{self.tar}/{self.offset}+{self.size}/{self.name}"


def as_member(path: str) -> Member | None:
    """Returns the parts of the path of a member; None for another path."""
    found = _MEMBER.fullmatch(path)
    return Member(found["tar"], int(found["offset"]), int(found["size"]), found["name"]) if found else None


def as_address(path: str | Path) -> str:
    """Returns an address with both slashes, of which `pathlib` leaves one; an empty string for a local path."""
    text = str(path)
    found = _ADDRESS.match(text)
    if not found or os.path.lexists(text):
        return ""
    return found[1] + (":///" if found[1] == "file" else "://") + text[found.end() :]


def absolute(path: str | Path) -> str:
    """Returns the absolute path; an address stays as it is."""
    return as_address(path) or os.path.abspath(path)


def is_plain(path: str) -> bool:
    """Returns whether a path names a local file or folder, which FFmpeg and NumPy open themselves."""
    return not as_member(path) and not as_address(path)


def local_file(path: str) -> str:
    """Returns the local file that must exist for a path to be read: of a member its tar; "" for an address."""
    member = as_member(path)
    outer = member.tar if member else path
    return "" if as_address(outer) else outer


def status(path: str) -> Status:
    """Returns size and time of a file or member. Raises OSError."""
    member = as_member(path)
    outer = member.tar if member else path
    if address := as_address(outer):
        found = _info(address)
        size, mtime_ns = int(found["size"] or 0), _mtime_ns(found)
    else:
        local = os.stat(outer)
        size, mtime_ns = local.st_size, local.st_mtime_ns
    return Status(member.size if member else size, mtime_ns)


def open_file(path: str) -> BinaryIO:
    """Opens a file or member for reading; it can be sought. Raises OSError."""
    member = as_member(path)
    if member is None:
        return _open_whole(path)
    return cast(BinaryIO, _Part(_open_whole(member.tar), member))


@contextmanager
def opened_for_ffmpeg(path: str) -> Iterator[Any]:
    """Yields what `av.open` takes for a path: a local path itself, else an open file. Raises OSError."""
    if is_plain(path):
        yield path
    else:
        with open_file(path) as file:
            yield file


def addresses_in(folder: str, suffix: str) -> list[str]:
    """Returns the addresses of the files with a suffix in a folder given by its address, sorted; empty for a file."""
    system, inner = _file_system(folder)
    try:
        found = system.find(inner, maxdepth=1) if system.isdir(inner) else []
    except Exception as error:
        raise _as_os_error(error, folder) from error
    return sorted(system.unstrip_protocol(name) for name in found if name.endswith(suffix))


def _open_whole(path: str) -> BinaryIO:
    address = as_address(path)
    if not address:
        return open(path, "rb")
    system, inner = _file_system(address)
    try:
        return cast(BinaryIO, _Remote(system.open(inner, "rb"), address))
    except Exception as error:
        raise _as_os_error(error, address) from error


def _info(address: str) -> dict[str, Any]:
    system, inner = _file_system(address)
    try:
        return system.info(inner)
    except Exception as error:
        raise _as_os_error(error, address) from error


def _file_system(address: str) -> tuple[Any, str]:
    """Raises UserError if the package for a protocol is missing."""
    try:
        import fsspec

        return fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise UserError(f"{address}: cannot be opened ({error})") from error


def _mtime_ns(found: dict[str, Any]) -> int:
    """Returns the time of the last change, by the names that file systems use."""
    for name in ("mtime", "LastModified", "last_modified", "updated", "created"):
        value = found.get(name)
        if isinstance(value, int | float):
            return int(value * 1e9)
        if isinstance(value, datetime):
            return int(value.timestamp() * 1e6) * 1000
    return 0


def _as_os_error(error: Exception, address: str) -> OSError:
    """Returns an error of a storage service as an I/O error, so that the read is tried again later."""
    if isinstance(error, OSError):
        return error
    return OSError(errno.EIO, f"{type(error).__name__}: {error}", address)


class _Wrapped(io.RawIOBase):
    """A file that reads from another one, and closes it."""

    def __init__(self, file: Any, name: str) -> None:
        self._file, self.name = file, name
        """FFmpeg takes the suffix of the name as a hint."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class _Remote(_Wrapped):
    """A file of fsspec, whose errors are OSErrors."""

    def read(self, size: int = -1) -> bytes:
        try:
            return self._file.read(size)
        except Exception as error:
            raise _as_os_error(error, self.name) from error

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


class _Part(_Wrapped):
    """The bytes of a member as a file."""

    def __init__(self, file: BinaryIO, member: Member) -> None:
        super().__init__(file, member.name)
        self._member, self._position = member, 0

    def read(self, size: int = -1) -> bytes:
        left = max(self._member.size - self._position, 0)
        self._file.seek(self._member.offset + self._position)
        content = self._file.read(left if size is None or size < 0 else min(size, left))
        self._position += len(content)
        return content

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._member.size}[whence]
        if base + offset < 0:
            raise ValueError(f"negative place {base + offset}")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position
