"""Runs the tests that need Triton's interpreter in a process of their own, where it interprets every kernel."""

import os
import subprocess
import sys

import pytest

from tests.helpers.interpreter import require_interpreter
from tests.helpers.paths import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("file", ["kernels_in_interpreter.py", "costs_in_interpreter.py", "limits_in_interpreter.py"])
def test_in_interpreter(file: str) -> None:
    require_interpreter()
    environment = os.environ | {"TRITON_INTERPRET": "1", "MAM2_KERNELS": "triton"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"tests/kernels/{file}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
