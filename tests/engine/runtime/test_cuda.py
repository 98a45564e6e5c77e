"""Capturing CUDA graphs beside other threads, with stand-ins for a GPU."""

import contextlib
import itertools
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


class SimpleStream:
    """Equal to other streams of its number."""

    def __init__(self, number):
        self.number = number

    def __eq__(self, other):
        return self.number == other.number

    def __hash__(self):
        return self.number


class Owner:
    pass


def test_streams_in_use_are_not_given_out_again(monkeypatch):
    """torch.cuda.Stream returns 32 streams in turn: the 33rd is the first one."""
    turns = itertools.count()
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: SimpleStream(next(turns) % cuda.POOL))
    owners = [Owner() for _ in range(3)]
    kept = [cuda.own_stream(owner) for owner in owners]
    for _ in range(100):
        assert cuda.own_stream(Owner()) not in kept
    del owners[1]
    assert 1 in {cuda.own_stream(Owner()).number for _ in range(cuda.POOL)}


class StandIn:
    """Does recorded work again by calling it, after which its results are changed by `wrong`."""

    def __init__(self, wrong=0):
        self.wrong, self.recorded, self.replayed, self.released = wrong, 0, 0, 0

    def warm_up(self, work):
        work()

    def record(self, work):
        self.recorded += 1
        values = {name: torch.full_like(value, -1) for name, value in work().items()}

        def replay():
            self.replayed += 1
            for name, value in work().items():
                values[name].copy_(value + self.wrong)

        return replay, values

    def release(self):
        self.released += 1


def test_a_captured_function_is_replayed_for_each_shape():
    recorder, lines, calls = StandIn(), [], []

    def double(values):
        calls.append(len(values))
        return 2 * values

    captured = cuda.Captured(double, recorder, lines.append, "codes   network")
    inputs = [torch.arange(4), torch.arange(4) + 9, torch.arange(2), torch.arange(4) + 5]
    found = [captured(given) for given in inputs]
    assert [result.tolist() for result in found] == [(2 * given).tolist() for given in inputs]
    assert (recorder.recorded, recorder.replayed, recorder.released) == (2, 2 + 4, 2)
    assert lines == ["codes   network, [4]: one CUDA graph", "codes   network, [2]: one CUDA graph"]


def test_what_is_wrong_as_a_graph_or_cannot_be_one_is_launched():
    class Refuses(StandIn):
        def record(self, work):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    reasons = {
        StandIn(wrong=1): "a CUDA graph gives another result",
        Refuses(): "it cannot be captured as a CUDA graph (operation not permitted when stream is capturing)",
    }
    for recorder, reason in reasons.items():
        lines = []
        captured = cuda.Captured(lambda values: 2 * values, recorder, lines.append, "codes   network")
        assert [captured(torch.tensor([number])).item() for number in range(3)] == [0, 2, 4]
        assert lines == [f"codes   network, [1]: launched kernel by kernel: {reason}"]
        assert recorder.released == 1


def stand_in_for_graphs(monkeypatch, graph):
    """Replaces torch.cuda.graph on a machine without a GPU; gives the streams that are made the current one."""
    current = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: SimpleStream(7))
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
    assert options == [{"pool": "pool", "stream": SimpleStream(7), "capture_error_mode": "thread_local"}]


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
