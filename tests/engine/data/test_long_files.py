"""A clip from a long file reads the part around it and not the file up to it."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from mam2.engine.config.training import DataConfig
from mam2.engine.data import renderer, storage
from mam2.engine.data.decoding import decode_frames
from mam2.engine.data.encoding import encode_frames
from mam2.engine.data.manifest import Manifest
from mam2.engine.data.video import SEEK_FRAMES, Video, probe_file
from mam2.engine.data.video_decoders import MOST_BYTES_READ, choose_decoder
from tests.helpers.loaders import take

SECONDS = 3600


@pytest.fixture(scope="module")
def hour(tmp_path_factory: pytest.TempPathFactory) -> Video:
    """An hour of small noisy frames, one per second."""
    path = tmp_path_factory.mktemp("long") / "hour.mp4"
    noise = np.random.default_rng(0).integers(0, 256, (40, 48, 64, 3), np.uint8)
    frames = (noise[number % 40] for number in range(SECONDS))
    options = {"preset": "ultrafast", "crf": "30"}
    encode_frames(path, frames, "libx264", (64, 48), rate=Fraction(1), gop=30, options=options)
    video = probe_file(str(path))
    assert isinstance(video, Video)
    return video


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each read of a file from now on."""
    counted: list[int] = []
    open_file = storage.open_file

    def counting(path: str) -> Any:
        file = open_file(path)
        read = file.read

        class Counted:
            name, seek, tell, close = path, file.seek, file.tell, file.close

            def read(self, size: int) -> bytes:
                content = read(size)
                counted.append(len(content))
                return content

            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

        return Counted()

    monkeypatch.setattr(storage, "is_plain", lambda _: False)
    monkeypatch.setattr(storage, "open_file", counting)
    return counted


def test_an_hour_has_a_seek_point_for_every_minute_of_frames(hour: Video) -> None:
    assert hour.frames == SECONDS
    assert hour.duration_s == SECONDS
    assert hour.bytes > 4_000_000
    assert [frame for frame, _ in hour.seek_points] == [SEEK_FRAMES, 2 * SEEK_FRAMES]


@pytest.mark.parametrize("frames", [(3100, 3104, 3108), (1500, 1501), (1499, 1500), (3598, 3599, 3700)])
def test_the_frames_are_those_of_a_read_from_the_beginning(hour: Video, frames: tuple[int, ...]) -> None:
    assert np.array_equal(
        decode_frames(hour.path, frames, seek_points=hour.seek_points), decode_frames(hour.path, frames)
    )


def test_a_clip_late_in_the_hour_reads_a_part_of_it(hour: Video, reads: list[int]) -> None:
    late = [3040, 3044, 3048, 3052]
    decode_frames(hour.path, late)
    assert sum(reads) > 0.8 * hour.bytes  # without seek points
    reads.clear()
    decode_frames(hour.path, late, seek_points=hour.seek_points)
    assert 0 < sum(reads) < 0.25 * hour.bytes


def test_on_a_gpu_an_hour_of_video_goes_to_the_decoder_that_seeks(hour: Video) -> None:
    """At 25 frames per second also where all its bytes would be few."""
    longer = dataclasses.replace(hour, frames=25 * SECONDS)
    assert longer.bytes < MOST_BYTES_READ
    assert choose_decoder(longer.codec, "cuda", **longer.traits) == "pyav"
    assert choose_decoder(longer.codec, "cuda", "nvdec", **longer.traits) == "nvdec"  # where it is asked for


def test_the_loader_passes_the_seek_points(hour: Video, monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[Any] = []

    def decode(*args: Any, **options: Any) -> Any:
        passed.append(options["seek_points"])
        return decode_frames(*args, **options)

    monkeypatch.setattr(renderer, "decode_frames", decode)
    take(Manifest((hour,)), 1, DataConfig(frames=4, stride=2, size=32, threads=1), batch=1)
    assert passed[0] == hour.seek_points
