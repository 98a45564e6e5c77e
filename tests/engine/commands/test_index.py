from __future__ import annotations

import collections
import dataclasses
import os
import subprocess
from pathlib import Path

import av
import pytest

from mam2.engine.data import inspect as index
from mam2.engine.data.encoding import video_writer
from mam2.engine.data.manifest import Manifest, Skipped, Video, read_manifest, read_saved_manifest
from tests.helpers.commands import MAM2_COMMAND, outcome

GOOD = Video("a.mp4", -1, 100, 320, 240, "h264", 30.0, 0, keyframe_median=30, keyframe_max=30, content="a")


def many(count: int, **values: object) -> list[Video]:
    return [
        dataclasses.replace(GOOD, path=f"{number}.mp4", content=str(number), **values)  # type: ignore[arg-type]
        for number in range(count)
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"keyframe_max": 250}, "20 of 20 videos: key frames up to 250 frames apart"),
        ({"width": 1920, "height": 1088}, "20 of 20 videos: a shorter side above 480"),
        ({"width": 340, "height": 256}, "20 of 20 videos: sides that are not multiples of 16"),
        ({"b_frames": True}, "20 of 20 videos: B-frames"),
        ({"codec": "mpeg4"}, "20 of 20 videos: NVDEC cannot decode them"),
        ({"rotation": 90}, "20 of 20 videos: NVDEC cannot decode them"),
    ],
)
def test_advice_names_what_is_wrong_and_the_command(values, message):
    (hint,) = index.advice(many(20, **values))
    assert message in hint
    assert "mam2 transcode DATA --out FOLDER" in hint


def test_good_videos_get_no_advice():
    assert index.advice(many(20)) == []
    assert index.advice([*many(19), dataclasses.replace(GOOD, keyframe_max=250)]) == []  # one of twenty is too few


def test_mixed_rates_and_copies_are_told():
    mixed = [*many(3), dataclasses.replace(GOOD, path="x.mp4", fps=60.0, content="x")]
    assert "rates from 30 to 60 frames/s" in index.advice(mixed)[0]
    copies = [*many(3), dataclasses.replace(GOOD, path="copy.mp4", content="1")]
    assert "1 copy of other videos: remove them" in index.advice(copies)[0]
    assert index.advice([*many(3), many(1)[0]]) == []  # a list may name a file twice


def test_the_summary_counts_what_is_there():
    videos = [
        *many(3, label=0, bytes=10**9, rotation=90),
        dataclasses.replace(GOOD, codec="av1", label=1, frames=30, variable_rate=True, path="v"),
        dataclasses.replace(GOOD, codec="vp9", width=640, height=480, path="w", fps=0.0),
    ]
    skipped = [Skipped(f"{number}.avi", "empty file") for number in range(5)]
    lines = index.summary(Manifest(tuple(videos), tuple(skipped), ("a", "b")), (12.3, 4)).splitlines()
    summary = {line[:12].strip(): line[12:] for line in lines}
    assert summary["videos"] == "5 usable, 5 skipped; 3.00 GB, 11.0 seconds"
    assert summary["classes"] == "2 with 1 to 3 videos each, 1 video without a label"
    assert summary["codecs"] == "h264 3, av1 1, vp9 1"
    assert summary["frames"] == "30 to 100, median 100; 1 video shorter than 16 frames at stride 4 (61 frames)"
    assert summary["short side"] == "240 to 480, median 240 pixels; 3 videos rotated"
    assert summary["rate"] == "30 to 30, median 30 frames/s; 1 video with a variable rate, 1 without a rate"
    assert summary["NVDEC"].startswith("1 video on every GPU since Turing; AV1 (1 video) only on")
    assert summary["DALI on CPU"] == "1 video"
    assert summary["PyAV"] == "5 videos; 12.3 clips/s per thread, measured here on 4 of them"
    assert "  5 × empty file: 0.avi, 1.avi, 2.avi, …" in lines
    assert not {"HDR", "interlaced"} & summary.keys()


def test_the_summary_tells_what_is_decoded_as_it_is():
    videos = [*many(2, transfer="pq"), *many(1, transfer="hlg", interlaced=True), *many(1, transfer="sdr")]
    message = index.summary(Manifest(tuple(videos)), (0.0, 0))
    assert "HDR         3 videos decoded without tone mapping" in message
    assert "interlaced  1 video not deinterlaced" in message
    assert "speed not measured: no video can be decoded, or a clip takes more than 0.5 GiB" in message


def test_advice_on_nvdec_is_for_what_nvdec_decodes():
    assert index.advice(many(20, codec="av1", b_frames=True, width=340)) == index.advice(many(20, codec="av1"))


def test_hdr_and_interlaced_files_are_recognized(tmp_path, numbered_frames):
    for name, options, trc in (
        ("sdr", {}, 1),
        ("pq", {}, 16),
        ("hlg", {}, 18),
        ("fields", {"x264-params": "interlaced=1"}, 1),
        ("b", {"bf": "2"}, 1),
    ):
        with video_writer(tmp_path / f"{name}.mp4", "libx264", (64, 48), options={"bf": "0"} | options) as (
            container,
            stream,
        ):
            stream.codec_context.color_trc = trc
            for image in numbered_frames(6):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
    videos = {Path(video.path).stem: video for video in read_manifest(tmp_path, progress=False).videos}
    facts = {name: (video.transfer, video.interlaced, video.b_frames) for name, video in videos.items()}
    assert facts == {
        "sdr": ("sdr", False, False),
        "pq": ("pq", False, False),
        "hlg": ("hlg", False, False),
        "fields": ("sdr", True, False),
        "b": ("sdr", False, True),
    }


def test_clips_that_do_not_fit_into_memory_are_left_out_of_the_measurement(tmp_path, write_video, numbered_frames):
    good = write_video(tmp_path / "good.mp4", numbered_frames(20))
    sound = dataclasses.replace(GOOD, path=str(good), frames=20)
    large = dataclasses.replace(sound, width=8192, height=8192)
    assert index.measure_clips_per_s([large, large]) == (0.0, 0)
    assert index.measure_clips_per_s([large, sound])[1] == 1


def test_the_rate_is_measured_on_files_that_decode(tmp_path, write_video, numbered_frames):
    good = write_video(tmp_path / "good.mp4", numbered_frames(20))
    videos = [dataclasses.replace(GOOD, path=str(path), frames=20) for path in (good, tmp_path / "gone.mp4", good)]
    rate, count = index.measure_clips_per_s(videos)
    assert rate > 0
    assert count == 2
    assert index.measure_clips_per_s(videos[1:2]) == (0.0, 0)


def test_the_verb_writes_next_to_the_data_and_looks_again_only_at_changes(
    tmp_path, capsys, write_video, numbered_frames
):
    for name in ("x/a.mp4", "y/b.mp4"):
        write_video(tmp_path / "data" / name, numbered_frames(6))
    (tmp_path / "data" / "y" / "c.mp4").write_bytes(b"")
    status, out, _ = outcome(capsys, "index", tmp_path / "data", "--plot", tmp_path / "plot.png")
    written = tmp_path / "data.index.jsonl"
    assert status == 0
    assert "2 usable, 1 skipped" in out
    assert "1 × empty file" in out
    assert f"{written}: 3 new files, 0 changed, 0 removed, 0 unchanged" in out
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert [Path(video.path).name for video in read_saved_manifest(written).videos] == ["a.mp4", "b.mp4"]

    (tmp_path / "data" / "x" / "a.mp4").unlink()
    os.utime(tmp_path / "data" / "y" / "b.mp4", ns=(1, 1))
    out = outcome(capsys, "index", tmp_path / "data")[1]
    assert f"{written}: 0 new files, 1 changed, 1 removed, 1 unchanged and not opened" in out
    assert [Path(video.path).name for video in read_saved_manifest(written).videos] == ["b.mp4"]


def test_a_place_that_cannot_be_written_is_told_before_the_scan(tmp_path, capsys):
    status, _, err = outcome(capsys, "index", tmp_path, "--out", tmp_path / "no" / "folder.jsonl")
    assert status == 2
    assert err == (
        f"mam2: error: --out {tmp_path / 'no' / 'folder.jsonl'}: cannot be written: No such file or directory; "
        f"create the folder {tmp_path / 'no'}, or choose another path\n"
    )


def test_a_broken_index_is_rewritten_and_a_foreign_file_is_left_alone(tmp_path, capsys, write_video, numbered_frames):
    write_video(tmp_path / "data" / "a.mp4", numbered_frames(6))
    broken, foreign = tmp_path / "data.index.jsonl", tmp_path / "notes.jsonl"
    for file in (broken, foreign):
        file.write_text("{}\n")
    status, out, _ = outcome(capsys, "index", tmp_path / "data")
    assert status == 0
    assert f"{broken}: not a saved manifest (KeyError: 'classes'): it is written again" in out
    assert len(read_saved_manifest(broken).videos) == 1
    status, _, err = outcome(capsys, "index", tmp_path / "data", "--out", foreign)
    assert status == 2
    assert "choose another file, or remove this one" in err
    assert foreign.read_text() == "{}\n"
    list_of_one = tmp_path / "list.csv"
    list_of_one.write_text("data/a.mp4 0\n")
    status, _, err = outcome(capsys, "index", list_of_one, "--out", list_of_one)
    assert (status, list_of_one.read_text()) == (2, "data/a.mp4 0\n")
    assert "is the data itself" in err
    assert outcome(capsys, "index", tmp_path / "data", "--plot", "plot.doc")[0] == 2


def test_a_full_disk_is_one_line_and_leaves_the_index_as_it_was(
    tmp_path, capsys, write_video, numbered_frames, full_disk
):
    write_video(tmp_path / "data" / "a.mp4", numbered_frames(6))
    outcome(capsys, "index", tmp_path / "data")
    before = (tmp_path / "data.index.jsonl").read_bytes()
    with full_disk(20):
        status, _, err = outcome(capsys, "index", tmp_path / "data")
    assert (status, err.count("\n")) == (2, 1)
    assert f"--out {tmp_path / 'data.index.jsonl'}: cannot be written: File too large" in err
    assert (tmp_path / "data.index.jsonl").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["data", "data.index.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_names_that_are_not_utf_8_reach_a_strict_output(tmp_path, encoding, write_video, numbered_frames):
    data = tmp_path / os.fsdecode(b"d\xe9")
    write_video(data / "a.mp4", numbered_frames(6))
    (data / os.fsdecode(b"caf\xe9\n.mp4")).write_bytes(b"")
    environment = os.environ | {"PYTHONIOENCODING": f"{encoding}:strict", "LC_ALL": "C.UTF-8"}
    command = [*MAM2_COMMAND, "index", data]
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert b"d\xe9/caf\xe9\\n.mp4\n" in done.stdout
    assert (b"\xc3\x97" in done.stdout) == (encoding == "utf-8")
    assert (tmp_path / os.fsdecode(b"d\xe9.index.jsonl")).is_file()


@pytest.mark.slow
def test_every_format_is_counted(tmp_path, capsys, clip_set):
    arguments = ("index", clip_set.folder, "--out", tmp_path / "clips.jsonl")
    status, out, _ = outcome(capsys, *arguments)
    assert status == 0
    usable = clip_set.listed.keys() - clip_set.broken
    assert f"{len(usable)} usable, {len(clip_set.broken)} skipped" in out
    for codec, count in collections.Counter(clip_set.listed[name]["codec"] for name in usable).items():
        assert f"{codec} {count}" in out
    assert "no video stream" in out
    assert f"0 changed, 0 removed, {len(clip_set.listed)} unchanged" in outcome(capsys, *arguments)[1]
