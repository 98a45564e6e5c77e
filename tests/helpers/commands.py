"""Runs the command line, in this process or in others."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "3000"}
"""One thread per process, which waits without spinning: several processes share few cores."""
MAM2_COMMAND = [sys.executable, "-m", "mam2.engine"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def exit_status(*arguments: object) -> int:
    """Runs `mam2 ARGUMENTS` in this process and returns its exit status."""
    from mam2.engine import cli

    with pytest.raises(SystemExit) as end:
        cli.main([str(argument) for argument in arguments])
    assert isinstance(end.value.code, int)
    return end.value.code


def outcome(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Runs `mam2 ARGUMENTS` in this process; returns exit status, stdout and stderr."""
    capsys.readouterr()
    status = exit_status(*arguments)
    output = capsys.readouterr()
    return status, output.out, output.err


def run_program(command: list[Any], **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a program and captures its output as text; options of subprocess.run override the defaults."""
    given = {"env": ENVIRONMENT, "capture_output": True, "text": True, "timeout": 900, "check": False, **options}
    return subprocess.run([str(word) for word in command], **given)


def torchrun(processes: int, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return run_program([*TORCHRUN, "--standalone", "--nproc-per-node", processes, *arguments], **options)


def free_port() -> int:
    """Returns a free port from 20000 to 29999: connections that are opened meanwhile get higher ones."""
    for port in random.SystemRandom().sample(range(20000, 30000), 10000):
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def wait_for_first_step(run: Path, process: subprocess.Popen[Any], seconds: float = 120) -> None:
    """Returns when the run's log has a line, or its process has ended. Raises AssertionError after `seconds`."""
    log, deadline = run / "log.jsonl", time.monotonic() + seconds
    while not (log.exists() and log.stat().st_size) and process.poll() is None:
        assert time.monotonic() < deadline, f"{run}: no step in {seconds:.0f} s"
        time.sleep(0.1)
