"""Output folders that are full, not writable, or the data itself: one error line, status 2, no files left."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
import torch

from mam2.engine.checkpoints import checkpoint
from mam2.engine.data.loader import ClipLoader
from mam2.engine.data.manifest import Manifest, Skipped, write_manifest
from mam2.engine.data.sources import read_source
from mam2.engine.errors import UserError
from mam2.engine.tokenizer.cache import CodeCache
from mam2.engine.train.finetune import finetune
from mam2.engine.train.pretrain import pretrain
from mam2.engine.train.session import SKIPPED, open_session
from tests.helpers.commands import outcome


@pytest.fixture(scope="module")
def clips(tmp_path_factory, synthetic_clips) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    synthetic_clips(folder, train=8)
    return folder / "train"


@pytest.fixture(scope="module")
def run(tmp_path_factory, clips, small) -> Path:
    out = tmp_path_factory.mktemp("run")
    pretrain(small(optim={"epochs": 0.25}), clips, out, progress=False)
    return out


def error_line(capsys, *arguments: object) -> str:
    """The one line of an error with status 2."""
    status, _, error = outcome(capsys, *arguments)
    lines = [line for line in error.splitlines() if line.startswith("mam2: ")]
    assert status == 2
    assert len(lines) == 1
    return lines[0]


def verbs(clips: Path, run: Path, out: Path) -> dict[str, tuple[object, ...]]:
    tokenizer = ("--size", 32, "--codes", 16, "--channels", 8, "--steps", 2, "--batch", 4, "--threads", 1)
    return {
        "train-tokenizer": ("train-tokenizer", clips, "--out", out / "x", *tokenizer),
        "tokenize": ("tokenize", "demo", "--data", clips, "--out", out / "x", "--data.recorded", 1, "--run.no-compile"),
        "embed": ("embed", run, "--data", clips, "--out", out / "x.npy"),
        "parquet": ("embed", run, "--data", clips, "--out", out / "x.parquet"),
        "videomae": ("export", run, "--to", "videomae", "--out", out / "x"),
        "torch": ("export", run, "--to", "torch", "--out", out / "x"),
        "huggingface": ("export", run, "--to", "huggingface", "--out", out / "x"),
        "demo": ("demo", "--out", out / "x"),
    }


VERBS = ("train-tokenizer", "tokenize", "embed", "parquet", "videomae", "torch", "huggingface", "demo")


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_a_full_disk_is_one_line(verb, clips, run, tmp_path, capsys, full_disk):
    if verb == "parquet":
        pytest.importorskip("pyarrow")
    tokenizer = run / "tokenizer.safetensors"
    arguments = verbs(clips, run, tmp_path)[verb]
    if verb == "tokenize":
        arguments += ("--tokenizer.path", tokenizer)
    with full_disk(100):
        line = error_line(capsys, *arguments)
    place = arguments[arguments.index("--out") + 1]
    assert line.startswith(f"mam2: error: --out {place}: cannot be written: ")
    assert "File too large" in line or "os error 27" in line
    if verb not in ("demo", "tokenize"):  # which continue from existing files
        assert os.listdir(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_a_place_that_is_no_folder_is_one_line_before_any_work(verb, clips, run, tmp_path, capsys, monkeypatch):
    if verb == "parquet":
        pytest.importorskip("pyarrow")
    monkeypatch.setattr("mam2.engine.data.manifest.scan", lambda *_, **__: pytest.fail("videos were opened"))
    monkeypatch.setattr("mam2.engine.checkpoints.load.load_model", lambda *_, **__: pytest.fail("the model was read"))
    (tmp_path / "file").write_text("mine")
    assert "cannot be written: " in error_line(capsys, *verbs(clips, run, tmp_path / "file")[verb])
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("verb", ["pretrain", "tokenize", "finetune", "evaluate", "visualize", "embed"])
def test_the_data_is_no_place_for_results(verb, clips, run, tmp_path, capsys):
    data = tmp_path / "list.csv" if verb == "embed" else tmp_path
    (tmp_path / "list.csv").write_text(f"{read_source(clips).entries[0].path} 0\n")
    before = sorted(tmp_path.iterdir())
    arguments = {
        "pretrain": ("demo",),
        "tokenize": ("demo", "--data.recorded", 1),
        "finetune": ("demo/finetune", "--val", clips, "--scratch"),
        "evaluate": (run,),
        "visualize": (run,),
        "embed": (run,),
    }[verb]
    out = tmp_path / "x" / ".." if verb != "embed" else tmp_path / "list.npy"
    if verb == "embed":
        data = data.rename(out)
        before = sorted(tmp_path.iterdir())
    assert "is the data itself" in error_line(capsys, verb, *arguments, "--data", data, "--out", out)
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_missing_is_told_before_the_videos_are_opened(clips, tmp_path, monkeypatch, small, small_finetuning):
    monkeypatch.setattr("mam2.engine.data.manifest.scan", lambda *_, **__: pytest.fail("videos were opened"))
    config = small(tokenizer={"cache": str(tmp_path / "codes")}, data={"recorded": 1})
    with pytest.raises(UserError, match=r"codes: not a cache of codes; write one with mam2 tokenize"):
        pretrain(config, clips, tmp_path / "run", progress=False)
    with pytest.raises(UserError, match=r"nowhere: no such file or folder"):
        finetune(small_finetuning(), clips, tmp_path / "ft", val=tmp_path / "nowhere", encoder=None, progress=False)
    with pytest.raises(UserError, match="not a cache of codes"):
        CodeCache(tmp_path)


def test_skipped_names_each_file_once_and_not_what_came_back(clips, tmp_path, small):
    """A resumed run still skips a file that it skipped before, and reads another one that is readable again."""
    data = tmp_path / "data"
    data.mkdir()
    for number, entry in enumerate(read_source(clips).entries[:2]):
        (data / f"{number}.mp4").write_bytes(Path(entry.path).read_bytes())
    (data / "broken\t.mp4").write_bytes(b"")
    run = tmp_path / "run"
    config = small()
    with open_session(config, data, run, resume=False, progress=False) as session:
        session.unusable.add(Skipped(str(data / "0.mp4"), "away for a while"))
        tensors = {"a": torch.zeros(1)}
        checkpoint.write(run, 1, tensors, tensors, config, {})
    row = f'"{data}/broken\t.mp4"\tempty file\n'
    assert (run / SKIPPED).read_text() == f"{row}{data}/0.mp4\taway for a while\n"
    for _ in range(2):
        with open_session(config, data, run, resume=True, progress=False) as session:
            assert session.saved
        assert (run / SKIPPED).read_text() == row


def test_a_resumed_run_keeps_the_order_of_its_classes(clips, tmp_path, small):
    """Earlier versions numbered the folders 0, 1, 10, 2 in text order; such a run continues with that order."""
    data, run, config = tmp_path / "data", tmp_path / "run", small()
    source = Path(read_source(clips).entries[0].path)
    for name in ("0", "2", "10"):
        (data / name).mkdir(parents=True)
        (data / name / "a.mp4").write_bytes(source.read_bytes())
    with open_session(config, data, run, resume=False, progress=False) as session:
        now = session.manifest
        assert now.classes == ("0", "2", "10")
        earlier = Manifest(now.videos, now.skipped, ("0", "10", "2"))
        write_manifest(earlier, run / "manifest.jsonl")
        tensors = {"a": torch.zeros(1)}
        checkpoint.write(run, 1, tensors, tensors, config, {})
    with open_session(config, data, run, resume=True, progress=False) as session:
        assert session.manifest.classes == ("0", "10", "2")


def test_a_result_never_replaces_what_it_is_made_from(tmp_path, capsys):
    listing, log, weights = tmp_path / "list.csv", tmp_path / "log.jsonl", tmp_path / "weights.safetensors"
    for file in (listing, log, weights):
        file.write_text("kept")
    for arguments, expected in (
        (("probe", "x", "--data", listing, "--out", listing), "is the data itself"),
        (("probe", "x", "--data", f"{listing}:train", "--out", listing), "is the data itself"),
        (("probe", "x", "--data", tmp_path, "--val", listing, "--out", listing), "is the data itself"),
        (("plot", tmp_path, "--out", log), "expected a name that ends in .png"),
        (("convert-tokenizer", weights, "--out", weights), "is the checkpoint itself"),
    ):
        assert expected in error_line(capsys, *arguments)
    assert [file.read_text() for file in (listing, log, weights)] == ["kept"] * 3


@pytest.mark.parametrize("fails", [False, True])
def test_a_session_closes_every_loader_it_owns(clips, tmp_path, small, fails):
    closed = []

    class Loader(contextlib.AbstractContextManager):
        def __exit__(self, *_):
            closed.append(self)

    loader = Loader()
    with (
        contextlib.suppress(ZeroDivisionError),
        open_session(small(), clips, tmp_path / "run", resume=False, progress=False) as session,
    ):
        session.own(loader)
        stream = session.loader.stream()
        next(stream)
        if fails:
            raise ZeroDivisionError
    assert closed == [loader]
    with pytest.raises(StopIteration):
        next(stream)


def test_a_failing_setup_leaves_no_open_loader(clips, tmp_path, small, monkeypatch):
    """An error after the training loader was opened closes the loader: none of its threads is left."""
    closed, close = [], ClipLoader.close
    monkeypatch.setattr(ClipLoader, "close", lambda self: closed.append(self) or close(self))
    monkeypatch.setattr(ClipLoader, "cropper", property(lambda self: 1 / 0))
    with pytest.raises(ZeroDivisionError), open_session(small(), clips, tmp_path / "run", resume=False, progress=False):
        pass
    assert len(closed) == 1
