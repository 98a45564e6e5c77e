"""Which of the hidden tokens are predicted."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mam2.engine.config.pretrain import PretrainConfig, check
from mam2.engine.config.recipe import load_recipe
from mam2.engine.errors import UserError
from mam2.engine.model.mam2 import MAM2
from mam2.engine.model.masking import keep_decoded, sample_masks
from mam2.engine.runtime.distributed import World
from mam2.engine.train.step import PretrainStep
from mam2.kernels import TubeMask, host_masks

CODES = 16


def small(**mask: Any) -> PretrainConfig:
    """16 slots of 4×4 patches, 12 of 16 hidden."""
    config = load_recipe("demo")
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, frames=32),
        mask=dataclasses.replace(config.mask, ratio=0.75, **mask),
        model=dataclasses.replace(config.model, width=24, depth=1, heads=2),
        run=dataclasses.replace(config.run, compile=False, precision="float32"),
    )


def drawn(config: PretrainConfig, clips: int = 6, **place: int) -> tuple[TubeMask, TubeMask]:
    mask = sample_masks(torch.zeros(clips, 3, 1, 1, 1, dtype=torch.uint8), config, **{"step": 3, **place})
    return mask, keep_decoded(mask, config, **{"step": 3, **place})


@pytest.mark.parametrize("kind", ["cell", "random"])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 1.0])
def test_the_share_is_kept_of_every_clips_hidden_tokens(kind: str, share: float) -> None:
    mask, kept = drawn(small(decoded=share, decoded_kind=kind))
    assert torch.equal(kept.visible, mask.visible)
    assert kept.masked.shape == (6, int(share * 192))
    assert (kept.masked.diff(dim=1) > 0).all()
    for hidden, some in zip(mask.masked.tolist(), kept.masked.tolist(), strict=True):
        assert set(some) <= set(hidden)


@pytest.mark.parametrize("kind", ["cell", "random"])
def test_the_choice_is_a_function_of_seed_step_and_sample(kind: str) -> None:
    config = small(decoded=0.3, decoded_kind=kind)
    whole = drawn(config)[1].masked
    assert torch.equal(drawn(config, clips=2, first_sample=4)[1].masked, whole[4:])
    assert not torch.equal(drawn(config, step=4)[1].masked, whole)
    other = dataclasses.replace(config, run=dataclasses.replace(config.run, seed=1))
    mask = drawn(config)[0]
    assert not torch.equal(keep_decoded(mask, other, step=3).masked, whole)


def test_the_choice_is_the_recorded_one() -> None:
    """A checkpoint of an earlier version predicts the same tokens; the sample numbers cross 32 bits."""
    recorded = {
        "random": [[34, 37, 39, 42, 115, 130, 131, 179, 224], [2, 31, 47, 65, 69, 172, 217, 238, 250]],
        "cell": [[13, 34, 42, 115, 179, 185, 214, 224, 234], [14, 16, 24, 55, 90, 163, 171, 181, 255]],
    }
    for kind, tokens in recorded.items():
        kept = drawn(small(decoded=0.05, decoded_kind=kind), clips=2, first_sample=2**32 - 1)[1]
        assert kept.masked.tolist() == tokens


@pytest.mark.parametrize("kind", ["cell", "random"])
def test_on_a_gpu_nothing_is_drawn_on_the_host(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_the_host(*_: object) -> None:
        raise AssertionError("drawn on the host")

    monkeypatch.setattr(host_masks, "philox", on_the_host)
    config = small(decoded=0.5, decoded_kind=kind)
    with FakeTensorMode():
        mask = sample_masks(torch.empty(6, 3, 1, 1, 1, device="cuda"), config, step=3)
        kept = keep_decoded(mask, config, step=3)
    assert kept.masked.shape == (6, 96)
    assert kept.masked.device.type == "cuda"


def test_cells_are_covered_evenly_in_space_and_time() -> None:
    config = small(decoded=0.5)
    everything = TubeMask(torch.empty(2, 0, dtype=torch.int64), torch.arange(256).expand(2, -1))
    config = dataclasses.replace(config, mask=dataclasses.replace(config.mask, ratio=1.0))
    chosen = torch.zeros(2, 256, dtype=torch.bool).scatter(1, keep_decoded(everything, config, step=5).masked, True)
    grid = chosen.view(2, 16, 2, 2, 2, 2)  # clip, slot, cell row, row, cell column, column
    assert (grid.sum((3, 5)) == 2).all(), "two patches of each cell in each slot"
    assert (chosen.view(2, 16, 16).sum(1) == 8).all(), "each patch in half of the slots"
    assert (chosen.view(2, 4, 4, 16).sum(2) == 2).all(), "and in two of four slots in a row"


def test_a_random_choice_is_independent_of_the_masks_own_draw() -> None:
    config = small(kind="random", decoded=0.5, decoded_kind="random")
    mask, kept = drawn(config, clips=400)
    counts = torch.zeros(256).index_add(0, kept.masked.flatten(), torch.ones(kept.masked.numel()))
    hidden = torch.zeros(256).index_add(0, mask.masked.flatten(), torch.ones(mask.masked.numel()))
    shares = counts / hidden
    assert shares.mean() == pytest.approx(0.5, abs=0.01)
    assert (shares - 0.5).abs().max() < 5 * 0.5 / 300**0.5  # five standard deviations of 300 coin flips


def test_a_step_learns_from_the_kept_tokens_alone() -> None:
    config = small(decoded=0.5)
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, batch=4))
    torch.manual_seed(0)
    step = PretrainStep(config, MAM2(config, CODES), torch.device("cpu"), World())
    video = torch.randint(0, 256, (4, 3, 32, 32, 32), dtype=torch.uint8)
    codes = torch.randint(CODES, (4, 256))
    _, mask, _ = step.arguments(0, 0, video, codes)
    assert mask.masked.shape == (4, config.decoded_tokens) == (4, 96)
    elsewhere = torch.ones(4, 256, dtype=torch.bool).scatter(1, mask.masked, False)
    with torch.no_grad():
        losses = [step.objective(video, mask, given)[0] for given in (codes, torch.where(elsewhere, 0, codes))]
        changed = step.objective(video, mask, torch.where(elsewhere, codes, 0))[0]
    assert losses[0] == losses[1] != changed


def test_a_share_that_keeps_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"mask.decoded 0.001 leaves none of 192 hidden tokens"):
        check(small(decoded=0.001))
