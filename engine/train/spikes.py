"""Detects jumps of the motion loss in every step.

A log line contains the loss of only one step; a jump in another step would not be visible there.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor

LOSS, PEAK = "loss/motion", "loss/motion_peak"
FACTOR = 100
"""A loss of this many times the median is a jump."""
REMEMBERED = 101
"""Number of log lines for the median."""


class Spikes:
    """Tracks the largest motion loss since the last log line, on the device, and warns of a jump."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._usual: deque[float] = deque(maxlen=REMEMBERED)
        self._warned = False

    def see(self, values: Mapping[str, Tensor]) -> None:
        """Records the numbers of a step, 0-d tensors."""
        if LOSS in values:
            self._losses.append(values[LOSS])

    def peak(self) -> dict[str, Tensor]:
        """Returns the largest loss since the last call as a number for the log; empty without a motion loss."""
        if not self._losses:
            return {}
        peak = torch.stack(self._losses).amax()
        self._losses = []
        return {PEAK: peak}

    def warning(self, steps: range, numbers: Mapping[str, float]) -> str | None:
        """Returns a warning for the first jump of a run, else None; later jumps are only visible in `PEAK`."""
        if PEAK not in numbers:
            return None
        self._usual.append(numbers[LOSS])
        median = statistics.median(self._usual)
        if self._warned or not numbers[PEAK] > FACTOR * median:
            return None
        self._warned = True
        return (
            f"steps {steps[0]} to {steps[-1]}: the motion loss rose to {numbers[PEAK]:.3g}, more than {FACTOR} times "
            f"its median {median:.3g}. Changing patches of almost one color can cause this if loss.motion_eps is "
            f"small (default: 0.05). This warning appears once; log.jsonl contains the peak of every line as {PEAK}"
        )
