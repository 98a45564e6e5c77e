"""Decodes videos in processes of their own, so that decoding never holds the Python lock of the training process.

A process decodes one clip at a time. It writes the frames into memory that it shares with its parent (a Linux memfd,
which no file system limits and which disappears with the processes), and the parent copies them to their place. It
answers through a pipe of its own, because what starts with the interpreter (sitecustomize, a wrapper) may print. It
ends when its parent closes its standard input or dies. It ignores signals: launchers send them to all processes of a
job, and the parent decides when decoding ends.
"""

from __future__ import annotations

import itertools
import mmap
import os
import pickle
import queue
import select
import signal
import subprocess
import sys
import time
import traceback
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import spawn
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mam2.engine.data.decoding import FILE_ERRORS, DecodeError, Empty, decode_frames

SUPPORTED = hasattr(os, "memfd_create")
"""Whether the system has the shared memory that is used here: Linux."""
END_S = 5.0
"""Seconds after which a process that does not end by itself is killed."""
START_S = 300.0
"""Seconds after which a process that has not started counts as one that cannot."""
RETRY_S = 60.0
"""Seconds without another try after a process could not be started: each try takes a core for a second."""
PRELUDE = """\
import signal, sys
for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
    signal.signal(getattr(signal, name), signal.SIG_IGN)
sys.path[:] = {path!r}
from mam2.engine.data.decode_process import serve
serve({memory}, {answers})
"""
"""The program of a process; it ignores signals before its imports, which take a part of a second."""
READY = b"ready"
MOST_CRASHES = 2
"""Ends of a process at one clip, by a crash or an exit, after which the file is unusable."""
MOST_ENDS = 10
"""The same with ends by other causes, such as SIGKILL, which the system (out of memory) or a person sends: they say
little about the file."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
"""Pauses in seconds after such an end; each is twice the one before. The ten take about 20 s."""
CRASHES = frozenset((signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP))
"""Signals that the code of a process causes."""


class CannotStart(Exception):
    """Raised if a process cannot be started; the message is a short reason."""


class _Ended(Exception):
    """Raised if a process has ended while it should have answered; the message says how it ended."""

    def __init__(self, status: int) -> None:
        """status: exit status, or minus the number of a signal."""
        super().__init__(signal.Signals(-status).name if status < 0 else f"exit status {status}")
        self.crashed = status >= 0 or -status in CRASHES
        """Whether the cause is in the process; else something outside has ended it."""


class DecodingProcesses:
    """Up to `count` processes, each started when it is first needed. Threads share one object, and wait for a free
    process."""

    def __init__(self, count: int) -> None:
        self._all = [_Process() for _ in range(count)]
        self._free: queue.LifoQueue[_Process] = queue.LifoQueue()
        for process in self._all:
            self._free.put(process)
        self._failed: tuple[float, str] | None = None
        """When a process could not be started, and why; None after a start."""
        self._finalizer = weakref.finalize(self, _end_all, self._all)  # else an object that nobody closes leaves them
        self._finalizer.atexit = False  # they end with this process

    def decode_frames(self, path: str, frames: Sequence[int], *, empty: Empty, **options: Any) -> NDArray[Any]:
        """Runs `decoding.decode_frames` in a process, with the same arguments, results and exceptions.

        A process that ends (killed, or crashed by a file) is replaced, and the clip is decoded again.

        Raises:
            DecodeError: also if MOST_CRASHES processes crash at the file, or MOST_ENDS end in any way.
            CannotStart: a process cannot be started, or could not in the last RETRY_S seconds.
        """
        crashes = 0
        with self._process() as process:
            for ends in range(1, MOST_ENDS + 1):
                self._start(process)
                try:
                    return process.decode(path, frames, empty, options)
                except _Ended as error:
                    crashes += error.crashed
                    if crashes == MOST_CRASHES or ends == MOST_ENDS:
                        raise DecodeError(f"decoding it ended {ends} processes ({error})") from None
                    if not error.crashed:
                        _pause(ends)
        raise AssertionError("the last attempt returns or raises")

    def _start(self, process: _Process) -> None:
        """Starts a process that does not run. A file is never blamed for the end of a process that starts."""
        if process.pid:
            return
        if self._failed and time.monotonic() - self._failed[0] < RETRY_S:
            raise CannotStart(self._failed[1])
        try:
            for ends in range(1, MOST_ENDS + 1):
                try:
                    process.start()
                    break
                except _Ended as error:
                    if error.crashed or ends == MOST_ENDS:
                        raise CannotStart(str(error)) from None
                    _pause(ends)
        except CannotStart as error:
            self._failed = time.monotonic(), str(error)
            raise
        self._failed = None

    @property
    def pids(self) -> list[int]:
        """Returns the numbers of the processes that run."""
        return [process.pid for process in self._all if process.pid]

    def close(self) -> None:
        """Ends the processes. No thread may be decoding."""
        self._finalizer()

    @contextmanager
    def _process(self) -> Iterator[_Process]:
        process = self._free.get()
        try:
            yield process
        finally:
            self._free.put(process)


class _Process:
    """The parent's side of one process."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._files: list[BinaryIO] = []
        """The shared memory, and the pipe of the answers."""
        self._view: mmap.mmap | None = None

    @property
    def pid(self) -> int:
        return self._child.pid if self._child else 0

    def decode(self, path: str, frames: Sequence[int], empty: Empty, options: dict[str, Any]) -> NDArray[Any]:
        """Decodes a clip in the running process. Raises _Ended, and what `decoding.decode_frames` raises."""
        child = self._child
        assert child is not None
        request = pickle.dumps((path, tuple(frames), options))
        try:
            _pipe(child.stdin).write(request)
            _pipe(child.stdin).flush()
            answer = pickle.load(self._files[1])
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise _Ended(self.end()) from error
        except BaseException:
            self.end()  # the answer may still come, and must not be taken for that to the next request
            raise
        if isinstance(answer, list):
            raise _chained(answer)
        shape, dtype = answer
        found = empty(shape, dtype)
        np.copyto(found, np.ndarray(shape, dtype, self._shared(found.nbytes)))
        return found

    def start(self) -> None:
        """Starts the process. Raises CannotStart; _Ended if it ends before it is ready."""
        program = os.fsdecode(spawn.get_executable() or "")  # a program with Python in it sets Python's path there
        if not program or getattr(sys, "frozen", False):
            raise CannotStart("Python is part of another program, whose multiprocessing.set_executable was not called")
        sending = -1
        try:
            memory = os.fdopen(os.memfd_create("mam2-frames"), "rb+", buffering=0)
            receiving, sending = os.pipe()
            self._files = [cast(BinaryIO, memory), os.fdopen(receiving, "rb")]
            path = [place for place in sys.path if isinstance(place, str)]
            self._child = subprocess.Popen(
                [program, "-c", PRELUDE.format(path=path, memory=memory.fileno(), answers=sending)],
                stdin=subprocess.PIPE,
                stdout=2,  # standard error, where it does no harm
                pass_fds=[memory.fileno(), sending],
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},  # NumPy's, which only copies
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise CannotStart(str(error)) from error
        finally:
            if sending >= 0:
                os.close(sending)
            if not self._child:
                self._release()
        poll = select.poll()
        poll.register(self._files[1], select.POLLIN)
        if not poll.poll(1000 * START_S):
            self._child.kill()
            self.end()
            raise CannotStart(f"it does not start within {START_S:g} s")
        if self._files[1].read(len(READY)) != READY:
            raise _Ended(self.end())

    def _shared(self, size: int) -> mmap.mmap:
        """Returns the shared memory, of at least `size` bytes."""
        if self._view is None or len(self._view) < size:
            memory = self._files[0].fileno()
            self._view = mmap.mmap(memory, os.fstat(memory).st_size)
        return self._view

    def ask_to_end(self) -> None:
        if self._child:
            with suppress(OSError):
                _pipe(self._child.stdin).close()

    def end(self) -> int:
        """Ends the process and releases its memory. Returns its exit status, or minus the number of a signal."""
        child, self._child = self._child, None
        if child is None:
            return 0
        with suppress(OSError):
            _pipe(child.stdin).close()
        try:
            status = child.wait(END_S)
        except subprocess.TimeoutExpired:
            child.kill()
            status = child.wait()
        self._release()
        return status

    def _release(self) -> None:
        for file in self._files:
            file.close()
        self._files, self._view = [], None


def serve(memory: int, answers_to: int) -> None:
    """Decodes for the parent until standard input ends. Descriptors: of the shared memory, of the pipe for answers."""
    requests, answers = sys.stdin.buffer, os.fdopen(answers_to, "wb")
    view: mmap.mmap | None = None

    def empty(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        nonlocal view
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if view is None or len(view) < size:
            os.ftruncate(memory, size)
            view = mmap.mmap(memory, size)
        return np.ndarray(shape, dtype, view)

    answers.write(READY)
    answers.flush()
    with suppress(EOFError, BrokenPipeError):
        while True:
            path, frames, options = pickle.load(requests)
            answer: Any
            try:
                clip = decode_frames(path, frames, empty=empty, **options)
                answer = clip.shape, clip.dtype.str
            except Exception as error:
                if not isinstance(error, (DecodeError, *FILE_ERRORS)):
                    traceback.print_exc()  # an error of the program: its place does not reach the parent
                answer = _causes(error)
            pickle.dump(answer, answers)
            answers.flush()


def _end_all(processes: list[_Process]) -> None:
    for process in processes:
        process.ask_to_end()
    for process in processes:
        process.end()


def _pause(ends: int) -> None:
    """Waits after the end number `ends` of a process that something outside has ended."""
    time.sleep(min(FIRST_PAUSE_S * 2 ** (ends - 1), LONGEST_PAUSE_S))


def _causes(error: BaseException) -> list[BaseException]:
    """Returns an exception and its causes, each as it can be pickled."""
    found: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None:
        try:
            pickle.loads(pickle.dumps(cause))
            found.append(cause)
        except Exception:
            found.append(RuntimeError(f"{type(cause).__name__}: {cause}"))
        cause = cause.__cause__
    return found


def _chained(errors: list[BaseException]) -> BaseException:
    """Undoes `_causes`."""
    for error, cause in itertools.pairwise(errors):
        error.__cause__ = cause
    return errors[0]


def _pipe(file: Any) -> BinaryIO:
    return cast(BinaryIO, file)
