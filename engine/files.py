"""How the engine writes files and names: whole or not at all, errors in one line, file names that need not be UTF-8.

On Linux a file name is bytes. Python carries those that are not UTF-8 as surrogates, which a strict encoder refuses:
`NAMES` is the error handler that turns them back into their bytes.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TextIO

from mam2.engine.errors import UserError

NAMES = "mam2.names"
"""Error handler of an encoder: surrogates become the bytes they stand for, what the encoding lacks an escape."""
FULL_OR_FORBIDDEN = frozenset(
    (errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC, errno.EPERM, errno.EROFS, errno.ESTALE)
)
"""Numbers of errors that only the place can cause that is written to or read, never a mistake in the program."""
PLACE_ERRORS = FULL_OR_FORBIDDEN | {
    *(errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.ETXTBSY)
}
"""Those of a place that a user named to write to."""

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
    """Lets text streams (standard output) take every file name, whatever their encoding."""
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=NAMES)


def one_line(text: object) -> str:
    """The text with control characters and line ends as escapes: a file name can hold them, a line of a log cannot."""
    return str(text).translate(_CONTROLS)


def printable(name: str) -> str:
    """A name for pictures, pages and other programs' formats, which take only valid Unicode: bytes as `\\xe9`."""
    return one_line(os.fsencode(name).decode("utf-8", "backslashreplace"))


def table_line(cells: Sequence[object]) -> str:
    """A line of a tab-separated file. A cell that holds a tab, a line end or a quote is quoted as in CSV files."""
    return "\t".join(map(_cell, cells)) + "\n"


def _cell(value: object) -> str:
    text = str(value)
    return '"' + text.replace('"', '""') + '"' if any(mark in text for mark in '\t\n\r"') else text


def write_table(path: Path, rows: Iterable[Sequence[object]]) -> None:
    """Writes a tab-separated file whole: UTF-8, names that are not UTF-8 as their bytes. Raises OSError."""
    write_whole(path, "".join(map(table_line, rows)))


def append_rows(path: Path, rows: Iterable[Sequence[object]]) -> None:
    """Adds lines to a tab-separated file, which is made where it is missing. Raises OSError."""
    with path.open("ab") as file:
        file.write("".join(map(table_line, rows)).encode("utf-8", NAMES))


def write_whole(path: Path, content: str | bytes | memoryview) -> None:
    """Replaces a file whole: after a crash or on a full disk it holds the old content or the new. Raises OSError.

    Text is written as UTF-8, names that are not UTF-8 as their bytes.
    """
    with whole_file(path) as file:
        file.write(content.encode("utf-8", NAMES) if isinstance(content, str) else content)


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write into, which takes its name when the block ends without an error and is removed otherwise."""
    aside = path.with_name(f".part-{path.name}")
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        with suppress(OSError):
            aside.unlink()
        raise


@contextmanager
def writing(place: str | Path, argument: str = "--out") -> Iterator[None]:
    """Turns an error of a place that is full, read-only or not a folder into a UserError that names the argument."""
    try:
        yield
    except OSError as error:
        if error.errno not in PLACE_ERRORS or not _concerns(error, Path(place)):
            raise
        raise unwritable(place, error, argument) from error


def _concerns(error: OSError, place: Path) -> bool:
    """Whether an error is of the place, of a file in it or beside it (written aside), or of a folder above it."""
    if not isinstance(error.filename, (str, bytes, os.PathLike)):
        return True  # of a write or a sync, which do not tell
    path, place = Path(os.path.abspath(os.fsdecode(error.filename))), Path(os.path.abspath(place))
    return path.is_relative_to(place.parent) or place.is_relative_to(path)


def unwritable(place: str | Path, error: OSError, argument: str = "--out") -> UserError:
    """The error for a place that cannot be written."""
    of = f" ({error.filename})" if error.filename and str(error.filename) != str(place) else ""
    return UserError(
        f"{argument} {place}: cannot be written: {error.strerror or error}{of}; make room or name another place"
    )


def make_folder(folder: str | Path, argument: str = "--out") -> Path:
    """The folder, made where it is missing; UserError where no file can be written into it."""
    folder = Path(folder)
    with writing(folder, argument):
        folder.mkdir(parents=True, exist_ok=True)
        check_folder(folder)
    return folder


def check_folder(folder: Path) -> None:
    """Raises OSError where no file can be made in a folder: tried, since permissions do not tell of read-only disks."""
    probe = folder / f".part-{os.getpid()}"
    probe.touch()
    probe.unlink()


def check_apart(data: str | Path, out: str | Path, *, inside: bool = True) -> None:
    """Raises UserError where the place to write is the data itself. inside=False: or lies in the data folder."""
    source, target = Path(os.path.realpath(data)), Path(os.path.realpath(out))
    if source == target:
        raise UserError(f"--out {out}: is the data itself; name a place outside of it")
    if not inside and source.is_dir() and target.is_relative_to(source):
        raise UserError(f"--out {out} lies in the data folder {source}; name a place outside of it")
