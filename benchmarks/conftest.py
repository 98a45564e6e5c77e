"""Prints the table and draws the plots of `make bench`, from pytest-benchmark's times."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.clips import SHAPES
from benchmarks.operators import OPERATORS, figures
from benchmarks.report import draw, table
from benchmarks.timing import ceilings

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS = pytest.StashKey[list[dict[str, Any]]]()
COLUMNS = (
    *("operator", "provider", "ratio_to_eager", "error", "median_ms", "p20_ms", "p80_ms", "replayed", "gb_per_s"),
    *("percent_of_copy", "peak_mib", "verdict", "reason"),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    default = Path(__file__).resolve().parents[1] / "runs" / "bench"
    parser.addoption("--plots", type=Path, default=default, help="folder of the plots; default: runs/bench")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


@pytest.fixture(scope="session")
def rows(pytestconfig: pytest.Config) -> list[dict[str, Any]]:
    return pytestconfig.stash[ROWS]


@pytest.fixture(scope="session")
def peaks(rows: list[dict[str, Any]]) -> dict[str, float]:
    rows.append({"operator": "ceilings", **ceilings(DEVICE)})
    return rows[-1]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    interpret(rows)
    shape = SHAPES[DEVICE.type][0]
    lines = [f"Forward and backward at {shape}:", table([row for row in rows if row.get("shape") == shape], COLUMNS)]
    if DEVICE.type == "cuda":
        machine, note = torch.cuda.get_device_name(), ""
    else:
        machine, note = "CPU", "small shapes on a shared machine: only ratios are meaningful"
    lines.append(draw(rows, config.getoption("plots"), machine=machine, note=note))
    terminalreporter.write_line("\n".join(["", *lines, *([f"A {machine}, {note}."] if note else [])]))


def interpret(rows: list[dict[str, Any]]) -> None:
    """Replaces the times by the figures derived from them; on a CPU only by ratios to `eager`."""
    operators = {operator.name: operator for operator in OPERATORS}
    peaks = next((row for row in rows if row["operator"] == "ceilings"), None)
    eager = {
        (row["operator"], row["batch"]): row["timing"].median_ms
        for row in rows
        if row.get("provider") == "eager" and "timing" in row
    }
    largest = max((batch for _, batch in eager), default=0)
    for row in rows:
        if timing := row.pop("timing", None):
            row |= figures(operators[row["operator"]], row["shape"], timing, DEVICE, peaks)
            if base := eager.get((row["operator"], row["batch"])):
                row["ratio_to_eager"] = base / timing.median_ms
            if DEVICE.type != "cuda" and (base := eager.get((row["operator"], largest))):
                row["relative_time"] = timing.median_ms / base
