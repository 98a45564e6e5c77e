"""Skips tests if Triton's interpreter does not run here."""

from importlib.metadata import version

import pytest


def _release(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version(package).split(".")[:2])


def require_interpreter() -> None:
    """Skips the test if Triton is missing, or if its interpreter does not work with the installed NumPy."""
    pytest.importorskip("triton")
    if _release("triton") < (3, 7) and _release("numpy") >= (2, 4):
        pytest.skip(
            f"the interpreter of Triton {version('triton')} converts arrays of one value to numbers, which NumPy "
            f"{version('numpy')} refuses; with numpy<2.4 or triton>=3.7 the test runs"
        )
