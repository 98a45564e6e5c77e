"""The phases of a step's time, with a clock that the test sets."""

from types import SimpleNamespace

import pytest

from mam2.engine.train import step_times
from mam2.engine.train.step_times import StepTimes, describe_times


class Clock:
    now = 100.0

    def perf_counter(self):
        return self.now


def step(clock, times, *, wait, prepare, queue, other, lead=None, ahead=0.0, device_ms=0.0):
    with times.phase("batch"):
        clock.now += wait + prepare
        times._loader.wait_s += wait
    with times.phase("step"):
        clock.now += queue + ahead
        if lead:
            lead.waited_s += ahead
            lead.device_ms += device_ms
            lead.done += bool(device_ms)
    clock.now += other


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(step_times, "time", clock)
    return clock


def test_phases_of_a_run_on_a_gpu(clock):
    loader = SimpleNamespace(wait_s=3.0, decoded_frames=0)
    lead = SimpleNamespace(waited_s=1.0, device_ms=5.0, done=1)
    codes = SimpleNamespace(device_ms=1.0, done=1)
    times = StepTimes(loader, lead, codes)
    step(clock, times, wait=9.0, prepare=9.0, queue=9.0, other=9.0, lead=lead)
    assert times.close(1, 32) == {"data_wait": pytest.approx(9 / 36), "decoded_frames_per_s": 0}
    for device_ms in (80.0, 0.0):  # the second step is not known to be done
        step(clock, times, wait=0.01, prepare=0.02, queue=0.03, other=0.04, lead=lead, ahead=0.1, device_ms=device_ms)
    codes.device_ms, codes.done = 25.0, 3
    clock.now += 5
    times.leave_out(5)
    loader.decoded_frames += 64
    found = times.close(3, 32)
    assert found == pytest.approx(
        {
            "data_wait": 0.05,
            "decoded_frames_per_s": 160,
            "clips_per_s": 160,
            "step_ms": 200,
            "host/wait_ms": 10,
            "host/prepare_ms": 20,
            "host/step_ms": 30,
            "host/device_wait_ms": 100,
            "device/step_ms": 80,
            "device/prepare_ms": 12,
        }
    )
    assert describe_times(found) == (
        "a step of 200 ms: 10 waiting for data, 20 preparing the batch, 30 queuing the step, 100 waiting for the GPU; "
        "the GPU takes 80 ms, and 12 ms for the next batch"
    )


def test_phases_of_a_run_on_a_cpu(clock):
    times = StepTimes(SimpleNamespace(wait_s=0.0, decoded_frames=0), None, None)
    step(clock, times, wait=0.01, prepare=0.02, queue=0.06, other=0.01)
    assert describe_times(times.close(1, 8)) == ""
    step(clock, times, wait=0.01, prepare=0.02, queue=0.06, other=0.01)
    found = times.close(2, 8)
    assert not {"host/device_wait_ms", "device/step_ms"} & found.keys()
    assert describe_times(found) == "a step of 100 ms: 10 waiting for data, 20 preparing the batch, 60 computing"
