"""Runs the tests that need Triton's interpreter in a process of their own, where it interprets every kernel."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("file", ["kernels_in_interpreter.py", "costs_in_interpreter.py", "limits_in_interpreter.py"])
def test_in_interpreter(file: str) -> None:
    pytest.importorskip("triton")
    paths = os.pathsep.join([str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"TRITON_INTERPRET": "1", "MAM2_KERNELS": "triton", "PYTHONPATH": paths}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", file]
    done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
