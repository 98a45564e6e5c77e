"""Iterates a generator in a background thread, a few items ahead of its consumer."""

from __future__ import annotations

import atexit
import queue
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")

_POLL_S = 0.1
_JOIN_S = 10.0


class Prefetcher(Generic[Item]):
    """Runs a generator in a daemon thread; its exception is raised in the consumer, in place of the missing item.

    The thread ends with `close()`, when the object is no longer referenced, and at the interpreter's exit: a thread
    that stays in native code would crash the exit.
    """

    def __init__(self, items: Generator[Item, None, None], depth: int, on_take: Callable[[Item, float], None]):
        """depth: items kept ready. on_take is called in the consumer's thread with each item and the seconds waited."""
        self._ready: queue.Queue[tuple[str, object]] = queue.Queue(depth)
        self._stop = threading.Event()
        self._on_take = on_take
        self._end: BaseException | None = None
        arguments = items, self._ready, self._stop
        self._thread = threading.Thread(target=_work, args=arguments, name="prefetch", daemon=True)
        self._thread.start()
        self._finalizer = weakref.finalize(self, _finish, self._stop, self._ready, self._thread)
        # weakref's exit hook may run after DALI's, which does not end while a thread builds a pipeline.
        atexit.register(self._finalizer)

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        if self._end is not None:
            raise self._end
        began = time.perf_counter()
        kind, value = self._take()
        if kind == "item":
            self._on_take(value, time.perf_counter() - began)  # type: ignore[arg-type]
            return value  # type: ignore[return-value]
        self._end = value if isinstance(value, BaseException) else StopIteration()
        raise self._end

    def close(self) -> None:
        """Stops the thread and drops the prepared items."""
        self._end = self._end or StopIteration()
        self._finalizer()
        atexit.unregister(self._finalizer)

    def _take(self) -> tuple[str, object]:
        while True:
            try:
                return self._ready.get(timeout=_POLL_S)
            except queue.Empty:
                if self._stop.is_set():
                    return "end", None


def _work(items: Generator[Item, None, None], ready: queue.Queue[tuple[str, object]], stop: threading.Event) -> None:
    try:
        for item in items:
            if not _put(("item", item), ready, stop):
                break
        else:
            _put(("end", None), ready, stop)
    except BaseException as error:  # without any of these, the consumer would wait forever
        _put(("error", error), ready, stop)
    finally:
        items.close()


def _put(entry: tuple[str, object], ready: queue.Queue[tuple[str, object]], stop: threading.Event) -> bool:
    while not stop.is_set():
        try:
            ready.put(entry, timeout=_POLL_S)
            return True
        except queue.Full:
            continue
    return False


def _finish(stop: threading.Event, ready: queue.Queue[tuple[str, object]], thread: threading.Thread) -> None:
    stop.set()
    while not ready.empty():
        try:
            ready.get_nowait()
        except queue.Empty:
            break
    if thread is not threading.current_thread():
        thread.join(_JOIN_S)
