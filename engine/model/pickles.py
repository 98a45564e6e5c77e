"""Checkpoints of other projects are pickles: their tensors are read, and no code from the file or for the file runs.

`torch.load(weights_only=True)` does the reading. Classes of training frameworks that a checkpoint mentions besides its
tensors are replaced by empty stand-ins; anything else it asks for is refused.
"""

from __future__ import annotations

import argparse
import collections
import pickle
import typing
from pathlib import Path
from typing import Any

import torch

from mam2.engine.config import UserError

STOOD_IN_FOR = ("pytorch_lightning", "lightning", "lightning_fabric", "omegaconf", "deepspeed", "numpy")
"""Packages whose classes a checkpoint may mention: training frameworks, and NumPy for a scalar among their records."""
HARMLESS = {
    "argparse.Namespace": argparse.Namespace,
    "collections.defaultdict": collections.defaultdict,
    "typing.Any": typing.Any,
    **{f"builtins.{kind.__name__}": kind for kind in (bool, dict, float, int, list, str, tuple)},
}
"""What else its settings may mention."""


def load_pickle(path: Path) -> Any:
    """What a `torch.save` file holds: tensors on the CPU, plain values, and stand-ins without content.

    Raises UserError: another kind of file, a broken one, or one that asks for other classes or functions.
    """
    try:
        mentioned = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (ValueError, RuntimeError, OSError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: expected a PyTorch checkpoint, found another kind of file") from error
    refused = [name for name in mentioned if name not in HARMLESS and name.split(".")[0] not in STOOD_IN_FOR]
    if refused:
        raise UserError(
            f"{path}: expected tensors only, found a pickle that asks for {', '.join(sorted(refused))}; not loaded"
        )
    stand_ins: list[Any] = [(HARMLESS.get(name) or _stand_in(), name) for name in mentioned]
    with torch.serialization.safe_globals(stand_ins):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path}: expected a PyTorch checkpoint, found a broken one ({reason})") from error


def _stand_in() -> type:
    """A class that takes any arguments and any state and does nothing with them."""

    class StandIn:
        def __new__(cls, *args: Any, **kwargs: Any) -> StandIn:
            return super().__new__(cls)

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            pass

        def __setstate__(self, state: Any) -> None:
            pass

    return StandIn
