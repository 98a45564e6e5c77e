from __future__ import annotations

import csv
import os
from pathlib import Path

import av
import numpy as np
import pytest

from mam2.engine.config import UserError
from mam2.engine.data.decoding import decode_frames
from mam2.engine.data.manifest import (
    Manifest,
    Skipped,
    Video,
    probe,
    read_manifest,
    read_saved_manifest,
    write_manifest,
)

CLIPS = Path(__file__).resolve().parents[2] / "shared" / "clips"


@pytest.fixture(scope="module")
def clip_bytes(tmp_path_factory, write_video, numbered_frames) -> bytes:
    return write_video(tmp_path_factory.mktemp("one") / "clip.mp4", numbered_frames(5)).read_bytes()


def place(content: bytes, *paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def names(manifest: Manifest) -> list[str]:
    return [Path(video.path).name for video in manifest.videos]


@pytest.mark.parametrize(
    ("suffix", "encoder", "codec", "pixel_format"),
    [
        ("mp4", "libx264", "h264", "yuv420p"),
        ("webm", "libvpx-vp9", "vp9", "yuv420p"),
        ("avi", "mjpeg", "mjpeg", "yuvj420p"),
        ("avi", "mpeg4", "mpeg4", "yuv420p"),
    ],
)
def test_probe_reports_what_the_file_holds(
    tmp_path, write_video, numbered_frames, suffix, encoder, codec, pixel_format
):
    path = write_video(tmp_path / f"a.{suffix}", numbered_frames(7, 48, 64), encoder)
    expected = Video(str(path), 3, 7, 64, 48, codec, 25.0, 0, pixel_format)
    assert probe(str(path), 3) == expected


def test_class_folders_are_labels_in_the_order_of_their_names(tmp_path, clip_bytes):
    place(clip_bytes, tmp_path / "wave" / "b.mp4", tmp_path / "archery" / "c.MP4", tmp_path / "wave" / "a.avi")
    place(b"notes", tmp_path / "README.md", tmp_path / "wave" / "list.csv", tmp_path / "wave" / ".hidden.mp4")
    manifest = read_manifest(tmp_path)
    assert manifest.classes == ("archery", "wave")
    assert [(Path(video.path).name, video.label) for video in manifest.videos] == [
        ("c.MP4", 0),
        ("a.avi", 1),
        ("b.mp4", 1),
    ]
    assert not manifest.skipped


def test_any_other_folder_is_searched_at_any_depth_without_labels(tmp_path, clip_bytes):
    place(clip_bytes, tmp_path / "top.mp4", tmp_path / "x" / "one.mp4", tmp_path / "x" / "y" / "two.mkv")
    manifest = read_manifest(tmp_path)
    assert names(manifest) == ["top.mp4", "one.mp4", "two.mkv"]
    assert {video.label for video in manifest.videos} == {-1}
    assert manifest.classes == ()


def test_links_that_go_round_in_a_circle_end(tmp_path, clip_bytes):
    place(clip_bytes, tmp_path / "x" / "one.mp4")
    os.symlink(tmp_path, tmp_path / "x" / "back", target_is_directory=True)
    assert names(read_manifest(tmp_path)) == ["one.mp4"]


def test_odd_names_are_found_and_opened(tmp_path, clip_bytes, monkeypatch):
    monkeypatch.chdir(tmp_path)
    odd = [os.fsdecode(b"caf\xe9.mp4"), "http:clip%03d.mp4", "pipe:0.mp4", "two\nlines.mp4", "Yards!!! #1 'x' [y].mp4"]
    place(clip_bytes, *(tmp_path / name for name in odd))
    manifest = read_manifest(".")
    assert manifest.skipped == ()
    assert names(manifest) == sorted(odd)
    assert all(os.path.isabs(video.path) for video in manifest.videos)
    for video in manifest.videos:
        assert decode_frames(video.path, 1, 2, 1).shape == (2, 48, 64, 3)


def test_a_single_video_is_a_data_set(tmp_path, clip_bytes):
    place(clip_bytes, tmp_path / "one.mp4")
    assert names(read_manifest(tmp_path / "one.mp4")) == ["one.mp4"]


def test_each_broken_file_is_named_with_its_reason(tmp_path, clip_bytes):
    place(clip_bytes, tmp_path / "good.mp4")
    place(b"", tmp_path / "empty.mp4")
    place(bytes(range(256)) * 20, tmp_path / "garbage.mp4")
    place(b"just some words\n" * 50, tmp_path / "text.avi")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    manifest = read_manifest(tmp_path)
    assert names(manifest) == ["good.mp4"]
    reasons = {Path(entry.path).name: entry.reason for entry in manifest.skipped}
    assert reasons == {
        "empty.mp4": "empty file",
        "garbage.mp4": "damaged, or not a video",
        "sound.mp4": "no video stream",
        "text.avi": "damaged, or not a video",
    }


def test_a_list_in_the_form_of_videomae(tmp_path, clip_bytes):
    elsewhere = tmp_path / "elsewhere" / "abs.mp4"
    place(clip_bytes, tmp_path / "set" / "with a space.mp4", tmp_path / "set" / "x.mp4", elsewhere)
    listed = tmp_path / "set" / "train.csv"
    listed.write_text(f"with a space.mp4 4\r\nx.mp4\n\n{elsewhere}\t0\nx.mp4,2\ngone.mp4 1\n", encoding="utf-8-sig")
    manifest = read_manifest(listed)
    assert [(Path(video.path).name, video.label) for video in manifest.videos] == [
        ("with a space.mp4", 4),
        ("x.mp4", -1),
        ("abs.mp4", 0),
        ("x.mp4", 2),
    ]
    assert manifest.skipped == (Skipped(str(tmp_path / "set" / "gone.mp4"), "does not exist"),)
    assert manifest.classes == ("0", "1", "2", "3", "4")


@pytest.mark.parametrize(
    "text",
    [
        "label\tpath\nwave\ta, b.mp4\narchery\tc.mp4\n\tc.mp4\n",
        'Filename,Class\n"a, b.mp4",wave\nc.mp4,archery\nc.mp4,\n',
    ],
)
def test_a_list_with_a_header(tmp_path, clip_bytes, text):
    place(clip_bytes, tmp_path / "a, b.mp4", tmp_path / "c.mp4")
    (tmp_path / "list.tsv").write_text(text)
    manifest = read_manifest(tmp_path / "list.tsv")
    assert names(manifest) == ["a, b.mp4", "c.mp4", "c.mp4"]
    assert [video.label for video in manifest.videos] == [1, 0, -1]
    assert manifest.classes == ("archery", "wave")


def test_numbers_under_a_header_stay_what_they_are(tmp_path, clip_bytes):
    place(clip_bytes, tmp_path / "a.mp4")
    (tmp_path / "list.csv").write_text("video,label\na.mp4,7\n")
    assert read_manifest(tmp_path / "list.csv").videos[0].label == 7


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"one.mp4 0\ntwo.mp4 1\n", "none of the 2 listed videos exists"),
        (b"", "the list is empty"),
        (b"\0\1\2", "not a text file"),
        (b"path,label\na.mp4\n", "row 2 has 1 columns, the header has 2"),
        (b"path,label\n", "a header but no videos"),
        (b"a.mp4 20261122\n", "label 20261122 is not a class"),
    ],
)
def test_an_unusable_list_is_one_clear_line(tmp_path, content, told):
    (tmp_path / "list.csv").write_bytes(content)
    with pytest.raises(UserError, match=told) as caught:
        read_manifest(tmp_path / "list.csv")
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "list.csv") in str(caught.value)


def test_a_missing_or_empty_folder_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no videos in this folder"):
        read_manifest(tmp_path)
    place(b"", tmp_path / "a.mp4")
    with pytest.raises(UserError, match=r"none of the 1 videos can be used.*empty file"):
        read_manifest(tmp_path)


def test_a_saved_manifest_comes_back_whole(tmp_path):
    odd = os.fsdecode(b"caf\xe9 \n\t\"'\xf0\x9f\x8e\xac.mp4")
    manifest = Manifest(
        (Video(odd, 1, 30, 640, 480, "h264", 29.97, 90, "yuv420p10le"),), (Skipped(odd, "no video stream"),), ("a", "b")
    )
    write_manifest(manifest, tmp_path / "manifest")
    assert read_saved_manifest(tmp_path / "manifest") == manifest
    assert os.listdir(tmp_path) == ["manifest"]


def test_another_file_is_no_saved_manifest(tmp_path):
    (tmp_path / "manifest").write_text("path label\n")
    with pytest.raises(UserError, match="not a saved manifest"):
        read_saved_manifest(tmp_path / "manifest")


@pytest.mark.skipif(not CLIPS.is_dir(), reason="the real clips are not here")
def test_real_clips_agree_with_their_list():
    with open(CLIPS / "manifest.csv", newline="") as file:
        listed = {row["file"]: row for row in csv.DictReader(file)}
    manifest = read_manifest(CLIPS)
    found = {str(Path(video.path).relative_to(CLIPS)): video for video in manifest.videos}
    broken = {str(Path(entry.path).relative_to(CLIPS)) for entry in manifest.skipped}
    assert found.keys() | broken == listed.keys()
    assert broken == {name for name, row in listed.items() if row["frames_decoded"] in ("", "0")}
    for name, video in found.items():
        if name == "torchcodec/nasa_13013.mp4":  # two video streams; the list tells of the first, we take the larger
            assert (video.width, video.height) == (480, 270)
            continue
        row = listed[name]
        assert (video.codec, f"{video.width}x{video.height}") == (row["codec"], row["size"]), name
        assert bool(video.rotation) == (row["rotation"] not in ("", "0")), name
        if "corrupt" not in name:  # packed B-frames: a packet more than there are frames
            assert 0 <= video.frames - int(row["frames_decoded"]) <= 1, name
