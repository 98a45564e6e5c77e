"""Finds the weights file of a path: the same for loading, hashing and everything that reads a checkpoint.

RUN/best/model.safetensors                  of a run that validates
    checkpoints/step-…/model.safetensors    otherwise the newest of these
"""

from __future__ import annotations

from pathlib import Path

from mam2.engine.checkpoints import checkpoint
from mam2.engine.checkpoints.hub import local_path
from mam2.engine.checkpoints.weight_files import open_safetensors
from mam2.engine.errors import UserError


def find_weights(path: str | Path) -> Path | None:
    """Returns MAM2's safetensors file for `path`, or None if `path` is another project's file or folder.

    Args:
        path: a run folder (its best validated checkpoint, else its newest), a checkpoint folder, a weights file, or
            the name of a repository on the hub, which is downloaded (`hub:OWNER/NAME`, see hub.py).

    Raises:
        UserError: `path` does not exist, is a run without a checkpoint, or is a file that cannot be read.
    """
    path = local_path(path)
    if not path.exists():
        raise UserError(
            f"{path}: no such file or folder; expected a run, a checkpoint, a .pth file or a Hugging Face folder"
        )
    if (path / checkpoint.BEST).is_dir():
        path = path / checkpoint.BEST
    elif (path / checkpoint.FOLDER).is_dir():
        newest = checkpoint.newest(path)
        if newest is None:
            raise UserError(f"{path}: this run has no checkpoint yet")
        path = newest
    if path.is_dir():
        if not (path / checkpoint.STATE).is_file():
            return None
        path = path / checkpoint.WEIGHTS
        if not path.is_file():
            raise UserError(f"checkpoint {path.parent}: {checkpoint.WEIGHTS} is missing; choose another checkpoint")
    if path.suffix != ".safetensors":
        return None
    with open_safetensors(path) as file:
        return path if "config" in (file.metadata() or {}) else None
