"""`optim.micro_batch auto`: finds the most clips whose pass fits into a GPU's memory, by trying.

Before the first step, each rank runs whole steps alone on its first batch, in one pass, then in more and more, until
its memory suffices. The steps run without torch.compile, which would compile for every size and needs no more memory.
All ranks then use the largest number of passes that any of them needs. Weights and moments are restored.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from mam2.engine.runtime.distributed import World, first_line

SHARE = 0.9
"""Share of a GPU's memory that a tried step may take. The tokenizer, which works on the next batch meanwhile, decoders
and a CUDA graph take some of the rest."""


class PassChoice(NamedTuple):
    passes: int
    """Number of equal passes; 0 if not even the smallest fits on every rank."""
    problem: str
    """What the device said about the last size that did not fit on this rank; empty if the first one fitted."""


def fewest_passes(
    possible: Sequence[int], step: Callable[[int], object], device: torch.device, world: World
) -> PassChoice:
    """Returns the fewest passes that fit on every rank.

    possible: numbers of passes, ascending. step(passes) runs a step without other ranks; it raises OutOfMemoryError if
    it does not fit.
    """
    found, problem = 0, ""
    with _limited_memory(device):
        for passes in possible:
            try:
                step(passes)
            except torch.OutOfMemoryError as error:
                problem = first_line(error)
            else:
                found = passes
                break
            finally:
                _release(device)
    everywhere = world.all_gather(found)
    return PassChoice(max(everywhere) if all(everywhere) else 0, problem)


@contextmanager
def _limited_memory(device: torch.device) -> Iterator[None]:
    """Makes torch raise OutOfMemoryError beyond `SHARE` of a GPU's memory."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_per_process_memory_fraction(device)
    torch.cuda.set_per_process_memory_fraction(min(SHARE, before), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)


def _release(device: torch.device) -> None:
    """Returns the memory of a tried step, also of frames that an error held in a cycle."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
