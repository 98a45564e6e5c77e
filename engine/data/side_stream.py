"""Prepares what goes with a batch while the step before it still runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mam2.engine.data.batch import Batch
from mam2.engine.runtime.cuda import own_stream

Extras = TypeVar("Extras")


class _Owner:
    """Owns a side stream while it is in use."""


def on_side_stream(prepared: Iterator[tuple[Batch, Extras]], device: torch.device) -> Iterator[tuple[Batch, Extras]]:
    """Yields the same pairs of a batch and its extras, which may hold tensors.

    On a GPU `prepared` is advanced on a side stream. The side stream does not wait for the step before, which the host
    has only queued when it asks for the next batch: so the two run at the same time.
    """
    if device.type != "cuda":
        yield from prepared
        return
    owner = _Owner()
    side_stream = own_stream(owner, device)
    side_stream.wait_stream(torch.cuda.current_stream(device))  # on which weights may still be copied
    while True:
        step = torch.cuda.current_stream(device)
        with torch.cuda.stream(side_stream):
            # The loader notes the current stream as a user of the clip's memory.
            pair = next(prepared, None)
        if pair is None:
            return
        step.wait_stream(side_stream)
        # Allocated on other streams, which must not reuse the memory before the step is done with it.
        batch, extras = pair
        for tensor in (batch.clip, *tree_leaves(extras)):
            if isinstance(tensor, Tensor):
                tensor.record_stream(step)
        yield pair
