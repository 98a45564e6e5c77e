"""Capturing CUDA graphs beside other threads, with stand-ins for a GPU."""

import contextlib
import threading
import warnings

import pytest
import torch

from mam2.engine.runtime import cuda


def test_another_thread_may_wait_for_the_device_meanwhile(monkeypatch):
    """As the loader's does for its copies: the debug mode is one for all threads."""
    modes = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    notice = "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"

    def set_mode(mode):
        modes.append(mode)
        warnings.warn(notice, stacklevel=1)  # as PyTorch does at the first call

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)

    def wait():
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    def elsewhere():
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join()

    assert cuda.waits_for_device(elsewhere) == ""
    assert cuda.waits_for_device(wait) == "called a synchronizing CUDA operation"
    assert modes == ["warn", 0] * 2


def stand_in_for_graphs(monkeypatch, graph):
    """Replaces torch.cuda.graph on a machine without a GPU; gives the streams that are made the current one."""
    current = []
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", torch.nn.Identity)
    monkeypatch.setattr(torch.nn.Identity, "replay", None, raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: "the step's stream")
    monkeypatch.setattr(torch.cuda, "set_stream", current.append)
    return current


def test_a_capture_that_cannot_be_ended_leaves_the_stream_as_it_was(monkeypatch):
    """torch.cuda.graph then leaves its own stream behind, on which the run would go on."""

    @contextlib.contextmanager
    def graph(*_, **__):
        yield
        raise RuntimeError("operation failed due to a previous error during capture")

    current = stand_in_for_graphs(monkeypatch, graph)
    with pytest.raises(RuntimeError, match="during capture"):
        cuda.CudaRecorder().record(dict)
    assert current == ["the step's stream"]


def test_a_capture_minds_its_own_thread_only(monkeypatch):
    options = []

    @contextlib.contextmanager
    def graph(recorded, **given):
        options.append(given)
        yield

    stand_in_for_graphs(monkeypatch, graph)
    assert cuda.CudaRecorder().record(dict)[1] == {}
    assert options == [{"pool": "pool", "capture_error_mode": "thread_local"}]


def test_a_timer_sums_the_work_that_is_done_and_never_waits():
    now, events = [0.0], []

    class Event:
        """Has passed at once, or when its time comes."""

        def record(self):
            self.at, self.passed = now[0], False
            events.append(self)

        def query(self):
            return self.passed

        def elapsed_time(self, end):
            assert end.passed
            return end.at - self.at

    timer, found = cuda.DeviceTimer(Event), []
    for milliseconds in (3.0, 5.0, 7.0):
        with timer:
            now[0] += milliseconds
        now[0] += 100  # between the bodies
        found.append((timer.done, timer.device_ms))
        for event in events[:4]:
            event.passed = True
    assert found == [(0, 0), (1, 3), (2, 8)]
