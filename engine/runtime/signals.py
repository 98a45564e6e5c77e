"""Handles signals that end a command or a run, with the usual exit status 128 + number. Does not import torch.

SIGINT is Ctrl-C; SIGTERM comes from `kill`, torchrun and schedulers; SIGHUP from a closed terminal; SIGUSR1 from Slurm
before a time limit (`--signal=USR1@300`). All four have the same effect: save unsaved work, then end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
GRACE_S = 5.0
"""Seconds after which a command ended by a signal exits, whatever its threads still do."""
SAME_S = 2.0
"""Ctrl-C within this many seconds of the first counts as the same one: torchrun forwards the terminal's signal."""


class Stopped(KeyboardInterrupt):
    """Raised if a signal ends the program where nothing needs saving."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = signal.Signals(number)


class Interrupted(Exception):
    """Raised if a signal requests the end while the loop waits."""


class _Command:
    """State of a command's process that concerns its end."""

    guarded = False
    """Whether this process is a `mam2` command, which may end itself."""
    received: signal.Signals | None = None
    announced = False
    """Whether the line that names the signal has been written."""
    abandoned = False
    """Whether the process ends without waiting for its threads."""


last_acts: list[Callable[[], None]] = []
"""Called before a process ends itself without unwinding, to remove files that would remain on disk."""


@contextmanager
def command_signals() -> Iterator[None]:
    """Makes this process a command.

    The first signal raises Stopped in the main thread, a second ends the process at once. Libraries may catch the
    exception and wait for threads; the process therefore ends after GRACE_S in any case.
    """
    with _handlers(_first_signal):
        _Command.guarded, _Command.received, _Command.announced, _Command.abandoned = True, None, False, False
        try:
            yield
        finally:
            _Command.guarded = False


def _first_signal(number: int, _: FrameType | None) -> None:
    if _Command.received is not None:
        _leave_stopped(number)
    end_soon(number)
    raise Stopped(number)


def end_soon(number: int) -> None:
    """Ends the process after GRACE_S with the status of a signal if it is a command; else does nothing."""
    if not _Command.guarded:
        return
    _Command.received, _Command.abandoned = signal.Signals(number), True
    timer = threading.Timer(GRACE_S, _leave_stopped, [number])
    timer.daemon = True
    timer.start()


def tell_stopped(number: int) -> None:
    """Reports once which signal ended the command."""
    if not _Command.announced:
        _Command.announced = True
        tell(
            f"stopped by {signal.Signals(number).name}; saved files are complete. Run the same command to continue, "
            "with --resume if it wrote a checkpoint"
        )


def _leave_stopped(number: int) -> NoReturn:
    tell_stopped(number)
    leave(128 + number)


def abandon() -> None:
    """Makes the command end without waiting for its threads, because one of them hangs."""
    _Command.abandoned = _Command.guarded


def end(status: int) -> NoReturn:
    """Ends a command: by SystemExit, or immediately if a thread may hang."""
    if _Command.abandoned:
        leave(status)
    sys.exit(status)


def leave(status: int) -> NoReturn:
    """Ends the process immediately, without waiting for threads."""
    for act in last_acts:
        with contextlib.suppress(Exception):
            act()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)


def tell(message: str) -> None:
    """Writes a line to stderr; also works in a signal handler, where `print` may be forbidden."""
    if os.environ.get("RANK", "0") == "0":
        start = "\n" if os.isatty(2) else ""  # a progress bar may be drawn there
        with contextlib.suppress(OSError):
            os.write(2, f"{start}mam2: {message}\n".encode())


class StopSignal:
    """Converts signals to a stop request that the loop handles after its current step.

    Outside the loop, and inside `nothing_to_save`, the first signal ends the program. In the loop only a second Ctrl-C
    does: launchers and schedulers repeat other signals, and use SIGKILL if the process does not end.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._at = 0.0
        self._looping = False
        self._interruptible = False
        self._nothing_to_save = False
        self._installed: Any = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.getsignal(number) for number in ENDING}
        self._installed = _handlers(self._handle)
        self._installed.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._installed.__exit__(None, None, None)

    @contextmanager
    def looping(self) -> Iterator[None]:
        """Context of the loop, which checks `received` after each step."""
        self._looping = True
        try:
            yield
        finally:
            self._looping = False

    @contextmanager
    def nothing_to_save(self, true: bool = True) -> Iterator[None]:
        """Context in which everything is saved already: a signal ends the program at once."""
        self._nothing_to_save = true
        try:
            yield
        finally:
            self._nothing_to_save = False

    @contextmanager
    def interruptible(self, allowed: bool = True) -> Iterator[None]:
        """Context in which a signal raises Interrupted; so does a signal received since the loop's last check."""
        if allowed and self.received:
            raise Interrupted
        self._interruptible = allowed
        try:
            yield
        finally:
            self._interruptible = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._looping or self._nothing_to_save:
            self._end(number, frame)
        elif self.received is None:
            self.received, self._at = signal.Signals(number), now
            if self._interruptible:
                raise Interrupted
            again = "; another Ctrl-C ends it at once" if number == signal.SIGINT else ""
            tell(f"{self.received.name}: the run ends after this step, with a checkpoint{again}")
        elif number == signal.SIGINT and now - self._at > SAME_S:
            self._end(number, frame)

    def _end(self, number: int, frame: FrameType | None) -> None:
        before = self._before[signal.Signals(number)]
        if callable(before) and before is not signal.default_int_handler:
            before(number, frame)  # the command's handler, which also limits the time until the end
        raise Stopped(number)


@contextmanager
def _handlers(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Installs `handler` for the ending signals; not in a thread, where Python forbids it; not SIGHUP under nohup."""
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in ENDING:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
