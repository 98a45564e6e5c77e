"""Runs the tests of each mutant against a copy of the kernels that makes its mistake.

    python -m tests.kernels.run_mutants        # prints for every mutant whether a test failed; status 1: one did not
    python -m tests.kernels.run_mutants 0 2    # the first of two halves

Prints one JSON object a mutant, and one for each file whose selected tests ran without a mistake: `name`, `status`
(PASSED, FAILED or another) and `output`. Every run is a fork of this process, which has imported the libraries but not
the kernels: that takes longer than the tests.
"""

import itertools
import json
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}

import einops
import hypothesis.extra.numpy
import pytest
import torch._dynamo.testing
import triton.runtime.interpreter

from tests.helpers.paths import ROOT
from tests.kernels.mutants import MUTANTS, Mutant

LIBRARIES = einops, hypothesis, torch, triton
PASSED, FAILED, NO_TESTS = int(pytest.ExitCode.OK), int(pytest.ExitCode.TESTS_FAILED), 90


def jobs() -> list[tuple[str, Mutant | None, str, str]]:
    """(name, mutant, file of tests, selection): every mutant, then every file without one."""
    mutants: list[tuple[str, Mutant | None, str, str]] = [(one.mistake, one, one.tests, one.select) for one in MUTANTS]
    for file, group in itertools.groupby(sorted(MUTANTS, key=lambda one: one.tests), key=lambda one: one.tests):
        mutants.append((file, None, file, " or ".join(sorted({f"({one.select})" for one in group}))))
    return mutants


def run_here(mutant: Mutant | None, file: str, select: str, folder: Path) -> int:
    """Pytest's exit status, in a process that has not imported mam2. Raises ValueError for an outdated mutant."""
    kernels = Path(shutil.copytree(ROOT / "kernels", folder / "mam2" / "kernels"))
    (folder / "mam2" / "__init__.py").touch()  # a regular package, before that of the checkout
    if mutant is not None:
        source = (kernels / mutant.file).read_text(encoding="utf-8")
        if source.count(mutant.old) != 1:
            raise ValueError(f"{mutant.file}: expected {mutant.old!r} once, found it {source.count(mutant.old)} times")
        (kernels / mutant.file).write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")
    os.environ["MAM2_KERNELS"] = "triton" if file.endswith("_in_interpreter.py") else "pytorch"
    os.chdir(ROOT)
    sys.path[:0] = [str(folder), str(ROOT)]
    import mam2.kernels

    if Path(mam2.kernels.__file__).parent != kernels:
        raise RuntimeError(f"expected the kernels of {kernels}, found {mam2.kernels.__file__}")
    return int(pytest.main(["-x", "-p", "no:cacheprovider", "--noconftest", f"tests/kernels/{file}", "-k", select]))


def run(mutant: Mutant | None, file: str, select: str) -> tuple[int, str]:
    """Status and output of the tests, run in a fork."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        child = os.fork()
        if child == 0:
            status = NO_TESTS
            with output.open("w") as written:
                os.dup2(written.fileno(), 1)
                os.dup2(written.fileno(), 2)
                try:
                    status = run_here(mutant, file, select, Path(folder))
                    sys.stdout.flush()
                except Exception:
                    traceback.print_exc()
                finally:
                    os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return status, output.read_text()


def results(part: int, parts: int) -> Iterator[dict[str, str | int]]:
    for name, mutant, file, select in jobs()[part::parts]:
        status, output = run(mutant, file, select)
        yield {"name": name, "status": status, "output": output[-3000:]}


def main() -> None:
    if len(sys.argv) == 3:
        for result in results(int(sys.argv[1]), int(sys.argv[2])):
            print(json.dumps(result), flush=True)
        return
    wrong = 0
    for result in results(0, 1):
        expected = PASSED if str(result["name"]).endswith(".py") else FAILED
        right = result["status"] == expected
        wrong += not right
        said = {PASSED: "passes" if right else "SURVIVED", FAILED: "noticed" if right else "FAILS"}
        print(f"{said.get(int(result['status']), result['output'])}: {result['name']}", flush=True)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
