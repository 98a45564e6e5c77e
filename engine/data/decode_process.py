"""Decodes videos in processes of their own, so that decoding never holds the Python lock of the training process.

A process decodes one clip at a time. It writes the frames into memory that it shares with its parent (a Linux memfd,
which no file system limits and which disappears with the processes), and the parent copies them to their place. It
ends when its parent closes its standard input or dies. It ignores signals: launchers send them to all processes of a
job, and the parent decides when decoding ends.
"""

from __future__ import annotations

import itertools
import mmap
import os
import pickle
import queue
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mam2.engine.data.decoding import FILE_ERRORS, DecodeError, Empty, decode_frames

SUPPORTED = hasattr(os, "memfd_create")
"""Whether the system has the shared memory that is used here: Linux."""
END_S = 5.0
"""Seconds after which a process that does not end by itself is killed."""
PRELUDE = """\
import signal, sys
for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
    signal.signal(getattr(signal, name), signal.SIG_IGN)
sys.path[:] = {path!r}
from mam2.engine.data.decode_process import serve
serve({memory})
"""
"""The program of a process; it ignores signals before its imports, which take a part of a second."""
READY = b"ready"
MOST_CRASHES = 2
"""Ends of a process at one clip, by a crash or an exit, after which the file is unusable."""
MOST_ENDS = 10
"""The same with those by SIGKILL, which the system (out of memory) or a person sends: they say nothing of the file."""


class CannotStart(Exception):
    """Raised if a process cannot be started; the message is a short reason."""


class _Ended(Exception):
    """Raised if a process has ended while it should have answered; the message says how it ended."""

    @property
    def killed(self) -> bool:
        return str(self) == signal.SIGKILL.name


class DecodingProcesses:
    """Up to `count` processes, each started when it is first needed. Threads share one object, and wait for a free
    process."""

    def __init__(self, count: int) -> None:
        self._all = [_Process() for _ in range(count)]
        self._free: queue.LifoQueue[_Process] = queue.LifoQueue()
        for process in self._all:
            self._free.put(process)

    def decode_frames(self, path: str, frames: Sequence[int], *, empty: Empty, **options: Any) -> NDArray[Any]:
        """Runs `decoding.decode_frames` in a process, with the same arguments, results and exceptions.

        A process that ends (killed, or crashed by a file) is replaced, and the clip is decoded again.

        Raises:
            DecodeError: also if MOST_CRASHES processes crash at the file, or MOST_ENDS end in any way.
            CannotStart: a process cannot be started.
        """
        crashes = 0
        with self._process() as process:
            for ends in range(1, MOST_ENDS + 1):
                try:
                    return process.decode(path, frames, empty, options)
                except _Ended as error:
                    crashes += not error.killed
                    if crashes == MOST_CRASHES or ends == MOST_ENDS:
                        raise DecodeError(f"decoding it ended {ends} processes ({error})") from None
        raise AssertionError("the last attempt returns or raises")

    @property
    def pids(self) -> list[int]:
        """Returns the numbers of the processes that run."""
        return [process.pid for process in self._all if process.pid]

    def close(self) -> None:
        """Ends the processes. No thread may be decoding."""
        for process in self._all:
            process.ask_to_end()
        for process in self._all:
            process.end()

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
        self._memory = -1
        self._view: mmap.mmap | None = None

    @property
    def pid(self) -> int:
        return self._child.pid if self._child else 0

    def decode(self, path: str, frames: Sequence[int], empty: Empty, options: dict[str, Any]) -> NDArray[Any]:
        child = self._child or self._start()
        try:
            pickle.dump((path, tuple(frames), options), _pipe(child.stdin))
            _pipe(child.stdin).flush()
            answer = pickle.load(_pipe(child.stdout))
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise _Ended(self.end() or str(error)) from error
        if isinstance(answer, list):
            raise _chained(answer)
        shape, dtype = answer
        found = empty(shape, dtype)
        np.copyto(found, np.ndarray(shape, dtype, self._shared(found.nbytes)))
        return found

    def _start(self) -> subprocess.Popen[bytes]:
        self._memory = _new_memory()
        try:
            child = subprocess.Popen(
                [sys.executable, "-c", PRELUDE.format(path=sys.path, memory=self._memory)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[self._memory],
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},  # NumPy's, which only copies
            )
        except OSError as error:
            os.close(self._memory)
            raise CannotStart(str(error)) from error
        self._child = child
        if _pipe(child.stdout).read(len(READY)) != READY:
            ended = _Ended(self.end())
            raise ended if ended.killed else CannotStart(str(ended))
        return child

    def _shared(self, size: int) -> mmap.mmap:
        """Returns the shared memory, of at least `size` bytes."""
        if self._view is None or len(self._view) < size:
            self._view = mmap.mmap(self._memory, os.fstat(self._memory).st_size)
        return self._view

    def ask_to_end(self) -> None:
        if self._child:
            with suppress(OSError):
                _pipe(self._child.stdin).close()

    def end(self) -> str:
        """Ends the process and releases its memory; returns how it ended."""
        child, self._child = self._child, None
        if child is None:
            return ""
        with suppress(OSError):
            _pipe(child.stdin).close()
        try:
            status = child.wait(END_S)
        except subprocess.TimeoutExpired:
            child.kill()
            status = child.wait()
        _pipe(child.stdout).close()
        os.close(self._memory)
        self._view = None
        return signal.Signals(-status).name if status < 0 else f"exit status {status}"


def serve(memory: int) -> None:
    """Decodes for the parent until standard input ends. memory: descriptor of the shared memory."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing else may write between the answers
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


def _new_memory() -> int:
    """Returns the descriptor of new shared memory of size 0."""
    try:
        return os.memfd_create("mam2-frames")
    except OSError as error:
        raise CannotStart(str(error)) from error


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
