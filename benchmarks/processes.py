"""Child processes with a time limit that never outlive their parent: the whole process group is killed at the end."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that a process gets when its parent dies."""
POLL_S = 0.05


class Ended(NamedTuple):
    """The result of a child process."""

    code: int | None
    """Exit status; None: the child was killed at its limit."""
    seconds: float


def start(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Starts a child in a new process group of this session; the kernel kills it when this process dies.

    In a new session it would survive a caller that ends all processes of its own session.
    """
    parent, prctl = os.getpid(), ctypes.CDLL(None, use_errno=True).prctl

    def prepare() -> None:
        os.setpgid(0, 0)
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent died before prctl
            os._exit(1)

    return subprocess.Popen(command, preexec_fn=prepare, **options)


def kill_group(child: subprocess.Popen[bytes]) -> None:
    """Kills the child and the processes that it started, such as a compiler's workers."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def run(
    command: Sequence[str],
    *,
    limit: Callable[[], float],
    cwd: Path,
    environment: Mapping[str, str],
    output: IO[bytes] | int | None = None,
) -> Ended:
    """Runs a command until it ends or time.monotonic() passes `limit()`, which is called repeatedly."""
    began = time.monotonic()
    child = start(command, cwd=cwd, env=dict(environment), stdout=output, stderr=subprocess.STDOUT)
    try:
        while child.poll() is None and time.monotonic() < limit():
            time.sleep(POLL_S)
        code = child.poll()
    finally:
        kill_group(child)
    return Ended(code, time.monotonic() - began)
