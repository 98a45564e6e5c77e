"""Signals that end a command or a run, and the exit status 128 + number that a shell expects. Imports no torch.

SIGINT is Ctrl-C; SIGTERM comes from `kill`, torchrun and schedulers; SIGHUP from a terminal that is closed; SIGUSR1
from Slurm before a time limit (`--signal=USR1@300`). All four mean the same: save what is new, then end.
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
"""A command that a signal ends is gone after so many seconds, whatever its threads still do."""
SAME_S = 2.0
"""Ctrl-C within so many seconds of the first is the same one: torchrun sends its workers what the terminal sent."""


class Stopped(KeyboardInterrupt):
    """A signal ended the program at a place where there is nothing to save."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = signal.Signals(number)


class Interrupted(Exception):
    """A signal asked for an end while the loop was waiting."""


class _Command:
    """What the process of a command line knows about its end."""

    guarded = False
    """Whether this process is a `mam2` command, which may end itself."""
    received: signal.Signals | None = None
    told = False
    """Whether the line that names the signal is written."""
    abandoned = False
    """Whether the process ends without waiting for its threads."""


last_acts: list[Callable[[], None]] = []
"""Called before a process ends itself without unwinding: what else would leave a trace on the disk."""


@contextmanager
def command_signals() -> Iterator[None]:
    """While it lasts, this process is a command: the first signal raises Stopped in the main thread, a second one ends
    the process at once. Libraries may swallow an exception and wait for threads: the process is gone GRACE_S later.
    """
    with _handlers(_first_signal):
        _Command.guarded, _Command.received, _Command.told, _Command.abandoned = True, None, False, False
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
    """Ends the process GRACE_S from now with the status of a signal, if it is a command; else does nothing."""
    if not _Command.guarded:
        return
    _Command.received, _Command.abandoned = signal.Signals(number), True
    timer = threading.Timer(GRACE_S, _leave_stopped, [number])
    timer.daemon = True
    timer.start()


def tell_stopped(number: int) -> None:
    """Says once which signal ended the command."""
    if not _Command.told:
        _Command.told = True
        tell(
            f"stopped by {signal.Signals(number).name}; what was saved is whole. The same command goes on, with "
            "--resume if it saved a checkpoint"
        )


def _leave_stopped(number: int) -> NoReturn:
    tell_stopped(number)
    leave(128 + number)


def abandon() -> None:
    """The command is to end without waiting for its threads: one of them hangs."""
    _Command.abandoned = _Command.guarded


def end(status: int) -> NoReturn:
    """Ends a command: by SystemExit, or at once where a thread may hang."""
    if _Command.abandoned:
        leave(status)
    sys.exit(status)


def leave(status: int) -> NoReturn:
    """Ends the process at once: no thread is waited for."""
    for act in last_acts:
        with contextlib.suppress(Exception):
            act()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)


def tell(message: str) -> None:
    """A line on stderr, also from within a signal handler, where `print` may be forbidden."""
    if os.environ.get("RANK", "0") == "0":
        start = "\n" if os.isatty(2) else ""  # a progress bar may be drawn there
        with contextlib.suppress(OSError):
            os.write(2, f"{start}mam2: {message}\n".encode())


class StopSignal:
    """Turns signals into a request that the loop meets after its step.

    Outside the loop, and while `nothing_to_save` lasts, the first one ends the program. In the loop a second Ctrl-C
    does; launchers and schedulers send other signals again, and have SIGKILL for those who do not listen.
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
        """While it lasts, the loop looks at `received` after each step."""
        self._looping = True
        try:
            yield
        finally:
            self._looping = False

    @contextmanager
    def nothing_to_save(self, true: bool = True) -> Iterator[None]:
        """While it lasts, what the loop has is on the disk already: a signal ends the program at once."""
        self._nothing_to_save = true
        try:
            yield
        finally:
            self._nothing_to_save = False

    @contextmanager
    def interruptible(self, allowed: bool = True) -> Iterator[None]:
        """While it lasts, a signal raises Interrupted; so does one that came since the loop last looked."""
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
            before(number, frame)  # the command's, which also bounds the time that the end may take
        raise Stopped(number)


@contextmanager
def _handlers(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handles the signals that end; none in a thread, where Python forbids it, nor SIGHUP where nohup ignores it."""
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
