"""The log of a run: JSON lines, TensorBoard and plain lines on the terminal; copies its numbers from the device."""

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
from mam2.engine.runtime.cuda import own_stream
from mam2.engine.runtime.distributed import World

MOST_PENDING = 2**20
"""Maximum bytes of log lines that wait for a full or absent disk; beyond it the oldest lines are dropped."""


class Log(Protocol):
    def info(self, message: str) -> None: ...

    def note(self, message: str) -> None: ...

    def write(self, step: int, values: dict[str, Any]) -> None: ...

    def start_new(self) -> None: ...

    def close(self) -> None: ...


class SilentLog:
    """The log of ranks other than 0: writes nothing."""

    def info(self, message: str) -> None:
        pass

    def note(self, message: str) -> None:
        pass

    def write(self, step: int, values: dict[str, Any]) -> None:
        pass

    def start_new(self) -> None:
        pass

    def close(self) -> None:
        pass


class RunLog:
    """Writes `RUN/log.jsonl` (one object per line), `RUN/tensorboard/` and, for `info`, the terminal and `RUN/log.txt`.

    After opening it never raises: a failed write is reported once, and the training continues. Names that are not UTF-8
    are written to the files as their bytes, and to the terminal escaped if it cannot display them.
    """

    def __init__(self, run: Path, tracker: str = "none") -> None:
        """tracker: "wandb" or "trackio", which then also receives the numbers.

        Raises UserError if the package is missing, OSError if the folder cannot be written.
        """
        # Imported here, because TensorBoard takes a second that `mam2 --help` should not need.
        from torch.utils.tensorboard import SummaryWriter

        self._run = run
        self._lines, self._text = LineFile(run / "log.jsonl"), LineFile(run / "log.txt")
        self._open_board = lambda: SummaryWriter(str(run / "tensorboard"))
        self._board: Any = self._open_board()
        self._tracker: Any = _open_tracker(tracker, run) if tracker != "none" else None
        self._failing: set[str] = set()

    def info(self, message: str) -> None:
        """Writes one plain line, above a progress bar if there is one."""
        show(message)
        self.note(message)

    def note(self, message: str) -> None:
        """Writes one plain line to log.txt only."""
        self._attempt("log.txt", lambda: self._text.write(one_line(message).encode("utf-8", NAMES) + b"\n"))

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Writes the numbers of a step."""
        line = json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n"
        self._attempt("log.jsonl", lambda: self._lines.write(line.encode()))
        self._attempt("tensorboard", lambda: self._draw(step, values))
        if self._tracker:
            self._attempt("run.tracker", lambda: self._tracker.log(values, step=step))

    def start_new(self) -> None:
        """Renames numbers of an earlier run without a checkpoint in this folder to log.before.jsonl."""

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
            self._board = None  # its writer thread has ended; the next numbers go to a new file
            raise

    def _attempt(self, name: str, write: Callable[[], object]) -> None:
        """Calls `write`; reports a failure once until it works again.

        Catches every exception, since this is only a log.
        """
        try:
            write()
            self._failing.discard(name)
        except Exception as error:
            if name not in self._failing:
                self._failing.add(name)
                reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
                where = self._run / name if name != "run.tracker" else name
                show(f"log     {where} cannot be written: {reason or type(error).__name__}. The run continues")


class LineFile:
    """An unbuffered text file for appending lines; lines that a full or absent disk refuses are kept for later."""

    def __init__(self, path: Path) -> None:
        """Raises OSError if the file cannot be opened. Starts a new line after an incomplete one of a killed run."""
        self._path = path
        self._pending = b""
        self._writing = threading.Lock()  # loader threads report unusable files
        self._file: io.FileIO | None = None
        file = self._open()
        if file.seek(0, os.SEEK_END) and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
            self._pending = b"\n"

    def write(self, lines: bytes) -> None:
        """Writes lines; raises OSError if they must be kept for later."""
        with self._writing:
            self._pending += lines
            if len(self._pending) > MOST_PENDING:
                self._pending = self._pending[-MOST_PENDING:].partition(b"\n")[2]
            try:
                while self._pending:
                    self._pending = self._pending[self._open().write(self._pending) or 0 :]
            except OSError:
                self._close()  # a stale handle is opened again
                raise

    def set_aside(self, other: Path) -> bool:
        """Renames the file to `other` and starts a new one, unless it is empty."""
        if not self._path.stat().st_size:
            return False
        self._path.replace(other)
        self._close()
        self._pending = b""
        self._open()
        return True

    def close(self) -> None:
        """Closes the file; raises OSError if lines are lost."""
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
    """Prints a line on stdout, above a progress bar if there is one.

    Characters that the stream cannot encode are escaped; if the stream is closed, the line is dropped.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    with contextlib.suppress(OSError, ValueError):
        tqdm.write(one_line(message).encode(encoding, "backslashreplace").decode(encoding))


def _open_tracker(name: str, run: Path) -> Any:
    """Imports the tracker's package and starts a run; both packages have `init`, `log` and `finish`."""
    try:
        package = importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"run.tracker {name}: {error}; pip install {name}, or use run.tracker=none") from None
    package.init(project="mam2", name=run.name)
    return package


def read_log(run: Path) -> list[dict[str, Any]]:
    """Returns the numbers of each step in `RUN/log.jsonl`.

    If a step was logged twice, with a validation or again after a resume, the later value of each quantity counts.
    """
    by_step: dict[int, dict[str, Any]] = {}
    for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # a killed run may have left an incomplete line
            values = json.loads(line)
            by_step[values["step"]] = by_step.get(values["step"], {}) | values
    return [by_step[step] for step in sorted(by_step)]


@dataclass(frozen=True)
class Line:
    """The numbers of the steps since the previous line."""

    steps: range
    """The step numbers: optimizer steps done so far."""
    numbers: dict[str, float]
    bad: list[bool]
    """For each step, whether it was skipped because its loss or gradient was not finite."""
    videos: dict[int, list[int]]
    """Manifest indices of the clips that this rank saw, by step."""


class Readout:
    """Copies a line's numbers from the device without making the loop wait; they are ready some steps later."""

    def __init__(self, device: torch.device) -> None:
        self._stream = own_stream(self, device) if device.type == "cuda" else None
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
        """Starts the copy of a line's numbers.

        values: 0-d tensors of step `step`, of which the ranks' mean is logged. bad: a flag per step since the last
        line. numbers: values on the host. videos: int64 manifest indices for each of those steps.
        """
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
        """Returns the lines that have arrived, or with `wait` all of them."""
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
