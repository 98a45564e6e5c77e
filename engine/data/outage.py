"""Reads again what failed for another cause than the file: an unmounted drive, an I/O error, a stopped process.

Reading is retried after growing pauses. A run whose data stays unavailable ends with an error; it does not replace one
video after the other. A single file or folder that stays unreadable while the rest is available counts as unusable.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import av
import numpy as np

from mam2.engine.data.decoding import TooSlow
from mam2.engine.data.storage import local_file, open_file, status
from mam2.engine.errors import UserError

TRANSIENT = frozenset(
    getattr(errno, name)
    for name in (
        *("EIO", "ESTALE", "EREMOTEIO", "ETIMEDOUT", "ENOTCONN", "ESHUTDOWN", "ECONNABORTED", "ECONNRESET", "ENOLINK"),
        *("EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETRESET", "ENETUNREACH", "EMFILE", "ENFILE"),
    )
    if hasattr(errno, name)
)
"""Error numbers caused by a drive, a network or this process, which may be gone at the next try."""
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 15.0
ALONE_S = 20.0
"""Longest wait in seconds for a file or folder while most others are available."""
SAMPLES = 16
"""Number of videos checked to find out whether all data or one file is unavailable."""
BLOCK = 2**16

Value = TypeVar("Value")


def why_away(path: str, error: BaseException) -> str:
    """Returns why a file cannot be read if the cause is not the file itself; "" if it is.

    error: the exception of the read; it may also be the cause of another exception.
    """
    cause = _system_error(error)
    number = getattr(cause, "errno", None)
    if number is not None and number in TRANSIENT:
        # FFmpeg returns EIO for damaged content too.
        if isinstance(cause, av.error.FFmpegError) and _can_be_read(path):
            return ""
        return os.strerror(number)
    folder = os.path.dirname(local_file(path))
    if number == errno.ENOENT and folder and _is_gone(folder):
        return f"folder {folder} is missing or empty"
    return ""


def _may_be_over(path: str, error: BaseException) -> bool:
    """Returns whether the cause of a failed read may have been an outage that has ended meanwhile.

    error: not one for which `why_away` has a reason.
    """
    number = getattr(_system_error(error), "errno", None)
    if number == errno.ENOENT:
        return _exists(path)
    return isinstance(error, TooSlow) or number in TRANSIENT  # the process may have been stopped


def _system_error(error: BaseException) -> BaseException | None:
    """Returns the error of the system or of FFmpeg that an exception is or has as cause; None if there is none."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, (OSError, av.error.FFmpegError)):
        cause = cause.__cause__
    return cause


class Patience:
    """Calls functions that read a file, and retries while the file is unavailable, and once if it may have been.

    Threads may share one object.
    """

    def __init__(self, wait_s: float, info: Callable[[str], None], paths: Sequence[str] = ()) -> None:
        """wait_s: longest wait in seconds. info: receives lines for the log. paths: the paths of the data."""
        self._wait_s, self._info = wait_s, info
        chosen = sorted({int(place) for place in np.linspace(0, len(paths) - 1, SAMPLES)}) if paths else []
        self._samples = [paths[place] for place in chosen]
        self._lock = threading.Lock()
        self._reported: set[str] = set()
        """Ongoing outages that have been logged."""
        self._given_up: set[str] = set()
        """Outages of single files and folders for which waiting did not help."""
        self._closing = threading.Event()

    def __call__(self, path: str, read: Callable[[], Value]) -> Value:
        """Calls `read` and returns its result; retries while the data is unavailable.

        Raises:
            UserError: most of the data was unavailable for wait_s seconds.
            Exception: an exception of `read` that waiting does not resolve.
        """
        begun, pause, outage = time.monotonic(), FIRST_PAUSE_S, ""
        again = False
        while True:
            try:
                value = read()
            except Exception as error:
                reason = why_away(path, error)
                if not reason:
                    if again or not _may_be_over(path, error):
                        raise
                    again = True
                    continue
                outage = reason if reason.startswith("folder") else f"{path}: {reason}"
                widespread = self._most_are_away()
                limit = self._wait_s if widespread else min(self._wait_s, ALONE_S)
                waited = time.monotonic() - begun
                if self._closing.is_set() or outage in self._given_up:
                    raise
                if waited >= limit:
                    self._given_up.add(outage)
                    if widespread and self._samples:
                        raise UserError(
                            f"the data is unavailable: {outage}, for {waited:.0f} s; restore it and start again with "
                            "--resume, or wait longer with data.wait_s"
                        ) from error
                    raise
                with self._lock:
                    if outage not in self._reported:
                        self._reported.add(outage)
                        self._info(f"data    {outage}; retrying for up to {limit:g} s")
                self._closing.wait(min(pause, limit - waited))
                pause = min(2 * pause, LONGEST_PAUSE_S)
            else:
                with self._lock:
                    if outage in self._reported:
                        self._reported.discard(outage)
                        self._info(f"data    {path} can be read again after {time.monotonic() - begun:.1f} s")
                return value

    def close(self) -> None:
        """Ends all waiting: data that is unavailable now counts as failed."""
        self._closing.set()

    def _most_are_away(self) -> bool:
        missing = sum(not _exists(path) for path in self._samples)
        return 2 * missing >= max(len(self._samples), 1)


def _exists(path: str) -> bool:
    try:
        status(path)
    except OSError:
        return False
    return True


def _is_gone(folder: str) -> bool:
    """Returns whether a folder is missing or empty: the mount point of an unmounted drive is an empty folder."""
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is None
    except OSError:
        return True


def _can_be_read(path: str) -> bool:
    """Returns whether beginning, middle and end of a file, or of a folder's first file, can be read."""
    try:
        if os.path.isdir(path):
            path = min(entry.path for entry in os.scandir(path) if entry.is_file())
        with open_file(path) as file:
            size = file.seek(0, os.SEEK_END)
            for place in (0, size // 2, max(size - BLOCK, 0)):
                file.seek(place)
                file.read(BLOCK)
    except (OSError, ValueError):
        return False
    return True
