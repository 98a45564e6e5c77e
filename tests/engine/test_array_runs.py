"""Whole runs on arrays: pre-training, probe, fine-tuning, predictions, embeddings and pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mam2.engine.checkpoints.load import load_encoder
from mam2.engine.config.finetune import FinetuneConfig
from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.evaluation.classification import evaluate
from mam2.engine.evaluation.embedding import embed
from mam2.engine.evaluation.prediction import predict
from mam2.engine.evaluation.probing import probe
from mam2.engine.evaluation.visualize import visualize
from mam2.engine.tokenizer.from_videos import train_tokenizer
from mam2.engine.train.finetune import finetune
from mam2.engine.train.pretrain import pretrain

KINDS = {
    "thermal": ("uint16", 1, (27000.0, 32000.0)),
    "bands": ("float32", 5, (-1.0, 1.0)),
}
"""Type and channels of the arrays, and the range of their values."""


def write_arrays(folder: Path, kind: str, clips: int = 16) -> Path:
    """Two classes: a square that moves to the right, or down; in the middle of the value range."""
    dtype, channels, (low, high) = KINDS[kind]
    generator = np.random.default_rng(0)
    for number in range(clips):
        label = ("right", "down")[number % 2]
        frames = np.full((16, 48, 48, channels), 0.2) + 0.02 * generator.random((16, 48, 48, channels))
        start = generator.integers(0, 12)
        for place, frame in enumerate(frames):
            top, left = (start, 2 * place) if label == "right" else (2 * place, start)
            frame[top : top + 12, left : left + 12] += 0.6 * generator.random(channels) + 0.2
        values = low + frames.clip(0, 1) * (high - low)
        target = folder / label / f"{number}.npy"
        target.parent.mkdir(parents=True, exist_ok=True)
        np.save(target, values.astype(dtype) if channels > 1 else values[..., 0].astype(dtype))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_arrays(
    kind: str,
    tmp_path: Path,
    small: Callable[..., PretrainConfig],
    small_finetuning: Callable[..., FinetuneConfig],
) -> None:
    _, channels, value_range = KINDS[kind]
    data = write_arrays(tmp_path / "data", kind)
    values: dict[str, Any] = {"channels": channels, "value_range": value_range, "size": 32}
    config = small(data=values | {"mean": (0.3,) * channels, "std": (0.2,) * channels}, optim={"epochs": 2.0})
    pretrain(config, data, tmp_path / "run", val=data, progress=False)
    log = (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")
    assert "decoded 16 by array, cropped by PyTorch (DALI's graph is for 8-bit RGB)" in log
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss/motion_relative"] for line in lines if "loss/motion_relative" in line]
    assert all(np.isfinite(losses))
    encoder = load_encoder(tmp_path / "run")
    assert encoder.channels == channels
    assert encoder.mean == pytest.approx((0.3,) * channels)

    probed = probe(
        [tmp_path / "run"], data, probes=["linear"], cache=tmp_path / "features", device="cpu", progress=False
    )
    assert probed.scores
    features = embed(tmp_path / "run", data, device="cpu", progress=False).features
    assert features.shape == (16, encoder.width)
    assert np.abs(features - features[:1])[1:].max() > 1e-3
    assert visualize([tmp_path / "run"], data, tmp_path / "page", clips=1, device="cpu", progress=False).is_file()

    # the value range and the statistics come from the checkpoint
    own = small_finetuning(data={"channels": channels, "size": 32}, optim={"epochs": 1.0})
    finetune(own, data, tmp_path / "ft", val=data, encoder=tmp_path / "run", progress=False)
    written = json.loads((tmp_path / "ft" / "config.json").read_text(encoding="utf-8"))["data"]
    assert written["value_range"] == list(value_range)
    assert written["mean"] == [0.3] * channels
    again = finetune(own, data, tmp_path / "ft", val=data, encoder=None, resume=True, progress=False)
    assert again.steps
    evaluated = evaluate(tmp_path / "ft", data, tmp_path / "scores", device="cpu", progress=False)
    assert evaluated.videos == 16
    found = predict(tmp_path / "ft", data, draw=tmp_path / "predictions", device="cpu", progress=False)
    assert len(found.predictions) == 16


@pytest.mark.slow
def test_a_tokenizer_is_trained_on_arrays(tmp_path: Path) -> None:
    data = write_arrays(tmp_path / "data", "bands", 8)
    options: dict[str, Any] = {"codes": 16, "channels": 8, "factor": 8, "size": 32, "steps": 20}
    found = train_tokenizer(
        data, tmp_path / "vq", image_channels=5, value_range=(-1, 1), device="cpu", progress=False, **options
    )
    assert found.quality.explained > 0.3
    assert found.quality.original.shape[-1] == 5
    assert torch.is_tensor(found.quality.reconstructed)
    assert (tmp_path / "vq" / "reconstructions.png").is_file()
