"""The log of a run: JSON lines, TensorBoard, and plain lines on the terminal; and how its numbers leave the device."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from mam2.engine.errors import UserError
from mam2.engine.files import NAMES, one_line
from mam2.engine.runtime.distributed import World

MOST_PENDING = 2**20
"""Bytes of a log that wait for a disk that takes them; then the oldest lines are dropped."""


class Log(Protocol):
    def info(self, message: str) -> None: ...

    def note(self, message: str) -> None: ...

    def write(self, step: int, values: dict[str, Any]) -> None: ...

    def begin_anew(self) -> None: ...

    def close(self) -> None: ...


class SilentLog:
    """Of the processes that are not rank 0."""

    def info(self, message: str) -> None:
        pass

    def note(self, message: str) -> None:
        pass

    def write(self, step: int, values: dict[str, Any]) -> None:
        pass

    def begin_anew(self) -> None:
        pass

    def close(self) -> None:
        pass


class RunLog:
    """Writes `RUN/log.jsonl` (one object per line), `RUN/tensorboard/` and, for `info`, the terminal and `RUN/log.txt`.

    Once open it raises nothing: what cannot be written is said once, and the training goes on. Names that are not UTF-8
    go into the files byte for byte, and onto the terminal escaped where it cannot show them.
    """

    def __init__(self, run: Path, tracker: str = "none") -> None:
        """tracker: "wandb" or "trackio" get the numbers as well. Raises UserError where the package is missing, OSError
        where the folder cannot be written."""
        # Imported here: TensorBoard costs a second that `mam2 --help` should not pay.
        from torch.utils.tensorboard import SummaryWriter

        self._run = run
        self._lines, self._text = LineFile(run / "log.jsonl"), LineFile(run / "log.txt")
        self._open_board = lambda: SummaryWriter(str(run / "tensorboard"))
        self._board: Any = self._open_board()
        self._tracker: Any = _open_tracker(tracker, run) if tracker != "none" else None
        self._failing: set[str] = set()

    def info(self, message: str) -> None:
        """One plain line, above a progress bar where one is drawn."""
        show(message)
        self.note(message)

    def note(self, message: str) -> None:
        """One plain line in log.txt alone."""
        self._attempt("log.txt", lambda: self._text.write(one_line(message).encode("utf-8", NAMES) + b"\n"))

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Numbers of a step."""
        line = json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n"
        self._attempt("log.jsonl", lambda: self._lines.write(line.encode()))
        self._attempt("tensorboard", lambda: self._draw(step, values))
        if self._tracker:
            self._attempt("run.tracker", lambda: self._tracker.log(values, step=step))

    def begin_anew(self) -> None:
        """Sets numbers aside that a run without a checkpoint left here, as log.before.jsonl: they are another run's."""

        def set_aside() -> None:
            if self._lines.set_aside(self._run / "log.before.jsonl"):
                self.info(f"run     numbers of an earlier attempt are now in {self._run / 'log.before.jsonl'}")

        self._attempt("log.jsonl", set_aside)

    def close(self) -> None:
        if self._tracker:
            self._attempt("run.tracker", self._tracker.finish)
        if self._board:
            self._attempt("tensorboard", self._board.close)
        for name, file in (("log.jsonl", self._lines), ("log.txt", self._text)):
            self._attempt(name, file.close)

    def _draw(self, step: int, values: dict[str, Any]) -> None:
        try:
            self._board = self._board or self._open_board()
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        except Exception:
            self._board = None  # the thread that writes has ended; the next numbers go to a file of their own
            raise

    def _attempt(self, name: str, write: Callable[[], object]) -> None:
        """Writes; where that fails, says so once until it works again. Whatever a library raises: it is only a log."""
        try:
            write()
            self._failing.discard(name)
        except Exception as error:
            if name not in self._failing:
                self._failing.add(name)
                reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
                where = self._run / name if name != "run.tracker" else name
                show(f"log     {where} cannot be written: {reason or type(error).__name__}. The run goes on")


class LineFile:
    """A text file that grows by lines, unbuffered; lines that a full or absent disk does not take wait for later."""

    def __init__(self, path: Path) -> None:
        """Raises OSError where the file cannot be opened. After half a line, of a killed run, a new one is begun."""
        self._path = path
        self._pending = b""
        self._writing = threading.Lock()  # loader threads name unusable files
        self._file: io.FileIO | None = None
        file = self._open()
        if file.seek(0, os.SEEK_END) and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
            self._pending = b"\n"

    def write(self, lines: bytes) -> None:
        """Raises OSError where they have to wait."""
        with self._writing:
            self._pending += lines
            if len(self._pending) > MOST_PENDING:
                self._pending = self._pending[-MOST_PENDING:].partition(b"\n")[2]
            try:
                while self._pending:
                    self._pending = self._pending[self._open().write(self._pending) or 0 :]
            except OSError:
                self._close()  # a handle that has become stale is opened anew
                raise

    def set_aside(self, other: Path) -> bool:
        """Renames the file to `other` and begins a new one, if there is anything in it."""
        if not self._path.stat().st_size:
            return False
        self._path.replace(other)
        self._close()
        self._pending = b""
        self._open()
        return True

    def close(self) -> None:
        """Raises OSError where lines are lost."""
        try:
            if self._pending:
                self.write(b"")
        finally:
            self._close()

    def _open(self) -> io.FileIO:
        if self._file is None:
            self._file = io.FileIO(os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666), "r+")
        return self._file

    def _close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None


def show(message: str) -> None:
    """A line on stdout, above a progress bar where one is drawn; escaped where the stream cannot show it, dropped where
    the stream is closed."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    with contextlib.suppress(OSError, ValueError):
        tqdm.write(one_line(message).encode(encoding, "backslashreplace").decode(encoding))


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

    def collect(self, *, wait: bool = False) -> Iterator[Line]:
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
