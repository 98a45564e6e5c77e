from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path

import pytest

from mam2.engine.data import manifest as module
from mam2.engine.data.decoding import decode_frames
from mam2.engine.data.manifest import (
    Changes,
    Manifest,
    Skipped,
    Video,
    index_path,
    read_manifest,
    read_saved_manifest,
    scan,
    write_manifest,
)
from mam2.engine.errors import UserError
from tests.helpers.videos import write_sound


@pytest.fixture(scope="module")
def clip_bytes(tmp_path_factory, write_video, numbered_frames) -> bytes:
    return write_video(tmp_path_factory.mktemp("one") / "clip.mp4", numbered_frames(5)).read_bytes()


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """Names of the files that are opened from now on."""
    names: list[str] = []
    probe_file = module.probe_file
    monkeypatch.setattr(module, "probe_file", lambda path: names.append(Path(path).name) or probe_file(path))
    return names


def place(content: bytes, *paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def names(manifest: Manifest) -> list[str]:
    return [Path(video.path).name for video in manifest.videos]


def test_odd_names_are_found_and_opened(tmp_path, clip_bytes, monkeypatch):
    monkeypatch.chdir(tmp_path)
    odd = [os.fsdecode(b"caf\xe9.mp4"), "http:clip%03d.mp4", "pipe:0.mp4", "two\nlines.mp4", "Yards!!! #1 'x' [y].mp4"]
    place(clip_bytes, *(tmp_path / name for name in odd))
    manifest = read_manifest(".")
    assert manifest.skipped == ()
    assert names(manifest) == sorted(odd)
    assert all(os.path.isabs(video.path) for video in manifest.videos)
    for video in manifest.videos:
        assert decode_frames(video.path, [1, 2]).shape == (2, 48, 64, 3)


def test_each_broken_file_is_named_with_its_reason(tmp_path, clip_bytes):
    place(clip_bytes, tmp_path / "good.mp4")
    place(b"", tmp_path / "empty.mp4")
    place(bytes(range(256)) * 20, tmp_path / "garbage.mp4")
    place(b"just some words\n" * 50, tmp_path / "text.avi")
    write_sound(tmp_path / "sound.mp4")
    manifest = read_manifest(tmp_path)
    assert names(manifest) == ["good.mp4"]
    reasons = {Path(entry.path).name: entry.reason for entry in manifest.skipped}
    assert reasons == {
        "empty.mp4": "empty file",
        "garbage.mp4": "damaged, or not a video",
        "sound.mp4": "no video stream",
        "text.avi": "damaged, or not a video",
    }


def test_a_list_opens_each_file_once_and_keeps_its_order_and_labels(tmp_path, clip_bytes, opened):
    place(clip_bytes, tmp_path / "a.mp4", tmp_path / "b.mp4")
    listed = tmp_path / "train.csv"
    listed.write_text("b.mp4 4\na.mp4\ngone.mp4 1\nb.mp4 2\ngone.mp4 0\n")
    manifest = read_manifest(listed)
    assert [(Path(video.path).name, video.label) for video in manifest.videos] == [
        ("b.mp4", 4),
        ("a.mp4", -1),
        ("b.mp4", 2),
    ]
    assert manifest.skipped == (Skipped(str(tmp_path / "gone.mp4"), "does not exist"),)
    assert manifest.classes == ("0", "1", "2", "3", "4")
    assert sorted(opened) == ["a.mp4", "b.mp4", "gone.mp4"]


def test_nothing_to_use_is_one_clear_line(tmp_path):
    (tmp_path / "list.csv").write_text("one.mp4 0\ntwo.mp4 1\n")
    with pytest.raises(UserError, match=r"no listed video exists \(2 lines\)"):
        read_manifest(tmp_path / "list.csv")
    place(b"", tmp_path / "folder" / "a.mp4")
    with pytest.raises(UserError, match=r"no video can be used \(1 file\).*empty file"):
        read_manifest(tmp_path / "folder")


def test_a_second_scan_opens_only_what_changed(tmp_path, clip_bytes, opened):
    place(clip_bytes, *(tmp_path / name for name in ("same.mp4", "touched.mp4", "longer.mp4", "gone.mp4")))
    place(b"", tmp_path / "broken.mp4", tmp_path / "mended.mp4")
    first, changes = scan(tmp_path, Manifest(()))
    assert changes == Changes(unchanged=0, new=6, changed=0, removed=0)

    opened.clear()
    assert scan(tmp_path, first) == (first, Changes(6, 0, 0, 0))
    assert opened == []

    status = (tmp_path / "longer.mp4").stat()
    place(clip_bytes + b"\0", tmp_path / "longer.mp4")
    os.utime(tmp_path / "longer.mp4", ns=(status.st_atime_ns, status.st_mtime_ns))
    os.utime(tmp_path / "touched.mp4", ns=(1, 1))
    place(clip_bytes, tmp_path / "mended.mp4", tmp_path / "new.mp4")
    (tmp_path / "gone.mp4").unlink()
    second, changes = scan(tmp_path, first)
    assert changes == Changes(unchanged=2, new=1, changed=3, removed=1)
    assert sorted(opened) == ["longer.mp4", "mended.mp4", "new.mp4", "touched.mp4"]
    assert names(second) == ["longer.mp4", "mended.mp4", "new.mp4", "same.mp4", "touched.mp4"]
    assert second == scan(tmp_path, Manifest(()))[0]


def test_a_folder_of_images_is_looked_at_again_when_an_image_comes(tmp_path, write_frames, numbered_frames, opened):
    write_frames(tmp_path / "clip", numbered_frames(3))
    first, _ = scan(tmp_path, Manifest(()))
    opened.clear()
    assert scan(tmp_path, first)[1].unchanged == 1
    assert opened == []
    write_frames(tmp_path / "clip", numbered_frames(4))
    assert scan(tmp_path, first)[0].videos[0].frames == 4


def test_an_image_that_is_overwritten_in_place_is_a_change(tmp_path, write_frames, numbered_frames, opened):
    write_frames(tmp_path / "clip", numbered_frames(3))
    known, _ = scan(tmp_path, Manifest(()))
    folder = (tmp_path / "clip").stat().st_mtime_ns
    image = tmp_path / "clip" / "img_00002.jpg"
    image.write_bytes(image.read_bytes())
    os.utime(image, ns=(2 * 10**18, 2 * 10**18))
    assert (tmp_path / "clip").stat().st_mtime_ns == folder
    found, changes = scan(tmp_path, known)
    assert changes == Changes(unchanged=0, new=0, changed=1, removed=0)
    assert found.videos[0].mtime_ns == 2 * 10**18


def test_a_folder_that_was_skipped_is_looked_at_again_when_an_image_is_mended(tmp_path, write_frames, numbered_frames):
    place(b"x", *(tmp_path / "clip" / f"img_{number}.jpg" for number in (1, 2)))
    write_frames(tmp_path / "sound", numbered_frames(2))
    known, _ = scan(tmp_path, Manifest(()))
    assert len(known.skipped) == 1
    (tmp_path / "clip" / "img_1.jpg").write_bytes((tmp_path / "sound" / "img_00001.jpg").read_bytes())
    assert len(scan(tmp_path, known)[0].videos) == 2


def test_two_series_of_images_are_not_shuffled_into_one_video(tmp_path, write_frames, numbered_frames):
    write_frames(tmp_path / "good", numbered_frames(2))
    write_frames(tmp_path / "flow", numbered_frames(2))
    for number in (1, 2):
        image = tmp_path / "flow" / f"img_{number:05d}.jpg"
        image.with_name(f"flow_x_{number}.jpg").write_bytes(image.read_bytes())
        image.rename(image.with_name(f"flow_y_{number}.jpg"))
    (entry,) = read_manifest(tmp_path).skipped
    assert entry.reason == "images flow_x_#.jpg and flow_y_#.jpg, 2 each: a folder must hold only one series"


def test_labels_come_from_the_source_not_from_the_index(tmp_path, clip_bytes):
    place(clip_bytes, tmp_path / "data" / "x" / "a.mp4")
    (tmp_path / "list.csv").write_text("data/x/a.mp4 7\n")
    known, _ = scan(tmp_path / "list.csv", Manifest(()))
    found, changes = scan(tmp_path / "data", known)
    assert changes.unchanged == 1
    assert [(video.label, found.classes) for video in found.videos] == [(0, ("x",))]


def test_the_index_next_to_the_data_is_used_and_left_alone(tmp_path, clip_bytes, opened):
    data = tmp_path / "data"
    place(clip_bytes, data / "a.mp4", data / "b.mp4")
    assert index_path(data) == tmp_path / "data.index.jsonl"
    first = read_manifest(data)
    assert not index_path(data).exists()
    write_manifest(first, index_path(data))
    before = index_path(data).read_bytes()
    place(clip_bytes, data / "c.mp4")
    opened.clear()
    assert names(read_manifest(f"{data}/")) == ["a.mp4", "b.mp4", "c.mp4"]
    assert opened == ["c.mp4"]
    assert index_path(data).read_bytes() == before


def test_the_index_itself_is_taken_unchanged(tmp_path, clip_bytes, opened):
    place(clip_bytes, tmp_path / "data" / "a.mp4")
    first = read_manifest(tmp_path / "data")
    write_manifest(first, tmp_path / "any.jsonl")
    (tmp_path / "data" / "a.mp4").unlink()
    opened.clear()
    assert read_manifest(tmp_path / "any.jsonl") == first
    assert opened == []


@pytest.mark.parametrize("content", ["{}\n", "", "[1]\n[]\n", '{"classes": []}\n[]\n', '{"classes": []}\n{"path": "'])
def test_a_broken_index_is_an_error_that_names_the_remedy(tmp_path, clip_bytes, content):
    place(clip_bytes, tmp_path / "data" / "a.mp4")
    index_path(tmp_path / "data").write_text(content)
    with pytest.raises(UserError, match=r"data\.index\.jsonl: not a saved manifest .*; `mam2 index .*/data` writes it"):
        read_manifest(tmp_path / "data")


def test_a_split_of_a_list_uses_the_index_of_the_list(tmp_path, clip_bytes, opened, capsys):
    place(clip_bytes, tmp_path / "a.mp4", tmp_path / "b.mp4")
    listed = tmp_path / "all.csv"
    listed.write_text("path,split\na.mp4,train\nb.mp4,val\n")
    write_manifest(read_manifest(listed), index_path(listed))
    assert (
        f"rows of all splits are used: train (1), val (1); {listed}:train selects one split" in capsys.readouterr().err
    )
    opened.clear()
    assert names(read_manifest(f"{listed}:val")) == ["b.mp4"]
    assert opened == []
    assert capsys.readouterr().err == ""


def test_an_interrupted_scan_ends_soon(tmp_path, monkeypatch):
    place(b"", *(tmp_path / f"{number:03d}.mp4" for number in range(200)))
    opened = []

    def interrupted(path):
        opened.append(path)
        if len(opened) == 10:
            raise KeyboardInterrupt
        time.sleep(0.01)
        return Skipped(path, "x")

    monkeypatch.setattr(module, "probe_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scan(tmp_path, Manifest(()), threads=1)
    assert len(opened) < 200


def test_a_saved_manifest_comes_back_whole(tmp_path):
    odd = os.fsdecode(b"caf\xe9 \n\t\"'\xf0\x9f\x8e\xac.mp4")
    facts = True, 12, 18, 2**40, 17 * 10**17, "0a1b", True, True, "pq", 3, 2, ((0, 5), (9, 7))
    video = Video(odd, 1, 30, 640, 480, "h264", 29.97, 90, "yuv420p10le", *facts)
    assert all(getattr(video, field.name) != field.default for field in dataclasses.fields(video))
    manifest = Manifest((video,), (Skipped(odd, "no video stream", 5, 6),), ("a", "b"))
    write_manifest(manifest, tmp_path / "manifest")
    assert read_saved_manifest(tmp_path / "manifest") == manifest
    assert os.listdir(tmp_path) == ["manifest"]
    record = json.loads((tmp_path / "manifest").read_text().splitlines()[1])
    assert (record["duration_s"], record["front_ends"]) == (1.001, ["array"])


def test_a_manifest_without_the_newer_facts_is_read_but_its_files_are_opened_again(tmp_path, clip_bytes, opened):
    place(clip_bytes, tmp_path / "data" / "a.mp4")
    path = tmp_path / "data" / "a.mp4"
    old = {"path": str(path), "label": -1, "frames": 5, "width": 64, "height": 48, "codec": "h264", "fps": 25.0}
    lines = [{"classes": []}, old | {"rotation": 0, "pixel_format": "yuv420p"}, {"path": "b", "reason": "empty file"}]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    saved = read_saved_manifest(tmp_path / "manifest.jsonl")
    assert saved == Manifest((Video(str(path), -1, 5, 64, 48, "h264", 25.0, 0),), (Skipped("b", "empty file"),))
    found, changes = scan(tmp_path / "data", saved)
    assert changes == Changes(unchanged=0, new=0, changed=1, removed=1)
    assert opened == ["a.mp4"]
    assert found.videos[0].keyframe_max == 5


@pytest.mark.parametrize("text", ["", "path label\n", "{}\n", '{"classes": []}\n{"path": "a"}\n'])
def test_another_file_is_no_saved_manifest(tmp_path, text):
    (tmp_path / "manifest").write_text(text)
    with pytest.raises(UserError, match="not a saved manifest"):
        read_saved_manifest(tmp_path / "manifest")
