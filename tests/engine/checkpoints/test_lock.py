"""Only one process at a time writes a run folder, even if an earlier one was killed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mam2.engine.checkpoints import lock
from mam2.engine.checkpoints.lock import RunLock
from mam2.engine.errors import UserError

HOLDER = """
import sys, time
from pathlib import Path
from mam2.engine.checkpoints.lock import RunLock
RunLock(Path(sys.argv[1])).acquire(print)
print("held", flush=True)
time.sleep(60)
"""


def of_another_machine(run, age):
    """Writes a lock as a process on another machine does, renewed `age` seconds ago."""
    held = {"host": "other", "pid": 7, "started": "then", "machine": "elsewhere", "process": "1", "token": "t"}
    (run / lock.FILE).write_text(json.dumps(held))
    then = time.time() - age
    os.utime(run / lock.FILE, (then, then))


def test_a_second_process_is_refused_and_told_of_the_first(tmp_path):
    first, messages = RunLock(tmp_path), []
    first.acquire(messages.append)
    with pytest.raises(UserError, match=rf"is being written by process {os.getpid()} on .*choose another folder"):
        RunLock(tmp_path).acquire(messages.append)
    first.release()
    assert list(tmp_path.iterdir()) == []
    second = RunLock(tmp_path)
    second.acquire(messages.append)
    second.release()
    assert messages == []


def test_kill_9_leaves_a_lock_that_is_taken_over_at_once_with_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "SETTLE_S", 0.0)
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {process.pid} on"):
        RunLock(tmp_path).acquire(print)
    process.kill()
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    messages = []
    mine = RunLock(tmp_path)
    mine.acquire(messages.append)  # while the dead one is still a zombie, as under a launcher
    process.wait()
    assert len(messages) == 1
    assert f"taken over from process {process.pid}" in messages[0]
    mine.release()
    assert list(tmp_path.iterdir()) == []


def test_a_process_of_another_machine_lives_as_long_as_its_lock_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "SETTLE_S", 0.0)
    of_another_machine(tmp_path, age=lock.STALE_S / 2)
    with pytest.raises(
        UserError, match=r"process 7 on other, started then .*if it has died, its lock expires in \d+ s"
    ):
        RunLock(tmp_path).acquire(print)
    of_another_machine(tmp_path, age=lock.STALE_S * 2)
    messages = []
    RunLock(tmp_path).acquire(messages.append)
    assert messages == ["lock    taken over from process 7 on other, started then, which no longer runs"]


def test_the_lock_is_renewed_and_one_who_lost_it_knows(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "RENEW_S", 0.02)
    mine = RunLock(tmp_path)
    mine.acquire(print)
    os.utime(tmp_path / lock.FILE, (1, 1))
    deadline = time.monotonic() + 30
    while (tmp_path / lock.FILE).stat().st_mtime < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not mine.lost
    of_another_machine(tmp_path, age=0)
    while not mine.lost:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    mine.release()
    assert json.loads((tmp_path / lock.FILE).read_text())["host"] == "other"
