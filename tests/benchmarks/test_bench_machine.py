"""The machine of `make gpu`: children that die with their parent, carried wheels, clocks, counters."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from tests.helpers.benchmarks import module
from tests.helpers.paths import ROOT

CPU = torch.device("cpu")


def gone(pid: int, seconds: float = 10) -> bool:
    """Whether a process is dead, or dies soon."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


def test_a_child_dies_with_its_parent_and_stays_in_its_session(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    code = f"""
import os, sys, time
from benchmarks import processes
child = processes.start([sys.executable, "-c", "import time; time.sleep(60)"])
assert os.getsid(child.pid) == os.getsid(0)
assert os.getpgid(child.pid) == child.pid
open({str(file)!r} + ".part", "w").write(str(child.pid))
os.rename({str(file)!r} + ".part", {str(file)!r})
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        while not file.exists() and parent.poll() is None:
            time.sleep(0.02)
        pid = int(file.read_text())
        assert Path(f"/proc/{pid}").exists()
    finally:
        parent.kill()
        parent.wait()
    assert gone(pid)


def test_what_a_child_started_is_killed_with_it(tmp_path: Path) -> None:
    processes = module("processes")
    file = tmp_path / "pid"
    command = ["sh", "-c", f"sleep 60 & echo $! > {file}; wait"]
    end = time.monotonic() + 1
    ended = processes.run(command, limit=lambda: end, cwd=ROOT, environment=os.environ)
    assert ended.code is None
    assert gone(int(file.read_text()))


def test_the_exit_status_comes_back() -> None:
    processes = module("processes")
    ended = processes.run(["sh", "-c", "exit 3"], limit=lambda: float("inf"), cwd=ROOT, environment=os.environ)
    assert ended.code == 3


@pytest.mark.slow
def test_carried_wheels_come_on_the_path_and_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = module("machine")
    wheels = tmp_path / ".whl"
    wheels.mkdir()
    monkeypatch.setattr(machine, "WHEELS", wheels)
    environment, lines = machine.environment(tmp_path / "none")
    assert lines[0] == ".whl/: no wheels there"
    info = "carried_thing-1.0.dist-info"
    with zipfile.ZipFile(wheels / "carried_thing-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried_thing.py", "there = True\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: carried-thing\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    environment, lines = machine.environment(tmp_path)
    assert lines[0] == ".whl/: carried_thing"
    code = "import carried_thing, mam2.kernels; print(carried_thing.there)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
    (wheels / "broken-1.0-py3-none-any.whl").write_text("no archive")
    assert "pip could not install broken, carried_thing" in machine.environment(tmp_path / "again")[1][0]


def test_the_checkout_serves_installed_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = module("machine")
    monkeypatch.setattr(machine, "WHEELS", tmp_path / "none")
    environment, _ = machine.environment(tmp_path)
    code = "import mam2.engine, mam2.kernels; print(mam2.kernels.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(ROOT / "mam2" / "kernels" / "__init__.py")


def test_the_commit_of_a_checkout_without_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = module("machine")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv(machine.COMMIT, raising=False)
    assert machine.commit() is None
    monkeypatch.setenv(machine.COMMIT, "abc123")
    assert machine.commit() == "abc123"


def test_clocks_are_summarized() -> None:
    machine = module("machine")
    text = "345, 2619, 71.30, 30\n1980, 2619, 640.1, 55\n1755, 2619, [N/A], 54\nUnable to\n"
    assert machine.summarize(text) == {
        "sm_mhz": [345, 1755, 1980], "memory_mhz": [2619] * 3, "power_w": [71.3, 355.7, 640.1],
        "temperature_c": [30, 54, 55],
    }  # fmt: skip
    assert machine.Clocks(False).stop() == {}


def test_counters_of_ncu_are_read() -> None:
    counters = module("counters")
    head = '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
    lines = [
        "==PROF== Connected to process 7",
        "a line of the program",
        head,
        '"0","7","_masked_loss_kernel(x, y)","gpu__time_duration.sum","ns","161,250"',
        '"0","7","_masked_loss_kernel(x, y)","dram__bytes_read.sum","byte","416,000,000"',
        '"1","7","_softmax_gradient_kernel","gpu__time_duration.sum","ns","20000"',
        '"2","7","_softmax_gradient_kernel","gpu__time_duration.sum","ns","21000"',
        '"3","7","_masked_loss_kernel","launch__registers_per_thread","register/thread","n/a"',
    ]
    assert list(counters.read("\n".join(lines))) == [
        {"kernel": "masked_loss_kernel", "us": 161.25, "read_mb": 416.0, "verdict": "right"},
        {"kernel": "softmax_gradient_kernel", "us": 20.0, "verdict": "right"},
        {"kernel": "masked_loss_kernel", "registers": None, "verdict": "right"},
    ]
    assert list(counters.read("==ERROR== no permission")) == []
    (row,) = counters.rows(CPU, float("inf"))
    assert row["reason"] == "counters need a GPU"


@pytest.mark.slow
def test_the_gpu_tests_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sections = module("sections")
    monkeypatch.setattr(sections, "ROOT", tmp_path)
    (row,) = sections.smoke_rows(CPU, float("inf"))
    assert row["verdict"] == "skipped"
    file = tmp_path / sections.TESTS
    file.parent.mkdir(parents=True)
    file.write_text("def test_a():\n    pass\n\ndef test_b():\n    assert False\n\ndef test_c():\n    pass\n")
    row, failed = sections.smoke_rows(CPU, time.monotonic() + 60)
    assert (row["passed"], row["failed"], row["skipped"], row["verdict"]) == (2, 1, 0, "wrong")
    assert failed["check"].endswith("::test_b")
    file.write_text("import pytest\n\ndef test_a():\n    pytest.skip('no GPU')\n")
    (row,) = sections.smoke_rows(CPU, time.monotonic() + 60)
    assert (row["skipped"], row["verdict"]) == (1, "right")
    (row,) = sections.smoke_rows(torch.device("cuda"), time.monotonic() + 60)
    assert row["reason"] == "no test ran on the GPU"
