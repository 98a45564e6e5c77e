"""Motion-guided tubes: energies against loops, and how often positions of given energies are hidden."""

import itertools
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from mam2.kernels import motion_tube_mask, reference, reference_masks, tube_mask
from tests.kernels.inputs import random_clips

clips = partial(random_clips, height=12, width=16)

PATCH, GRID = (2, 4, 4), (3, 3, 4)


def moving(energies: list[int]) -> torch.Tensor:
    """500 equal clips [1,2,1,n] of one row, whose n positions have these energies times 100."""
    frames = torch.zeros(1, 1, 2, 1, len(energies), dtype=torch.uint8)
    frames[0, 0, 1, 0] = torch.tensor([round(10 * energy**0.5) for energy in energies])
    return frames.expand(500, -1, -1, -1, -1)


def hidden_share(energies: list[int], hidden: int, strength: float) -> torch.Tensor:
    ratio = (hidden + 0.5) / len(energies)
    draws = [
        motion_tube_mask(moving(energies), ratio, patch_size=(2, 1, 1), strength=strength, seed=1, step=step).as_bool()
        for step in range(8)
    ]
    return torch.cat(draws).double().mean(0)


def by_enumeration(weights: list[float], hidden: int) -> torch.Tensor:
    """Probability that each position is among `hidden` drawn one after another by weight, without replacement."""
    share = torch.zeros(len(weights), dtype=torch.float64)
    for order in itertools.permutations(range(len(weights)), hidden):
        probability, left = 1.0, sum(weights)
        for position in order:
            probability *= weights[position] / left
            left -= weights[position]
        share[list(order)] += probability
    return share


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_energies_are_sums_of_squared_changes(dtype: torch.dtype) -> None:
    video = clips(dtype)
    energy = torch.ops.mam2.motion_energy(video, list(PATCH))
    change = video.double().diff(dim=2).square()
    assert energy.dtype == (torch.int64 if dtype == torch.uint8 else torch.promote_types(dtype, torch.float32))
    for clip, token in itertools.product(range(2), range(36)):
        slot, row, column = token // 12 * 2, token % 12 // 4 * 4, token % 4 * 4
        expected = change[clip, :, slot : slot + 2, row : row + 4, column : column + 4].sum()
        torch.testing.assert_close(energy[clip, token].double(), expected, rtol=1e-6, atol=0)


def test_energies_of_any_strides_are_equal() -> None:
    energy = torch.ops.mam2.motion_energy(clips(), list(PATCH))
    for video in (clips().contiguous(), torch.nn.functional.pad(clips(), (3, 2, 1, 1))[..., 1:-1, 3:-2]):
        assert torch.equal(torch.ops.mam2.motion_energy(video, list(PATCH)), energy)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_energies_computed_slot_by_slot_are_equal(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """However few squared changes exist at a time: of two clips, of one, of two slots of a clip, or of one."""
    for video in (clips(dtype, batch=3), clips(dtype, batch=3).contiguous()):
        whole = reference_masks.motion_energy(video, list(PATCH))
        for slots in (6, 3, 2, 1):
            monkeypatch.setattr(reference, "CHUNK_BYTES", slots * 4 * 2 * 3 * 12 * 16)
            assert torch.equal(reference_masks.motion_energy(video, list(PATCH)), whole)
        monkeypatch.undo()


def test_tubes_hide_the_same_positions_in_every_slot() -> None:
    visible, masked = motion_tube_mask(clips(), 0.75, patch_size=PATCH, seed=1)
    assert masked.shape == (2, 3 * 9)
    assert torch.equal(masked.view(2, 3, 9) - torch.arange(3)[:, None] * 12, masked[:, None, :9].expand(-1, 3, -1))
    assert torch.equal(torch.cat([visible, masked], 1).sort(1).values, torch.arange(36).expand(2, -1))


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_a_clip_that_moves_alike_everywhere_is_masked_as_by_tube_mask(strength: float) -> None:
    key = {"seed": 4, "step": 2, "first_sample": 7}
    expected = tube_mask(2, GRID, 0.6, **key).masked
    still = clips()[:, :, :1].expand(-1, -1, 6, -1, -1)
    flicker = torch.zeros_like(clips()).index_fill(2, torch.tensor([1, 3, 5]), 9)
    for video in (still, flicker, flicker.float()):
        assert torch.equal(motion_tube_mask(video, 0.6, patch_size=PATCH, strength=strength, **key).masked, expected)


def test_no_strength_is_tube_mask() -> None:
    drawn = motion_tube_mask(clips(), 0.6, patch_size=PATCH, strength=0, seed=4).masked
    assert torch.equal(drawn, tube_mask(2, GRID, 0.6, seed=4).masked)


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("hidden", [1, 2])
def test_positions_are_drawn_without_replacement_by_their_weights(strength: float, hidden: int) -> None:
    energies = [1, 4, 9, 16]
    weights = [1 - strength + strength * energy / 7.5 for energy in energies]
    expected = by_enumeration(weights, hidden)
    limit = 5 * (expected * (1 - expected) / 4000).sqrt()
    assert ((hidden_share(energies, hidden, strength) - expected).abs() < limit).all()


def test_by_motion_alone_what_stands_still_is_hidden_last() -> None:
    share = hidden_share([0, 0, 1, 9, 0, 4], 4, 1.0)
    assert (share[[2, 3, 5]] == 1).all()
    assert ((share[[0, 1, 4]] - 1 / 3).abs() < 5 * (2 / 9 / 4000) ** 0.5).all()


def test_masks_depend_on_clip_seed_step_and_sample_alone() -> None:
    video = torch.cat([clips()] * 4)
    whole = motion_tube_mask(video, 0.5, patch_size=PATCH, seed=11, step=5).masked
    part = motion_tube_mask(video[4:7], 0.5, patch_size=PATCH, seed=11, step=torch.tensor(5), first_sample=4).masked
    assert torch.equal(whole[4:7], part)
    assert not torch.equal(whole, motion_tube_mask(video, 0.5, patch_size=PATCH, seed=11, step=6).masked)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strength": 1.5}, "strength: expected 0 to 1"),
        ({"ratio": 1.0}, "ratio"),
        ({"video": clips()[0]}, "5 dimensions"),
        ({"patch_size": (4, 4, 4)}, "frames to be a multiple of 4"),
    ],
)
def test_bad_arguments_name_themselves(change: dict, message: str) -> None:
    arguments = {"video": clips(), "ratio": 0.5, "patch_size": PATCH, "seed": 0} | change
    with pytest.raises(ValueError, match=message):
        motion_tube_mask(**arguments)


def test_an_empty_batch_gives_empty_masks() -> None:
    assert motion_tube_mask(clips()[:0], 0.5, patch_size=PATCH, seed=0).masked.shape == (0, 18)


def test_operators_pass_opcheck() -> None:
    torch.library.opcheck(torch.ops.mam2.motion_energy.default, (clips(), list(PATCH)))
    energy = torch.ops.mam2.motion_energy(clips(torch.float32), list(PATCH))
    torch.library.opcheck(torch.ops.mam2.draw_mask.default, (torch.tensor(3), 1, 0, 2, 3, 12, 4, energy, 30000))


def test_a_compiled_step_is_not_specialized_on_the_step_number() -> None:
    compiles = CompileCounter()

    def draw(video: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        return motion_tube_mask(video, 0.5, patch_size=PATCH, seed=9, step=step).masked

    compiled = torch.compile(draw, backend=compiles, fullgraph=True)
    for step in range(4):
        assert torch.equal(compiled(clips(), torch.tensor(step)), draw(clips(), torch.tensor(step)))
    assert compiles.frame_count == 1
