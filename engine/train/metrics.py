"""The log of a run: JSON lines, TensorBoard, and plain lines on the terminal."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm


class RunLog:
    """Writes `RUN/log.jsonl` (one object a line), `RUN/tensorboard/` and, for `say`, the terminal and `RUN/log.txt`."""

    def __init__(self, run: Path) -> None:
        # Imported here: TensorBoard costs a second that `mam2 --help` should not pay.
        from torch.utils.tensorboard import SummaryWriter

        self._lines = (run / "log.jsonl").open("a", encoding="utf-8", buffering=1)
        self._text = (run / "log.txt").open("a", encoding="utf-8", buffering=1)
        self._board = SummaryWriter(str(run / "tensorboard"))

    def say(self, message: str) -> None:
        """One plain line, above a progress bar where one is drawn."""
        tqdm.write(message)
        self._text.write(message + "\n")

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Numbers of a step."""
        self._lines.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._lines.close()
        self._text.close()
        self._board.close()


def read_log(run: Path) -> list[dict[str, Any]]:
    """The lines of `RUN/log.jsonl`. After a resume a step may have been logged twice: the later line counts."""
    by_step = {}
    for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # a killed run may have left half a line
            values = json.loads(line)
            by_step[values["step"]] = values
    return [by_step[step] for step in sorted(by_step)]
