"""Classes of unlabeled videos of a folder, a list and a stream: correct, and written to files and pictures."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import image

from mam2.engine import UserError
from mam2.engine.checkpoints import checkpoint
from mam2.engine.checkpoints.classifiers import CLASSES, build_classifier, load_classifier
from mam2.engine.data.decoding import decode_frames
from mam2.engine.data.video import Skipped
from mam2.engine.evaluation.prediction import Prediction, Predictor, predict
from tests.helpers.commands import exit_status

pytestmark = pytest.mark.usefixtures("float32")
NAMES = ("archery", "juggling", "wave")


@pytest.fixture(scope="module")
def videos(tmp_path_factory, write_video):
    """Four videos of noise, 32² and 16 frames, and one of garbage between them."""
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    for name in ("a", "b", "d é", "e"):
        small = rng.integers(0, 256, (16, 4, 4, 3), dtype=np.uint8)
        write_video(folder / f"{name}.mp4", small.repeat(8, 1).repeat(8, 2))
    (folder / "c.mp4").write_bytes(b"no video" * 50)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, small_finetuning):
    """A classifier with random weights, saved like that of a run."""
    config = small_finetuning(
        data={"frames": 4, "stride": 3, "size": 32, "threads": 1},
        model={"width": 24, "depth": 1, "heads": 2, "classes": 3},
        test={"temporal": 2, "spatial": 1, "batch": 3},
    )
    torch.manual_seed(0)
    model = build_classifier(config)
    torch.nn.init.normal_(model.head.weight)
    folder = tmp_path_factory.mktemp("run")
    checkpoint.write_best(folder, 1, model.state_dict(), config, {CLASSES: json.dumps(NAMES)}, {})
    return folder


def plain(run, path):
    """Mean softmax of the first and the last clip, in a plain loop."""
    model = load_classifier(run)[0].eval()
    clips = [decode_frames(str(path), [start, start + 3, start + 6, start + 9]) for start in (0, 6)]
    with torch.no_grad():
        logits = [model(torch.from_numpy(clip).permute(3, 0, 1, 2)[None]) for clip in clips]
    return torch.stack([each.double().softmax(-1)[0] for each in logits]).mean(0).numpy()


def test_a_folder_gets_the_mean_over_views_and_the_broken_file_is_named(run, videos):
    seen = []
    result = predict(run, videos, on_result=seen.append, progress=False)
    assert [Path(found.path).name for found in result.predictions] == ["a.mp4", "b.mp4", "d é.mp4", "e.mp4"]
    assert [entry.path for entry in result.skipped] == [str(videos / "c.mp4")]
    assert len(seen) == 5
    for found in result.predictions:
        expected = plain(run, found.path)
        np.testing.assert_allclose(found.probabilities, expected, atol=1e-6)
        order = np.argsort(-expected)
        assert found.top(2) == [(NAMES[place], pytest.approx(expected[place], abs=1e-6)) for place in order[:2]]
        assert len(found.top(0)) == 3
        assert found.views == 2


@pytest.mark.parametrize("group", [1, 2, 8])
def test_a_stream_is_taken_as_it_comes_and_gives_the_same(run, videos, group):
    taken = []

    def names():
        for path in sorted(videos.iterdir()):
            taken.append(path)
            yield path

    predictor, found = Predictor(run), []
    for one in predictor.stream(names(), group=group):
        found.append(one)
        assert len(taken) <= len(found) + group - 1
    whole = predict(run, videos, progress=False)
    assert [type(one) for one in found] == [Prediction, Prediction, Skipped, Prediction, Prediction]
    for one, other in zip([one for one in found if isinstance(one, Prediction)], whole.predictions, strict=True):
        assert one.path == other.path
        np.testing.assert_allclose(one.probabilities, other.probabilities, atol=1e-6)


def test_a_file_that_breaks_later_is_skipped_too(run, videos, tmp_path):
    path = tmp_path / "cut.mp4"
    path.write_bytes((videos / "a.mp4").read_bytes())
    predictor = Predictor(run)

    def names():
        yield path
        yield videos / "b.mp4"

    from mam2.engine.evaluation import prediction as module

    probe = module.probe_file

    def probe_and_break(name):
        found = probe(name)
        if name == str(path):
            path.write_bytes(b"gone" * 100)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "probe_file", probe_and_break)
        first, second = predictor.stream(names())
    assert isinstance(first, Skipped)
    assert first.path == str(path)
    assert isinstance(second, Prediction)


def test_files_hold_what_the_terminal_shows(run, videos, tmp_path, capsys):
    status = exit_status(
        "predict", run, "--data", videos, "--out", tmp_path / "p.json", "--draw", tmp_path / "drawn", "--top", 2
    )
    assert status == 0
    output = capsys.readouterr()
    written = json.loads((tmp_path / "p.json").read_text())
    assert written["classes"] == list(NAMES)
    assert (written["temporal"], written["spatial"]) == (2, 1)
    assert [entry["path"] for entry in written["skipped"]] == [str(videos / "c.mp4")]
    lines = output.out.splitlines()
    assert len(lines) == len(written["predictions"]) == 4
    for line, entry in zip(lines, written["predictions"], strict=True):
        first, second = entry["top"]
        assert line.split()[:2] == [first["class"], f"{100 * first['probability']:.1f}"]
        assert f"{second['class']:<8} {100 * second['probability']:5.1f} %" in line
        assert line.endswith(Path(entry["path"]).name)
    assert f"skipped: {videos / 'c.mp4'}: damaged, or not a video" in output.err
    assert "4 videos, 1 skipped" in output.err
    pictures = sorted((tmp_path / "drawn").iterdir())
    assert [path.name for path in pictures] == ["00001-a.png", "00002-b.png", "00003-d-é.png", "00004-e.png"]
    assert image.imread(pictures[0])[..., :3].std() > 0.1


def test_csv_and_json_lines(run, videos, tmp_path):
    assert exit_status("predict", run, "--data", videos, "--out", tmp_path / "p.csv", "--top", 0) == 0
    with (tmp_path / "p.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(Path(row["path"]).name, row["rank"]) for row in rows[:2]] == [("c.mp4", ""), ("a.mp4", "1")]
    assert rows[0]["problem"] == "damaged, or not a video"
    assert sum(float(row["probability"]) for row in rows[1:4]) == pytest.approx(1, abs=1e-5)
    files = [videos / "b.mp4", videos / "c.mp4"]
    assert exit_status("predict", run, "--data", *files, "--out", tmp_path / "p.jsonl") == 0
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [line["path"] for line in lines] == [str(path) for path in files]
    assert lines[0]["top"][0]["class"] in NAMES
    assert "reason" in lines[1]


def test_names_come_over_the_standard_input(run, videos, tmp_path, monkeypatch, capsys):
    names = b"\n".join(os.fsencode(path) for path in sorted(videos.iterdir())) + b"\n\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(names)))
    assert exit_status("predict", run, "--data", "-", "--out", tmp_path / "p.jsonl") == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert len((tmp_path / "p.jsonl").read_text().splitlines()) == 5


def test_what_came_before_an_interruption_is_written(run, videos, tmp_path):
    def interrupted(found):
        if found.path.endswith("b.mp4"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(run, videos, out=tmp_path / "p.json", on_result=interrupted, progress=False)
    written = json.loads((tmp_path / "p.json").read_text())
    assert [Path(entry["path"]).name for entry in written["predictions"]] == ["a.mp4", "b.mp4"]


def test_mistakes_are_named_before_anything_is_classified(run, videos, tmp_path, capsys):
    for arguments, message in {
        (run, "--data", videos, "--out", tmp_path / "p.txt"): "expected a name that ends in .json, .csv, .jsonl",
        (run, "--data", videos, "--out", tmp_path / "no" / "p.csv"): "cannot be written: No such file or directory",
        (run, "--data", videos, "--top", "-1"): "--top -1: expected at least 0",
        (run, "--data", "-", videos): "only - for a list",
        (run, "--data", videos / "c.mp4"): "no video can be used (1 file)",
        (videos, "--data", videos): "config.json cannot be read",
    }.items():
        assert exit_status("predict", *arguments) == 2
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"--classes: 2 names, but .* has 3 classes"):
        Predictor(run, names=("one", "two"))
