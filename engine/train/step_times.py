"""Where the time of the steps since the last log line went: rates, and milliseconds per step of each phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from mam2.engine.data.loader import ClipLoader
from mam2.engine.runtime.cuda import DeviceTimer, Lead

Phase = Literal["batch", "step"]


class StepTimes:
    """Times of a log line. `step_ms` is the whole step; the phases below take a part of it, on the loop's thread.

    - `host/wait_ms`: waiting for a batch of the loader;
    - `host/prepare_ms`: the rest of getting a batch, for example queuing the tokenizer or the augmentation;
    - `host/step_ms`: drawing masks and queuing the step; on a CPU, which queues nothing, computing it;
    - `host/device_wait_ms`: only on a GPU, waiting because the host is `cuda.AHEAD` steps ahead;
    - `device/step_ms`: only on a GPU, from the step's first kernel to its last, by events. If it
      is close to `step_ms`, the GPU limits the run, else the host or the data.
    - `device/prepare_ms`: the same of the tokenizer or the augmentation, which run during the step before.
    """

    def __init__(self, loader: ClipLoader, lead: Lead | None, extras_timer: DeviceTimer | None) -> None:
        self._loader, self._lead = loader, lead
        self._devices = {"prepare": extras_timer, "step": lead}
        self._phases: dict[Phase, float] = {}
        self._restart(None)

    def _restart(self, step: int | None) -> None:
        self._start, self._step = time.perf_counter(), step
        self._waited, self._decoded = self._loader.wait_s, self._loader.decoded_frames
        self._phases = {"batch": 0.0, "step": 0.0}
        self._ahead = self._lead.waited_s if self._lead else 0.0
        self._before = {name: (timer.device_ms, timer.done) for name, timer in self._devices.items() if timer}

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Counts the body's time as getting a batch or as taking the step."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._phases[name] += time.perf_counter() - start

    def leave_out(self, seconds: float) -> None:
        """Excludes seconds that have just passed from all rates."""
        self._start += seconds

    def close(self, step: int, batch: int) -> dict[str, float]:
        """Returns the numbers of the steps up to `step` and starts the next line's.

        batch: clips per step. The first line of a run has shares and decoding only, as it includes the compilation.
        """
        seconds = time.perf_counter() - self._start
        waited = self._loader.wait_s - self._waited
        numbers = {
            "data_wait": waited / seconds,
            "decoded_frames_per_s": (self._loader.decoded_frames - self._decoded) / seconds,
        }
        if self._step is not None:
            steps = step - self._step
            numbers |= {"clips_per_s": steps * batch / seconds, "step_ms": 1000 * seconds / steps}
            numbers |= self._phases_per_step(steps, waited)
        self._restart(step)
        return numbers

    def _phases_per_step(self, steps: int, waited: float) -> dict[str, float]:
        ahead = self._lead.waited_s - self._ahead if self._lead else 0.0
        seconds = {"wait": waited, "prepare": self._phases["batch"] - waited, "step": self._phases["step"] - ahead}
        numbers = {f"host/{name}_ms": 1000 * value / steps for name, value in seconds.items()}
        if self._lead:
            numbers["host/device_wait_ms"] = 1000 * ahead / steps
        for name, (before_ms, before) in self._before.items():
            timer = self._devices[name]
            if timer and timer.done > before:
                numbers[f"device/{name}_ms"] = (timer.device_ms - before_ms) / (timer.done - before)
        return numbers


def describe_times(numbers: dict[str, float]) -> str:
    """Returns a line for the log about the numbers of `StepTimes.close`; "" if they have no phases."""
    if "host/step_ms" not in numbers:
        return ""
    phases = {
        "waiting for data": "host/wait_ms",
        "preparing the batch": "host/prepare_ms",
        "queuing the step" if "host/device_wait_ms" in numbers else "computing": "host/step_ms",
        "waiting for the GPU": "host/device_wait_ms",
    }
    named = ", ".join(f"{numbers[key]:.4g} {words}" for words, key in phases.items() if key in numbers)
    device = f"; the GPU takes {numbers['device/step_ms']:.4g} ms" if "device/step_ms" in numbers else ""
    if "device/prepare_ms" in numbers:
        device += f", and {numbers['device/prepare_ms']:.4g} ms for the next batch"
    return f"a step of {numbers['step_ms']:.4g} ms: {named}{device}"
