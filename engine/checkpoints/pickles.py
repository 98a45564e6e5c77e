"""Reads the tensors of other projects' checkpoints, which are pickles, without executing code that the file names.

`torch.load(weights_only=True)` reads the file. Classes of training frameworks that a checkpoint contains in addition to
tensors are replaced by empty placeholders; any other class or function is refused.
"""

from __future__ import annotations

import argparse
import collections
import pickle
import pickletools
import typing
from pathlib import Path
from typing import Any

import torch

from mam2.engine.checkpoints.weight_files import check_whole, kind_of
from mam2.engine.errors import UserError

STOOD_IN_FOR = ("pytorch_lightning", "lightning", "lightning_fabric", "omegaconf", "deepspeed", "numpy")
"""Packages whose classes a checkpoint may contain: training frameworks, and NumPy for scalars in their records."""
HARMLESS = {
    "argparse.Namespace": argparse.Namespace,
    "collections.defaultdict": collections.defaultdict,
    "typing.Any": typing.Any,
    **{f"builtins.{kind.__name__}": kind for kind in (bool, dict, float, int, list, str, tuple)},
}
"""Other classes that a checkpoint's settings may contain."""
CHECKED_BY_TORCH = ("collections.OrderedDict", "_codecs.encode")
LEGACY_PICKLES = 5
"""Number of pickles in a file of PyTorch before 1.6: magic number, version, machine, content, keys of the tensors."""


def load_pickle(path: Path) -> Any:
    """Reads a `torch.save` file: tensors on the CPU, plain values, and empty placeholders.

    Raises UserError for another kind of file, a broken file, or a file that contains other classes or functions.
    """
    check_whole(path)
    kind = kind_of(path)
    if kind not in ("zip", "legacy"):
        found = "a safetensors file; name it .safetensors" if kind == "safetensors" else "another kind of file"
        raise UserError(f"{path}: expected a PyTorch checkpoint, found {found}")
    try:
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint
        mentioned = unsafe(path) if kind == "zip" else _legacy_globals(path)
    except (ValueError, RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: expected a PyTorch checkpoint, found a broken one ({reason})") from error
    refused = [name for name in mentioned if name not in HARMLESS and name.split(".")[0] not in STOOD_IN_FOR]
    if refused:
        raise UserError(
            f"{path}: expected only tensors, found a pickle that needs {', '.join(sorted(refused))}; not loaded"
        )
    stand_ins: list[Any] = [(HARMLESS.get(name) or _stand_in(), name) for name in mentioned]
    with torch.serialization.safe_globals(stand_ins):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, ValueError, pickle.UnpicklingError, EOFError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path}: expected a PyTorch checkpoint, found a broken one ({reason})") from error


def _legacy_globals(path: Path) -> list[str]:
    """The classes and functions of a `torch.save` file of PyTorch before 1.6 that torch does not check itself."""
    found: dict[str, None] = {}
    with path.open("rb") as file:
        for _ in range(LEGACY_PICKLES):
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name == "STACK_GLOBAL":
                    raise ValueError("written with a pickle protocol that these versions of PyTorch did not use")
                if opcode.name in ("GLOBAL", "INST"):
                    found[str(argument).replace(" ", ".")] = None
    return [name for name in found if name.split(".")[0] != "torch" and name not in CHECKED_BY_TORCH]


def _stand_in() -> type:
    """Returns a class that accepts and ignores any arguments and state."""

    class StandIn:
        def __new__(cls, *args: Any, **kwargs: Any) -> StandIn:
            return super().__new__(cls)

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            pass

        def __setstate__(self, state: Any) -> None:
            pass

    return StandIn
