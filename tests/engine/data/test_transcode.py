from __future__ import annotations

import os
import re
import threading
from pathlib import Path

import av
import numpy as np
import pytest

from mam2.engine.data import transcode as module
from mam2.engine.data.decoding import decode_frames
from mam2.engine.data.encoding import encode_frames, video_writer
from mam2.engine.data.manifest import read_manifest
from mam2.engine.data.transcode import FAILURES, Settings, transcode
from mam2.engine.data.video import Video, probe_file
from mam2.engine.errors import UserError
from tests.helpers.commands import exit_status


@pytest.fixture(scope="module")
def clip_bytes(tmp_path_factory, write_video, numbered_frames) -> bytes:
    path = tmp_path_factory.mktemp("one") / "clip.mp4"
    return write_video(path, numbered_frames(20, 96, 128), gop=250).read_bytes()


def place(content: bytes, *paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        os.utime(path, ns=(10**18, 10**18))


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def good(path: Path) -> Video:
    video = probe_file(str(path))
    assert isinstance(video, Video)
    return video


@pytest.mark.parametrize(("codec", "suffix"), [("h264", ".mp4"), ("hevc", ".mp4"), ("vp9", ".webm")])
def test_every_frame_keeps_its_number_at_a_smaller_size(tmp_path, clip_bytes, frame_numbers, codec, suffix):
    place(clip_bytes, tmp_path / "in" / "x" / "a.mp4")
    outcome = transcode(tmp_path / "in", tmp_path / "out", codec=codec, short_side=48, gop=7)
    assert (len(outcome.written), outcome.kept, outcome.failed) == (1, 0, ())
    video = good(tmp_path / "out" / "x" / f"a{suffix}")
    assert (video.codec, video.frames, video.width, video.height, video.fps) == (codec, 20, 64, 48, 25.0)
    assert video.keyframe_max <= 7
    assert not video.variable_rate
    assert not video.b_frames
    assert frame_numbers(decode_frames(video.path, range(20))) == list(range(20))
    assert outcome.written[0] == (len(clip_bytes), video.bytes)


@pytest.mark.parametrize(
    ("size", "expected"), [((33, 47), (32, 48)), ((32, 48), (32, 48)), ((1, 1), (16, 16)), ((99, 201), (48, 80))]
)
def test_sides_become_multiples_of_16(tmp_path, write_video, size, expected):
    frames = np.full((3, *size, 3), 90, np.uint8)
    encode_frames(tmp_path / "a.mkv", frames, "ffv1", size[::-1], pixel_format="bgr0")
    assert not transcode(tmp_path / "a.mkv", tmp_path / "out", short_side=41).failed
    video = good(tmp_path / "out" / "a.mp4")
    assert (video.height, video.width) == expected
    assert abs(decode_frames(video.path, [0]).astype(int) - 90).max() <= 3


def test_a_picture_is_stretched_by_less_than_3_percent():
    for width, height in ((340, 256), (1920, 1080), (640, 360), (426, 240), (720, 576), (608, 1080)):
        wide, high = module._coded_size(width, height, 320)
        assert wide % 16 == high % 16 == 0
        assert min(wide, high) == min(320, height, width)
        assert wide / high == pytest.approx(width / height, rel=0.03)


@pytest.mark.parametrize("codec", ["h264", "hevc"])
def test_scenes_that_move_get_no_b_frames_and_closed_groups(tmp_path, codec):
    generator = np.random.default_rng(0)
    scene = generator.integers(0, 255, (96, 160, 3), np.uint8)
    frames = (np.ascontiguousarray(scene[:, shift : shift + 96]) for shift in range(40))
    encode_frames(tmp_path / "a.mkv", frames, "ffv1", (96, 96), pixel_format="bgr0")
    assert not transcode(tmp_path / "a.mkv", tmp_path / "out", codec=codec, gop=10).failed
    with av.open(str(tmp_path / "out" / "a.mp4")) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    assert [packet.pts for packet in packets] == sorted(packet.pts for packet in packets)
    assert good(tmp_path / "out" / "a.mp4").keyframe_max <= 10
    assert decode_frames(str(tmp_path / "out" / "a.mp4"), [25]).shape == (1, 96, 96, 3)


def test_a_full_disk_ends_the_run_with_one_line(tmp_path, clip_bytes, capsys, full_disk):
    place(clip_bytes, *(tmp_path / "in" / f"{number}.mp4" for number in range(3)))
    arguments = ["transcode", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--short-side", "48"]
    with full_disk(200):
        assert exit_status(*arguments) == 2
    message = capsys.readouterr().err
    assert message.splitlines()[-1].startswith(
        f"mam2: error: --out {tmp_path / 'out'}: cannot be written: File too large"
    )
    assert files(tmp_path / "out") == [module.SETTINGS]


def test_images_that_were_overwritten_are_encoded_again(tmp_path, write_frames, numbered_frames):
    write_frames(tmp_path / "in" / "clip", numbered_frames(3))
    transcode(tmp_path / "in", tmp_path / "out")
    image = tmp_path / "in" / "clip" / "img_00002.jpg"
    image.write_bytes(image.read_bytes())
    os.utime(image, ns=(2 * 10**18, 2 * 10**18))
    assert len(transcode(tmp_path / "in", tmp_path / "out").written) == 1


def test_a_list_keeps_its_splits_and_odd_names(tmp_path, clip_bytes):
    odd = os.fsdecode(b"tab\there caf\xe9.mp4")
    place(clip_bytes, tmp_path / odd, tmp_path / "b.mp4")
    (tmp_path / "list.csv").write_bytes(os.fsencode(f'path,split\n"{odd}",train\nb.mp4,val\n'))
    transcode(tmp_path / "list.csv", tmp_path / "out", short_side=32)
    (only,) = read_manifest(f"{tmp_path / 'out' / 'list.tsv'}:train").videos
    assert only.path == str(tmp_path / "out" / odd)
    outcome = transcode(f"{tmp_path / 'list.csv'}:val", tmp_path / "other", short_side=32)
    assert len(outcome.written) == 1
    assert len(read_manifest(tmp_path / "other" / "list.tsv").videos) == 1


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_planes_turn_like_the_picture(turns):
    image = np.kron(np.random.default_rng(0).integers(30, 220, (4, 6, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")
    turned = module._turned(frame, turns)
    expected = np.rot90(frame.to_ndarray(format="rgb24"), turns)
    assert turned.to_ndarray(format="rgb24").shape == expected.shape
    assert np.abs(turned.to_ndarray(format="rgb24").astype(int) - expected).mean() < 3


@pytest.mark.parametrize("pixels", ["yuv420p", "yuvj420p"])
def test_brightness_stays_for_limited_and_full_range(tmp_path, pixels):
    levels = np.arange(0, 256, 15)
    with video_writer(tmp_path / "a.mkv", "libx264", (32, 32), pixel_format=pixels, options={"crf": "1"}) as (
        container,
        stream,
    ):
        for level in levels:
            image = np.full((32, 32, 3), level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pixels)))
    before = decode_frames(str(tmp_path / "a.mkv"), range(len(levels))).mean((1, 2, 3))
    transcode(tmp_path / "a.mkv", tmp_path / "out")
    after = decode_frames(str(tmp_path / "out" / "a.mp4"), range(len(levels))).mean((1, 2, 3))
    np.testing.assert_allclose(after, before, atol=2)
    np.testing.assert_allclose(before, levels, atol=4)


def test_a_second_run_keeps_what_is_there_and_redoes_what_is_older(tmp_path, clip_bytes):
    place(clip_bytes, *(tmp_path / "in" / name for name in ("a.mp4", "b.mp4", "c.mp4")))
    transcode(tmp_path / "in", tmp_path / "out", short_side=32)
    first = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in ("a.mp4", "b.mp4", "c.mp4")}
    os.utime(tmp_path / "in" / "b.mp4")
    (tmp_path / "out" / "c.mp4").unlink()
    os.utime(tmp_path / "out" / "b.mp4", ns=(10**18, 10**18))
    outcome = transcode(tmp_path / "in", tmp_path / "out", short_side=32)
    assert (len(outcome.written), outcome.kept) == (2, 1)
    assert (tmp_path / "out" / "a.mp4").stat().st_mtime_ns == first["a.mp4"]
    assert files(tmp_path / "out") == ["a.mp4", "b.mp4", "c.mp4", FAILURES, module.SETTINGS]


def test_an_interrupted_run_leaves_only_whole_files_and_continues(tmp_path, clip_bytes, monkeypatch):
    place(clip_bytes, *(tmp_path / "in" / f"{number}.mp4" for number in range(6)))
    encode = module._encode
    under_way = threading.Event()

    def slow(video, path, settings, stop):
        if path.name == ".part-2.mp4":
            path.write_bytes(b"half of it")
            under_way.set()
            stop.wait(60)
            raise module.DecodeError("interrupted")
        return encode(video, path, settings, stop)

    def interrupting(results, *_, **__):
        for result in results:
            yield result
            under_way.wait(60)
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "_encode", slow)
    monkeypatch.setattr(module, "Progress", interrupting)
    with pytest.raises(KeyboardInterrupt):
        transcode(tmp_path / "in", tmp_path / "out", short_side=32, jobs=1)
    assert files(tmp_path / "out") == ["0.mp4", "1.mp4", module.SETTINGS]
    monkeypatch.undo()
    outcome = transcode(tmp_path / "in", tmp_path / "out", short_side=32)
    assert (len(outcome.written), outcome.kept) == (4, 2)
    assert [video.frames for video in read_manifest(tmp_path / "out").videos] == [20] * 6


def test_the_frames_in_the_middle_of_a_file_are_no_obstacle_to_stopping(tmp_path, clip_bytes):
    place(clip_bytes, tmp_path / "a.mp4")
    stop = threading.Event()
    frames = module._decoded([str(tmp_path / "a.mp4")], stop)
    next(frames)
    stop.set()
    with pytest.raises(module.DecodeError, match="interrupted"):
        list(frames)


def test_a_list_is_rewritten_with_its_labels(tmp_path, clip_bytes):
    data = tmp_path / "data"
    place(clip_bytes, data / "v 1" / "a.avi", data / "v 1" / "a.mp4", data / "w" / "b, c.mp4")
    place(b"", data / "w" / "broken.mp4")
    (data / "train.csv").write_text(
        "v 1/a.avi wave\nw/b, c.mp4 archery\nw/broken.mp4 wave\nv 1/a.mp4 wave\nv 1/a.avi archery\n"
    )
    outcome = transcode(data / "train.csv", tmp_path / "out", short_side=32)
    assert [entry.reason for entry in outcome.failed] == ["empty file"]
    before, after = read_manifest(data / "train.csv"), read_manifest(tmp_path / "out" / "train.tsv")
    assert after.classes == before.classes == ("archery", "wave")
    assert [video.label for video in after.videos] == [video.label for video in before.videos] == [1, 0, 1, 0]
    found = [os.path.relpath(video.path, tmp_path / "out") for video in after.videos]
    assert found == ["v 1/a.avi.mp4", "w/b, c.mp4", "v 1/a.mp4.mp4", "v 1/a.avi.mp4"]


def test_numbers_as_labels_stay_the_same_when_a_class_fails(tmp_path, clip_bytes):
    place(clip_bytes, tmp_path / "a.mp4", tmp_path / "b.mp4")
    place(b"", tmp_path / "c.mp4")
    (tmp_path / "list.csv").write_text("c.mp4 0\na.mp4 5\nb.mp4\n")
    transcode(tmp_path / "list.csv", tmp_path / "out", short_side=32)
    assert [video.label for video in read_manifest(tmp_path / "out" / "list.tsv").videos] == [5, -1]


def test_a_folder_of_images_becomes_a_video(tmp_path, write_frames, numbered_frames, frame_numbers):
    write_frames(tmp_path / "in" / "push" / "12", numbered_frames(15))
    transcode(tmp_path / "in", tmp_path / "out")
    path = tmp_path / "out" / "push" / "12.mp4"
    assert frame_numbers(decode_frames(str(path), range(15))) == list(range(15))
    assert good(path).fps == module.UNSTATED_RATE


def test_what_fails_is_named_and_the_status_is_1(tmp_path, clip_bytes, capsys):
    place(clip_bytes, tmp_path / "in" / "a.mp4")
    place(clip_bytes[: len(clip_bytes) // 2], tmp_path / "in" / "cut.mp4")
    arguments = ["transcode", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--short-side", "32"]
    assert exit_status(*arguments) == 1
    assert "1 written" in capsys.readouterr().out
    assert (tmp_path / "out" / FAILURES).read_text().splitlines() == [
        "path\treason",
        f"{tmp_path / 'in' / 'cut.mp4'}\tdamaged, or not a video",
    ]
    (tmp_path / "in" / "cut.mp4").unlink()
    assert exit_status(*arguments) == 0
    assert "0 written (0.0 MB became 0.0 MB), 1 existed already, 0 failed" in capsys.readouterr().out


@pytest.mark.parametrize(("damaged", "taken"), [(1, True), (3, True), (6, False)])
def test_a_source_that_loses_many_frames_is_not_taken_over(tmp_path, write_video, numbered_frames, damaged, taken):
    path = write_video(tmp_path / "in" / "a.avi", numbered_frames(24), "mjpeg")
    content = path.read_bytes()
    for place in [found.start() for found in re.finditer(b"00dc....\xff\xd8", content, re.DOTALL)][2 : 2 + damaged]:
        size = int.from_bytes(content[place + 4 : place + 8], "little")
        content = content[: place + 8] + bytes(size) + content[place + 8 + size :]
    path.write_bytes(content)
    outcome = transcode(tmp_path / "in", tmp_path / "out", jobs=1)
    reasons = [] if taken else [f"damaged: {24 - damaged} of 24 frames can be decoded"]
    assert [entry.reason for entry in outcome.failed] == reasons
    assert (tmp_path / "out" / "a.mp4").exists() == taken
    if taken:
        assert good(tmp_path / "out" / "a.mp4").frames == 24 - damaged


def test_an_output_with_another_number_of_frames_is_thrown_away(tmp_path, clip_bytes, monkeypatch):
    place(clip_bytes, tmp_path / "in" / "a.mp4")
    encode = module._encode
    monkeypatch.setattr(module, "_encode", lambda *arguments: encode(*arguments) - 1)
    outcome = transcode(tmp_path / "in", tmp_path / "out", short_side=32)
    assert [entry.reason for entry in outcome.failed] == ["the output decodes to 20 frames instead of 19"]
    assert files(tmp_path / "out") == [module.SETTINGS, FAILURES] or files(tmp_path / "out") == [
        FAILURES,
        module.SETTINGS,
    ]


def test_mistakes_are_one_clear_line(tmp_path, clip_bytes):
    place(clip_bytes, tmp_path / "in" / "a.mp4")
    (tmp_path / "in" / "list.csv").write_text("a.mp4 0\n")
    for settings, message in (
        ({"codec": "av1"}, "--codec: expected one of h264, hevc, vp9; found av1"),
        ({"short_side": 1}, "--short-side 1"),
        ({"gop": 0}, "--gop 0"),
    ):
        with pytest.raises(UserError, match=message):
            transcode(tmp_path / "in", tmp_path / "out", **settings)
    with pytest.raises(UserError, match="is in the data folder"):
        transcode(tmp_path / "in", tmp_path / "in" / "small")
    with pytest.raises(UserError, match="is one of the videos to be read"):
        transcode(tmp_path / "in" / "list.csv", tmp_path / "in")
    with pytest.raises(UserError, match="cannot be written"):
        transcode(tmp_path / "in", "/dev/null/out")
    place(clip_bytes, *(tmp_path / "twice" / name for name in ("a.avi", "a.mp4", "a.avi.mkv")))
    with pytest.raises(UserError, match=r"would both become .*a\.avi\.mp4; rename one"):
        transcode(tmp_path / "twice", tmp_path / "out")
    transcode(tmp_path / "in", tmp_path / "out", short_side=32)
    with pytest.raises(UserError, match="holds files made with"):
        transcode(tmp_path / "in", tmp_path / "out", short_side=64)


@pytest.mark.slow
def test_every_format_looks_and_counts_the_same(tmp_path, clip_set):
    """All formats, rotations, ranges, depths and rates; of a damaged file the readable part is kept, or it is named."""
    folder = clip_set.folder
    outcome = transcode(folder, tmp_path / "out", short_side=64)
    assert len(outcome.written) == len(clip_set.found.videos)
    assert {clip_set.name(entry.path) for entry in outcome.failed} == clip_set.broken
    targets = {
        job.source: job.target for job in module._plan(folder, module.read_source(folder), tmp_path / "out", Settings())
    }
    for video in clip_set.found.videos:
        after = good(targets[video.path])
        assert after.keyframe_max <= 30, video.path
        assert after.fps == pytest.approx(video.fps or module.UNSTATED_RATE, rel=1e-3), video.path
        assert not after.rotation, video.path
        assert not after.variable_rate, video.path
        assert video.frames * 0.9 - 1 <= after.frames <= video.frames, video.path
        assert after.shown_size == module._coded_size(*video.shown_size, 64), video.path
        assert not after.b_frames, video.path
        if "corrupt" in video.path:
            continue
        middle = min(video.frames // 2, after.frames - 1)
        seen, source = (decode_frames(path, [middle])[0].astype(float) for path in (after.path, video.path))
        thumbs = [block_means(image) for image in (seen, source)]
        assert np.abs(thumbs[0] - thumbs[1]).mean() < 5, video.path


def block_means(image: np.ndarray) -> np.ndarray:
    """A 4 × 4 thumbnail of an [H, W, 3] picture, which no resizing filter changes by much."""
    rows = [band.mean(0) for band in np.array_split(image, 4, 0)]
    return np.array([[part.mean(0) for part in np.array_split(row, 4, 0)] for row in rows])
