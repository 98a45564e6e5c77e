from __future__ import annotations

import dataclasses
import importlib
import re
import sys
import time
from types import ModuleType

import numpy as np
import pytest
import torch

from benchmarks import loader_settings
from mam2.engine.config.training import DataConfig
from mam2.engine.data import decoder_share
from mam2.engine.data.decoder_share import Rates
from tests.helpers.dali import needs_dali

CPU = torch.device("cpu")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = importlib.import_module("benchmarks.bench_loader")
    tiny = dataclasses.replace(
        module.SETTINGS["cpu"],
        files=2,
        frames=24,
        height=48,
        width=64,
        data={"frames": 4, "size": 32, "stride": 2},
        turns=2,
        seconds=0.01,
        steps=2,
        loaders=(("pyav", "h264", 30, 1), ("nvdec", "h264", 30, 1), ("pyav", "h264", 6, 1), ("dali-cpu", "vp9", 30, 1)),
        views=(1, 2),
        recorded={"frames": 4, "size": 32, "stride": 2, "threads": 1},
        recorded_clips=8,
        recorded_videos=(48, 64),
    )
    monkeypatch.setitem(module.SETTINGS, "cpu", tiny)
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    return module


def everything(bench: ModuleType) -> dict[tuple, dict]:
    until = time.monotonic() + 100
    return by_name([*bench.rows(CPU, until), *bench.file_rows(CPU, until)])


def by_name(rows: list[dict]) -> dict[tuple, dict]:
    return {(row["decoder"], row["files"], row.get("gop"), row.get("views")): row for row in rows}


@pytest.mark.slow
def test_every_row_has_a_ratio_or_a_reason_and_none_a_rate_of_a_cpu(bench):
    rows = everything(bench)
    for row in rows.values():
        assert not any(key.endswith("_per_s") for key in row)
        assert ("reason" in row) == ("verdict" in row)
    for kind in (("h264", 6), ("h264", 30), ("vp9", 30)):
        assert rows[(bench.ALONE, *kind, None)]["ratio_to_pyav_alone"] == 1
    for name, *kind in (("pyav", "h264", 6), ("pyav", "h264", 30), ("dali-cpu", "vp9", 30)):
        assert rows[(name, *kind, None)]["ratio_to_pyav_alone"] > 0
    refused = rows["nvdec", "h264", 30, None]
    assert refused["verdict"] == "skipped"
    assert "needs an NVIDIA GPU" in refused["reason"]
    first = rows["auto, in a step of mam2-fast", "h264", 30, 1]
    assert 0 <= first["data_wait_percent"] <= 100
    decoded, raw, jpeg = (
        rows[name, "h264", None, None]
        for name in ("videos of recorded clips", "recorded clips, raw", "recorded clips, jpeg")
    )
    assert decoded["ratio_to_decoding"] == decoded["ratio_of_processor_time"] == 1
    assert raw["ratio_of_processor_time"] > 0
    assert "psnr_db" not in raw, "raw clips are those of the videos"
    assert jpeg["psnr_db"] > 30
    assert raw["kb_per_clip"] == 4 * 32 * 32 * 3 / 1000
    assert 0 < jpeg["kb_per_clip"] < raw["kb_per_clip"]
    assert first["limit"] == ("step" if first["data_wait_percent"] < 100 * bench.ENOUGH else "loader")


@pytest.mark.slow
def test_without_dali_pyav_and_the_step_are_still_measured(bench, monkeypatch):
    for place in ("assigned_decoders", "renderer"):
        monkeypatch.setattr(importlib.import_module(f"mam2.engine.data.{place}"), "dali_version", lambda: "")
    monkeypatch.setattr(bench, "_installed", lambda name: name != "nvidia.dali")
    rows = everything(bench)
    assert rows["pyav", "h264", 6, None]["ratio_to_pyav_alone"] > 0
    assert rows["auto, in a step of mam2-fast", "h264", 30, 1]["data_wait_percent"] >= 0
    refused = rows["dali-cpu", "vp9", 30, None]
    assert (refused["verdict"], "NVIDIA DALI, which is not installed" in refused["reason"]) == ("skipped", True)


def test_each_row_is_yielded_before_the_next_is_measured(bench, monkeypatch):
    """Decoders first: a time limit then keeps what a data loader is chosen by."""
    measured = []

    def rate(name):
        return lambda *given: measured.append(name) or 10.0

    monkeypatch.setattr(bench, "loader_rate", rate("loader"))
    monkeypatch.setattr(bench, "decoder_rate", rate("alone"))
    monkeypatch.setattr(bench, "write_files", lambda folder, *kind: measured.append(kind[:2]))
    monkeypatch.setattr(bench, "options_of", lambda *_: None)
    monkeypatch.setattr(bench, "step_rows", lambda *_: measured.append("step") or iter([{"decoder": "step"}]))
    settings = dataclasses.replace(bench.SETTINGS["cuda"], turns=1)
    rows = bench.rows(CPU, time.monotonic() + 100, settings)
    seen = {}
    for row in rows:
        seen[row["decoder"]] = len(measured)
    assert measured[:4] == [("h264", 30), "alone", "alone", "alone"]
    assert measured[4:] == ["loader"] * 3 + ["step"]
    expected = [bench.ALONE, "decord2", "torchcodec", "nvdec", "pyav", "shared", "step"]
    assert seen == {name: place + 2 for place, name in enumerate(expected)}
    measured.clear()
    found = list(bench.file_rows(CPU, 0.0, settings))
    assert {row["reason"] for row in found} == {"out of time"}
    assert not measured, "no files are written in vain"
    assert [(row["files"], row["gop"]) for row in found[:3]] == [("h264 340x256", 30), ("h264", 12), ("h264", 250)]


def test_files_have_their_key_frames_where_they_are_told(bench, tmp_path):
    for codec, gop in (("h264", 6), ("h264", 250), ("vp9", 6)):
        manifest = bench.write_files(tmp_path, codec, gop, bench.SETTINGS["cpu"])
        assert {video.codec for video in manifest.videos} == {codec}
        assert {video.keyframe_max for video in manifest.videos} == {min(gop, 24)}


def test_a_decoder_that_is_wrong_or_missing_gets_no_number(bench, tmp_path, monkeypatch):
    settings = bench.SETTINGS["cpu"]
    manifest = bench.write_files(tmp_path, "h264", 30, settings)
    right = bench.decoders()[bench.ALONE]
    wrong = {
        "too few": lambda path, frames: right(path, frames)[1:],
        "off by one": lambda path, frames: right(path, [max(frame - 1, 0) for frame in frames]),
    }
    monkeypatch.setattr(
        bench, "decoders", lambda: {bench.ALONE: right, **wrong, "absent": lambda *_: bench._peer("no_such_package")}
    )
    settings = dataclasses.replace(settings, loaders=())
    rows = {
        row["decoder"]: row
        for row in bench.decoding_rows({("h264", 30): manifest}, settings, CPU, time.monotonic() + 100)
    }
    assert rows[bench.ALONE]["ratio_to_pyav_alone"] == 1
    assert [rows[name]["verdict"] for name in wrong] == ["wrong", "wrong"]
    assert rows["absent"]["reason"] == "not installed"
    assert "ratio_to_pyav_alone" not in rows["off by one"]
    late = next(bench.decoding_rows({("h264", 30): manifest}, settings, CPU, 0.0))
    assert (late["verdict"], late["reason"]) == ("skipped", "out of time")


@needs_dali
def test_a_loader_whose_clips_are_not_pyavs_gets_no_number(bench, tmp_path, monkeypatch):
    """Returns frames like a decoder that is off by one frame."""
    from mam2.engine.config.recipe import load_recipe

    settings = bench.SETTINGS["cpu"]
    manifest = bench.write_files(tmp_path, "vp9", 30, settings)
    data = dataclasses.replace(load_recipe("mam2-fast").data, decoder="dali-cpu", **settings.data)
    bench.check_frames(manifest, data, settings, CPU)
    first_clips = bench.first_clips

    def off_by_one(manifest, data, settings, device):
        clips = first_clips(manifest, data, settings, device)
        return clips.roll(1, 1) if data.decoder == "dali-cpu" else clips

    monkeypatch.setattr(bench, "first_clips", off_by_one)
    settings = dataclasses.replace(settings, loaders=(("dali-cpu", "vp9", 30, 1),), turns=1)
    rows = bench.decoding_rows({("vp9", 30): manifest}, settings, CPU, time.monotonic() + 100)
    row = next(row for row in rows if row["decoder"] == "dali-cpu")
    assert row["verdict"] == "wrong"
    assert "differ from PyAV's by" in row["reason"]


def test_a_measurement_that_is_cut_off_has_said_where_its_time_went(bench, tmp_path, capsys):
    from mam2.engine.config.recipe import load_recipe

    settings = dataclasses.replace(bench.SETTINGS["cpu"], files=1, seconds=0.01)
    manifest = loader_settings.write_files(tmp_path, "vp9", 30, settings)
    data = dataclasses.replace(load_recipe("mam2-fast").data, decoder="pyav", **settings.data)
    bench.first_clips(manifest, data, settings, CPU)
    bench.loader_rate(manifest, data, settings, CPU)
    parts = re.findall(r"([a-z ]+) [0-9.]+ s", capsys.readouterr().err)
    assert [part.strip() for part in parts] == ["opened", "first batch", "closed", "prefetched batches"]


def test_the_shared_loader_has_the_measured_share(bench, tmp_path, monkeypatch):
    manifest = loader_settings.write_files(tmp_path, "vp9", 30, bench.SETTINGS["cpu"])
    asked = []
    measured = lambda manifest, videos, data, device: asked.append((videos, data.decoder)) or Rates(75.0, 25.0)  # noqa: E731
    monkeypatch.setattr(decoder_share, "measure_rates", measured)
    options = bench.options_of("shared", 2, manifest, DataConfig(), CPU)
    assert (options.decoder, options.nvdec_share, options.threads) == ("auto", 0.75, 2)
    assert asked == [([0, 1], "auto")]
    assert bench.options_of("nvdec", 2, manifest, DataConfig(), CPU).nvdec_share == DataConfig().nvdec_share


def test_moving_noise_moves(bench):
    frames = loader_settings.moving_noise(3, 32, 48, np.random.default_rng(0))
    assert frames.shape == (3, 32, 48, 3)
    assert np.abs(np.diff(frames.astype(int), axis=0)).mean() > 2 * bench.TOLERANCE
