"""Detects that the teacher's features collapse: one vector for every token, or all on a line."""

from __future__ import annotations

from collections.abc import Mapping

RANK, DEVIATION = "teacher/rank", "teacher/deviation"
LOWEST_RANK = 1.5
"""Effective rank below which features have collapsed; those of a random encoder have 4 or more."""
LOWEST_DEVIATION = 0.1
"""Mean standard deviation below which features have collapsed; it cannot exceed 1, and random encoders have 0.5."""


class Collapse:
    """Warns of a collapse in the numbers of the log, once per run."""

    def __init__(self) -> None:
        self._warned = False

    def warning(self, steps: range, numbers: Mapping[str, float]) -> str | None:
        """Returns a warning for the first log line of a run with collapsed features, else None."""
        if self._warned or RANK not in numbers:
            return None
        if numbers[RANK] >= LOWEST_RANK and numbers[DEVIATION] >= LOWEST_DEVIATION:
            return None
        self._warned = True
        return (
            f"steps {steps[0]} to {steps[-1]}: the teacher's features collapse: effective rank {numbers[RANK]:.3g} "
            f"(limit {LOWEST_RANK:g}), standard deviation {numbers[DEVIATION]:.3g} (limit {LOWEST_DEVIATION:g}). There "
            "is little left to predict. Remedies: loss.teacher_momentum closer to 1, a lower optim.base_lr, or also a "
            f"motion target. This warning appears once; log.jsonl contains {RANK} and {DEVIATION}"
        )
