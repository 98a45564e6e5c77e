from __future__ import annotations

import ast
import csv
import errno
import io
import os
import re
from pathlib import Path

import pytest

from mam2.engine import cli
from mam2.engine.errors import UserError
from mam2.engine.files import (
    NAMES,
    append_rows,
    check_apart,
    files_written_aside,
    make_folder,
    one_line,
    printable,
    remove_parts,
    write_table,
    write_whole,
    writing,
    written_aside,
)
from tests.helpers.paths import ROOT

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
    with full_disk(3), pytest.raises(OSError, match=f"File too large: '{tmp_path}/"):
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


def test_a_folder_replaces_another_only_if_asked_to(tmp_path):
    folder = tmp_path / "a"

    def fill(name, **options):
        with written_aside(folder, **options) as aside:
            aside.mkdir()
            (aside / name).touch()

    fill("b", durable=True)
    with pytest.raises(OSError, match="not empty"):
        fill("c")
    assert os.listdir(folder) == ["b"]
    fill("d", durable=True, replace_folder=True)
    assert os.listdir(folder) == ["d"]
    assert os.listdir(tmp_path) == ["a"]


def test_all_of_a_durable_folder_is_synced_before_it_is_renamed(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{file}"))))
    with written_aside(tmp_path / "a", durable=True) as aside:
        (aside / "b").mkdir(parents=True)
        (aside / "b" / "c").touch()
    assert sorted(synced[:2]) == ["b", "c"]
    assert synced[2:] == [".part-a", tmp_path.name]


def test_two_writers_of_one_file_do_not_share_a_temporary_one(tmp_path):
    with written_aside(tmp_path / "a", unique=True) as one, written_aside(tmp_path / "a", unique=True) as two:
        assert one != two
        one.write_text("one")
        two.write_text("two")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "one"  # its block ended last


def test_files_that_belong_together_appear_together(tmp_path):
    def write(broken):
        with files_written_aside(tmp_path / "b") as folder:
            for name in ("a", "b", "c"):
                (folder / name).touch()
            if broken:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write(broken=True)
    assert os.listdir(tmp_path) == []
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "file").touch()
    with pytest.raises(OSError, match="directory"):
        write(broken=False)
    assert sorted(os.listdir(tmp_path)) == ["a", "c"]  # the main file, b, comes last
    (tmp_path / "c" / "file").unlink()
    (tmp_path / "c").rmdir()
    write(broken=False)
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c"]


def test_what_a_killed_process_has_left_is_removed(tmp_path):
    (tmp_path / ".part-a").mkdir()
    (tmp_path / ".part-a" / "b").touch()
    (tmp_path / ".part-c").touch()
    (tmp_path / "d").touch()
    remove_parts(tmp_path)
    assert os.listdir(tmp_path) == ["d"]


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


RENAMES = {
    "engine/checkpoints/checkpoint.py newest_whole": "puts a damaged checkpoint aside, writes nothing",
    "engine/runtime/log.py set_aside": "puts the log of an earlier start aside, writes nothing",
}
WRITES = {
    "benchmarks/gpu.py collect": "output of a process, which is read while it is written",
    "engine/checkpoints/export.py write_hugging_face": "into the temporary folder of export",
    "engine/checkpoints/export.py write_mam2": "into the temporary folder of export",
    "engine/checkpoints/lock.py _create": "must fail if the file exists",
    "engine/checkpoints/lock.py _take_over": "into a temporary file",
    "engine/checkpoints/weight_files.py sort_metadata": "changes a file of a temporary folder in place",
    "engine/checkpoints/checkpoint.py _written_aside": "into the temporary folder of a checkpoint",
    "engine/data/encoding.py video_writer": "FFmpeg writes; callers give it a temporary file",
    "engine/evaluation/feature_files.py _new_rows": "into a temporary file",
    "engine/evaluation/prediction_files.py __enter__": "lines that other programs read while they are written",
}


def renames(call):
    """Whether a call renames a file: os.rename, shutil.move, Path.rename, and Path.replace, which has one argument."""
    if not isinstance(call.func, ast.Attribute):
        return False
    owner = call.func.value.id if isinstance(call.func.value, ast.Name) else ""
    one = len(call.args) == 1 and not call.keywords
    return (owner == "os" and call.func.attr in ("rename", "renames", "replace")) or (
        (owner == "shutil" and call.func.attr == "move") or (call.func.attr in ("rename", "replace") and one)
    )


def writes(call):
    """Whether a call writes a file under a name of its own: Path.write_text and write_bytes, open for writing, and
    np.save and np.savez of anything but an open file, which is named `file`, or `buffer`."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    given = [
        value.value for value in (*call.args, *(entry.value for entry in call.keywords)) if type(value) is ast.Constant
    ]
    opened = name == "open" and any(re.fullmatch(r"[wx][b+]*|rb?\+b?", str(value)) for value in given)
    saved = name in ("save", "savez") and not (
        isinstance(call.args[0], ast.Name) and call.args[0].id in ("file", "buffer")
    )
    return name in ("write_text", "write_bytes") or opened or (saved and _of_numpy(call))


def _of_numpy(call):
    owner = getattr(call.func, "value", None)
    return isinstance(owner, ast.Name) and owner.id == "np"


def calls(node, function=""):
    """(name of the function, call) of all calls in a syntax tree."""
    if isinstance(node, ast.FunctionDef):
        function = node.name
    if isinstance(node, ast.Call):
        yield function, node
    for child in ast.iter_child_nodes(node):
        yield from calls(child, function)


def places(root, folders, wanted):
    """The functions, as "file function", of the sources in which a call is `wanted`; files.py is left out."""
    found = set()
    for path in (path for folder in folders for path in (root / folder).rglob("*.py")):
        text = path.read_text("utf-8")
        if path != root / "engine" / "files.py" and re.search(r"rename|replace\(|\.move\(|write_|open\(|save", text):
            found |= {f"{path.relative_to(root)} {name}" for name, call in calls(ast.parse(text)) if wanted(call)}
    return found


def test_files_get_their_names_in_one_place():
    """Whole files and folders are written by files.py, so that a crash leaves the old or the new one."""
    assert places(ROOT, ("engine", "kernels", "benchmarks", "examples"), renames) == set(RENAMES)
    assert places(ROOT, ("engine", "kernels", "benchmarks", "examples"), writes) == set(WRITES)


def test_another_way_to_write_a_file_is_found(tmp_path):
    (tmp_path / "engine").mkdir()
    lines = ("os.replace(a, b)", "shutil.move(a, b)", "a.rename(b)", "a.replace(b)", "a.write_text(b)", "a.open('wb')")
    lines += ("dataclasses.replace(a, b=c)", "a.replace(b, c)", "a.open('rb')", "a.open('a')", "open(a)")
    lines += ("a.open('w+b')", "np.save(a, b)", "np.savez(file, a)")
    (tmp_path / "engine" / "a.py").write_text("".join(f"def f{i}(): {line}\n" for i, line in enumerate(lines)))
    assert places(tmp_path, ["engine"], renames) == {f"engine/a.py f{i}" for i in range(4)}
    assert places(tmp_path, ["engine"], writes) == {f"engine/a.py f{i}" for i in (4, 5, 11, 12)}
