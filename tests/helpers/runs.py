"""Reads and compares the weights of run folders."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from mam2.engine.checkpoints import checkpoint


def newest_weights(run: Path) -> dict[str, torch.Tensor]:
    """The tensors of a run's newest checkpoint, by name."""
    folder = checkpoint.newest(run)
    assert folder is not None, f"{run} holds no checkpoint"
    return load_file(folder / checkpoint.WEIGHTS)


def same_tensors(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether both hold the same names and the same bits."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def same_weights(first: Path, second: Path) -> bool:
    """Whether the newest checkpoints of two runs hold the same bits."""
    return same_tensors(newest_weights(first), newest_weights(second))
