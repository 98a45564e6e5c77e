"""Watches the motion loss of every step for a jump far above its usual value.

The loss of a log line is that of one step; a clip that ruins another step of the window would not be seen in it.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor

LOSS, PEAK = "loss/motion", "loss/motion_peak"
FACTOR = 100
"""A loss so many times the median is a jump."""
REMEMBERED = 101
"""Log lines of which the median is taken."""


class Spikes:
    """The largest motion loss since the last log line, on the device, and the warning where it is a jump."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._usual: deque[float] = deque(maxlen=REMEMBERED)
        self._warned = False

    def see(self, values: Mapping[str, Tensor]) -> None:
        """Takes note of the numbers of a step, 0-d tensors."""
        if LOSS in values:
            self._losses.append(values[LOSS])

    def peak(self) -> dict[str, Tensor]:
        """The largest loss since the last call as a number of the log; nothing where there is no motion loss."""
        if not self._losses:
            return {}
        peak = torch.stack(self._losses).amax()
        self._losses = []
        return {PEAK: peak}

    def warning(self, steps: range, numbers: Mapping[str, float]) -> str | None:
        """What to log of a line with these numbers; the first jump of a run is told, later ones are in `PEAK`."""
        if PEAK not in numbers:
            return None
        self._usual.append(numbers[LOSS])
        median = statistics.median(self._usual)
        if self._warned or not numbers[PEAK] > FACTOR * median:
            return None
        self._warned = True
        return (
            f"steps {steps[0]} to {steps[-1]}: the motion loss rose to {numbers[PEAK]:.3g}, more than {FACTOR} times its "
            f"median {median:.3g}. Patches of almost one color that change do that where loss.motion_eps is small (its "
            f"default is 0.05). This is told once; log.jsonl holds the peak of every line as {PEAK}"
        )
