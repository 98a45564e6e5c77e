"""Faults while loading: videos are replaced or named, and threads and program end properly."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from mam2.engine.data import assigned_decoders, dali, decoding, loader, manifest, nvdec, renderer
from mam2.engine.data.dali import ClipGraph
from mam2.engine.data.manifest import Skipped
from mam2.engine.data.sampling import draw_clip, replacement
from mam2.engine.errors import UserError
from tests.helpers.dali import needs_dali
from tests.helpers.loaders import CONFIG, assert_same, damaged, open_loader, take


def test_a_damaged_video_is_replaced_the_same_way_by_any_thread_and_named_once(videos, tmp_path, frame_numbers):
    broken = damaged(videos, tmp_path, 0, 1)
    messages: list[Skipped] = []
    batches = take(broken, 10, on_skip=messages.append)
    assert sorted(Path(entry.path).name for entry in messages) == ["damaged 0.mp4", "damaged 1.mp4"]
    sound = take(videos, 10)
    replaced = 0
    for batch, before in zip(batches, sound, strict=True):
        for row, video in enumerate(before.index.tolist()):
            if video in (0, 1):
                epoch = (before.step * 4 + row) // 10
                drawn = ((replacement(video, 10, epoch, 5, attempt), attempt) for attempt in itertools.count(1))
                other, attempt = next((place, attempt) for place, attempt in drawn if place not in (0, 1))
                first = draw_clip(other, videos.videos[other], epoch, CONFIG, 5, attempt=attempt).frames[0]
                assert batch.index[row] == other
                assert frame_numbers(batch.clip[row].numpy())[0] == first
                replaced += 1
            else:
                assert batch.index[row] == video
                assert torch.equal(batch.clip[row], before.clip[row])
    assert replaced == 8
    threads = dataclasses.replace(CONFIG, threads=1)
    for one, other in zip(batches[5:], take(broken, 5, threads, first_step=5), strict=True):
        assert_same(one, other)


@needs_dali
def test_what_dali_cannot_decode_goes_to_pyav(videos, monkeypatch):
    run = ClipGraph.run

    def fail_late(self: ClipGraph, payloads, frames, views):
        if self._decoder != "pyav" and max(numbers[0] for numbers in frames) > 2:
            raise decoding.DecodeError("damage in the middle")
        return run(self, payloads, frames, views)

    expected = take(videos, 5)
    monkeypatch.setattr(ClipGraph, "run", fail_late)
    monkeypatch.setattr(
        assigned_decoders, "choose_decoder", lambda codec, *_, **__: "dali-cpu" if codec == "vp9" else "pyav"
    )
    with open_loader(videos) as clips:
        got = list(itertools.islice(clips.stream(), 5))
        assert clips.skipped == []
        assert clips.decoders == {"pyav": 7, "dali-cpu": 3}
    for one, other in zip(expected, got, strict=True):
        assert torch.equal(one.index, other.index)
        difference = (one.clip.int() - other.clip.int()).abs()
        assert difference.max() <= 3


@needs_dali
def test_nvdec_is_not_asked_twice_for_a_file_it_failed_on(videos, monkeypatch):
    run = ClipGraph.run
    asked: list[int] = []

    def no_gpu(self: ClipGraph, payloads, frames, views):
        if self._decoder == "nvdec":
            asked.append(len(payloads))
            raise decoding.DecodeError("unsupported profile")
        return run(self, payloads, frames, views)

    expected = take(videos, 8)
    monkeypatch.setattr(ClipGraph, "run", no_gpu)
    monkeypatch.setattr(
        assigned_decoders, "choose_decoder", lambda codec, *_, **__: "nvdec" if codec == "vp9" else "pyav"
    )
    with open_loader(videos) as clips:
        for one, other in zip(expected, clips.stream(), strict=False):
            assert_same(one, other)
        assert clips.decoders == {"pyav": 10}
    assert 3 <= len(asked) < 12


def test_evaluation_leaves_a_damaged_video_out(videos, tmp_path):
    with open_loader(damaged(videos, tmp_path, 2, 9)) as clips:
        batches = list(clips.evaluate())
        assert [Path(entry.path).name for entry in clips.skipped] == ["damaged 2.mp4", "damaged 9.mp4"]
    assert torch.cat([batch.index for batch in batches]).tolist() == [0, 1, 3, 4, 5, 6, 7, 8]
    assert torch.cat([batch.label for batch in batches]).tolist() == [
        videos.videos[video].label for video in (0, 1, 3, 4, 5, 6, 7, 8)
    ]


def test_too_many_damaged_videos_end_the_run(videos, tmp_path):
    with open_loader(damaged(videos, tmp_path, *range(6))) as clips, pytest.raises(UserError, match="6 of 10 videos"):
        for _ in clips.stream():
            pass
    skipped = tuple(Skipped(f"{number}.mp4", "empty file") for number in range(11))
    with pytest.raises(UserError, match=r"11 of 21 videos cannot be used.*10\.mp4: empty file"):
        open_loader(dataclasses.replace(videos, skipped=skipped))


@needs_dali
def test_a_forced_decoder_decodes_what_it_can(videos):
    config = dataclasses.replace(CONFIG, decoder="dali-cpu", max_unusable=1.0)
    messages: list[Skipped] = []
    (batch,) = take(videos, 1, config, on_skip=messages.append)
    assert {videos.videos[video].codec for video in batch.index} == {"vp9"}
    assert len(messages) == 7
    assert "codec h264 cannot be decoded by dali-cpu" in messages[0].reason
    with pytest.raises(UserError, match="7 of 10 videos cannot be used"):
        open_loader(videos, dataclasses.replace(config, max_unusable=0.5))
    avc = dataclasses.replace(videos, videos=tuple(video for video in videos.videos if video.codec == "h264"))
    with pytest.raises(UserError, match=r"use data\.decoder=pyav"):
        open_loader(avc, config)


def test_an_error_in_a_thread_reaches_the_consumer(videos, tmp_path, monkeypatch):
    def fail(_: Skipped) -> None:
        raise RuntimeError("the log is full")

    with open_loader(damaged(videos, tmp_path, 0), on_skip=fail) as clips:
        stream = clips.stream()
        with pytest.raises(RuntimeError, match="the log is full"):
            list(itertools.islice(stream, 20))
        with pytest.raises(RuntimeError, match="the log is full"):
            next(stream)
    monkeypatch.setattr(loader, "draw_clip", None)
    with open_loader(videos) as clips, pytest.raises(TypeError):
        next(clips.stream())


def test_a_strange_error_of_one_file_is_a_skip(videos, monkeypatch):
    def strange(path: str, *arguments, **keywords) -> np.ndarray:
        if path.endswith("0.mp4"):
            raise OverflowError("a header from the future")
        return decoding.decode_frames(path, *arguments, **keywords)

    monkeypatch.setattr(renderer, "decode_frames", strange)
    messages: list[Skipped] = []
    take(videos, 5, on_skip=messages.append)
    assert [entry.reason for entry in messages] == ["OverflowError: a header from the future"]


def test_close_and_neglect_end_all_threads(videos):
    before = set(threading.enumerate())
    with open_loader(videos) as clips:
        stream = clips.stream()
        next(stream)
        other = clips.stream()
    assert before.issuperset(threading.enumerate())
    with pytest.raises(StopIteration):
        next(other)
    clips = open_loader(videos)
    stream = clips.stream()
    next(stream)
    del stream
    clips.close()
    assert before.issuperset(threading.enumerate())


@pytest.mark.slow
def test_a_program_that_never_closes_its_loader_ends(videos, tmp_path):
    manifest.write_manifest(videos, tmp_path / "manifest")
    program = (
        "import sys\n"
        "from mam2.engine.config.pretrain import DataConfig\n"
        "from mam2.engine.data.loader import ClipLoader\n"
        "from mam2.engine.data.manifest import read_saved_manifest\n"
        "config = DataConfig(frames=4, stride=2, size=32)\n"
        "clips = ClipLoader(read_saved_manifest(sys.argv[1]), config, batch=4, device='cpu', seed=0)\n"
        "stream = clips.stream()\n"
        "print(next(stream).clip.shape[0])\n"
        "raise KeyboardInterrupt\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "manifest")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout == "4\n"
    assert done.stderr.strip().endswith("KeyboardInterrupt")


@pytest.mark.parametrize(
    ("changes", "batch", "message"),
    [
        ({"views": 3}, 4, "data.views: expected a divisor of the batch of 4; found 3"),
        ({}, 0, "divisor of the batch of 0"),
        ({"frames": 0}, 4, "data.frames 0: expected at least 1"),
        ({"fps": 8.0}, 4, "data.stride 2, data.fps 8: dense sampling needs exactly one"),
        ({"min_area": 0.8, "max_area": 0.5}, 4, "data.min_area 0.8 is above data.max_area 0.5"),
        ({"max_aspect": 0.5}, 4, "data.max_aspect 0.5: expected at least 1"),
        ({"prefetch": 0}, 4, "data.prefetch 0: expected at least 1"),
        ({"threads": -1}, 4, "data.threads -1: expected at least 0"),
        ({"nvdec_threads": 0}, 4, "data.nvdec_threads 0: expected at least 1"),
        ({"timeout_s": float("nan")}, 4, "data.timeout_s nan: expected a finite number, above 0"),
        ({"max_unusable": 2.0}, 4, "data.max_unusable 2.0: expected at least 0 and at most 1"),
    ],
)
def test_values_that_do_not_fit_together_are_one_line(videos, changes, batch, message):
    with pytest.raises(UserError, match=message):
        open_loader(videos, dataclasses.replace(CONFIG, **changes), batch=batch)


def test_without_dali_pytorch_crops_the_same(videos, monkeypatch):
    expected = take(videos, 2)
    monkeypatch.setattr(assigned_decoders, "dali_version", lambda: "")
    monkeypatch.setattr(renderer, "dali_version", lambda: "")
    with open_loader(videos) as clips:
        assert clips.cropper == "PyTorch (DALI is not installed)"
        for one, other in zip(expected, itertools.islice(clips.stream(), 2), strict=True):
            assert (one.clip.int() - other.clip.int()).abs().max() <= 1
    with pytest.raises(UserError, match=r"needs NVIDIA DALI, which is not installed: use data\.decoder=pyav"):
        open_loader(videos, dataclasses.replace(CONFIG, decoder="dali-cpu", max_unusable=1.0))


def test_a_gpu_whose_memory_is_full_is_no_bad_file(videos, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")

    monkeypatch.setattr(renderer, "dali_version", lambda: "")
    monkeypatch.setattr(renderer.TorchCrops, "run", full)
    with open_loader(videos) as clips:
        with pytest.raises(UserError, match=r"no memory left for the clips: .*2\.00 GiB\.; use a smaller"):
            next(clips.stream())
        assert clips.skipped == []


def test_a_mistake_of_a_program_is_no_bad_file(videos, monkeypatch):
    def removed(*_, **__):
        raise TypeError("open() got an unexpected keyword argument")

    monkeypatch.setattr(renderer, "decode_frames", removed)
    with open_loader(videos) as clips, pytest.raises(TypeError, match="unexpected keyword"):
        next(clips.stream())
    monkeypatch.setattr(renderer, "read_vetted", removed)
    monkeypatch.setattr(assigned_decoders, "choose_decoder", lambda *_, **__: "dali-cpu")
    with open_loader(videos) as clips, pytest.raises(TypeError, match="unexpected keyword"):
        next(clips.stream())


def test_first_files_that_fail_for_one_reason_end_the_run(videos, monkeypatch):
    def refuse(*_, **__):
        raise decoding.DecodeError("Permission denied")

    many = dataclasses.replace(
        videos, videos=tuple(dataclasses.replace(videos.videos[0], path=f"/nowhere/{k}.mp4") for k in range(100))
    )
    monkeypatch.setattr(renderer, "decode_frames", refuse)
    with open_loader(many) as clips, pytest.raises(UserError, match=r"first 16 .* the same reason, Permission denied"):
        next(clips.stream())


def nvdec_for_vp9(codec: str, *_, **__) -> str:
    return "nvdec" if codec == "vp9" else "pyav"


@needs_dali
def test_nvdec_is_no_longer_used_after_failures_in_a_row(videos, monkeypatch):
    run = ClipGraph.run

    def no_gpu(self: ClipGraph, payloads, frames, views):
        if self._decoder == "nvdec":
            raise decoding.DecodeError("unsupported")
        return run(self, payloads, frames, views)

    monkeypatch.setattr(ClipGraph, "run", no_gpu)
    monkeypatch.setattr(assigned_decoders, "choose_decoder", nvdec_for_vp9)
    vp9 = next(video for video in videos.videos if video.codec == "vp9")
    many = dataclasses.replace(videos, videos=(vp9,) * 60)
    said: list[str] = []
    with open_loader(many, info=said.append) as clips:
        for _ in zip(range(7), clips.stream(), strict=False):
            pass
        assert clips.decoders == {"pyav": 60}
        assert clips.skipped == []
    assert len(said) == 1
    assert "NVDEC is switched off for this run: it failed on 20 files in a row" in said[0]


@needs_dali
def test_nvdec_that_hangs_is_no_longer_used(videos, monkeypatch):
    expected = take(videos, 3)
    free = threading.Event()
    run = ClipGraph._run_pipeline

    def hang(self: ClipGraph, payloads, frames, views):
        return free.wait(60) if self._decoder == "nvdec" else run(self, payloads, frames, views)

    monkeypatch.setattr(ClipGraph, "_run_pipeline", hang)
    monkeypatch.setattr(dali, "within", lambda _, work: nvdec.within(0.2, work))  # PyAV has its time
    monkeypatch.setattr(assigned_decoders, "choose_decoder", nvdec_for_vp9)
    said: list[str] = []
    with open_loader(videos, info=said.append) as clips:
        for one, other in zip(expected, clips.stream(), strict=False):
            assert_same(one, other)
    free.set()
    assert len(said) == 1
    assert "NVDEC: no answer within 0.2 s" in said[0]


@pytest.mark.parametrize("bad", [0, 37, 63])
def test_a_bad_file_costs_a_batch_few_runs(bad):
    calls: list[int] = []

    class Graph:
        def run(self, payloads, frames, views):
            calls.append(len(payloads))
            if bad in payloads:
                raise decoding.DecodeError(f"file {bad} of {len(payloads)}")
            return [torch.tensor(payloads)[:, None]]

    work = renderer.Renderer(CONFIG, samples=64, device=torch.device("cpu"), info=print)
    jobs = []
    for row in range(64):
        payload = renderer.Future()
        payload.set_result(row)
        jobs.append(renderer.Job(row, draw_nothing, "pyav", payload))
    clip = torch.full((64, 1, 1), -1)
    assert work._resize(Graph(), jobs, clip) == {bad: f"file {bad} of 1"}
    work.close()
    assert clip.flatten().tolist() == [-1 if row == bad else row for row in range(64)]
    assert len(calls) <= 13


draw_nothing = renderer.ClipRequest(0, (0,), ())


def test_processes_of_a_node_share_its_cores(monkeypatch):
    monkeypatch.setattr(renderer, "available_cores", lambda: 192)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert renderer.threads_of_a_process() == 24
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "999")
    assert renderer.threads_of_a_process() == 1
