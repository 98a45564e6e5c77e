from __future__ import annotations

import dataclasses
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from mam2.engine.data.encoding import encode_frames
from mam2.engine.data.video import HASH_BLOCK, Skipped, Video, content_hash, probe_file
from tests.helpers.clip_sets import ClipSet
from tests.helpers.paths import CLIPS, REAL_CLIPS, needs_real_clips


def write_at_times(path: Path, times_ms: list[int]) -> Path:
    """A video whose frames are shown at these milliseconds."""
    frames = (np.full((48, 64, 3), time_ms % 200, np.uint8) for time_ms in times_ms)
    encode_frames(path, frames, "libx264", (64, 48), times=times_ms, time_base=Fraction(1, 1000))
    return path


@pytest.mark.parametrize(
    ("suffix", "encoder", "codec", "pixel_format", "decoders"),
    [
        ("mp4", "libx264", "h264", "yuv420p", ("nvdec", "pyav")),
        ("webm", "libvpx-vp9", "vp9", "yuv420p", ("dali-cpu", "pyav")),  # too small for NVDEC, as is the next
        ("avi", "mjpeg", "mjpeg", "yuvj420p", ("dali-cpu", "pyav")),
        ("avi", "mpeg4", "mpeg4", "yuv420p", ("pyav",)),
    ],
)
def test_it_reports_what_the_file_holds(
    tmp_path, write_video, numbered_frames, suffix, encoder, codec, pixel_format, decoders
):
    path = write_video(tmp_path / f"a.{suffix}", numbered_frames(7, 48, 64), encoder, gop=3)
    found = probe_file(str(path), 3)
    assert isinstance(found, Video)
    own = found.keyframe_median, found.keyframe_max  # where the encoder treats the brighter frame as a new scene
    keys = {"mjpeg": (1, 1), "mpeg4": own}.get(codec, (3, 3))
    expected = Video(str(path), 3, 7, 64, 48, codec, 25.0, 0, pixel_format, False, *keys)
    status = path.stat()
    assert found == dataclasses.replace(
        expected,
        bytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
        content=found.content,
        b_frames=encoder == "libx264",
        transfer="sdr",
        trimmed=0,
    )
    assert found.duration_s == pytest.approx(0.28)
    assert found.decoders == decoders


def test_the_last_key_frame_counts_to_the_end(tmp_path, write_video, numbered_frames):
    found = probe_file(str(write_video(tmp_path / "a.mp4", numbered_frames(11), gop=8, sc_threshold="0")))
    assert (found.keyframe_median, found.keyframe_max) == (5, 8)  # 8 and 3


def test_a_variable_rate_is_told_and_averaged(tmp_path):
    even = probe_file(str(write_at_times(tmp_path / "even.mkv", [40 * k for k in range(20)])))
    uneven = probe_file(str(write_at_times(tmp_path / "uneven.mkv", [40 * k + 200 * (k > 9) for k in range(20)])))
    assert (even.fps, even.variable_rate) == (25.0, False)
    assert uneven.variable_rate
    assert uneven.fps == pytest.approx(19 / 0.96, abs=1e-3)


def test_rounding_to_milliseconds_is_no_variable_rate(tmp_path):
    assert not probe_file(
        str(write_at_times(tmp_path / "a.mkv", [round(k * 1000 / 240) for k in range(200)]))
    ).variable_rate


def test_a_folder_of_images_is_a_video_of_frames(tmp_path, numbered_frames, write_frames):
    folder = write_frames(tmp_path / "clip", numbered_frames(12, 48, 64))
    (folder / "notes.txt").write_text("no frame")
    found = probe_file(str(folder), 2)
    size = sum(path.stat().st_size for path in folder.glob("*.jpg"))
    expected = Video(str(folder), 2, 12, 64, 48, "frames", 0.0, 0, "yuvj420p", False, 1, 1, size)
    facts = {"mtime_ns": folder.stat().st_mtime_ns, "content": found.content, "transfer": "sdr", "trimmed": 0}
    assert found == dataclasses.replace(expected, **facts)
    assert found.decoders == ("pyav",)
    assert found.duration_s == 0
    (folder / "img_00001.jpg").write_bytes(b"")
    assert probe_file(str(folder)).reason == "empty file"
    os.mkdir(tmp_path / "empty")
    assert probe_file(str(tmp_path / "empty")).reason == "no images in this folder"


def test_a_file_that_is_not_there_is_named_without_a_state():
    assert probe_file("/nowhere/a.mp4") == Skipped("/nowhere/a.mp4", "does not exist")


def test_what_is_not_the_files_fault_is_looked_at_again(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "a.mp4"
    path.write_bytes(b"something")
    broken = probe_file(str(path))
    assert (broken.reason, broken.bytes) == ("damaged, or not a video", 9)
    monkeypatch.setattr(av, "open", refuse)
    assert probe_file(str(path)) == Skipped(str(path), "Permission denied")  # no time of change that could match later


@pytest.mark.parametrize("size", [1, HASH_BLOCK, 3 * HASH_BLOCK, 3 * HASH_BLOCK + 1, 10 * HASH_BLOCK])
def test_the_hash_sees_head_middle_tail_and_length(tmp_path, size):
    content = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    path = tmp_path / "a"

    def hashed(data: np.ndarray) -> str:
        path.write_bytes(data.tobytes())
        return content_hash([str(path)], len(data))

    first = hashed(content)
    assert hashed(content) == first
    assert len(first) == 32
    others = {hashed(np.append(content, np.uint8(0)))}
    for place in (0, size // 2, size - 1):
        changed = content.copy()
        changed[place] ^= 255
        others.add(hashed(changed))
    assert first not in others
    assert len(others) == len({0, size // 2, size - 1}) + 1


def test_clips_agree_with_their_list(clip_set):
    found = {clip_set.name(video.path): video for video in clip_set.found.videos}
    assert found.keys() == clip_set.listed.keys() - clip_set.broken
    for name, video in found.items():
        if name == "torchcodec/nasa_13013.mp4":  # two video streams; the list describes the first, we use the larger
            assert (video.width, video.height) == (480, 270)
            continue
        row = clip_set.listed[name]
        assert (video.codec, f"{video.width}x{video.height}") == (row["codec"], row["size"]), name
        assert bool(video.rotation) == (row["rotation"] not in ("", "0")), name
        if "corrupt" not in name:
            # Packed B-frames: one packet more than frames.
            assert 0 <= video.frames - int(row["frames_decoded"]) <= 1, name
        if row["vfr"] == "CFR" and "corrupt" not in name:
            assert not video.variable_rate, name


@needs_real_clips
def test_rates_and_key_frames_of_real_clips():
    real = ClipSet(REAL_CLIPS)
    found = {real.name(video.path): video for video in real.found.videos}
    vary = {name for name, video in found.items() if video.variable_rate}
    assert vary == {
        "mmaction2/part_0.mp4",
        "androidx/sample.avi",  # one gap, of 96 frames
        "androidx/sample_android_slow_motion.mp4",
        "derived/bikes_h264_vfr.mp4",
        "derived/bikes_vp9_vfr.webm",
    }
    assert found["androidx/sample.mkv"].fps == pytest.approx(29.99)  # the file says 1000
    assert found["derived/bikes_vp9_vfr.webm"].fps == pytest.approx(14.96)  # the file says 25
    assert found["moviepy/chaplin.mp4"].keyframe_max == 241
    assert found["derived/nasa_h264_g16.mp4"].keyframe_max == 16


def test_the_clips_of_the_repository_are_seen_as_they_were_made():
    """Every file has the properties that the script requested; all files are listed; the set is small."""
    made = ClipSet(CLIPS)
    for video in made.found.videos:
        row = made.listed[made.name(video.path)]
        found = video.rotation, video.pixel_format, video.variable_rate, video.interlaced
        made_as = int(row["rotation"]), row["pixel_format"], row["vfr"] == "VFR", row["interlaced"] == "1"
        assert found == made_as or "corrupt_bitrot" in video.path, video.path  # its times are damaged too
        assert made.found.classes[video.label] == made.name(video.path).split("/")[0]
    paths = [path for path in CLIPS.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in paths) < 2**20
    clips = {made.name(path if path.suffix != ".jpg" else path.parent) for path in paths if path.parent != CLIPS}
    assert clips == made.listed.keys()
