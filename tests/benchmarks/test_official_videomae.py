"""VideoMAE's own code as a peer of the step benchmark: found, loaded without timm, with our weights and its own labels.

A stand-in for the clone computes its predictions with our model. The test of the real code needs MAM2_VIDEOMAE.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from mam2.engine.errors import UserError
from mam2.kernels import masked_pixel_loss

CPU = torch.device("cpu")
SIZES = (
    {"data": {"frames": 16, "size": 16}, "model": {"patch": 8, "width": 48, "depth": 1, "heads": 3}},
    {"depth": 1, "width": 48, "heads": 3},
)
STAND_IN = """
from timm.models.layers import drop_path, to_2tuple, trunc_normal_
from timm.models.registry import register_model

import torch
from mam2.engine.checkpoints.names import from_videomae
from mam2.kernels import TubeMask

MODEL = None

@register_model
class PretrainVisionTransformer(torch.nn.Module):
    def __init__(self, **sizes):
        super().__init__()
        assert to_2tuple(sizes["img_size"]) == (16, 16) and sizes["decoder_num_classes"] == 384
        self.inner = MODEL

    def load_state_dict(self, state):
        self.inner.load_state_dict(from_videomae(state))

    def forward(self, videos, hidden):
        pixels = videos * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1, 1)
        pixels = pixels + torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1, 1)
        return self.inner.predict_pixels(pixels, TubeMask.from_bool(hidden))
"""


@pytest.fixture
def bench() -> ModuleType:
    return importlib.import_module("benchmarks.bench_step")


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    module = importlib.import_module("benchmarks.official_videomae")
    yield module
    module.load_code.cache_clear()
    sys.modules.pop(module.MODULE, None)


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peer: ModuleType) -> Path:
    (tmp_path / "modeling_pretrain.py").write_text(STAND_IN, encoding="utf-8")
    monkeypatch.setenv(peer.VARIABLE, str(tmp_path))
    return tmp_path


def rows_of(bench: ModuleType, precision: str = "float32") -> dict[tuple[str, str], dict[str, Any]]:
    config = bench.sized("videomae", SIZES, precision)
    found = bench.compare("videomae", config, 2, CPU, compiled=False, rounds=1, takes=lambda way: way != "hugging_face")
    return {(row["provider"], row["step"]): row for row in found if row.get("timed") != "alone"}


def test_its_loss_is_ours_with_our_weights(bench: ModuleType, peer: ModuleType, clone: Path) -> None:
    code = peer.load_code(clone)
    code.MODEL = bench.build_model(bench.sized("videomae", SIZES, "float32"), 0)  # type: ignore[attr-defined]
    rows = rows_of(bench)
    theirs = rows["official", "eager"]
    assert theirs["verdict"] == "right", theirs
    assert theirs["loss"] == pytest.approx(rows["ours", "eager"]["loss"], rel=1e-5)
    assert rows["ours", "eager"]["ratio"] == theirs["median_ms"] / rows["ours", "eager"]["median_ms"]


def test_its_loss_of_predictions_is_that_of_the_operator(peer: ModuleType) -> None:
    video = torch.randint(0, 256, (2, 3, 16, 16, 16), dtype=torch.uint8)
    hidden = torch.zeros(2, 32, dtype=torch.bool)
    hidden[0, 5:9] = hidden[1, 20:24] = True
    pred = torch.randn(2, 4, 384)
    loss = peer.loss_of(lambda clip, mask: pred, (2, 8, 8))(peer.pixels(video), hidden)
    torch.testing.assert_close(loss, masked_pixel_loss(pred, video, hidden, patch_size=(2, 8, 8)), rtol=1e-4, atol=0)


def test_timm_is_replaced_only_while_the_code_is_imported(peer: ModuleType, clone: Path) -> None:
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "timm"}
    peer.load_code(clone)
    assert {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "timm"} == before
    assert str(clone) not in sys.path


def test_without_a_clone_it_says_so(bench: ModuleType, peer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(peer.VARIABLE, raising=False)
    row = rows_of(bench)["official", "eager"]
    assert (row["verdict"], row["reason"]) == (
        "skipped",
        "MAM2_VIDEOMAE is not set: name a clone of github.com/MCG-NJU/VideoMAE",
    )


def test_a_folder_without_the_code_is_one_line(
    bench: ModuleType, peer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    with pytest.raises(UserError, match=r"expected a clone .* found no modeling_pretrain.py"):
        peer.check_clone(tmp_path)
    with pytest.raises(SystemExit) as ended:
        bench.main(["--videomae", str(tmp_path)])
    assert ended.value.code == 2
    assert str(tmp_path) in capsys.readouterr().err
    monkeypatch.setenv(peer.VARIABLE, str(tmp_path))
    assert rows_of(bench)["official", "eager"]["verdict"] == "failed"


@pytest.mark.skipif(not os.environ.get("MAM2_VIDEOMAE"), reason="MAM2_VIDEOMAE names no clone of VideoMAE's code")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_real_code_has_our_loss(bench: ModuleType, peer: ModuleType, precision: str) -> None:
    assert rows_of(bench, precision)["official", "eager"]["verdict"] == "right"
