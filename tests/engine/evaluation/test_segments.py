"""Probes of temporal segments from features of windows: the right windows, no video in both training and test."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest

from mam2.engine import UserError, probe
from mam2.engine.evaluation.embedding import Embedding
from mam2.engine.evaluation.embedding_files import read_embedding, write_embedding
from mam2.engine.evaluation.segments import Segment, probe_segments, read_segments, segment_features
from tests.helpers.commands import exit_status

SUFFIXES = (".npy", ".npz", ".safetensors", *([".parquet"] if importlib.util.find_spec("pyarrow") else []))
VIDEOS = 8
SECONDS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Windows of 1 s every 0.5 s of eight videos: `jump` from 4 to 8 s, else `walk`, seen in one of three values."""
    folder = tmp_path_factory.mktemp("segments")
    rng = np.random.default_rng(0)
    starts = np.arange(0, SECONDS - 0.5, 0.5)
    features = rng.normal(size=(VIDEOS, len(starts), 3)).astype(np.float32)
    jumping = (starts + 0.5 >= 4) & (starts + 0.5 < 8)
    features[:, :, 1] += np.where(jumping, 20, -20)
    embedding = Embedding(
        features=features.reshape(-1, 3),
        paths=tuple(str(folder / f"{number}.mp4") for number in range(VIDEOS) for _ in starts),
        labels=np.full(VIDEOS * len(starts), -1),
        start_s=np.tile(starts, VIDEOS),
        end_s=np.tile(starts + 1, VIDEOS),
        about={"layer": 2, "pool": "mean", "classes": []},
    )
    for suffix in SUFFIXES:
        write_embedding(folder / f"f{suffix}", embedding)
    lines = ["path,start_s,end_s,label"]
    for number in range(VIDEOS):
        lines += [f"{number}.mp4,0,4,walk", f"{number}.mp4,4,8,jump", f"{number}.mp4,8,12,walk"]
    (folder / "all.csv").write_text("\n".join(lines) + "\n")
    (folder / "train.csv").write_text("\n".join(lines[:16]) + "\n")
    (folder / "test.csv").write_text("\n".join([lines[0], *lines[16:], "absent.mp4,0,1,walk"]) + "\n")
    return folder


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_is_read_as_it_was_written(folder, suffix):
    found = read_embedding(folder / f"f{suffix}")
    assert found.features.shape == (VIDEOS * 23, 3)
    assert found.start_s is not None
    assert found.start_s[:3].tolist() == [0, 0.5, 1]
    assert found.paths[23] == str(folder / "1.mp4")
    assert found.about == {"layer": 2, "pool": "mean", "classes": []}


def test_a_segment_is_the_mean_of_the_windows_whose_middle_lies_in_it(folder):
    embedding, path = read_embedding(folder / "f.npz"), str(folder / "1.mp4")
    segments = [Segment(path, 1.0, 2.5, "x"), Segment(path, 3.1, 3.2, "x"), Segment(str(folder / "9.mp4"), 0, 1, "x")]
    features, there = segment_features(embedding, segments)
    own = embedding.features[23:46]  # middles 0.5, 1, 1.5, …
    np.testing.assert_allclose(features[0], own[1:4].mean(0), rtol=1e-6)
    np.testing.assert_allclose(features[1], own[5], rtol=1e-6)  # the middle at 3.0 is the nearest to 3.15
    assert there.tolist() == [True, True, False]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_the_windows_show_is_found(folder, suffix, tmp_path, capsys):
    lists = ("--data", folder / "train.csv", "--val", folder / "test.csv")
    assert exit_status("probe", folder / f"f{suffix}", *lists, "--out", tmp_path / "p.json") == 0
    message = capsys.readouterr().out
    assert "15 training and 9 test segments of 2 classes, 1 left out; always the most frequent class: 66.7 %" in message
    written = json.loads((tmp_path / "p.json").read_text())
    assert [(score["probe"], score["accuracy"], score["layer"]) for score in written["scores"]] == [
        ("linear", 1.0, 2),
        ("knn", 1.0, 2),
    ]
    assert (written["groups"], written["both"], written["unit"]) == (3, 0, "segments")


def test_without_a_test_list_whole_videos_are_held_out(folder):
    report = probe_segments([folder / "f.npz"], folder / "all.csv", None, probes=("linear",))
    assert (report.train, report.test, report.both, report.groups) == (18, 6, 0, 2)
    assert report.scores[0].accuracy == 1


def test_labels_that_windows_do_not_show_are_not_found(folder, tmp_path):
    rng = np.random.default_rng(1)
    lines = (folder / "all.csv").read_text().splitlines()
    drawn = [f"{folder / line.split(',')[0]},{','.join(line.split(',')[1:3])}" for line in lines[1:]]
    for name, part in {"train": drawn[:15], "test": drawn[15:]}.items():
        rows = [f"{line},{rng.choice(['a', 'b'])}" for line in part]
        (tmp_path / f"{name}.csv").write_text("\n".join([lines[0], *rows]) + "\n")
    report = probe([folder / "f.npz"], tmp_path / "train.csv", tmp_path / "test.csv", probes=["linear", "knn"])
    assert all(score.accuracy < 0.9 for score in report.scores)


def test_mistakes_are_named(folder, tmp_path):
    lists = {
        "path,start_s,label\na.mp4,0,x\n": "no column for the end in seconds",
        "path,start,end,label\na.mp4,3,2,x\n": "line 2: expected a label and seconds with 0 ≤ start < end",
        "path,start,end,label\na.mp4,1,soon,x\n": "line 2: expected a label and seconds",
        "path,start,end,label\na.mp4,1,2\n": "line 2 has 3 columns, the header has 4",
        "path,start,end,label\n": "a header but no segments",
    }
    for text, message in lists.items():
        (tmp_path / "list.csv").write_text(text)
        with pytest.raises(UserError, match=message):
            read_segments(tmp_path / "list.csv")
    with pytest.raises(UserError, match="name checkpoints, or files of features, not both"):
        probe([folder / "f.npz", "random"], folder / "all.csv")
    with pytest.raises(UserError, match="segments are probed by linear and knn"):
        probe([folder / "f.npz"], folder / "all.csv", probes=["attentive"])
    whole = Embedding(features=np.zeros((1, 3), np.float32), paths=("a",), labels=np.zeros(1, int), about={"layer": 1})
    write_embedding(tmp_path / "whole.npz", whole)
    with pytest.raises(UserError, match=r"whole\.npz: holds one feature per video; segments need windows"):
        probe([tmp_path / "whole.npz"], folder / "all.csv")
    (tmp_path / "broken.npz").write_bytes(b"PK nothing")
    with pytest.raises(UserError, match=r"broken\.npz: expected features that mam2 embed wrote"):
        probe([tmp_path / "broken.npz"], folder / "all.csv")
