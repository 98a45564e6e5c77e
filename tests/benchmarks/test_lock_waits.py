"""The threads that hold Python's lock run during a measurement and end with it; the switch interval is put back."""

import sys
import threading

from benchmarks import lock_waits


def test_rows_and_what_is_left(monkeypatch):
    before, running = sys.getswitchinterval(), []
    steps = lock_waits.step_ms

    def new_threads():
        return set(threading.enumerate()) - before_all

    def counted(seconds):
        running.append((len(new_threads()), sys.getswitchinterval()))
        return steps(seconds)

    before_all = set(threading.enumerate())  # some of them may end meanwhile
    monkeypatch.setattr(lock_waits, "step_ms", counted)
    rows = list(lock_waits.measure([0, 3], 0.06, 1e-4, seconds=0.02))
    assert [(row["switch interval ms"], row["threads"]) for row in rows] == [(5, 0), (5, 3), (0.5, 0), (0.5, 3)]
    assert all(row["mean ms"] > 0 for row in rows)
    assert running[1:] == [(0, 0.005), (3, 0.005), (0, 0.0005), (3, 0.0005)]
    assert (new_threads(), sys.getswitchinterval()) == (set(), before)
