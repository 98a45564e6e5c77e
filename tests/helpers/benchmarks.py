"""Modules of benchmarks/, imported only when a test needs them: some start Triton or read the machine's state."""

import importlib
from types import ModuleType


def module(name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.{name}")
