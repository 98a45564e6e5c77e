"""Every kernel compiles for GPUs that this machine lacks, and the committed table of the machine code is current."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from tests.helpers.paths import ROOT

STATIC = ROOT / "benchmarks" / "results" / "static"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942")
SHARED_MEMORY = {
    "sm_80": 166_912,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
    "gfx90a": 65_536,
    "gfx942": 65_536,
}
"""Maximum bytes of shared memory per program."""

ROWS_OF_16_PIXELS = r"\w+ \dx16x16 (?!.* 4 channels).*"
SHORT_ROWS = r"channels_last (\dx14x14|\dx8x8) .*|.* 4 channels.*"
WHOLE_VECTORS, ODD_ROWS = r"(8192|16384|2048|1024) .*|\d+x(1536|512) .*", r"1000 .*|\d+x1000 .*"
PROMISES: list[tuple[str, str, int | None, int | None]] = [
    ("gather_tubes", ROWS_OF_16_PIXELS, 17, 0),
    ("gather_tubes", SHORT_ROWS, None, None),
    ("frame_difference", ROWS_OF_16_PIXELS, 33, 0),
    ("frame_difference", SHORT_ROWS, None, None),
    ("masked_loss", ROWS_OF_16_PIXELS, 35, 2),
    ("masked_loss", SHORT_ROWS, None, None),
    ("softmax_gradient", WHOLE_VECTORS, 3, 1),
    ("softmax_gradient", ODD_ROWS, None, None),
    ("scale_gradient", WHOLE_VECTORS, 1, 0),
    ("scale_gradient", ODD_ROWS, None, None),
    ("motion_energy", ROWS_OF_16_PIXELS, 0, 1),
    ("motion_energy", SHORT_ROWS, None, None),
    ("draw_mask", r"\d+ positions.*", None, None),
    ("masked_subset", r"\d+ of \d+.*", None, None),
]
"""Kernel and launches → how many loads and stores of a thread may be narrower than 128 bits; None: no limit.

Narrow loads: the token's number and factor; a row's target, its logit and its weight; a row's factor. Narrow stores:
the token's error, where weights learn also without its weight; the row's loss. A thread reads as many values of a clip
at a time as it stores: bytes in pieces of 64 bits where it stores two bytes each, of 32 bits where it stores four.
Rows of 14 or 8 pixels, or of 1000 codes, are not aligned, and with 4 channels two warps share a cube's rows.
draw_mask and masked_subset scatter.
"""
LEAST_BITS = 32
"""Width of the narrowest load from a clip whose patches have rows of 16 pixels."""


SPECIALIZATIONS = """
import json
import torch
from tests.kernels.compile_kernels import Goal, PretendedDriver, driver, launch, masked_errors, masked_subset, masks
from tests.kernels.compile_kernels import softmax_gradient

driver.set_active(PretendedDriver("sm_90"))
launch.architecture = lambda device: "sm_90"
keys = {}

def record(kernel, programs, *arguments, **meta):
    *_, binder = kernel.create_binder()
    _, found, options = binder(*arguments, **meta)
    keys.setdefault(kernel.fn.__name__, set()).add(str((found, options)))

launch.run_kernel = record
step = torch.empty((), dtype=torch.int64, device="meta")
for seed, sample, slots, positions, hidden, strength in (
    (0, 0, 8, 196, 176, 0), (1, 1, 1, 129, 1, 1), (16, 48, 16, 256, 16, 32768), (2**40 + 1, 2**40, 3, 200, 3, 65536)
):
    masks._launch(step, seed, sample, 4, slots, positions, hidden, None, strength)
    index = torch.empty(4, positions, dtype=torch.int64, device="meta")
    masked_subset._launch(index, step, (slots, hidden, positions), hidden, True, seed, sample)
logits, target = torch.empty(4, 64, device="meta"), torch.empty(4, dtype=torch.int64, device="meta")
for ignored in (-100, 0, 1, 16):
    softmax_gradient.softmax_gradient_(logits, target, None, ignored, 0.0, True, torch.empty(4, device="meta"))
for grid, count in (((2, 2, 2), 4), ((16, 16, 16), 16), ((3, 16, 5), 32)):
    video = torch.empty(2, 2 * grid[0], 16 * grid[1], 16 * grid[2], 16, dtype=torch.uint8, device="meta")
    index = torch.empty(2, count, dtype=torch.int64, device="meta")
    goal = Goal((2, 16, 16), "pixel", "channel", 1e-6, None, None)
    pred = torch.empty(2, count, 8192, device="meta")
    masked_errors(pred, video.permute(0, 4, 1, 2, 3), index, None, pred.numel(), (True, False), goal)
print(json.dumps({name: len(found) for name, found in keys.items()}))
"""


@pytest.mark.slow
def test_one_compilation_serves_all_seeds_samples_and_counts() -> None:
    """Triton compiles again for integers of 1, multiples of 16 and 64 bits, unless the argument is excluded."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SPECIALIZATIONS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout) == {
        "_draw_mask_kernel": 1,
        "_masked_subset_kernel": 1,
        "_softmax_gradient_kernel": 1,
        "_masked_loss_kernel": 1,
    }


@pytest.fixture(scope="module")
def compiled() -> Iterator[dict[str, Future[list[dict[str, Any]]]]]:
    """Architecture → what compile_kernels.py prints, two architectures at a time."""
    pytest.importorskip("triton")

    def run(architecture: str) -> list[dict[str, Any]]:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        command = [sys.executable, "-m", "tests.kernels.compile_kernels", architecture]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    with ThreadPoolExecutor(2) as pool:
        yield {architecture: pool.submit(run, architecture) for architecture in ARCHITECTURES}


def kernels() -> set[str]:
    """Names of the kernels in the source: jitted functions that have a grid of their own."""
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "kernels").glob("*.py"))
    return set(re.findall(r"^@jit(?:\([^()]*\))?\ndef _(\w+)_kernel\(", sources, re.MULTILINE))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compilers run on Linux")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles_for_a_gpu_that_is_not_here(architecture: str, compiled: dict[str, Future]) -> None:
    """No spills to memory, shared memory within bounds, no atomics, wide accesses as listed."""
    launches = compiled[architecture].result()
    assert {facts["name"].split()[0] for facts in launches} == kernels()
    for facts in launches:
        assert facts["stack"] == facts["spills"] == facts["atomics"] == 0, facts
        assert facts["shared"] <= SHARED_MEMORY[architecture], facts
        kernel, launch = facts["name"].split(" ", 1)
        promised = [limits for name, pattern, *limits in PROMISES if name == kernel and re.fullmatch(pattern, launch)]
        assert len(promised) == 1, f"{facts['name']}: expected one row of PROMISES, found {len(promised)}"
        # the 64 threads of an AMD wavefront hold half as many bytes of a patch row each
        wide = 128 if architecture.startswith("sm_") else 64
        for kind, limit in zip(("loads", "stores"), promised[0], strict=True):
            narrow = sum(count for width, count in facts[kind].items() if int(width) < wide)
            assert limit is None or narrow <= limit, (kind, facts)
        assert promised[0][0] is None or any(int(width) >= wide for width in [*facts["loads"], *facts["stores"]]), facts
        if wide == 128 and re.fullmatch(ROWS_OF_16_PIXELS, launch):
            assert min(map(int, facts["loads"])) >= LEAST_BITS, facts


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compilers run on Linux")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_checked_in_table_is_what_the_compilers_make(architecture: str, compiled: dict[str, Future]) -> None:
    triton = pytest.importorskip("triton")
    name, tables = "nvidia" if architecture.startswith("sm_") else "amd", {}
    for path in STATIC.glob(f"{name}*.csv"):
        head, _, *rows = path.read_text(encoding="utf-8").splitlines()
        version = re.match(r"# triton ([\d.]+);", head)
        assert version is not None, head
        tables[version[1]] = rows
    if triton.__version__ not in tables:
        pytest.skip(f"the tables are of triton {', '.join(tables)}, here is {triton.__version__}")
    rows = tables[triton.__version__]
    expected = [row for row in rows if row.split(",")[2] == architecture]
    found = sorted(facts["row"] for facts in compiled[architecture].result())
    remedy = "if the change is meant: python -m tests.kernels.compile_kernels --write"
    assert found == expected, remedy
