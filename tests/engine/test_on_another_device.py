"""Runs on_another_device.py in a process of its own, because the device stays registered."""

import sys

import pytest
from torch.utils import backend_registration

from tests.helpers.commands import run_program
from tests.helpers.paths import ROOT


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices written in Python",
)
def test_on_another_device() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/engine/on_another_device.py"]
    done = run_program(command, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
