"""Runs kernels_in_interpreter.py where Triton interprets its kernels: in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_kernels_in_interpreter() -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "MAM2_KERNELS": "triton"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "kernels_in_interpreter.py"]
    done = subprocess.run(
        command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
