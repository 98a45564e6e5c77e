from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from mam2.engine import cli
from mam2.engine.data import index
from mam2.engine.data.manifest import Manifest, Skipped, Video, read_saved_manifest

CLIPS = Path(__file__).resolve().parents[2] / "shared" / "clips"
GOOD = Video("a.mp4", -1, 100, 320, 240, "h264", 30.0, 0, keyframe_median=30, keyframe_max=30, content="a")


def many(count: int, **values: object) -> list[Video]:
    return [
        dataclasses.replace(GOOD, path=f"{number}.mp4", content=str(number), **values)  # type: ignore[arg-type]
        for number in range(count)
    ]


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    told = capsys.readouterr()
    return stop.value.code, told.out, told.err


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"keyframe_max": 250}, "20 of 20 videos have key frames up to 250 frames apart"),
        ({"width": 1920, "height": 1080}, "20 of 20 videos have a shorter side above 480"),
        ({"codec": "mpeg4"}, "20 of 20 videos are not for NVDEC"),
        ({"rotation": 90}, "20 of 20 videos are not for NVDEC"),
    ],
)
def test_advice_names_what_is_wrong_and_the_command(values, told):
    (hint,) = index.advice(many(20, **values))
    assert told in hint
    assert "mam2 transcode DATA --out FOLDER" in hint


def test_good_videos_get_no_advice():
    assert index.advice(many(20)) == []
    assert index.advice([*many(19), dataclasses.replace(GOOD, keyframe_max=250)]) == []  # one of twenty is no reason


def test_mixed_rates_and_copies_are_told():
    mixed = [*many(3), dataclasses.replace(GOOD, path="x.mp4", fps=60.0, content="x")]
    assert "rates from 30 to 60 frames/s" in index.advice(mixed)[0]
    copies = [*many(3), dataclasses.replace(GOOD, path="copy.mp4", content="1")]
    assert "1 videos are copies of others" in index.advice(copies)[0]
    assert index.advice([*many(3), many(1)[0]]) == []  # a list may name a file twice


def test_the_summary_counts_what_is_there():
    videos = [
        *many(3, label=0, bytes=10**9, rotation=90),
        dataclasses.replace(GOOD, codec="av1", label=1, frames=30, variable_rate=True, path="v"),
        dataclasses.replace(GOOD, codec="vp9", width=640, height=480, path="w", fps=0.0),
    ]
    skipped = [Skipped(f"{number}.avi", "empty file") for number in range(5)]
    lines = index.summary(Manifest(tuple(videos), tuple(skipped), ("a", "b")), (12.3, 4)).splitlines()
    told = {line[:12].strip(): line[12:] for line in lines}
    assert told["videos"] == "5 usable, 5 skipped; 3.00 GB, 0.00 hours"
    assert told["classes"] == "2 with 1 to 3 videos, 1 videos without a label"
    assert told["codecs"] == "h264 3, av1 1, vp9 1"
    assert told["frames"] == "30 to 100, median 100; 1 videos have fewer than a clip of 16, 4 apart"
    assert told["short side"] == "240 to 480, median 240 pixels; 3 videos are rotated"
    assert told["rate"] == "30 to 30, median 30 frames/s; 1 vary, 1 do not say"
    assert told["NVDEC"].startswith("1 videos on every GPU since Turing; AV1 (1 videos) only on")
    assert told["DALI on CPU"] == "1 videos"
    assert told["PyAV"] == "5 videos; 12.3 clips/s a thread, measured here on 4 of them"
    assert "  5 × empty file: 0.avi, 1.avi, 2.avi, …" in lines


def test_the_rate_is_measured_on_files_that_decode(tmp_path, write_video, numbered_frames):
    good = write_video(tmp_path / "good.mp4", numbered_frames(20))
    videos = [dataclasses.replace(GOOD, path=str(path), frames=20) for path in (good, tmp_path / "gone.mp4", good)]
    rate, count = index.measure_clips_per_s(videos)
    assert rate > 0
    assert count == 2
    assert index.measure_clips_per_s(videos[1:2]) == (0.0, 0)


def test_the_verb_writes_beside_the_data_and_looks_again_only_at_changes(
    tmp_path, capsys, write_video, numbered_frames
):
    for name in ("x/a.mp4", "y/b.mp4"):
        write_video(tmp_path / "data" / name, numbered_frames(6))
    (tmp_path / "data" / "y" / "c.mp4").write_bytes(b"")
    status, out, _ = run(capsys, "index", tmp_path / "data", "--plot", tmp_path / "plot.png")
    written = tmp_path / "data.index.jsonl"
    assert status == 0
    assert "2 usable, 1 skipped" in out
    assert "1 × empty file" in out
    assert f"{written}: 3 files new, 0 changed, 0 gone, 0 unchanged" in out
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert [Path(video.path).name for video in read_saved_manifest(written).videos] == ["a.mp4", "b.mp4"]

    (tmp_path / "data" / "x" / "a.mp4").unlink()
    os.utime(tmp_path / "data" / "y" / "b.mp4", ns=(1, 1))
    out = run(capsys, "index", tmp_path / "data")[1]
    assert f"{written}: 0 files new, 1 changed, 1 gone, 1 unchanged and not opened" in out
    assert [Path(video.path).name for video in read_saved_manifest(written).videos] == ["b.mp4"]


def test_a_place_that_cannot_be_written_is_told_before_the_scan(tmp_path, capsys):
    status, _, err = run(capsys, "index", tmp_path, "--out", tmp_path / "no" / "folder.jsonl")
    assert status == 2
    assert "name another place with --out" in err


@pytest.mark.slow
@pytest.mark.skipif(not CLIPS.is_dir(), reason="the real clips are not here")
def test_real_clips(tmp_path, capsys):
    status, out, _ = run(capsys, "index", CLIPS, "--out", tmp_path / "clips.jsonl")
    assert status == 0
    assert "84 usable, 7 skipped" in out
    for word in ("h264 42", "mpeg4 15", "vp9 14", "no video stream", "12336x12336", "--gop 30"):
        assert word in out
    assert "0 changed, 0 gone, 91 unchanged" in run(capsys, "index", CLIPS, "--out", tmp_path / "clips.jsonl")[1]
