"""Logging never ends a run: full disks, closed pipes, names that are not valid text."""

import ast
import errno
import io
import json
import sys
from pathlib import Path

import pytest

from mam2.engine.runtime import log as metrics
from mam2.engine.runtime import progress
from mam2.engine.runtime.log import LineFile, RunLog, read_log


@pytest.fixture
def disk(monkeypatch):
    """disk["full"]: whether writing fails, after the first 5 bytes of a line."""
    state = {"full": False}

    class Disk(io.FileIO):
        def write(self, content):
            if not state["full"]:
                return super().write(content)
            if state.pop("room", 0):
                return super().write(bytes(content)[:5])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(metrics.io, "FileIO", Disk)
    return state


def test_lines_that_a_full_disk_refused_are_written_later_and_told_once(tmp_path, disk, capsys):
    log = RunLog(tmp_path)
    log.write(1, {"loss": 1.0})
    disk.update(full=True, room=1)
    log.info("one")
    for step in (2, 3):
        log.write(step, {"loss": float(step)})
    log.info("two")
    disk["full"] = False
    log.write(4, {"loss": 4.0})
    log.info("three")
    log.close()
    assert [line["loss"] for line in read_log(tmp_path)] == [1.0, 2.0, 3.0, 4.0]
    assert (tmp_path / "log.txt").read_text() == "one\ntwo\nthree\n"
    messages = [line for line in capsys.readouterr().out.splitlines() if line.startswith("log ")]
    assert len(messages) == 2
    assert all("No space left on device. The run continues" in line for line in messages)


def test_tensorboard_and_a_tracker_that_fail_end_nothing(tmp_path, monkeypatch, capsys):
    log = RunLog(tmp_path)

    class Failing:
        def add_scalar(self, *_):
            raise OSError(errno.ENOSPC, "No space left on device")

        def log(self, *_, **__):
            raise ConnectionError("no route")

        finish = log

    log._tracker = Failing()
    board, log._board = log._board, Failing()
    board.close()
    log.write(1, {"loss": 1.0})
    log.write(2, {"loss": 2.0})
    log.close()
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2]
    out = capsys.readouterr().out
    assert out.count("tensorboard cannot be written") == 1
    assert out.count("run.tracker cannot be written: no route") == 1


def test_a_name_that_is_not_utf8_is_logged_as_its_bytes_and_shown_escaped(tmp_path, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", terminal)
    log = RunLog(tmp_path)
    log.info("unusable: caf\udce9×.mp4")
    log.close()
    assert (tmp_path / "log.txt").read_bytes() == b"unusable: caf\xe9\xc3\x97.mp4\n"
    terminal.flush()
    assert terminal.buffer.getvalue() == b"unusable: caf\\udce9\\xd7.mp4\n"


def test_a_closed_output_ends_nothing(tmp_path, monkeypatch):
    class Closed(io.StringIO):
        def write(self, _):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", Closed())
    monkeypatch.setattr(sys, "stderr", Closed())
    monkeypatch.setattr(progress, "LEAST_S", 0.0)
    log = RunLog(tmp_path)
    log.info("here")
    log.close()
    with progress.Progress(total=4) as bar:
        bar.update(4)
    assert (tmp_path / "log.txt").read_text() == "here\n"


def test_half_a_line_of_a_killed_run_spoils_no_other(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    file = LineFile(tmp_path / "log.jsonl")
    file.write(b'{"step": 3, "loss": 3.0}\n')
    file.close()
    assert [line["step"] for line in read_log(tmp_path)] == [1, 3]


def test_numbers_of_an_attempt_without_a_checkpoint_are_set_aside(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 900, "loss": 1.0}\n')
    log = RunLog(tmp_path)
    log.start_new()
    log.write(1, {"loss": 2.0})
    log.close()
    assert [line["step"] for line in read_log(tmp_path)] == [1]
    assert json.loads((tmp_path / "log.before.jsonl").read_text())["step"] == 900


class Terminal(io.StringIO):
    def isatty(self):
        return True


def drawn(monkeypatch, columns):
    """What the training bar shows on a terminal of that number of columns, halfway."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    numbers = ["codes 5.92", "motion 0.531", "(87% of no motion)", "right codes 8%", "123 clips/s", "data wait 3%"]
    bar = progress.Progress(desc="pre-training", total=20000, unit="step", bar_format=progress.BAR)
    bar.dynamic_ncols = None
    bar.ncols = columns
    bar.n = 10000
    bar.show(numbers)
    text = str(bar)
    bar.close()
    return text


def test_the_bar_keeps_its_width_and_shows_the_numbers_that_fit(monkeypatch):
    wide, usual, narrow = (drawn(monkeypatch, columns) for columns in (200, 120, 80))
    for text in (wide, usual, narrow):
        assert len(text.split("|")[1]) == 16
        assert " 50%" in text
    assert "data wait 3%" in wide
    assert "(87% of no motion)" in usual
    assert len(usual) <= 120
    assert len(narrow) <= 80


def test_where_the_output_is_no_terminal_there_is_a_line_every_few_percent(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "LEAST_S", 0.0)
    with progress.Progress(desc="pre-training", total=200, unit="step", bar_format=progress.BAR) as bar:
        bar.show(["codes 5.92"])
        for _ in range(200):
            bar.update()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 20
    assert lines[9].startswith("pre-training: 100 of 200 (50%)")
    assert lines[9].endswith("codes 5.92")
    for _ in progress.Progress(range(10), "reading", shown=False):
        pass
    assert len(stream.getvalue().splitlines()) == 20


def test_no_verb_has_a_bar_that_only_a_terminal_shows():
    """tqdm's own bar writes nothing useful into a log: every bar of the engine is a `Progress`."""
    engine = Path(progress.__file__).resolve().parents[1]
    bare = [
        f"{path.relative_to(engine)}:{node.lineno}"
        for path in sorted(engine.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("tqdm", "trange")
    ]
    assert bare == []
