"""The kernels' tests against deliberate mistakes: every mutant of mutants.py must make some test fail."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.helpers.interpreter import require_interpreter
from tests.helpers.paths import ROOT
from tests.kernels.mutants import MUTANTS

PASSED, FAILED = int(pytest.ExitCode.OK), int(pytest.ExitCode.TESTS_FAILED)
PROCESSES = 2


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    """Results of the tests for each mutant, and of each file's selected tests without a mistake."""
    require_interpreter()

    def run(part: int) -> list[dict[str, Any]]:
        command = [sys.executable, "-m", "tests.kernels.run_mutants", str(part), str(PROCESSES)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    with ThreadPoolExecutor(PROCESSES) as pool:
        return {result["name"]: result for part in pool.map(run, range(PROCESSES)) for result in part}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("mistake", [mutant.mistake for mutant in MUTANTS])
def test_a_mistake_makes_a_test_fail(mistake: str, results: dict[str, dict[str, Any]]) -> None:
    result = results[mistake]
    assert result["status"] != PASSED, f"survived: {mistake}"
    assert result["status"] == FAILED, result["output"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("file", sorted({mutant.tests for mutant in MUTANTS}))
def test_without_a_mistake_the_same_tests_pass(file: str, results: dict[str, dict[str, Any]]) -> None:
    assert results[file]["status"] == PASSED, results[file]["output"]
