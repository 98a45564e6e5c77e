"""Videos are written in one way."""

from fractions import Fraction

import av
import numpy as np
import pytest

from mam2.engine.data.decoding import decode_frames
from mam2.engine.data.encoding import encode_frames
from tests.helpers.paths import ROOT

WRITERS = {"engine/data/encoding.py", "tests/helpers/videos.py"}
"""The latter writes sound."""


def test_frames_are_shown_at_their_times(tmp_path, numbered_frames, frame_numbers):
    times = [0, 40, 70, 500]
    encode_frames(
        tmp_path / "a.mkv",
        numbered_frames(4),
        "ffv1",
        (64, 48),
        pixel_format="bgr0",
        times=times,
        time_base=Fraction(1, 1000),
    )
    with av.open(str(tmp_path / "a.mkv")) as container:
        assert [1000 * frame.time for frame in container.decode(video=0)] == pytest.approx(times)
    assert frame_numbers(decode_frames(str(tmp_path / "a.mkv"), range(4))) == [0, 1, 2, 3]


def test_frames_come_in_any_format_and_a_single_one_becomes_a_picture(tmp_path):
    gray = np.random.default_rng(0).integers(0, 1 << 16, (1, 8, 10), np.uint16)
    given = {"pixel_format": "gray16be", "frame_format": "gray16le", "container_format": "image2"}
    encode_frames(tmp_path / "a.png", gray, "png", (10, 8), **given)
    with av.open(str(tmp_path / "a.png")) as container:
        (frame,) = container.decode(video=0)
    assert np.array_equal(frame.to_ndarray(format="gray16le"), gray[0])


def test_no_other_code_writes_streams():
    call = "add_" + "stream("
    folders = ("engine", "benchmarks", "examples", "tests")
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.py") if call in path.read_text("utf-8")]
    assert {str(path.relative_to(ROOT)) for path in found} == WRITERS
