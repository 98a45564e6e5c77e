"""Waits for data that is away: a drive that is not mounted or an I/O error is no fault of a file.

Reading is tried again after growing pauses. A run whose data stays away ends with an error; it does not replace one
video after the other. A single file or folder that stays unreadable while the rest is there counts as unusable.
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

from mam2.engine.errors import UserError

TRANSIENT = frozenset(
    getattr(errno, name)
    for name in (
        *("EIO", "ESTALE", "EREMOTEIO", "ETIMEDOUT", "ENOTCONN", "ESHUTDOWN", "ECONNABORTED", "ECONNRESET", "ENOLINK"),
        *("EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETRESET", "ENETUNREACH", "EMFILE", "ENFILE"),
    )
    if hasattr(errno, name)
)
"""Error numbers that tell of a drive, a network or this process, and may be gone at the next try."""
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 15.0
ALONE_S = 20.0
"""Longest wait for a file or folder while most others are there."""
SAMPLES = 16
"""Videos looked at to tell whether the data or one file is away."""
BLOCK = 2**16

Value = TypeVar("Value")


def why_away(path: str, error: BaseException) -> str:
    """What keeps a file from being read that is not the fault of the file; empty where the file itself is at fault.

    error: what reading raised, by itself or as the cause of another exception.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, (OSError, av.error.FFmpegError)):
        cause = cause.__cause__
    number = getattr(cause, "errno", None)
    if number is not None and number in TRANSIENT:
        # FFmpeg also returns EIO for damaged content.
        if isinstance(cause, av.error.FFmpegError) and _can_be_read(path):
            return ""
        return os.strerror(number)
    if number == errno.ENOENT and _is_gone(os.path.dirname(path)):
        return f"folder {os.path.dirname(path)} is missing or empty"
    return ""


class Patience:
    """Calls functions that read a file, again and again while the file is away. Threads may share one."""

    def __init__(self, wait_s: float, info: Callable[[str], None], paths: Sequence[str] = ()) -> None:
        """wait_s: longest wait in seconds. info: gets the lines for the log. paths: of the data that is read."""
        self._wait_s, self._info = wait_s, info
        chosen = sorted({int(place) for place in np.linspace(0, len(paths) - 1, SAMPLES)}) if paths else []
        self._samples = [paths[place] for place in chosen]
        self._lock = threading.Lock()
        self._told: set[str] = set()
        """Outages that the log names and that are not over."""
        self._given_up: set[str] = set()
        """Outages of single files and folders that were waited for in vain."""
        self._closing = threading.Event()

    def __call__(self, path: str, read: Callable[[], Value]) -> Value:
        """What `read` returns.

        Raises:
            UserError: most of the data was away for wait_s seconds.
            Exception: whatever `read` raises that waiting does not mend.
        """
        begun, pause, outage = time.monotonic(), FIRST_PAUSE_S, ""
        while True:
            try:
                value = read()
            except Exception as error:
                reason = why_away(path, error)
                if not reason:
                    raise
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
                            f"the data is away: {outage}, for {waited:.0f} s; bring it back and start again with "
                            "--resume, or wait longer with data.wait_s"
                        ) from error
                    raise
                with self._lock:
                    if outage not in self._told:
                        self._told.add(outage)
                        self._info(f"data    {outage}; trying again for up to {limit:g} s")
                self._closing.wait(min(pause, limit - waited))
                pause = min(2 * pause, LONGEST_PAUSE_S)
            else:
                with self._lock:
                    if outage in self._told:
                        self._told.discard(outage)
                        self._info(f"data    {path} can be read again after {time.monotonic() - begun:.1f} s")
                return value

    def close(self) -> None:
        """Ends all waiting: what is away now counts as failed."""
        self._closing.set()

    def _most_are_away(self) -> bool:
        missing = sum(not os.path.exists(path) for path in self._samples)
        return 2 * missing >= max(len(self._samples), 1)


def _is_gone(folder: str) -> bool:
    """Whether a folder is missing or empty: where a drive is not mounted, its mount point is an empty folder."""
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is None
    except OSError:
        return True


def _can_be_read(path: str) -> bool:
    """Whether the operating system reads beginning, middle and end of a file, or of the first file of a folder."""
    try:
        if os.path.isdir(path):
            path = min(entry.path for entry in os.scandir(path) if entry.is_file())
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            for place in (0, size // 2, max(size - BLOCK, 0)):
                file.seek(place)
                file.read(BLOCK)
    except (OSError, ValueError):
        return False
    return True
