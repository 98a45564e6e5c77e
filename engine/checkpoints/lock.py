"""Locks a run folder for one process: RUN/lock names the process, and its file time shows that the process is alive.

The lock works on network file systems: the file is created exclusively; a thread renews its time, which is compared
with the file server's clock. A lock left behind by kill -9 on this machine is detected by its missing process; one of
another machine by a file time that has not been renewed for STALE_S.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mam2.engine.errors import UserError
from mam2.engine.files import written_aside
from mam2.engine.runtime import signals

FILE = "lock"
RENEW_S = 10.0
STALE_S = 60.0
SETTLE_S = 0.5
"""Seconds to wait after taking over a stale lock, so that two processes that do so at once detect each other."""
FIELDS = ("host", "pid", "started", "machine", "process", "token")


class RunLock:
    """Holds RUN/lock from `acquire` to `release`."""

    def __init__(self, run: Path) -> None:
        self._file = run / FILE
        self._token = uuid.uuid4().hex
        self._ended = threading.Event()
        self._owner = os.getpid()
        self._text = ""
        self.lost = False
        """Whether another process has taken over the folder; then nothing may be written."""

    def acquire(self, info: Callable[[str], None]) -> None:
        """Takes the lock; reports to `info` if it takes over a stale one.

        Raises:
            UserError: another process holds it; the message names the process.
            OSError: the folder cannot be written.
        """
        mine = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
            "machine": _machine(),
            "process": _process_start(os.getpid()),
            "token": self._token,
        }
        self._text = json.dumps(mine) + "\n"
        try:
            self._create()
        except FileExistsError:
            self._take_over(info)
        signals.last_acts.append(self.release)
        threading.Thread(target=self._renew, name="lock", daemon=True).start()

    def release(self) -> None:
        """Removes the lock if this process still holds it."""
        self._ended.set()
        with contextlib.suppress(ValueError):
            signals.last_acts.remove(self.release)
        if os.getpid() == self._owner and self._is_mine():  # not in a forked child
            with contextlib.suppress(OSError):
                self._file.unlink(missing_ok=True)

    def _create(self) -> None:
        """Writes the lock; raises FileExistsError if there is one."""
        with self._file.open("x", encoding="utf-8") as file:
            try:
                file.write(self._text)
                file.flush()
            except OSError:
                self._file.unlink()
                raise

    def _take_over(self, info: Callable[[str], None]) -> None:
        held = self._read()
        age = self._age()
        who = f"process {held.get('pid', '?')} on {held.get('host', '?')}, started {held.get('started', '?')}"
        if held.get("machine") == _machine() and held["process"]:
            alive = _process_start(int(held["pid"])) == held["process"]
            remedy = "wait until it ends, or end it"
        else:
            alive = age < STALE_S
            remedy = f"wait until it ends; if it has died, its lock expires in {max(STALE_S - age, 1):.0f} s"
        if alive:
            raise UserError(
                f"{self._file.parent} is being written by {who} (see {self._file}): {remedy}, or choose another folder "
                "with --out"
            )
        with written_aside(self._file, unique=True) as aside:
            aside.write_text(self._text, encoding="utf-8")
        time.sleep(SETTLE_S)
        if not self._is_mine():
            raise UserError(f"{self._file.parent}: another process took it over at the same time ({self._file})")
        info(f"lock    taken over from {who}, which no longer runs")

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_S):
            try:
                if self._read(strict=True).get("token") != self._token:
                    self.lost = True
                    return
                os.utime(self._file)
            except FileNotFoundError:  # the file system is unavailable, or somebody removed the file
                with contextlib.suppress(OSError):
                    self._create()
            except (OSError, ValueError):  # the file server is unavailable: retry
                continue

    def _is_mine(self) -> bool:
        return self._read().get("token") == self._token

    def _read(self, *, strict: bool = False) -> dict[str, Any]:
        """Reads the lock; returns {} while its holder is writing it, or if it is not a lock of MAM2."""
        try:
            held = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            if strict:
                raise
            return {}
        return held if isinstance(held, dict) and held.keys() >= set(FIELDS) else {}

    def _age(self) -> float:
        """Returns the seconds since the lock was renewed, by the file server's clock."""
        probe = self._file.with_name(f".{FILE}-{self._token}")
        probe.touch()
        try:
            return probe.stat().st_mtime - self._file.stat().st_mtime
        except FileNotFoundError:  # just released
            return STALE_S
        finally:
            probe.unlink(missing_ok=True)


def _machine() -> str:
    """Returns an identifier of the scope of process numbers: this boot of this machine, this container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} without /proc {uuid.getnode()}"


def _process_start(pid: int) -> str:
    """Returns the start time of a process in the kernel's ticks since the boot; empty for a process that has ended.

    It distinguishes a process from a later one with the same number.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
