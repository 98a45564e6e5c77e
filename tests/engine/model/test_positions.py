"""An encoder trained at one size, run at another."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mam2.engine.config.pretrain import DecoderConfig, ModelConfig, PretrainConfig
from mam2.engine.config.training import DataConfig
from mam2.engine.data.synthetic import MOTIONS, render_clip
from mam2.engine.model.blocks import sincos_positions
from mam2.engine.model.encoder import Encoder
from mam2.engine.model.positions import resample_positions, set_clip_size
from mam2.engine.model.videomae import VideoMAE
from mam2.kernels import tube_mask

FRAMES, SIZE = 8, 32


def clips(count: int, seed: int) -> Tensor:
    """Moving shapes, uint8 [count, 3, 8, 32, 32]: every third frame, half the size."""
    generator = np.random.default_rng(seed)
    rendered = [render_clip(MOTIONS[number % len(MOTIONS)], generator)[::3, ::2, ::2] for number in range(count)]
    return torch.from_numpy(np.stack(rendered)).permute(0, 4, 1, 2, 3)


@pytest.fixture(scope="module")
def trained() -> Encoder:
    """Some steps of VideoMAE on 8 × 32²: its encoder must use positions to place a patch."""
    torch.manual_seed(0)
    decoder = DecoderConfig(depth=1, width=32, heads=2)
    model = ModelConfig(objective="videomae", patch=8, width=64, depth=2, heads=2, mlp_ratio=2, decoder=decoder)
    videomae = VideoMAE(PretrainConfig(data=DataConfig(frames=FRAMES, size=SIZE), model=model))
    optimizer = torch.optim.AdamW(videomae.parameters(), lr=2e-3)
    video = clips(32, seed=0)
    for step in range(20):
        batch = video[(step * 8 + torch.arange(8)) % len(video)]
        loss = videomae.loss(batch, tube_mask(8, videomae.encoder.grid, 0.5, seed=0, step=step, device="cpu"))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return videomae.encoder.eval()


def at(encoder: Encoder, frames: int, size: int, positions: str) -> Encoder:
    """A copy of the encoder at another size."""
    *_, patch = encoder.patch_size
    copy = Encoder(encoder.grid, encoder.patch_size, width=64, depth=2, heads=2, mlp_ratio=2).eval()
    copy.load_state_dict(encoder.state_dict())
    set_clip_size(copy, frames, size, positions)
    assert copy.grid == (frames // 2, size // patch, size // patch)
    return copy


@torch.no_grad()
def far(features: Tensor, others: Tensor) -> float:
    """Mean distance of two sets of features [B, D], in units of the distance between two clips of the first."""
    return float((features - others).norm(dim=1).mean() / F.pdist(features).mean())


@pytest.mark.slow
@pytest.mark.parametrize(("frames", "size"), [(2 * FRAMES, SIZE), (FRAMES, 2 * SIZE)])
@torch.no_grad()
def test_features_of_an_unchanged_clip_stay_close(trained: Encoder, frames: int, size: int) -> None:
    """Clips whose tokens have one color each: with twice the frames or pixels there are more of the same tokens."""
    tokens = F.avg_pool3d(clips(16, seed=1).float(), trained.patch_size)

    def drawn(frames: int, size: int) -> Tensor:
        return F.interpolate(tokens, size=(frames, size, size)).to(torch.uint8)

    expected = trained.encode(drawn(FRAMES, SIZE)).mean(1)
    moved = {
        kind: far(expected, at(trained, frames, size, kind).encode(drawn(frames, size)).mean(1))
        for kind in ("resample", "recompute")
    }
    assert moved["resample"] < 0.1
    assert moved["resample"] < 0.5 * moved["recompute"], moved


@pytest.mark.slow
def test_the_same_size_changes_nothing(trained: Encoder) -> None:
    assert torch.equal(at(trained, FRAMES, SIZE, "resample").positions, trained.positions)


def test_resampling_meets_the_places_that_both_grids_have() -> None:
    table = sincos_positions(3 * 3 * 3, 16)
    finer = resample_positions(table, (3, 3, 3), (9, 9, 9)).unflatten(0, (9, 9, 9))
    torch.testing.assert_close(finer[1::3, 1::3, 1::3].flatten(0, 2), table)
    line = resample_positions(torch.arange(4.0)[:, None], (4, 1, 1), (8, 1, 1))[:, 0]
    torch.testing.assert_close(line, torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]))


@pytest.mark.slow
def test_recomputing_is_the_table_of_the_new_grid(trained: Encoder) -> None:
    torch.testing.assert_close(at(trained, 4, 48, "recompute").positions, sincos_positions(2 * 6 * 6, 64))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("frames", "size", "message"), [(7, 32, "frames: .* tubelet, 2, found 7"), (8, 30, "patch, 8, found 30")]
)
def test_sizes_that_make_no_whole_tokens_are_refused(trained: Encoder, frames: int, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        at(trained, frames, size, "resample")
