"""Damaged or odd files: each is decoded correctly or replaced, and none ends or stalls a run or changes a shape."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

from mam2.engine.config.training import DataConfig
from mam2.engine.data import decoding, vetting
from mam2.engine.data.decoding import DecodeError, decode_frames
from mam2.engine.data.encoding import encode_frames
from mam2.engine.data.loader import ClipLoader
from mam2.engine.data.manifest import Manifest, Skipped, Video, probe_file, read_manifest
from mam2.engine.data.video_decoders import DALI_CPU_CODECS
from mam2.engine.errors import UserError
from tests.helpers.dali import needs_dali
from tests.helpers.paths import CLIPS, REAL_CLIPS, needs_real_clips
from tests.helpers.videos import rotated, write_sound

CONFIG = DataConfig(frames=4, stride=2, size=32, threads=2)


def encode(
    path: Path, frames: np.ndarray, codec: str = "libx264", pixels: str = "yuv420p", pts: Sequence[int] = ()
) -> Path:
    """uint8 [T, H, W, 3] at 25 frames per second, or shown at pts / 25 seconds."""
    height, width = frames.shape[1:3]
    options = {"x265-params": "log-level=none"}
    encode_frames(path, frames, codec, (width, height), pixel_format=pixels, gop=6, times=pts, options=options)
    return path


def turn(path: Path) -> Path:
    """Writes a rotation by a quarter turn into an mp4."""
    path.write_bytes(rotated(path.read_bytes(), 270))
    return path


VARIABLE = np.cumsum(np.random.default_rng(0).integers(1, 9, 20)).tolist()
ODDITIES: dict[str, tuple[Callable[[Path, np.ndarray], Path], range]] = {
    "variable rate, mp4": (lambda folder, frames: encode(folder / "a.mp4", frames, pts=VARIABLE), range(20)),
    "variable rate, webm": (
        lambda folder, frames: encode(folder / "a.webm", frames, "libvpx-vp9", pts=VARIABLE),
        range(20),
    ),
    "an edit list that hides frames": (
        lambda folder, frames: encode(folder / "a.mp4", frames, pts=range(-5, 15)),
        range(5, 20),
    ),
    "ten bits, H.264": (lambda folder, frames: encode(folder / "a.mp4", frames, pixels="yuv420p10le"), range(20)),
    "ten bits, HEVC": (lambda folder, frames: encode(folder / "a.mkv", frames, "libx265", "yuv420p10le"), range(20)),
    "odd sides": (lambda folder, frames: encode(folder / "a.webm", frames[:, :27, :35], "libvpx-vp9"), range(20)),
    "one pixel": (lambda folder, frames: encode(folder / "a.webm", frames[:, :1, :1], "libvpx-vp9"), range(20)),
    "one pixel, lossless": (
        lambda folder, frames: encode(folder / "a.mov", frames[:, :1, :1], "png", "rgb24"),
        range(20),
    ),
    "a single row": (lambda folder, frames: encode(folder / "a.avi", frames[:, :1], "mjpeg", "yuvj444p"), range(20)),
    "a quarter turn": (lambda folder, frames: turn(encode(folder / "a.mp4", frames)), range(20)),
    "another extension": (lambda folder, frames: encode(folder / "a.mp4", frames).rename(folder / "a.avi"), range(20)),
}


@pytest.mark.parametrize("name", ODDITIES)
def test_an_odd_file_gives_the_right_frames(tmp_path, numbered_frames, frame_numbers, name):
    write, shown = ODDITIES[name]
    path = write(tmp_path, numbered_frames(20))
    manifest = read_manifest(path, progress=False)
    (video,) = manifest.videos
    assert video.frames == len(shown)
    for first in (0, 7, len(shown) - 1):
        clip = decode_frames(str(path), range(first, first + 3))
        assert (clip.shape[2], clip.shape[1]) == video.shown_size
        assert frame_numbers(clip) == [shown[min(t, len(shown) - 1)] for t in range(first, first + 3)]
    with ClipLoader(manifest, CONFIG, batch=2, device="cpu", seed=0) as loader:
        batch = next(loader.stream())
        assert batch.clip.shape == (2, 4, 32, 32, 3)
        assert set(frame_numbers(batch.clip.numpy())) <= set(shown)
        (middle,) = loader.evaluate()
    start = (len(shown) - 7) // 2
    assert frame_numbers(middle.clip.numpy()) == [shown[start + 2 * t] for t in range(4)]


def test_a_clock_that_starts_again_and_one_that_runs_backwards(tmp_path, numbered_frames, frame_numbers):
    halves = [encode(tmp_path / f"{half}.ts", numbered_frames(20)[10 * half :][:10]).read_bytes() for half in range(2)]
    (tmp_path / "twice.ts").write_bytes(halves[0] + halves[1])
    late = encode(tmp_path / "late.ts", numbered_frames(20)[:10], pts=range(500, 510)).read_bytes()
    (tmp_path / "back.ts").write_bytes(late + halves[1])
    for name in ("twice.ts", "back.ts"):
        for first in (0, 8, 12):
            assert frame_numbers(decode_frames(str(tmp_path / name), range(first, first + 5))) == [
                *range(first, first + 5)
            ]


def test_a_frame_larger_than_4k(tmp_path, numbered_frames, frame_numbers):
    path = encode(tmp_path / "a.avi", numbered_frames(2, 2400, 4224), "mjpeg", "yuvj420p")
    assert decode_frames(str(path), [1]).shape == (1, 2400, 4224, 3)
    config = dataclasses.replace(CONFIG, frames=2, stride=1)
    with ClipLoader(read_manifest(path, progress=False), config, batch=1, device="cpu", seed=0) as loader:
        assert frame_numbers(next(loader.stream()).clip.numpy()) == [0, 1]


@pytest.mark.parametrize(("suffix", "digits"), [(".jpg", 5), (".png", 1)])
def test_a_folder_of_images_is_a_video(tmp_path, numbered_frames, frame_numbers, suffix, digits):
    folder = tmp_path / "a video"
    folder.mkdir()
    for number, image in enumerate(numbered_frames(12), 1):
        codec, pixels = ("mjpeg", "yuvj420p") if suffix == ".jpg" else ("png", "rgb24")
        encode(tmp_path / "one.avi", image[None], codec, pixels)
        with av.open(str(tmp_path / "one.avi")) as container:
            (folder / f"img_{number:0{digits}d}{suffix}").write_bytes(bytes(next(container.demux(video=0))))
    (folder / "notes.txt").write_text("not an image")
    video = probe_file(str(folder))
    assert isinstance(video, Video)
    assert (video.codec, video.frames, video.width, video.height) == ("frames", 12, 64, 48)
    assert frame_numbers(decode_frames(str(folder), [0, 8, 9, 9, 30])) == [0, 8, 9, 9, 11]
    with ClipLoader(Manifest((video,)), CONFIG, batch=1, device="cpu", seed=0) as loader:
        (middle,) = loader.evaluate()
    assert frame_numbers(middle.clip.numpy()) == [2, 4, 6, 8]
    broken = sorted(folder.glob("img*"))[3]
    broken.write_bytes(b"no picture")
    number = decoding.frame_files(str(folder)).index(str(broken))
    with pytest.raises(DecodeError, match=rf"{broken.name}: no decodable image"):
        decode_frames(str(folder), [number])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DecodeError, match="no images in this folder"):
        decode_frames(str(tmp_path / "empty"), [0])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "No such file": lambda path: path.unlink(),
    "empty file": lambda path: path.write_bytes(b""),
    "damaged, or not a video": lambda path: path.write_bytes(path.read_bytes()[:600]),  # the index is at the end
    "[Dd]amaged|[Ii]nvalid|End of file|not a video": lambda path: path.write_text("a text under a video's name\n" * 40),
    "no video stream": lambda path: write_sound(path),
    "no decodable frame": lambda path: blank_packets(path),
    "not a file": lambda path: (path.unlink(), os.mkfifo(path)),
    "no images in this folder": lambda path: (path.unlink(), path.mkdir()),
}


def blank_packets(path: Path) -> None:
    content = path.read_bytes()
    start, end = content.index(b"mdat") + 4, content.index(b"moov") - 4
    path.write_bytes(content[:start] + bytes(end - start) + content[end:])


@pytest.fixture(scope="module")
def sound(tmp_path_factory, numbered_frames) -> Manifest:
    folder = tmp_path_factory.mktemp("sound")
    for number in range(6):
        frames = np.roll(numbered_frames(20), number, 0)
        encode(folder / f"{number}.mp4", frames)
    return read_manifest(folder, progress=False)


def take(manifest: Manifest, steps: int, on_skip: Callable[[Skipped], None] | None = None, **changes: object) -> list:
    config = dataclasses.replace(CONFIG, **changes)
    with ClipLoader(manifest, config, batch=4, device="cpu", seed=3, on_skip=on_skip) as loader:
        return list(itertools.islice(loader.stream(), steps))


@pytest.mark.parametrize("reason", DAMAGES)
def test_what_breaks_after_the_scan_is_replaced_and_named_once(sound, tmp_path, reason):
    path = tmp_path / "broken.mp4"
    path.write_bytes(Path(sound.videos[2].path).read_bytes())
    (tmp_path / "other.mp4").touch()  # an empty folder counts as an unavailable drive, for which the loader waits
    videos = list(sound.videos)
    videos[2] = dataclasses.replace(videos[2], path=str(path))
    DAMAGES[reason](path)
    with pytest.raises(DecodeError, match=reason):
        decode_frames(str(path), [0])
    messages: list[Skipped] = []
    got, expected = take(Manifest(tuple(videos)), 6, messages.append), take(sound, 6)
    assert [entry.path for entry in messages] == [str(path)]
    replaced = 0
    for batch, whole in zip(got, expected, strict=True):
        kept = whole.index != 2
        assert torch.equal(batch.index[kept], whole.index[kept])
        assert torch.equal(batch.clip[kept], whole.clip[kept])
        assert 2 not in batch.index
        replaced += int((~kept).sum())
    assert replaced == 4  # four passes over six videos


def test_bits_that_rotted_leave_frames_of_the_right_shape(sound, tmp_path):
    content = bytearray(Path(sound.videos[0].path).read_bytes())
    start, end = content.index(b"mdat") + 400, content.index(b"moov") - 4
    generator = np.random.default_rng(0)
    for place in generator.integers(start, end, 60):
        content[place] ^= 1 << int(generator.integers(8))
    path = tmp_path / "rotten.mp4"
    path.write_bytes(content)
    assert decode_frames(str(path), range(20)).shape == (20, 48, 64, 3)


def test_a_playlist_does_not_reach_other_files_or_the_network(sound, tmp_path):
    lists = {
        "concat": f"ffconcat version 1.0\nfile '{sound.videos[0].path}'\n",
        "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://localhost:9/a.ts\n#EXT-X-ENDLIST\n",
    }
    for name, text in lists.items():
        path = tmp_path / f"{name}.mp4"
        path.write_text(text)
        with pytest.raises(DecodeError):
            decode_frames(str(path), [0])


def test_a_file_that_takes_too_long_counts_as_unusable(sound, monkeypatch):
    slow = sound.videos[4].path
    decode_packet, here = decoding.decode_packet, threading.local()  # a clock for each thread

    def dawdle(stream, packet):
        if stream.container.name == slow:
            here.late = getattr(here, "late", 0) + 25
        return decode_packet(stream, packet)

    monkeypatch.setattr(decoding, "decode_packet", dawdle)
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + getattr(here, "late", 0))
    monkeypatch.setattr(decoding, "time", clock)
    messages: list[Skipped] = []
    batches = take(sound, 4, messages.append, timeout_s=100, frames=8)
    assert messages == [Skipped(slow, "not decoded within 100 s")]
    assert all(4 not in batch.index for batch in batches)
    with pytest.raises(DecodeError, match="not read within 1e-09 s"):
        decode_frames(slow, [0], timeout_s=1e-9)


def test_too_many_unusable_files_stop_with_a_summary(sound, tmp_path):
    (tmp_path / "other.mp4").touch()  # an empty folder counts as a drive that is away, which is waited for
    videos = [dataclasses.replace(video, path=str(tmp_path / f"{n}.mp4")) for n, video in enumerate(sound.videos)]
    with pytest.raises(
        UserError, match=r"4 of 6 videos cannot be used, more than data\.max_unusable=0\.5.*No such file"
    ):
        take(Manifest((*videos[:4], *sound.videos[4:])), 6)


def test_every_broken_file_is_named_with_a_reason(clip_set):
    damaged = {name for name in clip_set.listed if "corrupt_" in name}
    skipped = {clip_set.name(entry.path): entry.reason for entry in clip_set.found.skipped}
    usable = {clip_set.name(video.path): video for video in clip_set.found.videos}
    assert skipped.keys() == clip_set.broken
    assert len(damaged & skipped.keys()) > 3
    assert len(damaged & usable.keys()) > 1
    for name, reason in skipped.items():
        assert reason
        assert "Error" not in reason, name  # our message, not that of an unexpected exception
    for name in damaged & usable.keys():
        video = usable[name]
        clip = decode_frames(video.path, range(0, video.frames, max(video.frames // 4, 1)))
        assert clip.shape[1:] == (*video.shown_size[::-1], 3)


@pytest.mark.slow
def test_dali_sees_no_file_that_leads_it_astray(tmp_path, numbered_frames):
    sound = encode(tmp_path / "a.avi", numbered_frames(12), "mjpeg", "yuvj420p")
    content = sound.read_bytes()
    vetting.vet(np.frombuffer(content, np.uint8))
    size = content.index(b"movi") - 4
    damaged = content[:size] + struct.pack("<I", 0xF0000000) + content[size + 4 :]
    with pytest.raises(DecodeError, match="an offset points outside of the file"):
        vetting.vet(np.frombuffer(damaged, np.uint8))
    webm = encode(tmp_path / "a.webm", numbered_frames(12), "libvpx").read_bytes()
    place = webm.index(bytes.fromhex("b08140"))  # PixelWidth, one byte: 64
    narrow = webm[: place + 2] + b"\x3f" + webm[place + 3 :]
    with pytest.raises(DecodeError, match=r"a frame of 64x48, but the header says \(63, 48\)"):
        vetting.vet(np.frombuffer(narrow, np.uint8))
    vetted: set[tuple[str, int, int]] = set()
    assert vetting.read_vetted(str(sound), vetted).tobytes() == content
    assert len(vetted) == 1
    sound.write_bytes(damaged)
    with pytest.raises(DecodeError):
        vetting.read_vetted(str(sound), vetted)
    with pytest.raises(DecodeError, match="not a file of 1 to"):
        vetting.read_vetted(str(tmp_path), vetted)


def test_dali_may_see_every_sound_file(clip_set):
    sound = [video for video in clip_set.found.videos if video.codec in DALI_CPU_CODECS and "corrupt" not in video.path]
    assert {video.codec for video in sound} >= {"vp8", "vp9", "mjpeg"}
    for video in sound:
        vetting.vet(np.fromfile(video.path, np.uint8))


def fuzz(*arguments: str) -> dict:
    program = Path(__file__).with_name("fuzz_decoding.py")
    done = subprocess.run([sys.executable, program, *arguments], capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("decoder", "count", "sources"),
    [
        ("pyav", 1000, None),
        ("pyav", 150, CLIPS),
        pytest.param("pyav", 150, REAL_CLIPS, marks=needs_real_clips),
        pytest.param("dali-cpu", 100, None, marks=needs_dali),
        ("loader", 20, None),
    ],
)
def test_mutants_neither_crash_nor_hang_nor_misshape(decoder, count, sources):
    report = fuzz("--decoder", decoder, "--count", str(count), *([str(sources)] if sources else []))
    assert report["bad"] == {}
    assert report["mutants"] == count
    assert report["outcomes"]["decoded"] > count / 10


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["auto", pytest.param("dali-cpu", marks=needs_dali)])
def test_memory_stays_flat_over_many_epochs_with_damaged_files(tmp_path, numbered_frames, monkeypatch, decoder):
    for number in range(6):
        encode(tmp_path / f"{number}.webm", numbered_frames(20, 120, 160), "libvpx")
    manifest = read_manifest(tmp_path, progress=False)
    for video in manifest.videos[:2]:
        Path(video.path).write_bytes(Path(video.path).read_bytes()[:250])
    # Without vetting, DALI loses its pipeline to them in every epoch.
    monkeypatch.setattr(vetting, "vet", lambda content: None)
    config = dataclasses.replace(CONFIG, decoder=decoder)
    with ClipLoader(manifest, config, batch=6, device="cpu", seed=0) as loader:
        stream = loader.stream()
        for _ in range(20):  # epochs
            next(stream)
        sizes = [resident_mib()]
        for _ in range(3):
            for _ in range(40):
                next(stream)
            sizes.append(resident_mib())
        assert len(loader.skipped) == 2
    # The 240 clips of 40 epochs are 53 MiB: a leak adds as much in every round; other memory stops growing.
    assert min(after - before for before, after in itertools.pairwise(sizes)) < 16, sizes
