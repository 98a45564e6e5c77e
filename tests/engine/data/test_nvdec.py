"""When NVDEC is used, tested with mocks: no GPU is needed."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from mam2.engine.data import nvdec
from mam2.engine.data.decoding import DecodeError, decode_frames
from mam2.engine.data.video_decoders import MOST_BYTES_READ, MOST_FRAMES_READ, choose_decoder
from mam2.engine.errors import UserError

HEAD = "Critical error in pipeline:\nError in MIXED operator `nvidia.dali.fn.decoders.video`,\nencountered:\n\n"
RESIZE = "Error in GPU operator `nvidia.dali.fn.resize`,\nencountered:\n\n"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            HEAD + 'Assert on "x" failed: Failed to create video decoder\nCurrent pipeline object is no longer valid.',
            "file",
        ),
        (HEAD + "Video is too small in at least one dimension. Provided: 64x64 vs supported:128x128", "file"),
        (HEAD + "Assert failed: Failed to send packet to decoder: Invalid data found", "file"),
        (HEAD + "dlopen libnvcuvid.so failed!. Please install GPU driver", "driver"),
        (HEAD + "CUDA driver API error CUDA_ERROR_NO_DEVICE (100)", "driver"),
        (HEAD + "CUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory", "memory"),
        (RESIZE + "Can't allocate 7 B on device 0: std::bad_alloc", "memory"),
        (HEAD + "cudaErrorIllegalAddress: an illegal memory access was encountered", "gpu"),
        (RESIZE + "input shape is wrong", "program"),
    ],
)
def test_only_the_decoders_own_stops_are_a_files_fault(message, expected):
    assert nvdec.fault(message) == expected
    kind = {"file": DecodeError, "program": RuntimeError}.get(expected, UserError)
    assert isinstance(nvdec.error_of(message, "the reason"), kind)


def test_failures_count_only_in_a_row():
    record = nvdec.Record()
    stops = [record.note(False) for _ in range(19)] + [record.note(True)] + [record.note(False) for _ in range(25)]
    assert [place for place, stop in enumerate(stops) if stop] == [39]


def test_a_trial_accepts_right_frames_only(tmp_path):
    def decode(content: np.ndarray) -> np.ndarray:
        (tmp_path / "clip").write_bytes(content.tobytes())
        return decode_frames(str(tmp_path / "clip"), range(nvdec.TRIAL_FRAMES))

    def late(content: np.ndarray) -> np.ndarray:
        return np.roll(decode(content), 1, 0)

    def no_library(_: np.ndarray) -> np.ndarray:
        raise nvdec.error_of("dlopen libnvcuvid.so failed!", "DALI: dlopen libnvcuvid.so failed!")

    for codec in ("h264", "hevc", "vp9", "mjpeg"):
        assert nvdec.try_codec(codec, decode) == ""
    assert "gray levels" in nvdec.try_codec("h264", late)
    assert "was decoded to" in nvdec.try_codec("h264", lambda content: decode(content)[:-1])
    assert set(nvdec.try_codecs(["h264", "vp9"], no_library)) == {"h264", "vp9"}
    assert "libnvcuvid" in nvdec.try_codec("h264", no_library)


def test_work_that_does_not_end_is_left_behind():
    assert nvdec.within(5, lambda: 7) == 7
    with pytest.raises(KeyError, match="x"):
        nvdec.within(5, lambda: {}["x"])
    end = threading.Event()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.05 s"):
        nvdec.within(0.05, end.wait)
    end.set()


def test_time_in_which_the_process_is_stopped_is_not_nvdecs(monkeypatch):
    """Ctrl-Z, then fg an hour later: the clocks say that an hour has passed, and the first wait ends at once."""
    end, waits = threading.Event(), []

    class Stopped(threading.Thread):
        def join(self, timeout=None):
            waits.append(timeout)
            if len(waits) == 2:
                end.set()
                super().join()

    monkeypatch.setattr(nvdec.threading, "Thread", Stopped)
    assert nvdec.within(5, lambda: end.wait() and 7) == 7
    assert sum(waits) == pytest.approx(5)


@pytest.mark.parametrize(
    ("codec", "traits", "expected"),
    [
        ("vp9", {"size": (64, 64)}, "pyav"),
        ("vp9", {"size": (128, 128)}, "nvdec"),
        ("hevc", {"size": (144, 143)}, "pyav"),
        ("h264", {"size": (64, 64)}, "nvdec"),
        ("h264", {"size": (4098, 2160)}, "pyav"),
        ("hevc", {"size": (4098, 2160)}, "nvdec"),
        ("h264", {"size": (640, 480), "interlaced": True}, "pyav"),
        ("h264", {"bytes": MOST_BYTES_READ + 1}, "pyav"),
        ("h264", {"bytes": MOST_BYTES_READ}, "nvdec"),
        ("h264", {"frames": MOST_FRAMES_READ + 1}, "pyav"),
        ("h264", {"frames": MOST_FRAMES_READ}, "nvdec"),
        ("h264", {"broken": {"h264": "no library"}}, "pyav"),
        ("h264", {"broken": {"vp9": "no library"}}, "nvdec"),
        ("h264", {"dali": False}, "pyav"),
    ],
)
def test_nvdec_gets_only_what_it_can_decode(codec, traits, expected):
    assert choose_decoder(codec, "cuda", **traits) == expected


def test_a_forced_nvdec_that_fails_its_trial_says_why():
    with pytest.raises(UserError, match=r"h264 cannot be decoded by nvdec on this machine \(no library\)"):
        choose_decoder("h264", "cuda", "nvdec", broken={"h264": "no library"})
