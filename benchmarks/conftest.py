"""Says below the table of `make bench` what its numbers are worth."""

from typing import Any

import torch


def pytest_terminal_summary(terminalreporter: Any) -> None:
    where = "One GPU, with launches: `make gpu` measures without them" if torch.cuda.is_available() else "A CPU"
    note = "" if torch.cuda.is_available() else ": only the ratios, in brackets, mean something"
    terminalreporter.write_line(f"{where}{note}.")
