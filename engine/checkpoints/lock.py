"""One process at a time writes a run folder: RUN/lock names it, and its file time says that it still lives.

It works on network file systems: the file is created exclusively, and its time is renewed by a thread and compared with
the file server's own clock. A lock that kill -9 left behind on this machine is recognized by its process; one of
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
from mam2.engine.runtime import signals

FILE = "lock"
RENEW_S = 10.0
STALE_S = 60.0
SETTLE_S = 0.5
"""After taking over, so that of two processes that do so together one sees the other."""
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
        """Whether another process has taken the folder over: nothing may be written then."""

    def acquire(self, info: Callable[[str], None]) -> None:
        """Takes the lock; `info` hears where a stale one is taken over. Raises UserError, which names the process that
        holds it, and OSError where the folder cannot be written."""
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
        """Removes the lock, if it is still this process's."""
        self._ended.set()
        with contextlib.suppress(ValueError):
            signals.last_acts.remove(self.release)
        if os.getpid() == self._owner and self._is_mine():  # not in a forked child
            with contextlib.suppress(OSError):
                self._file.unlink(missing_ok=True)

    def _create(self) -> None:
        """Writes the lock; FileExistsError where there is one."""
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
            remedy = "wait for its end, or end it"
        else:
            alive = age < STALE_S
            remedy = f"wait for its end; if it has died, its lock ends {max(STALE_S - age, 1):.0f} s from now"
        if alive:
            raise UserError(
                f"{self._file.parent} is being written by {who} (says {self._file}): {remedy}, or name another folder "
                "with --out"
            )
        partial = self._file.with_name(f".{FILE}-{self._token}")
        partial.write_text(self._text, encoding="utf-8")
        partial.replace(self._file)
        time.sleep(SETTLE_S)
        if not self._is_mine():
            raise UserError(f"{self._file.parent}: another process took it over at the same moment ({self._file})")
        info(f"lock    taken over from {who}, which no longer runs")

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_S):
            try:
                if self._read(strict=True).get("token") != self._token:
                    self.lost = True
                    return
                os.utime(self._file)
            except FileNotFoundError:  # the file system is away, or somebody removed it by hand
                with contextlib.suppress(OSError):
                    self._create()
            except (OSError, ValueError):  # the file server is away: it is asked again
                continue

    def _is_mine(self) -> bool:
        return self._read().get("token") == self._token

    def _read(self, *, strict: bool = False) -> dict[str, Any]:
        """What the lock says; empty while its holder is writing it, or where it is not one of ours."""
        try:
            held = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            if strict:
                raise
            return {}
        return held if isinstance(held, dict) and held.keys() >= set(FIELDS) else {}

    def _age(self) -> float:
        """Seconds since the lock was renewed, by the clock of the machine that keeps the files."""
        probe = self._file.with_name(f".{FILE}-{self._token}")
        probe.touch()
        try:
            return probe.stat().st_mtime - self._file.stat().st_mtime
        except FileNotFoundError:  # released a moment ago
            return STALE_S
        finally:
            probe.unlink(missing_ok=True)


def _machine() -> str:
    """Where process numbers mean the same: this boot of this machine, this container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} without /proc {uuid.getnode()}"


def _process_start(pid: int) -> str:
    """When a process began, in the kernel's ticks since the boot; empty for one that has ended.

    Tells a process from a later one of the same number.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
