"""Crops without DALI equal those of DALI up to one gray level, for any position, size and direction."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mam2.engine.config.training import DataConfig
from mam2.engine.data import crops
from mam2.engine.data.crops import TorchCrops
from mam2.engine.data.dali import ClipGraph
from mam2.engine.data.sampling import View
from mam2.engine.data.values import PixelValues
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


def batch_of_two_sizes():
    draw = np.random.default_rng(1)
    sizes = [(40, 70), (33, 57), (40, 70), (40, 70), (33, 57)]
    payloads = [draw.integers(0, 256, (3, *size, 3), dtype=np.uint8) for size in sizes]
    return payloads, [range(3)] * 5, [[VIEWS[place], VIEWS[place - 1]] for place in range(5)]


@pytest.mark.parametrize("value_range", [(), (10.0, 200.0)])
def test_clips_cropped_together_are_those_cropped_alone(value_range, monkeypatch):
    """As a GPU does it; on a CPU, in parts of two clips and less."""
    payloads, frames, views = batch_of_two_sizes()
    values = PixelValues(3, bool(value_range), value_range)
    monkeypatch.setattr(crops, "PART_BYTES", 2 * 4 * payloads[0].size)
    alone, together = (TorchCrops(24, views=2, device=CPU, values=values) for _ in range(2))
    together._together = True
    for one, other in zip(alone.run(payloads, frames, views), together.run(payloads, frames, views), strict=True):
        assert (one.shape, one.dtype, other.is_contiguous()) == (other.shape, other.dtype, True)
        assert (one.float() - other.float()).abs().max() <= (1e-5 if value_range else 1)
        assert value_range or (one != other).float().mean() < 1e-3  # rounding of nearly .5


def test_a_gpu_takes_few_operators_per_clip():
    """Python launches each of them while the training loop waits for its lock; "meta" computes no values."""

    class Counted(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            self.count += 1
            return function(*arguments, **(named or {}))

    clips = TorchCrops(24, views=2, device=torch.device("meta"))
    payloads, frames, views = batch_of_two_sizes()
    payloads, frames, views = 16 * payloads, 16 * frames, 16 * views
    with Counted() as found:
        first, second = clips.run(payloads, frames, views)
    assert first.shape == second.shape == (80, 3, 24, 24, 3)
    assert found.count < 6 * len(payloads)


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
