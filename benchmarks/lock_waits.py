"""Prints how much longer the launches of a step take while other threads hold Python's lock, as decoding threads do.

    python -m benchmarks.lock_waits [--share 0.06] [--burst-ms 0.05] [--threads 0 2 4 8 16]

A step is 200 small operators of PyTorch on the CPU, each of which releases the lock and takes it again. Each of N other
threads holds the lock for `share` of its time, in bursts, and sleeps otherwise: it needs no core while it sleeps, so
that a machine with few cores can show what 16 threads do. `python -m benchmarks.decoding_gil` measures the share that
decoding has. With `data.workers processes` no thread of the training holds it, which is N = 0.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from benchmarks.report import table

OPERATORS = 200
SECONDS = 2.0
INTERVALS_MS = (5.0, 0.5)
"""Python's default time after which a waiting thread asks for the lock, and a tenth of it."""


@contextmanager
def holders(count: int, share: float, burst_s: float) -> Iterator[None]:
    """Runs `count` threads that hold the lock for `share` of their time, `burst_s` seconds at a time."""
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            end = time.thread_time() + burst_s
            while time.thread_time() < end:
                pass
            time.sleep(burst_s * (1 - share) / share)

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def step_ms(seconds: float = SECONDS) -> list[float]:
    """Returns the milliseconds of steps of OPERATORS operators, taken for some seconds."""
    values, found = torch.zeros(64), []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(OPERATORS):
            values.add_(1)
        found.append(1000 * (time.perf_counter() - start))
    return found


def measure(
    threads: Sequence[int], share: float, burst_s: float, seconds: float = SECONDS
) -> Iterator[dict[str, object]]:
    """Yields a row per number of threads and switch interval."""
    before = sys.getswitchinterval()
    step_ms(seconds / 10)
    try:
        for interval_ms in INTERVALS_MS:
            sys.setswitchinterval(interval_ms / 1000)
            for count in threads:
                with holders(count, share, burst_s):
                    found = step_ms(seconds)
                yield {
                    "switch interval ms": interval_ms,
                    "threads": count,
                    "median ms": round(statistics.median(found), 2),
                    "mean ms": round(statistics.fmean(found), 2),
                }
    finally:
        sys.setswitchinterval(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--share", type=float, default=0.06, help="share of its time for which a thread holds the lock")
    parser.add_argument(
        "--burst-ms", type=float, default=0.05, help="milliseconds for which it holds the lock at a time"
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[0, 2, 4, 8, 16], help="numbers of threads")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = list(measure(options.threads, options.share, options.burst_ms / 1000))
    print(table(rows, tuple(rows[0])))


if __name__ == "__main__":
    main()
