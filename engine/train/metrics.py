"""The log of a run: JSON lines, TensorBoard, and plain lines on the terminal; and how its numbers leave the device."""

from __future__ import annotations

import contextlib
import importlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from mam2.engine.config import UserError
from mam2.engine.train.distributed import World


class Log(Protocol):
    def say(self, message: str) -> None: ...

    def write(self, step: int, values: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class SilentLog:
    """Of the processes that are not rank 0."""

    def say(self, message: str) -> None:
        pass

    def write(self, step: int, values: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


class RunLog:
    """Writes `RUN/log.jsonl` (one object a line), `RUN/tensorboard/` and, for `say`, the terminal and `RUN/log.txt`."""

    def __init__(self, run: Path, tracker: str = "none") -> None:
        """tracker: "wandb" or "trackio" get the numbers as well. Raises UserError where the package is missing."""
        # Imported here: TensorBoard costs a second that `mam2 --help` should not pay.
        from torch.utils.tensorboard import SummaryWriter

        self._lines = (run / "log.jsonl").open("a", encoding="utf-8", buffering=1)
        self._text = (run / "log.txt").open("a", encoding="utf-8", buffering=1)
        self._board = SummaryWriter(str(run / "tensorboard"))
        self._tracker = _open_tracker(tracker, run) if tracker != "none" else None

    def say(self, message: str) -> None:
        """One plain line, above a progress bar where one is drawn."""
        tqdm.write(message)
        self._text.write(message + "\n")

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Numbers of a step."""
        self._lines.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._tracker:
            self._tracker.log(values, step=step)

    def close(self) -> None:
        if self._tracker:
            self._tracker.finish()
        self._lines.close()
        self._text.close()
        self._board.close()


def _open_tracker(name: str, run: Path) -> Any:
    """The package, which both name alike: `init`, `log`, `finish`."""
    try:
        package = importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"run.tracker {name}: {error}; pip install {name}, or leave it at none") from None
    package.init(project="mam2", name=run.name)
    return package


def read_log(run: Path) -> list[dict[str, Any]]:
    """What `RUN/log.jsonl` says of each step. Where it was logged twice, with a validation or again after a resume, the
    later value of each quantity counts."""
    by_step: dict[int, dict[str, Any]] = {}
    for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # a killed run may have left half a line
            values = json.loads(line)
            by_step[values["step"]] = by_step.get(values["step"], {}) | values
    return [by_step[step] for step in sorted(by_step)]


@dataclass(frozen=True)
class Line:
    """What is known of the steps since the line before."""

    steps: range
    """Optimiser steps done after each of them."""
    numbers: dict[str, float]
    bad: list[bool]
    """Of each step, whether it was left out because loss or gradient was not finite."""
    videos: dict[int, list[int]]
    """Places in the manifest of the clips that this rank saw, by step."""


class Readout:
    """Brings a line's numbers from the device without making the loop wait for it: they are ready some steps later."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pending: list[tuple[Any, ...]] = []

    def put(
        self,
        step: int,
        values: dict[str, Tensor],
        bad: Tensor,
        numbers: dict[str, float],
        videos: Sequence[Tensor],
        world: World,
    ) -> None:
        """values: 0-d tensors of step `step`, of which the ranks' mean is logged; bad: a flag for each step since the
        last line; numbers: known already; videos: int64 places in the manifest for each of those steps."""
        packed = torch.stack([value.float().to(bad.device) for value in values.values()])
        packed = torch.cat([world.mean_(packed), bad])
        event = None
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True).copy_(packed, non_blocking=True)
                packed.record_stream(self._stream)
                event = self._stream.record_event()
            packed = host
        steps = range(step - len(videos) + 1, step + 1)
        self._pending.append((event, packed, list(values), numbers, steps, videos))

    def take(self, *, wait: bool = False) -> Iterator[Line]:
        """The lines that have arrived, or all of them."""
        while self._pending:
            event, packed, names, numbers, steps, videos = self._pending[0]
            if event and not wait and not event.query():
                return
            if event:
                event.synchronize()
            del self._pending[0]
            read = packed.tolist()
            places = {number: video.flatten().tolist() for number, video in zip(steps, videos, strict=True)}
            values = dict(zip(names, read, strict=False))
            yield Line(steps, values | numbers, [flag > 0 for flag in read[len(names) :]], places)
