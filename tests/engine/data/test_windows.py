"""Sliding windows over whole videos: the right frames at the right times, from one pass, with few frames in memory."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from mam2.engine.data import windows as module
from mam2.engine.data.decoding import DecodeError
from mam2.engine.data.encoding import encode_frames
from mam2.engine.data.video import Skipped, Video, probe_file
from mam2.engine.data.windows import Span, parse_span, sliding_windows
from mam2.engine.errors import UserError


def look(path: Path) -> Video:
    video = probe_file(str(path))
    assert isinstance(video, Video)
    return video


@pytest.fixture(scope="module")
def video(tmp_path_factory, write_video, numbered_frames):
    """24 numbered frames at 25 per second, wider than high."""
    return look(write_video(tmp_path_factory.mktemp("v") / "v.mp4", numbered_frames(24, 48, 64)))


@pytest.mark.parametrize(
    ("window", "hop", "frames", "expected"),
    [
        (8, 8, 4, [[0, 2, 4, 6], [8, 10, 12, 14], [16, 18, 20, 22]]),
        (8, 5, 4, [[0, 2, 4, 6], [5, 7, 9, 11], [10, 12, 14, 16], [15, 17, 19, 21], [20, 22, 23, 23]]),
        (6, 10, 6, [[0, 1, 2, 3, 4, 5], [10, 11, 12, 13, 14, 15], [20, 21, 22, 23, 23, 23]]),
        (3, 12, 6, [[0, 0, 1, 1, 2, 2], [12, 12, 13, 13, 14, 14]]),
        (40, 4, 4, [[0, 10, 20, 23]]),
        (24, 1, 2, [[0, 12]]),
    ],
)
def test_windows_hold_the_frames_that_they_should(video, frame_numbers, window, hop, frames, expected):
    found = list(sliding_windows(video, frames=frames, size=32, window=window, hop=hop))
    assert [frame_numbers(one.clip.numpy()) for one in found] == expected
    for place, one in enumerate(found):
        assert one.clip.shape == (frames, 32, 32, 3)
        assert (one.first, one.stop) == (place * hop, min(place * hop + window, 24))
        assert one.start_s == pytest.approx(one.first / 25, abs=1e-3)
        assert one.end_s == pytest.approx(one.stop / 25, abs=1e-3)


def test_the_middle_square_is_shown(tmp_path, write_video):
    frames = np.zeros((4, 32, 64, 3), np.uint8)
    frames[:, :, 16:48] = 200  # the middle
    clip = next(sliding_windows(look(write_video(tmp_path / "v.mp4", frames)), frames=2, size=32, window=4, hop=4)).clip
    assert clip[:, :, 2:-2].float().mean() == pytest.approx(200, abs=3)


def test_frames_are_decoded_once_and_few_are_held(tmp_path, write_video, numbered_frames, monkeypatch):
    """200 windows, each frame in sixteen of them: the file is opened once, and each frame is converted once."""
    path = write_video(tmp_path / "v.mp4", np.tile(numbered_frames(20, 32, 32), (10, 1, 1, 1)))
    opened, converted, held = [], [], []
    open_video, convert, crop = module.open_video, module.FrameConverter.__call__, module._Crops.flush
    monkeypatch.setattr(module, "open_video", lambda *a: (opened.append(a), open_video(*a))[1])
    monkeypatch.setattr(module.FrameConverter, "__call__", lambda s, f: (converted.append(f.pts), convert(s, f))[1])

    def flush(self):
        held.append(len(self._waiting))
        return crop(self)

    monkeypatch.setattr(module._Crops, "flush", flush)
    count = sum(1 for _ in sliding_windows(look(path), frames=16, size=16, window=16, hop=1))
    assert count == 200 - 16 + 1
    assert len(opened) == 1
    assert len(converted) - len(set(converted)) <= 1  # the last frame, which repeats
    assert max(held) <= module.CROPPED_AT_ONCE


def test_a_folder_of_images(tmp_path, write_frames, numbered_frames, frame_numbers):
    video = look(write_frames(tmp_path / "images", numbered_frames(9, 32, 32)))
    found = list(sliding_windows(video, frames=2, size=32, window=4, hop=4))
    assert [frame_numbers(one.clip.numpy()) for one in found] == [[0, 2], [4, 6], [8, 8]]
    assert all(math.isnan(one.start_s) for one in found) == (video.fps == 0)


def test_times_are_those_of_the_timestamps(tmp_path):
    """A variable rate: the frames of the second half are shown for five times as long."""
    path = tmp_path / "v.mkv"
    times = [0, 40, 80, 120, 160, 360, 560, 760]
    frames = [np.full((32, 32, 3), 90, np.uint8)] * len(times)
    encode_frames(path, frames, "mpeg4", (32, 32), times=times, time_base=Fraction(1, 1000))
    found = list(sliding_windows(look(path), frames=2, size=16, window=2, hop=2))
    assert [one.start_s for one in found] == pytest.approx([0, 0.08, 0.16, 0.56], abs=2e-3)
    assert [one.end_s for one in found[:3]] == pytest.approx([0.08, 0.16, 0.56], abs=2e-3)


def test_a_file_without_a_frame_is_an_error(video, tmp_path):
    path = tmp_path / "broken.mp4"
    path.write_bytes(b"nothing" * 99)
    assert isinstance(probe_file(str(path)), Skipped)
    broken = Video(str(path), -1, 24, 64, 48, "h264", 25.0, 0)
    with pytest.raises(DecodeError):
        next(sliding_windows(broken, frames=2, size=32, window=4, hop=4))


def test_spans_are_frames_or_seconds(video):
    assert parse_span("16", "--window") == parse_span(16, "--window") == Span(16, False)
    assert parse_span("0.5s", "--hop").frames(video) == round(0.5 * 25)
    assert parse_span("0.001 s", "--hop").frames(video) == 1
    assert [str(parse_span(text, "--hop")) for text in ("16", "2s", ".5s")] == ["16", "2s", "0.5s"]
    for text in ("0", "1.5", "-2", "2m", "s", "0s", ""):
        with pytest.raises(UserError, match=r"--hop .*: expected an integer number of frames \(16\) or seconds"):
            parse_span(text, "--hop")
    no_rate = Video("v", -1, 24, 64, 48, "frames", 0.0, 0)
    with pytest.raises(UserError, match="unknown frame rate, so 2s"):
        parse_span("2s", "--window").frames(no_rate)
