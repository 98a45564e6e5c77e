"""The doctor decodes a clip of each codec, and reports which are correct and which are not."""

from __future__ import annotations

import av
import torch

from mam2.engine import doctor
from mam2.engine.data import renderer
from tests.helpers.dali import DALI_INSTALLED

CPU = torch.device("cpu")


def test_it_decodes_a_clip_of_each_codec(capfd):
    lines = {line.split()[0]: line for line in doctor.try_decoding(CPU)}
    assert "Svt" not in capfd.readouterr().err  # the AV1 encoder's own log
    assert set(lines) == set(doctor.CODECS)
    for codec in ("h264", "hevc", "vp9", "mjpeg", "mpeg4"):
        assert f"decoded correctly by pyav, cropped by {'DALI' if DALI_INSTALLED else 'PyTorch'}" in lines[codec]


def test_what_does_not_work_is_named(monkeypatch):
    decode = renderer.decode_frames
    monkeypatch.setattr(
        renderer, "decode_frames", lambda *arguments, **options: decode(*arguments, **options)[::-1].copy()
    )
    wrong = [line for line in doctor.try_decoding(CPU) if "not tested" not in line]
    assert len(wrong) >= 5
    assert all("WRONG" in line for line in wrong)

    def removed(*_, **__):
        raise TypeError("open() got an unexpected keyword argument 'metadata_errors'")

    monkeypatch.setattr(av, "open", removed)
    impossible = [line for line in doctor.try_decoding(CPU) if "not tested" not in line]
    assert len(impossible) >= 5
    assert all("NOT POSSIBLE: TypeError: open() got an unexpected" in line for line in impossible)
