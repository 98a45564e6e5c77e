"""Probes averaged over seeds: `python -m benchmarks.probe_seeds`."""

from __future__ import annotations

import json

import pytest

from benchmarks.probe_seeds import main
from mam2.engine.data.manifest import Manifest
from mam2.engine.data.video import Video


@pytest.fixture
def question(tmp_path):
    """Four test videos of two speakers, and the answers of two seeds of one encoder and one of another."""
    clips = [tmp_path / f"{name}.mp4" for name in "abcd"]
    for clip in clips:
        clip.write_bytes(b"")
    (tmp_path / "test.csv").write_text("".join(f"{clip} {number % 2}\n" for number, clip in enumerate(clips)))
    meta = "".join(f"{clip},{speaker}\n" for clip, speaker in zip(clips, "FFMM", strict=True))
    (tmp_path / "meta.csv").write_text("path,speaker\n" + meta)
    rights = {"m-0": "1110", "m-1": "1100", "v-0": "1000", "m-0 + pixels": "1111", "m-1 + pixels": "1101"}
    scores = [{"checkpoint": run, "pool": "time", "probe": "linear", "right": right} for run, right in rights.items()]
    scores.append({"checkpoint": "m-0", "pool": "time", "probe": "knn", "right": "0000"})
    (tmp_path / "one.json").write_text(json.dumps({"scores": scores[:1]}))
    (tmp_path / "others.json").write_text(json.dumps({"scores": scores[1:]}))
    return tmp_path


def called(folder, *options, files=("one.json", "others.json"), group="meta.csv:speaker"):
    places = [str(folder / file) for file in files]
    return main([*places, "--val", str(folder / "test.csv"), "--group", str(folder / group), *options])


def test_seeds_are_averaged_and_compared_over_groups(question, capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.probe_seeds.read_manifest", listed(question))
    assert called(question, "--encoder", "motion=m-0,m-1", "--encoder", "videomae=v-0", "--against", "videomae") == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert rows == [
        ["motion", "time", "2", "62.5", "75.0, 50.0", "25.0 to 100.0", "+37.5 [+25.0 to +50.0]"],
        ["motion + pixels", "time", "2", "87.5", "100.0, 75.0", "75.0 to 100.0", "+62.5 [+50.0 to +75.0]"],
        ["videomae", "time", "1", "25.0", "25.0", "0.0 to 50.0", ""],
    ]


def test_runs_without_a_row_with_pixels_are_not_counted_in_it(question, capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.probe_seeds.read_manifest", listed(question))
    assert called(question, "--encoder", "all=m-0,v-0") == 0
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert [row[:4] for row in rows[2:]] == [["all", "time", "2", "50.0"], ["all + pixels", "time", "1", "100.0"]]


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        (("--encoder", "motion=m-0,m-2"), {}, "no answers of m-2 with the pool time"),
        (("--encoder", "motion"), {}, "expected NAME=RUN,RUN"),
        (("--encoder", "motion=m-0", "--against", "other"), {}, "expected one of the encoders motion"),
        (("--encoder", "motion=m-0"), {"group": "meta.csv:person"}, "no column for 'person'"),
        (("--encoder", "motion=m-0"), {"files": ["meta.csv"]}, "meta.csv: expected a file of mam2 probe"),
    ],
)
def test_what_does_not_fit_is_named(question, capsys, monkeypatch, options, changes, message):
    monkeypatch.setattr("benchmarks.probe_seeds.read_manifest", listed(question))
    assert called(question, *options, **changes) == 2
    assert message in capsys.readouterr().err


def test_answers_of_another_list_are_refused(question, capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.probe_seeds.read_manifest", listed(question, names="abc"))
    assert called(question, "--encoder", "motion=m-0") == 2
    assert "has answers for 4 videos, the test list has 3" in capsys.readouterr().err


def listed(folder, names="abcd"):
    """Instead of reading videos: their paths and labels."""
    videos = tuple(Video(str(folder / f"{name}.mp4"), 0, 8, 32, 32, "h264", 15.0, 0) for name in names)
    return lambda *_, **__: Manifest(videos)
