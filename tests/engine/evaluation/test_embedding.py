"""Features of windows over whole videos: the right ones, in files that others read, from one pass in bounded memory."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import resource
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from mam2.engine import UserError, embed
from mam2.engine.checkpoints.frozen import load_frozen
from mam2.engine.data.encoding import encode_frames
from mam2.engine.data.manifest import read_manifest
from mam2.engine.data.windows import sliding_windows
from mam2.engine.train.pretrain import pretrain
from tests.helpers.commands import exit_status

pytestmark = pytest.mark.usefixtures("float32")


@pytest.fixture(scope="module")
def videos(tmp_path_factory, write_video):
    """Two labeled videos of 30 and 11 frames of noise, and a file that is no video."""
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    for name, count in (("run/a", 30), ("walk/b é", 11)):
        small = rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        write_video(folder / f"{name}.mp4", small.repeat(8, 1).repeat(8, 2))
    (folder / "walk" / "broken.mp4").write_bytes(b"not a video" * 100)
    return folder


@pytest.fixture(scope="module")
def run(videos, tmp_path_factory, small):
    run = tmp_path_factory.mktemp("run")
    config = small(model={"objective": "videomae", "depth": 2}, optim={"batch": 4, "epochs": 1.0})
    pretrain(config, videos, run, progress=False)
    return run


def test_a_row_is_the_feature_of_its_window(videos, run):
    found = embed(run, videos, window=12, hop="0.2s", batch=3, progress=False)
    names = [Path(path).stem for path in found.paths]
    assert names == ["a"] * 5 + ["b é"]
    assert found.labels.tolist() == [0] * 5 + [1]
    np.testing.assert_allclose(found.start_s, [0, 0.2, 0.4, 0.6, 0.8, 0], atol=1e-3)
    np.testing.assert_allclose(found.end_s, [0.48, 0.68, 0.88, 1.08, 1.2, 0.44], atol=1e-3)
    assert list(found.skipped) == [str(videos / "walk" / "broken.mp4")]
    assert (found.about["window"], found.about["hop"], found.about["shape"]) == ("12", "0.2s", [1, 24])

    frozen = load_frozen(run, torch.device("cpu"))
    clips = [
        window.clip
        for video in read_manifest(videos, progress=False).videos
        for window in sliding_windows(video, frames=frozen.data.frames, size=frozen.data.size, window=12, hop=5)
    ]
    with torch.no_grad():
        expected = frozen.encoder.encode(torch.stack(clips).permute(0, 4, 1, 2, 3)).mean(1)
    np.testing.assert_allclose(found.features, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_one_window_as_long_as_the_trained_clip_is_the_default(videos, run):
    frozen = load_frozen(run, torch.device("cpu"))
    found = embed(run, videos, hop=1000, progress=False)
    assert found.about["window"] == str(frozen.data.frames * frozen.data.stride)
    assert found.about["hop"] == "1000"
    assert embed(run, videos, window=7, progress=False).about["hop"] == "7"


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ".parquet"])
def test_files_hold_features_and_times(videos, run, tmp_path, capsys, suffix):
    if suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        pytest.skip("pyarrow, which writes Parquet, is not installed")
    out = tmp_path / f"f{suffix}"
    assert exit_status("embed", run, "--data", videos, "--out", out, "--window", 12, "--hop", 5, "--pool", "time") == 0
    message = capsys.readouterr().out
    found = embed(run, videos, window=12, hop=5, pool="time", progress=False)
    count, values = found.features.shape
    assert f"{count} windows of 2 videos, {values} values each: {out}; 1 left out" in message
    if suffix == ".npy":
        about = json.loads(out.with_suffix(".json").read_text())
        arrays = {"features": np.load(out)} | {name: np.array(about[name]) for name in ("start_s", "end_s")}
        paths = about["paths"]
    elif suffix == ".npz":
        arrays = dict(np.load(out))
        about, videos_of = json.loads(str(arrays["about"])), json.loads(str(arrays["paths"]))
        paths = [videos_of[place] for place in arrays["video"]]
    elif suffix == ".safetensors":
        with safe_open(out, "numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about, videos_of = (json.loads(file.metadata()[name]) for name in ("about", "paths"))
        paths = [videos_of[place] for place in arrays["video"]]
    else:
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(out)
        arrays = {"features": np.stack(table["feature"].to_numpy())}
        arrays |= {name: table[name].to_numpy() for name in ("start_s", "end_s")}
        about, paths = json.loads(table.schema.metadata[b"mam2"]), table["path"].to_pylist()
    np.testing.assert_array_equal(arrays["features"], found.features)
    np.testing.assert_array_equal(arrays["start_s"], found.start_s)
    np.testing.assert_array_equal(arrays["end_s"], found.end_s)
    assert tuple(paths) == found.paths
    assert (about["pool"], about["classes"]) == ("time", ["run", "walk"])
    with (tmp_path / "f.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == list(found.paths)
    assert [row["label"] for row in rows] == ["run"] * 5 + ["walk"]
    assert [float(row["end_s"]) for row in rows] == pytest.approx(found.end_s.tolist(), abs=1e-3)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_videos_as_a_whole_go_into_every_format(videos, run, tmp_path):
    whole = embed(run, videos, tmp_path / "f.npz", progress=False)
    assert whole.start_s is None
    assert whole.features.shape == (2, 24)
    arrays = dict(np.load(tmp_path / "f.npz"))
    assert "start_s" not in arrays
    np.testing.assert_array_equal(arrays["features"], whole.features)
    assert [path.name for path in tmp_path.iterdir()] == ["f.npz"]


def test_a_video_that_breaks_keeps_the_windows_before(videos, run, monkeypatch):
    from mam2.engine.evaluation import embedding as module

    def breaking(video, **options):
        for number, window in enumerate(sliding_windows(video, **options)):
            if number == 2:
                raise OSError(5, "Input/output error")
            yield window

    monkeypatch.setattr(module, "sliding_windows", breaking)
    found = embed(run, videos, window=12, hop=5, progress=False)
    assert [Path(path).stem for path in found.paths] == ["a", "a", "b é"]
    assert "Input/output error" in found.skipped[str(videos / "run" / "a.mp4")]


def test_mistakes_are_named(videos, run, tmp_path):
    for options, message in (
        ({"window": "2m"}, "--window 2m: expected an integer number of frames"),
        ({"hop": 0}, "--hop 0: expected an integer number"),
        ({"window": 8, "stride": 2}, "--stride 2: a window of 8 determines"),
        ({"out": tmp_path / "f.csv", "hop": 8}, "expected a name that ends in .npy, .npz, .safetensors, .parquet"),
    ):
        with pytest.raises(UserError, match=message.replace(".", r"\.")):
            embed(run, videos, **{"out": None, **options}, progress=False)
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "x.mp4").write_bytes(b"")
    with pytest.raises(UserError, match="empty file"):
        embed(run, folder, hop=8, progress=False)


def long_video(path: Path, seconds: int) -> Path:
    """5 frames of 64×64 pixels per second, a gray that changes slowly."""
    color = np.full((32, 64), 128, np.uint8)
    levels = (60 + number // 50 % 100 for number in range(5 * seconds))
    frames = (np.concatenate([np.full((64, 64), level, np.uint8), color]) for level in levels)
    encode_frames(path, frames, "mpeg4", (64, 64), rate=5, frame_format="yuv420p")
    return path


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def read_bytes() -> int:
    """Bytes that this process has allocated from the system, cached or not."""
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's /proc")
def test_an_hour_of_video_is_read_once_in_bounded_memory(run, tmp_path):
    hour, minute = long_video(tmp_path / "hour.mp4", 3600), long_video(tmp_path / "minute.mp4", 60)
    embed(run, minute, window=16, hop=8, progress=False)  # allocations of the first use
    video = read_manifest(hour, progress=False).videos[0]
    assert video.frames == 18000

    before = read_bytes()
    count = sum(1 for _ in sliding_windows(video, frames=8, size=32, window=16, hop=8))
    assert count == 18000 // 8 - 1
    assert read_bytes() - before < 1.05 * os.path.getsize(hour) + 2**20

    peak, done = [resident_bytes()], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak.append(resident_bytes())
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        found = embed(run, hour, tmp_path / "hour.npz", window=16, hop=8, batch=64, progress=False)
    finally:
        done.set()
        watcher.join()
    assert found.features.shape == (count, 24)
    assert found.end_s is not None
    assert found.end_s[-1] == pytest.approx(3600, abs=0.3)
    assert (np.diff(found.end_s) > 0).all()
    decoded = 18000 * 64 * 64 * 3
    assert max(peak) - peak[0] < min(100 * 2**20, decoded / 4)
