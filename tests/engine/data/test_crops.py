"""Crops without DALI equal those of DALI up to one gray level, for any position, size and direction."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mam2.engine.config.training import DataConfig
from mam2.engine.data import crops
from mam2.engine.data.crops import TorchCrops
from mam2.engine.data.dali import ClipGraph
from mam2.engine.data.sampling import View
from tests.helpers.dali import needs_dali

CPU = torch.device("cpu")
VIEWS = [
    View(0, 0, 1, 1, False),
    View(0, 0, 1, 1, True),
    View(0.113, 0.241, 0.771, 0.913, False),
    View(0.113, 0.241, 0.771, 0.913, True),
    View(0.5, 0.5, 0.6, 0.63, False),
]


@pytest.mark.parametrize("view", VIEWS)
def test_all_rows_at_once_are_those_of_blocks(view, monkeypatch):
    """Crops on a device other than the CPU; "meta" computes no values."""
    frames = torch.randint(0, 256, (2, 96, 131, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    products: list[int] = []
    taps = crops._taps

    def counted(*given):
        found = taps(*given)
        products.append(len(found))
        return found

    monkeypatch.setattr(crops, "_taps", counted)
    blocks = crops.crop(frames, view, 112)
    assert crops.crop(frames.to("meta"), view, 112).shape == blocks.shape
    assert products == [4, 4, 1, 1]
    monkeypatch.setattr(crops, "ROWS", 112)
    assert (crops.crop(frames, view, 112).int() - blocks.int()).abs().max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), [(48, 64), (96, 131), (300, 170), (7, 5), (1, 1)])
@pytest.mark.parametrize("size", [16, 40, 112])
@needs_dali
def test_crops_are_dalis(height, width, size):
    frames = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    config = DataConfig(frames=2, stride=1, size=size)
    dali = ClipGraph("pyav", config, views=len(VIEWS), samples=2, threads=1, device=CPU)
    ours = TorchCrops(size, views=len(VIEWS), device=CPU)
    given = [frames, frames[:, ::-1].copy()], [range(2)] * 2, [VIEWS, VIEWS[::-1]]
    for expected, found in zip(dali.run(*given), ours.run(*given), strict=True):
        assert (found.shape, found.dtype) == ((2, 2, size, size, 3), torch.uint8)
        assert found.is_contiguous()
        assert (found.int() - expected.int()).abs().max() <= 1
