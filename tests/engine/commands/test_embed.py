"""`mam2 embed`: the right feature for each video of a folder, in files that other programs read."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mam2.engine.checkpoints.frozen import load_frozen
from mam2.engine.data.loader import ClipLoader
from mam2.engine.data.manifest import read_manifest
from mam2.engine.evaluation.features import layer_tokens
from mam2.engine.train.pretrain import pretrain
from tests.helpers.commands import exit_status
from tests.helpers.paths import CLIPS

pytestmark = pytest.mark.usefixtures("float32", "on_a_cpu")


@pytest.fixture(scope="module")
def videos(tmp_path_factory, synthetic_clips):
    """Eight clips without labels and a file that is not a video; their names contain the separators of lists."""
    folder = tmp_path_factory.mktemp("videos")
    synthetic_clips(folder / "made", train=8)
    for number, path in enumerate(sorted((folder / "made").rglob("*.*"))):
        path.rename(folder / f"a, b\t{number}{path.suffix}")
    shutil.rmtree(folder / "made")
    (folder / "broken.mp4").write_bytes(b"not a video" * 100)
    return folder


@pytest.fixture(scope="module")
def run(videos, tmp_path_factory, small):
    run = tmp_path_factory.mktemp("run")
    config = small(model={"objective": "videomae", "depth": 2}, optim={"batch": 8, "epochs": 1.0})
    pretrain(config, videos, run, progress=False)
    return run


@pytest.mark.parametrize("layer", [0, 1])
def test_rows_are_the_videos_features(videos, run, tmp_path, capsys, layer):
    out = tmp_path / "f.npy"
    assert exit_status("embed", run, "--data", videos, "--out", out, "--layer", layer, "--batch", 3) == 0
    features, index = np.load(out), json.loads((tmp_path / "f.json").read_text())
    assert (features.shape, features.dtype) == ((8, 24), np.float32)
    assert [Path(path).parent for path in index["paths"]] == [videos] * 8
    assert list(index["skipped"]) == [str(videos / "broken.mp4")]
    assert (index["layer"], index["precision"]) == (layer or 2, "float32")
    assert "8 videos, 24 values each" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"f.npy", "f.json"}

    frozen = load_frozen(run, torch.device("cpu"))
    manifest = read_manifest(videos, progress=False)
    with ClipLoader(manifest, frozen.data, batch=8, device="cpu", seed=0, train=False) as loader:
        batch = next(iter(loader.evaluate()))
    with torch.no_grad():
        tokens = layer_tokens(frozen.encoder, batch.video, [1, 2])
    for place, feature in zip(batch.index.tolist(), tokens[layer or 2].mean(1).numpy(), strict=True):
        row = index["paths"].index(manifest.videos[place].path)
        np.testing.assert_allclose(features[row], feature, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="needs pyarrow")
def test_parquet_holds_the_same(videos, run, tmp_path):
    import pyarrow.parquet

    assert exit_status("embed", run, "--data", videos, "--out", tmp_path / "f.npy") == 0
    assert exit_status("embed", run, "--data", videos, "--out", tmp_path / "f.parquet") == 0
    table = pyarrow.parquet.read_table(tmp_path / "f.parquet")
    np.testing.assert_array_equal(np.stack(table["feature"].to_numpy()), np.load(tmp_path / "f.npy"))
    assert table["path"].to_pylist() == json.loads((tmp_path / "f.json").read_text())["paths"]


def test_a_pool_that_keeps_time(videos, run, tmp_path):
    """The concatenated means of the time slots: their mean is the mean of all tokens."""
    for pool in ("mean", "time"):
        assert exit_status("embed", run, "--data", videos, "--out", tmp_path / f"{pool}.npy", "--pool", pool) == 0
    mean, time = (np.load(tmp_path / f"{pool}.npy") for pool in ("mean", "time"))
    index = json.loads((tmp_path / "time.json").read_text())
    slots, width = index["shape"]
    assert (index["pool"], slots > 1, width) == ("time", True, 24)
    assert time.shape == (8, slots * width)
    np.testing.assert_allclose(time.reshape(8, slots, width).mean(1), mean, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_written_is_said_first(videos, run, tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "pyarrow" else find(name, *rest)
    )
    for out, message in {
        "f.csv": ".npy, .npz, .safetensors, .parquet",
        "f.parquet": "pip install pyarrow",
        "no/f.npy": "cannot be written: No such file or directory",
    }.items():
        assert exit_status("embed", run, "--data", videos, "--out", tmp_path / out) == 2
        assert message in capsys.readouterr().err
    assert exit_status("embed", run, "--data", videos, "--out", tmp_path / "f.npy", "--layer", 3) == 2
    assert "layers 1 to 2" in capsys.readouterr().err
    assert exit_status("embed", tmp_path, "--data", videos, "--out", tmp_path / "f.npy") == 2
    assert exit_status("embed", tmp_path / "none", "--data", videos, "--out", tmp_path / "f.npy") == 2
    assert list(tmp_path.iterdir()) == []


def test_clips_of_many_formats(run, tmp_path):
    assert exit_status("embed", run, "--data", CLIPS / "train.csv", "--out", tmp_path / "f.npy") == 0
    features = np.load(tmp_path / "f.npy")
    assert len(features) == len(json.loads((tmp_path / "f.json").read_text())["paths"]) == 20
    assert np.isfinite(features).all()
