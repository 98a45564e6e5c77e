"""A mark for tests that run NVIDIA DALI."""

import importlib.util

import pytest


def _installed() -> bool:
    """Returns whether the package is there; does not import it, so that a broken DALI fails the tests."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False


DALI_INSTALLED = _installed()
needs_dali = pytest.mark.skipif(not DALI_INSTALLED, reason="NVIDIA DALI is not installed")
