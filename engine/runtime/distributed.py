"""Connects the processes of a run that torchrun started, and lets them exchange values.

Every process (rank) runs the same program on its part of each batch. Only rank 0 writes files, scans the data and
trains a tokenizer; the others wait for its result. DDP or FSDP2 averages the gradients.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mam2.engine.errors import PeerFailed, RankError, UserError
from mam2.engine.runtime import signals

Value = TypeVar("Value")

STEP_TIMEOUT = datetime.timedelta(minutes=10)
"""A rank that stalls a step for longer than this is considered dead."""
SETUP_TIMEOUT = datetime.timedelta(days=2)
"""Limit during setup, where rank 0 may scan millions of files or train a tokenizer."""
ABORT_S = 5.0
"""Seconds to wait for an aborted process group."""
LOST = re.compile(
    r"[Cc]onnection (closed|reset|refused)|[Ss]ocket|[Bb]roken pipe|[Tt]imed out|NCCL|remote process", re.I
)
"""Messages of backends after another process has ended."""


@dataclass(frozen=True)
class World:
    """The processes of a run, from the view of one of them. `World()` is a run of one process."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Number of this process, and of its GPU, on its machine."""
    hosts: Any = None
    """Process group for values on the CPU."""

    @property
    def main(self) -> bool:
        """Whether this process writes the files and the log."""
        return self.rank == 0

    def broadcast(self, make: Callable[[], Value]) -> Value:
        """Calls `make` on rank 0 and returns its result on every rank.

        If it raises there, the others raise PeerFailed.
        """
        if self.size == 1:
            return make()
        box: list[Any] = [None, False]
        try:
            if self.main:
                box = [make(), True]
        finally:  # the others must not wait for a value that is never sent
            dist.broadcast_object_list(box, src=0, group=self.hosts)
        if not box[1]:
            raise PeerFailed
        return box[0]

    def all_gather(self, value: Value) -> list[Value]:
        """Returns the values of all ranks, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.hosts)
        return values

    def mean_(self, numbers: Tensor) -> Tensor:
        """Replaces a tensor on the run's device by its mean over the ranks."""
        if self.size > 1:
            dist.all_reduce(numbers)
            numbers /= self.size
        return numbers

    def error(self, message: str) -> Exception:
        """Returns the error for a condition that all ranks detect: a UserError on rank 0, PeerFailed on the others."""
        error = UserError(message) if self.main else PeerFailed()
        error.everywhere = True
        return error


class StopConsensus:
    """Makes all ranks stop after the same step: the votes of a step are counted while the next step runs."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._pending: tuple[Any, Tensor] | None = None

    def __call__(self, signal: int) -> int:
        """Returns the signal that ends the run, or 0.

        In a single process that is `signal` itself, else a signal that any rank passed at the previous call.
        """
        if self._world.size == 1:
            return signal
        decided = 0
        if self._pending:
            work, votes = self._pending
            work.wait()
            decided = int(votes)
        votes = torch.tensor(signal)
        self._pending = dist.all_reduce(votes, dist.ReduceOp.MAX, group=self._world.hosts, async_op=True), votes
        return decided


@contextmanager
def join(device: torch.device) -> Iterator[World]:
    """Connects the processes that torchrun's environment describes, and yields their World.

    Raises RankError, which names the rank, if the processes cannot be connected, and instead of a UserError on a rank
    other than 0. The loss of another process later raises PeerFailed with the backend's first line.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    world, whole = None, False
    try:
        world = _connect(device, rank, size, local_rank)
        yield world
        whole = True
    except UserError as error:
        if rank == 0 or isinstance(error, RankError):
            raise
        raise RankError(f"rank {rank}: {error}") from error
    except (RuntimeError, dist.DistError) as error:
        if world and not isinstance(error, torch.OutOfMemoryError) and LOST.search(str(error)):
            raise PeerFailed(f"rank {rank}: lost the other processes: {first_line(error)}") from error
        raise
    finally:
        _disconnect(device, whole)


def _connect(device: torch.device, rank: int, size: int, local_rank: int) -> World:
    """Connects the processes and computes a sum over them, because only then backends connect. Raises RankError."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(backend, timeout=STEP_TIMEOUT, device_id=device if device.type == "cuda" else None)
        hosts = dist.new_group(backend="gloo", timeout=SETUP_TIMEOUT)
        found = torch.ones((), device=device)
        dist.all_reduce(found)
        if int(found) != size:
            raise RuntimeError(f"a sum over {size} processes gave {int(found)}")
    except (RuntimeError, dist.DistError) as error:
        more = "; set NCCL_DEBUG=INFO in the environment for details" if backend == "nccl" else ""
        raise RankError(f"rank {rank}: {backend} cannot connect the processes: {first_line(error)}{more}") from error
    return World(rank, size, local_rank, hosts)


def _disconnect(device: torch.device, whole: bool) -> None:
    """Leaves the process group.

    After an error NCCL might wait for others until its time limit. It is then aborted without waiting, since the error
    must still be printed.
    """
    if not dist.is_initialized():
        return
    if whole or device.type != "cuda":
        dist.destroy_process_group()
        return

    def abort() -> None:
        with contextlib.suppress(RuntimeError, ValueError):
            dist.distributed_c10d._abort_process_group()

    thread = threading.Thread(target=abort, name="abort", daemon=True)
    thread.start()
    thread.join(ABORT_S)
    if thread.is_alive():
        signals.abandon()


def first_line(error: BaseException) -> str:
    """Returns the first non-empty line of an error's text, or the error's type if there is none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
