"""One process or many: what torchrun says, and what the processes of a run have to agree on.

Every process (rank) runs the same program on its part of each batch. Rank 0 alone writes files, scans the data and
trains a tokenizer; the others wait for what it found. Gradients are averaged by DDP or FSDP2.
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
"""A process that keeps the others waiting so long in a step is taken for dead."""
SETUP_TIMEOUT = datetime.timedelta(days=2)
"""Rank 0 may scan millions of files or train a tokenizer meanwhile."""
ABORT_S = 5.0
"""How long an aborted process group is waited for."""
LOST = re.compile(
    r"[Cc]onnection (closed|reset|refused)|[Ss]ocket|[Bb]roken pipe|[Tt]imed out|NCCL|remote process", re.I
)
"""What backends say when another process is gone."""


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them. `World()` is a run of one process."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Number of this process on its machine, and of its GPU."""
    hosts: Any = None
    """Process group for values on the CPU."""

    @property
    def main(self) -> bool:
        """Whether this process writes the files and the log."""
        return self.rank == 0

    def broadcast(self, make: Callable[[], Value]) -> Value:
        """What `make` gives on rank 0, on every rank. Where it raises there, the others raise PeerFailed."""
        if self.size == 1:
            return make()
        box: list[Any] = [None, False]
        try:
            if self.main:
                box = [make(), True]
        finally:  # the others must not wait for a value that never comes
            dist.broadcast_object_list(box, src=0, group=self.hosts)
        if not box[1]:
            raise PeerFailed
        return box[0]

    def all_gather(self, value: Value) -> list[Value]:
        """The values of all ranks, on every rank, by rank."""
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
        """For a mistake that every rank sees at once: rank 0 says it, the others end without a word."""
        error = UserError(message) if self.main else PeerFailed()
        error.everywhere = True
        return error


class StopConsensus:
    """Lets all ranks stop after the same step: a step's votes are counted while the next one runs."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._pending: tuple[Any, Tensor] | None = None

    def __call__(self, signal: int) -> int:
        """The signal that ends the run, 0 for none: at once in a single process, else one that any rank had received
        at the call before."""
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
    """The world that torchrun's environment describes, for as long as the block lasts.

    Raises RankError, which names the rank, where the processes cannot be connected, and in place of a UserError on
    another rank than 0. Losing another process later becomes PeerFailed with the backend's first line.
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
    """Joins the processes and lets them add up a number, which is when backends really connect. Raises RankError."""
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
        more = "; NCCL_DEBUG=INFO in the environment tells more" if backend == "nccl" else ""
        raise RankError(f"rank {rank}: {backend} cannot connect the processes: {first_line(error)}{more}") from error
    return World(rank, size, local_rank, hosts)


def _disconnect(device: torch.device, whole: bool) -> None:
    """Leaves the process group. After an error NCCL might wait for others until its time limit: it is aborted then,
    and not waited for, since the error has still to be printed."""
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
    """The first line of an error's text that is not empty; its kind where there is none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
