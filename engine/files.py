"""Writes files atomically, with one-line errors and support for file names that are not UTF-8.

On Linux a file name is a byte string. Python represents bytes that are not UTF-8 as surrogates, for which a strict
encoder raises; `NAMES` is an error handler that converts them back to their bytes.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TextIO

from mam2.engine.errors import UserError

PART = ".part-"
"""Prefix of the names of temporary files and folders."""
NAMES = "mam2.names"
"""Error handler of an encoder: surrogates become the bytes that they represent; other characters become escapes."""
FULL_OR_FORBIDDEN = frozenset(
    (errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC, errno.EPERM, errno.EROFS, errno.ESTALE)
)
"""Error numbers that only the storage can cause, never an error in the program."""
PLACE_ERRORS = FULL_OR_FORBIDDEN | {
    *(errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.ETXTBSY)
}
"""Error numbers of an output path given by a user."""

_CONTROLS = {code: repr(chr(code))[1:-1] for code in (*range(32), 127, *range(128, 160), 0x2028, 0x2029)}


def _encode_name(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    first = UnicodeEncodeError(error.encoding, error.object, error.start, error.start + 1, error.reason)
    if "\udc80" <= error.object[error.start] <= "\udcff":
        return codecs.lookup_error("surrogateescape")(first)
    return codecs.lookup_error("backslashreplace")(first)


codecs.register_error(NAMES, _encode_name)


def accept_names(*streams: TextIO) -> None:
    """Makes text streams (standard output) accept every file name, whatever their encoding."""
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=NAMES)


def one_line(text: object) -> str:
    """Returns the text with control characters and line ends escaped.

    File names may contain them, log lines must not.
    """
    return str(text).translate(_CONTROLS)


def printable(name: str) -> str:
    """Returns a name in valid Unicode, for pictures, pages and other programs' formats.

    Invalid bytes become `\\xe9`.
    """
    return one_line(os.fsencode(name).decode("utf-8", "backslashreplace"))


def table_line(cells: Sequence[object]) -> str:
    """Returns a line of a tab-separated file. A cell with a tab, a line end or a quote is quoted as in CSV files."""
    return "\t".join(map(_cell, cells)) + "\n"


def _cell(value: object) -> str:
    text = str(value)
    return '"' + text.replace('"', '""') + '"' if any(mark in text for mark in '\t\n\r"') else text


def write_table(path: Path, rows: Iterable[Sequence[object]]) -> None:
    """Writes a tab-separated file atomically in UTF-8; names that are not UTF-8 as their bytes. Raises OSError."""
    write_whole(path, "".join(map(table_line, rows)))


def append_rows(path: Path, rows: Iterable[Sequence[object]]) -> None:
    """Appends lines to a tab-separated file; creates it if missing. Raises OSError."""
    with path.open("ab") as file:
        file.write("".join(map(table_line, rows)).encode("utf-8", NAMES))


def write_whole(path: Path, content: str | bytes | memoryview) -> None:
    """Replaces a file atomically: after a crash or a full disk it has the old or the new content. Raises OSError.

    Text is written as UTF-8, names that are not UTF-8 as their bytes.
    """
    with whole_file(path) as file:
        file.write(content.encode("utf-8", NAMES) if isinstance(content, str) else content)


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Yields a temporary file to write to; renames it if the block ends without an error, else removes it."""
    with written_aside(path) as aside, aside.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def written_aside(
    path: Path, *, durable: bool = False, unique: bool = False, replace_folder: bool = False
) -> Iterator[Path]:
    """Yields a temporary path next to `path`, for a file or a folder that the block creates.

    Renames it to `path` if the block ends without an error, else removes it. The block checks what it has written, and
    raises to discard it.

    Args:
        path: the file or folder; a file is replaced.
        durable: sync all contents to the disk before the temporary path is renamed, and the parent folder after it.
        unique: use a temporary name of its own, because other processes may write the same path at the same time.
        replace_folder: replace a folder too. There is a moment between two renames at which `path` does not exist.

    Raises:
        OSError: the path cannot be written, or it is a folder that is not empty and replace_folder is False.
    """
    aside = path.with_name(f"{PART}{uuid.uuid4().hex}-{path.name}" if unique else f"{PART}{path.name}")
    old = path.with_name(f".old-{path.name}")
    _remove(aside)
    try:
        yield aside
        if durable:
            for entry in (*aside.rglob("*"), aside):
                _sync(entry)
        if replace_folder:
            _remove(old)
            if path.is_dir():
                path.rename(old)
        aside.replace(path)
        if durable:
            _sync(path.parent)
        if replace_folder:
            _remove(old)
    except BaseException as error:
        if isinstance(error, OSError) and not error.filename:  # of a write or a sync
            error.filename = str(path)
        _remove(aside)
        raise


@contextmanager
def files_written_aside(path: Path) -> Iterator[Path]:
    """Yields a temporary folder, for a file named as `path` and further files that belong to it.

    Moves them next to `path` if the block ends without an error, `path` itself last. Raises OSError.
    """
    aside = path.with_name(f"{PART}{path.name}")
    _remove(aside)
    try:
        aside.mkdir(parents=True)
        yield aside
        for file in sorted(aside.iterdir(), key=lambda file: (file.name == path.name, file.name)):
            file.replace(path.with_name(file.name))
    finally:
        _remove(aside)


def remove_parts(folder: Path) -> None:
    """Removes the temporary files and folders that a killed process has left in a folder."""
    for left in folder.glob(f"{PART}*"):
        _remove(left)


def remove_folder(folder: Path) -> None:
    """Removes a folder, which first gets a temporary name: a kill leaves nothing that looks like the whole folder.

    A file server may refuse while another process reads from the folder; `remove_parts` removes the rest later.
    Raises OSError.
    """
    aside = folder.with_name(f"{PART}{folder.name}")
    folder.rename(aside)
    _remove(aside)


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(place: str | Path, argument: str = "--out") -> Iterator[None]:
    """Converts an error of an output path (full, read-only, not a folder) to a UserError that names the argument."""
    try:
        yield
    except OSError as error:
        if error.errno not in PLACE_ERRORS or not _concerns(error, Path(place)):
            raise
        raise unwritable(place, error, argument) from error


def _concerns(error: OSError, place: Path) -> bool:
    """Returns whether an error concerns the path, a file in it or next to it (a temporary file), or a parent folder."""
    if not isinstance(error.filename, (str, bytes, os.PathLike)):
        return True  # an error of a write or a sync does not contain the path
    path, place = Path(os.path.abspath(os.fsdecode(error.filename))), Path(os.path.abspath(place))
    return path.is_relative_to(place.parent) or place.is_relative_to(path)


def unwritable(place: str | Path, error: OSError, argument: str = "--out") -> UserError:
    """Returns the error for a path that cannot be written."""
    if error.errno == errno.ENOENT:
        remedy = f"create the folder {Path(place).parent}, or choose another path"
        return UserError(f"{argument} {place}: cannot be written: {error.strerror}; {remedy}")
    of = f" ({error.filename})" if error.filename and str(error.filename) != str(place) else ""
    remedy = "free space or choose another path" if error.errno in FULL_OR_FORBIDDEN else "choose another path"
    return UserError(f"{argument} {place}: cannot be written: {error.strerror or error}{of}; {remedy}")


def make_folder(folder: str | Path, argument: str = "--out") -> Path:
    """Creates the folder if it is missing and returns it; raises UserError if no file can be written into it."""
    folder = Path(folder)
    with writing(folder, argument):
        folder.mkdir(parents=True, exist_ok=True)
        check_folder(folder)
    return folder


def check_folder(folder: Path) -> None:
    """Raises OSError if no file can be created in a folder. It tries, since permissions do not show read-only disks."""
    probe = folder / f"{PART}{os.getpid()}"
    probe.touch()
    probe.unlink()


def check_apart(data: str | Path, out: str | Path, *, inside: bool = True) -> None:
    """Raises UserError if the output path is the data itself, or, with inside=False, is in the data folder."""
    listing = os.fspath(data)
    if not os.path.exists(listing) and ":" in listing:  # LIST:SPLIT
        listing = listing.rpartition(":")[0]
    source, target = Path(os.path.realpath(listing)), Path(os.path.realpath(out))
    if source == target:
        raise UserError(f"--out {out}: is the data itself; choose a path outside of it")
    if not inside and source.is_dir() and target.is_relative_to(source):
        raise UserError(f"--out {out} is in the data folder {source}; choose a path outside of it")
