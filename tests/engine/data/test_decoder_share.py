"""NVDEC and PyAV decode a part of each batch, in proportion to their rates. NVDEC is played by DALI's CPU decoder."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from mam2.engine.data import assigned_decoders, decoder_share
from mam2.engine.data.dali import ClipGraph
from mam2.engine.data.decoder_share import FILE, Rates, divide, measure_rates, nvdec_keeps
from mam2.engine.errors import UserError
from mam2.engine.tokenizer.precompute import tokenize
from mam2.engine.train import session
from mam2.engine.train.pretrain import pretrain
from tests.helpers.dali import needs_dali
from tests.helpers.loaders import CONFIG, assert_same, open_loader, take

GPU = torch.device("cuda")


@pytest.fixture
def nvdec(monkeypatch):
    """Gives all VP9 files to NVDEC, which is DALI's CPU decoder here; returns the numbers of clips it was asked for."""
    init, run, asked = ClipGraph.__init__, ClipGraph.run, []

    def graph(self, decoder, config, **options):
        init(self, "dali-cpu" if decoder == "nvdec" else decoder, config, **options)
        self.plays_nvdec = decoder == "nvdec"

    def counted(self, payloads, frames, views):
        if self.plays_nvdec:
            asked.append(len(payloads))
        return run(self, payloads, frames, views)

    monkeypatch.setattr(ClipGraph, "__init__", graph)
    monkeypatch.setattr(ClipGraph, "run", counted)
    monkeypatch.setattr(
        assigned_decoders,
        "choose_decoder",
        lambda codec, device, forced, **_: "nvdec" if codec == "vp9" and forced != "pyav" else "pyav",
    )
    return asked


@pytest.fixture
def many(videos):
    """200 places of VP9 videos."""
    vp9 = [video for video in videos.videos if video.codec == "vp9"]
    return dataclasses.replace(videos, videos=tuple(vp9[place % len(vp9)] for place in range(200)))


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.87])
def test_any_run_of_videos_is_divided_by_the_share(share):
    kept = [nvdec_keeps(video, share) for video in range(100_000)]
    for first in (0, 12_345, 99_000):
        assert sum(kept[first : first + 1000]) / 1000 == pytest.approx(share, abs=0.005)
    more = [nvdec_keeps(video, share + 0.1) for video in range(1000)]
    assert all(later for before, later in zip(kept, more, strict=False) if before)


def test_all_videos_stay_with_nvdec_at_a_share_of_1():
    assert all(nvdec_keeps(video, 1.0) for video in range(100_000))


@pytest.mark.parametrize(
    ("nvdec", "pyav", "share"), [(100, 100, 0.5), (300, 100, 0.75), (990, 10, 1.0), (1, 999, 0.05), (60, 200, 0.23)]
)
def test_both_decoders_need_the_same_time(nvdec, pyav, share):
    assert Rates(nvdec, pyav).share == share


def test_a_loader_divides_its_videos(many, nvdec):
    config = dataclasses.replace(CONFIG, nvdec_share=0.25)
    with open_loader(many, config) as clips:
        assert clips.decoders == {"nvdec": 50, "pyav": 150}
        assert clips.videos_of("nvdec") == [video for video in range(200) if nvdec_keeps(video, 0.25)]


@needs_dali
def test_the_share_changes_who_decodes_and_not_what(many, nvdec):
    alone, shared = take(many, 5), take(many, 5, dataclasses.replace(CONFIG, nvdec_share=0.5))
    by_pyav = take(many, 5, dataclasses.replace(CONFIG, decoder="pyav"))
    for both, by_nvdec, by_cpu in zip(shared, alone, by_pyav, strict=True):
        assert torch.equal(both.index, by_nvdec.index)
        for row, video in enumerate(both.index.tolist()):
            expected = by_nvdec if nvdec_keeps(video, 0.5) else by_cpu
            assert torch.equal(both.clip[row], expected.clip[row])


@needs_dali
def test_a_measurement_times_both_decoders(many, nvdec):
    rates = measure_rates(many, list(range(200)), CONFIG, torch.device("cpu"))
    assert rates.nvdec > 0
    assert rates.pyav > 0
    assert nvdec.count(32) >= 5  # in the half of the measurement that is NVDEC's


def test_a_run_measures_once_and_keeps_its_share(many, nvdec, tmp_path, monkeypatch):
    monkeypatch.setattr(decoder_share, "measure_rates", lambda *_: Rates(150.0, 50.0))
    with open_loader(many) as clips:
        line = divide(clips, CONFIG, GPU, tmp_path)
        assert clips.decoders == {"nvdec": 150, "pyav": 50}
        first = clips.videos_of("nvdec")
    assert line == (
        "NVDEC decodes 75 % of what it can, PyAV the others (150 clips per second of NVDEC alone, 50 of PyAV alone; "
        "measured)"
    )
    monkeypatch.delattr(decoder_share, "measure_rates")
    with open_loader(many) as clips:
        assert divide(clips, CONFIG, GPU, tmp_path).endswith(f"; from {tmp_path / FILE})")
        assert clips.videos_of("nvdec") == first


def test_other_ranks_take_the_share_of_rank_0(many, nvdec, tmp_path):
    with open_loader(many) as clips:
        divide(clips, CONFIG, GPU, tmp_path, broadcast=lambda make: (0.25, "of rank 0"))
        assert clips.decoders == {"nvdec": 50, "pyav": 150}


def test_nothing_is_measured_where_nothing_can_be_divided(videos, many, nvdec, tmp_path, monkeypatch):
    monkeypatch.delattr(decoder_share, "measure_rates")
    with open_loader(many) as clips:
        assert divide(clips, CONFIG, torch.device("cpu"), tmp_path) == ""
        assert divide(clips, dataclasses.replace(CONFIG, decoder="nvdec"), GPU, tmp_path) == ""
        assert divide(clips, dataclasses.replace(CONFIG, nvdec_share=1.0), GPU, tmp_path) == ""
    h264 = dataclasses.replace(many, videos=tuple(video for video in videos.videos if video.codec == "h264"))
    with open_loader(h264) as clips:
        assert divide(clips, CONFIG, GPU, tmp_path) == ""
    assert not list(tmp_path.iterdir())


def test_nvdec_that_cannot_be_measured_keeps_its_videos(many, nvdec, tmp_path, monkeypatch):
    def fail(*_):
        raise UserError("NVDEC: no answer within 60 s")

    monkeypatch.setattr(decoder_share, "measure_rates", fail)
    with open_loader(many) as clips:
        line = divide(clips, CONFIG, GPU, tmp_path)
        assert clips.decoders == {"nvdec": 200}
    assert "could not be measured (NVDEC: no answer within 60 s)" in line
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"nvdec": 1}', '{"nvdec": 0, "pyav": 5}', '{"nvdec": "fast", "pyav": 5}'])
def test_a_foreign_file_of_rates_is_named(many, nvdec, tmp_path, text):
    (tmp_path / FILE).write_text(text)
    with open_loader(many) as clips, pytest.raises(UserError, match=r"decoders\.json: expected the rates"):
        divide(clips, CONFIG, GPU, tmp_path)
    assert (tmp_path / FILE).read_text() == text


def test_the_file_holds_both_rates(many, nvdec, tmp_path, monkeypatch):
    monkeypatch.setattr(decoder_share, "measure_rates", lambda *_: Rates(150.0, 50.0))
    with open_loader(many) as clips:
        divide(clips, CONFIG, GPU, tmp_path)
    assert json.loads((tmp_path / FILE).read_text()) == {"nvdec": 150.0, "pyav": 50.0}


@needs_dali
def test_batches_of_a_divided_loader_are_reproducible(many, nvdec):
    config = dataclasses.replace(CONFIG, nvdec_share=0.5)
    for one, other in zip(take(many, 4, config)[2:], take(many, 2, config, first_step=2), strict=True):
        assert_same(one, other)


@pytest.mark.slow
def test_only_a_run_that_decodes_divides_its_videos(small, clips, tmp_path, monkeypatch):
    """Recorded clips are read, so that no decoder is measured for them."""
    asked = []
    monkeypatch.setattr(session, "divide", lambda loader, config, device, run, **_: asked.append(run.name) or "halved")
    config = small(data={"recorded": 1}, optim={"epochs": 0.5})
    tokenize(config, clips, tmp_path / "codes", clips="raw", progress=False)
    pretrain(config, clips, tmp_path / "decoding", progress=False)
    cached = dataclasses.replace(config.tokenizer, cache=str(tmp_path / "codes"))
    pretrain(dataclasses.replace(config, tokenizer=cached), clips, tmp_path / "reading", progress=False)
    assert asked == ["decoding"]
    assert "data    halved" in (tmp_path / "decoding" / "log.txt").read_text()
