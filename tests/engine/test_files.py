from __future__ import annotations

import csv
import errno
import io
import os
from pathlib import Path

import pytest

from mam2.engine import cli
from mam2.engine.errors import UserError
from mam2.engine.files import (
    NAMES,
    append_rows,
    check_apart,
    make_folder,
    one_line,
    printable,
    write_table,
    write_whole,
    writing,
    written_aside,
)

ODD = [os.fsdecode(b"caf\xe9"), "tab\there", "two\nlines", "carriage\rreturn", 'a "word"', "", "é \u2028 ×"]


def test_tables_come_back_whatever_the_names_hold(tmp_path):
    rows = [(name, str(number)) for number, name in enumerate(ODD)]
    write_table(tmp_path / "a.tsv", rows[:3])
    append_rows(tmp_path / "a.tsv", rows[3:])
    with (tmp_path / "a.tsv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert [tuple(row) for row in csv.reader(file, delimiter="\t")] == rows
    assert b"caf\xe9\t0\n" in (tmp_path / "a.tsv").read_bytes()


@pytest.mark.parametrize(
    ("encoding", "expected"), [("utf-8", b"\xe9 \xc3\xa9 \\ud800"), ("ascii", b"\xe9 \\xe9 \\ud800")]
)
def test_a_stream_that_takes_names_never_refuses_one(encoding, expected):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding, errors=NAMES)
    stream.write("\udce9 é \ud800")
    stream.flush()
    assert raw.getvalue() == expected


def test_a_line_stays_one_line_and_a_printable_name_is_valid():
    assert one_line("a\nb\tc\x1b[31m\x85\u2028é\udce9") == "a\\nb\\tc\\x1b[31m\\x85\\u2028é\udce9"
    assert printable(os.fsdecode(b"caf\xe9 \xc3\xa9\n")) == "caf\\xe9 é\\n"


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path, full_disk):
    path = tmp_path / "a"
    write_whole(path, "first")
    with full_disk(3), pytest.raises(OSError, match="File too large"):
        write_whole(path, "second")
    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["a"]
    write_whole(path, b"second")
    assert path.read_bytes() == b"second"


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "a"
    (tmp_path / ".part-a").mkdir()  # left behind by a killed process
    (tmp_path / ".part-a" / "old").touch()

    def fill(broken):
        with written_aside(folder) as aside:
            aside.mkdir()
            (aside / "b").touch()
            assert not folder.exists()
            if broken:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fill(broken=True)
    assert os.listdir(tmp_path) == []
    fill(broken=False)
    assert os.listdir(tmp_path) == ["a"]
    assert os.listdir(folder) == ["b"]


def test_an_error_of_the_place_is_one_line_and_others_stay_what_they_are(tmp_path):
    message = r"--to .*/x: cannot be written: No space left on device; free space"
    with pytest.raises(UserError, match=message), writing(tmp_path / "x", "--to"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(FileNotFoundError), writing(tmp_path / "x"):
        Path("/somewhere/else").read_text()
    with pytest.raises(OSError, match="refused"), writing(tmp_path / "x"):
        raise OSError(errno.ECONNREFUSED, "refused")
    with pytest.raises(UserError, match="Not a directory"):
        make_folder("/dev/null/x")


def test_the_data_is_no_place_to_write_to(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    for out in (tmp_path, tmp_path / "link", tmp_path / "x" / ".."):
        with pytest.raises(UserError, match="is the data itself"):
            check_apart(tmp_path, out)
    check_apart(tmp_path, tmp_path / "x")
    with pytest.raises(UserError, match="is in the data folder"):
        check_apart(tmp_path, tmp_path / "link" / "x", inside=False)


@pytest.mark.parametrize(("number", "status"), [(errno.ENOSPC, 2), (errno.EROFS, 2), (errno.ENOTCONN, None)])
def test_a_place_that_nobody_looked_after_is_one_line_too(monkeypatch, capsys, number, status):
    def verb(arguments):
        raise OSError(number, os.strerror(number), "some\nwhere")

    monkeypatch.setattr("mam2.engine.commands.doctor.run", verb)
    if status is None:
        with pytest.raises(OSError, match="not connected"):
            cli.main(["doctor"])
        return
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor"])
    assert stop.value.code == status
    message = capsys.readouterr().err
    assert message == f"mam2: error: some\\nwhere: {os.strerror(number)}; free space or choose another path\n"


def test_every_table_is_written_in_one_way():
    """All tables are written by `write_table` and `append_rows`; no other code joins cells with tabs."""
    engine = Path(cli.__file__).parent
    by_hand = [
        str(path.relative_to(engine))
        for path in engine.rglob("*.py")
        if path.name != "files.py" and any(mark in path.read_text() for mark in ('"\\t".join', "\\t{", "}\\t"))
    ]
    assert by_hand == []
