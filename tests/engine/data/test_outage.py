"""The loader waits for storage that is unavailable, but not for a broken file."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import time
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

from mam2.engine.config.training import DataConfig
from mam2.engine.data import cuts, decoding, outage, renderer, video
from mam2.engine.data.crops import crop
from mam2.engine.data.decoding import DecodeError, decode_frames
from mam2.engine.data.outage import Patience, why_away
from mam2.engine.data.sampling import ClipRequest, View, least_size
from mam2.engine.data.video import Video, probe_file
from mam2.engine.errors import UserError
from tests.helpers.loaders import CONFIG, assert_same, open_loader, take


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(outage, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(outage, "LONGEST_PAUSE_S", 0.05)


def wrapped(error: Exception) -> DecodeError:
    """Raises the error of `open_video`."""
    found = DecodeError("cannot be read")
    found.__cause__ = error
    return found


def test_whose_fault_it_is(tmp_path):
    sound, gone, alone = tmp_path / "a.mp4", tmp_path / "away" / "b.mp4", tmp_path / "c.mp4"
    sound.write_bytes(b"x" * 1000)
    for number in (errno.EIO, errno.ESTALE, errno.ENOTCONN):
        assert why_away(str(sound), wrapped(OSError(number, "")))
        assert why_away(str(sound), wrapped(wrapped(OSError(number, ""))))
    assert why_away(str(sound), wrapped(PermissionError(errno.EACCES, ""))) == ""
    assert why_away(str(sound), DecodeError("damaged, or not a video")) == ""
    assert why_away(str(alone), wrapped(FileNotFoundError(errno.ENOENT, ""))) == ""
    assert "missing or empty" in why_away(str(gone), wrapped(FileNotFoundError(errno.ENOENT, "")))
    # FFmpeg reports EIO for damage too; reading the file tells the two apart.
    with pytest.raises(av.error.OSError) as caught:
        av.error.err_check(-errno.EIO)
    assert why_away(str(sound), wrapped(caught.value)) == ""
    assert why_away(str(alone), wrapped(caught.value))


@pytest.mark.parametrize("stops", [1, 2])
def test_a_run_that_is_stopped_for_a_while_blames_no_file(videos, monkeypatch, stops):
    """Ctrl-Z during a clip, then fg: its time is over, and it is decoded again. A file slow twice is unusable."""
    config, reads = dataclasses.replace(CONFIG, threads=1), itertools.count()
    expected = take(videos, 3, config)
    # the clip's begin, and the check after its first packet
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + 1000 * min((next(reads) + 1) // 2, stops))
    monkeypatch.setattr(decoding, "time", clock)
    skipped = []
    found = take(videos, 3, config, on_skip=skipped.append)
    if stops == 1:
        assert not skipped
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert [entry.reason for entry in skipped] == ["not decoded within 60 s"]


def test_a_folder_that_comes_back_costs_nothing_but_time(videos, tmp_path):
    """The data set is renamed until the run notices; the clips are those of an undisturbed run."""
    folder = tmp_path / "data"
    folder.mkdir()
    moved = []
    for entry in videos.videos:
        path = folder / entry.path.rpartition("/")[2]
        path.write_bytes(Path(entry.path).read_bytes())
        moved.append(dataclasses.replace(entry, path=str(path)))
    here = dataclasses.replace(videos, videos=tuple(moved))
    expected, said, messages = take(here, 12), [], []
    config = dataclasses.replace(CONFIG, prefetch=1, wait_s=60)

    def say(line: str) -> None:
        said.append(line)
        if "is missing or empty" in line and not folder.exists():
            (tmp_path / "elsewhere").rename(folder)

    with open_loader(here, config, info=say, on_skip=messages.append) as clips:
        stream = clips.stream()
        got = [next(stream)]
        folder.rename(tmp_path / "elsewhere")
        got += [next(stream) for _ in range(11)]
    assert messages == []
    for one, other in zip(expected, got, strict=True):
        assert_same(one, other)
    assert any("is missing or empty; retrying for up to 60 s" in line for line in said)
    assert any("can be read again after" in line for line in said)


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EIO])
@pytest.mark.parametrize(("fails", "there", "reads"), [(1, True, 2), (9, True, 2), (9, False, 1)])
def test_an_outage_that_ends_before_it_is_examined_blames_no_file(tmp_path, number, fails, there, reads):
    """The file is there again: it is read once more. FFmpeg has the same errors for damaged files."""
    path, done = tmp_path / "a.mp4", []
    (path if there or number == errno.EIO else tmp_path / "b.mp4").write_bytes(b"x" * 1000)
    with pytest.raises(av.error.FFmpegError) as caught:
        av.error.err_check(-number)

    def read() -> int:
        done.append(None)
        if len(done) <= fails:
            raise wrapped(caught.value)
        return 7

    patience = Patience(1, pytest.fail, [str(path)])
    if fails == 1:
        assert patience(str(path), read) == 7
    else:
        with pytest.raises(DecodeError):
            patience(str(path), read)
    assert len(done) == (reads if number == errno.ENOENT else 2)


def test_data_that_stays_away_ends_the_run_and_burns_no_video(videos, tmp_path):
    away = dataclasses.replace(
        videos,
        videos=tuple(dataclasses.replace(v, path=f"{tmp_path}/gone/{k}.mp4") for k, v in enumerate(videos.videos)),
    )
    messages, config = [], dataclasses.replace(CONFIG, wait_s=0.1)
    with open_loader(away, config, info=messages.append, on_skip=messages.append) as clips:
        with pytest.raises(UserError, match=r"the data is unavailable: folder .*/gone is missing or empty.*--resume"):
            next(clips.stream())
        assert clips.skipped == []


def test_one_file_that_stays_unreadable_counts_as_unusable(tmp_path, monkeypatch):
    paths = [tmp_path / f"{k}.mp4" for k in range(4)]
    for path in paths:
        path.write_bytes(b"x")
    monkeypatch.setattr(outage, "ALONE_S", 0.1)
    said: list[str] = []
    patience = Patience(60, said.append, [str(path) for path in paths])
    calls = []

    def bad_sector() -> None:
        calls.append(1)
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        patience(str(paths[0]), bad_sector)
    assert len(calls) > 2
    calls.clear()
    with pytest.raises(OSError, match="Input/output"):
        patience(str(paths[0]), bad_sector)
    assert len(calls) == 1  # the loader does not wait for it again
    assert len(said) == 1


def test_a_scan_tries_again_and_does_not_keep_what_it_could_not_read(
    tmp_path, write_video, numbered_frames, monkeypatch
):
    path = write_video(tmp_path / "a.mp4", numbered_frames(4))
    real, calls = video._probe_file, []

    def stale(*arguments):
        calls.append(1)
        if len(calls) < 3:
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(*arguments)

    monkeypatch.setattr(video, "_probe_file", stale)
    assert isinstance(probe_file(str(path)), Video)
    monkeypatch.setattr(video, "_PATIENCE", Patience(0, print))
    calls.clear()
    found = probe_file(str(path))
    assert (found.bytes, found.mtime_ns) == (0, 0)


def test_a_mistake_of_a_program_is_not_a_skipped_file(tmp_path, write_video, numbered_frames, monkeypatch):
    path = write_video(tmp_path / "a.mp4", numbered_frames(4))

    def removed(*_, **__):
        raise TypeError("open() got an unexpected keyword argument 'metadata_errors'")

    monkeypatch.setattr(av, "open", removed)
    with pytest.raises(TypeError, match="metadata_errors"):
        probe_file(str(path))


CODECS = [("mp4", "libx264"), ("mkv", "libx264"), ("ts", "libx264"), ("webm", "libvpx-vp9"), ("avi", "mjpeg")]


@pytest.mark.parametrize(("suffix", "encoder"), CODECS)
def test_a_large_file_is_read_from_a_seek_point(
    tmp_path, write_video, numbered_frames, frame_numbers, monkeypatch, suffix, encoder
):
    monkeypatch.setattr(video, "SEEK_FROM", 0)
    monkeypatch.setattr(video, "SEEK_SPACING", 0)
    path = str(write_video(tmp_path / f"a.{suffix}", numbered_frames(24), encoder, gop=4))
    found = probe_file(path)
    assert len(found.seek_points) >= 3
    assert Video(**dataclasses.asdict(found)) == found
    read, packets = decoding.read_packets, []

    def counted(container, stream):
        for packet in read(container, stream):
            packets.append(packet.size)
            yield packet

    monkeypatch.setattr(decoding, "read_packets", counted)
    monkeypatch.setattr(cuts, "REORDER", 2)
    for start in (0, 3, 4, 11, 17, 23):
        wanted = [min(start + k, 23) for k in range(3)]
        assert frame_numbers(decode_frames(path, wanted, seek_points=found.seek_points)) == wanted
    packets.clear()
    decode_frames(path, [20, 21], seek_points=found.seek_points)
    sought = len(packets)
    packets.clear()
    decode_frames(path, [20, 21])
    # Transport streams have no index: seeking misses, which is detected, and the file is read from its beginning.
    assert suffix == "ts" or sought < len(packets) / 2
    # Wrong seek points are detected.
    assert frame_numbers(decode_frames(path, [20], seek_points=[(8, 10**9)])) == [20]


def test_large_frames_are_scaled_while_they_are_converted(tmp_path, write_video):

    y, x = np.mgrid[:360, :480]
    picture = np.stack([127 + 100 * np.sin(x / 23), 127 + 100 * np.cos(y / 31), (x + y) / 4], -1).astype(np.uint8)
    path = str(write_video(tmp_path / "a.mp4", np.stack([picture] * 2), crf="10"))
    view = View(0.1, 0.2, 0.9, 0.8, False)
    full, small = decode_frames(path, [0]), decode_frames(path, [0], least_size=least_size([view], 64))
    assert small.shape == (1, 150, 200, 3)  # 1.4 times 64 pixels of 60 % of the height
    one, other = (crop(torch.from_numpy(frames), view, 64).float() for frames in (full, small))
    assert (one - other).abs().mean() < 1
    assert decode_frames(path, [0], least_size=(400, 300)).shape == full.shape  # too little to shrink
    assert DataConfig().wait_s < 600


def test_frames_for_a_gpu_are_decoded_into_pinned_memory(tmp_path, write_video, numbered_frames, monkeypatch):
    path = str(write_video(tmp_path / "a.mp4", numbered_frames(4)))
    expected = decode_frames(path, [1, 2])
    work = renderer.Renderer(dataclasses.replace(CONFIG, threads=1), samples=1, device=torch.device("cpu"), info=print)
    monkeypatch.setattr(work, "_device", torch.device("cuda"))
    empty, pinned = torch.empty, []

    def allocate(shape, *, dtype, pin_memory=False):
        pinned.append(pin_memory)
        return empty(shape, dtype=dtype)

    monkeypatch.setattr(torch, "empty", allocate)
    try:
        request = ClipRequest(0, (1, 2), (View(0, 0, 1, 1, False),))
        found = work.start(0, path, request, "pyav").payload.result()
    finally:
        monkeypatch.undo()
        work.close()
    assert pinned == [True]
    assert np.array_equal(found, expected)
