"""Masks: which tokens, how many, and equal draws on any device and from any first sample."""

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mam2.kernels import TubeMask, host_masks, motion_tube_mask, random_mask, reference_masks, tube_mask
from mam2.kernels.masks import without_repeats
from mam2.kernels.shapes import REPEATED

GRID = (4, 5, 7)


@pytest.mark.parametrize(
    ("key", "counter", "word"),
    [
        (0, (0, 0, 0, 0), 0x6627E8D5),
        (0xFFFFFFFF_FFFFFFFF, (0xFFFFFFFF,) * 4, 0x408F276D),
        (0x299F31D0_A4093822, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0xD16CFE09),
    ],
)
def test_philox_matches_the_published_vectors(key: int, counter: tuple[int, ...], word: int) -> None:
    """The test vectors of Random123's philox4x32-10."""
    assert host_masks.philox(key, [np.array([[value]]) for value in counter]).tolist() == [[word]]


def test_masks_are_those_recorded() -> None:
    """A checkpoint of an earlier version draws the same masks: of tubes, and of motion in a fixed clip."""
    far = {"seed": 2**62 + 5, "step": 2**33 + 7, "first_sample": 2**32 - 1}
    assert tube_mask(2, (1, 4, 4), 0.4, **far).masked.tolist() == [[0, 8, 9, 11, 12, 14], [0, 1, 4, 10, 13, 14]]
    values = (torch.arange(2 * 3 * 4 * 8 * 8) * 7919 % 251).to(torch.uint8)
    video = values.view(2, 4, 8, 8, 3).permute(0, 4, 1, 2, 3)
    mask = motion_tube_mask(video, 0.5, patch_size=(2, 2, 2), seed=9, step=3, strength=0.8)
    assert mask.masked[:, :8].tolist() == [[0, 2, 4, 5, 6, 11, 12, 15], [0, 1, 4, 5, 8, 11, 13, 14]]


@pytest.mark.parametrize(
    ("seed", "step", "sample", "energies"),
    [
        (0, 0, 0, None),
        (2**63 - 1, 2**40 + 3, 2**32 - 2, None),
        (7, -1, 2**33, torch.int64),
        (7, 5, 3, torch.float32),
        (7, 5, 3, torch.float64),
    ],
)
def test_masks_on_a_cpu_are_those_of_the_reference(seed: int, step: int, sample: int, energies) -> None:
    """Samples that cross 32 bits; energies of which the first clip's are all 0."""
    numbers = torch.tensor(step), seed, sample, 5, 3, 35, 22
    energy = (
        None if energies is None else torch.randint(0, 900, (5, 105)).index_fill(0, torch.tensor(0), 0).to(energies)
    )
    for found, expected in zip(
        host_masks.draw_mask(*numbers, energy, 30000), reference_masks.draw_mask(*numbers, energy, 30000), strict=True
    ):
        assert found.dtype == torch.int64
        assert torch.equal(found, expected)


def test_operators_and_direct_calls_draw_the_same_masks() -> None:
    """Under a dispatch mode, as when a graph is recorded, a mask comes from the operator."""
    drawn = tube_mask(3, GRID, 0.5, seed=3, step=7)
    with FlopCounterMode(display=False):
        recorded = tube_mask(3, GRID, 0.5, seed=3, step=7)
    assert torch.equal(drawn.masked, recorded.masked)
    with FakeTensorMode():
        assert type(tube_mask(3, GRID, 0.5, seed=3, step=7).masked) is FakeTensor


def test_tube_mask_hides_the_same_positions_in_every_slot() -> None:
    mask = tube_mask(6, GRID, 0.75, seed=1)
    hidden = int(0.75 * 35)
    assert mask.masked.shape == (6, 4 * hidden)
    assert mask.visible.shape == (6, 4 * (35 - hidden))
    slots = mask.as_bool().view(6, 4, 35)
    assert torch.equal(slots, slots[:, :1].expand_as(slots))
    assert (slots[:, 0].sum(1) == hidden).all()


@pytest.mark.parametrize("draw", [tube_mask, random_mask])
def test_rows_are_ascending_and_hold_every_token_once(draw) -> None:
    visible, masked = draw(5, GRID, 0.6, seed=3)
    assert (visible.diff(dim=1) > 0).all()
    assert (masked.diff(dim=1) > 0).all()
    assert torch.equal(torch.cat([visible, masked], 1).sort(1).values, torch.arange(140).expand(5, -1))


def test_random_mask_differs_between_slots() -> None:
    slots = random_mask(4, GRID, 0.5, seed=0).as_bool().view(4, 4, 35)
    assert (slots != slots[:, :1]).any()
    assert (slots.sum((1, 2)) == 70).all()


def test_masks_depend_on_seed_step_and_sample_alone() -> None:
    whole = tube_mask(8, GRID, 0.5, seed=11, step=5)
    part = tube_mask(3, GRID, 0.5, seed=11, step=torch.tensor(5), first_sample=4)
    assert torch.equal(whole.masked[4:7], part.masked)
    for other in (
        tube_mask(8, GRID, 0.5, seed=12, step=5),
        tube_mask(8, GRID, 0.5, seed=11, step=6),
        tube_mask(8, GRID, 0.5, seed=11 + 2**32, step=5),
        tube_mask(8, GRID, 0.5, seed=11, step=5, first_sample=2**32),
    ):
        assert not torch.equal(whole.masked, other.masked)


def test_every_position_is_hidden_equally_often() -> None:
    hidden = torch.cat([tube_mask(500, (1, 4, 5), 0.5, seed=0, step=step).as_bool() for step in range(8)])
    share = hidden.double().mean(0)
    assert (share - 0.5).abs().max() < 5 * (0.25 / 4000) ** 0.5
    pairs = (hidden.double().T @ hidden.double() / 4000)[~torch.eye(20, dtype=torch.bool)]
    assert (pairs - 0.5 * 9 / 19).abs().max() < 5 * (0.25 / 4000) ** 0.5


def test_from_bool_inverts_as_bool() -> None:
    mask = random_mask(3, GRID, 0.4, seed=2)
    again = TubeMask.from_bool(mask.as_bool())
    assert torch.equal(again.visible, mask.visible)
    assert torch.equal(again.masked, mask.masked)


def test_only_a_clip_with_a_number_twice_is_marked() -> None:
    """Not one whose numbers are out of range, even if they are equal: for these there is another message."""
    clips = [[4, 0, 3, 1], [4, 0, 3, 4], [0, 0, 0, 0], [2, 5, 5, 1], [-1, 2, -1, 9], [-1, 2, 2, 9]]
    found = without_repeats(torch.tensor(clips), 5)
    assert found.tolist() == [[REPEATED] * 4 if place in (1, 2, 5) else row for place, row in enumerate(clips)]
    numbers = torch.randint(0, 40, (200, 8), generator=torch.Generator().manual_seed(0))
    twice = torch.tensor([len(set(row)) < 8 for row in numbers.tolist()])
    assert 50 < twice.sum() < 150
    assert torch.equal(without_repeats(numbers, 40)[:, 0] == REPEATED, twice)
    assert without_repeats(numbers[:0], 40).shape == (0, 8)


@pytest.mark.parametrize("ratio", [0.0, 0.02, 1.0, 1.5, -0.5])
def test_hiding_nothing_or_everything_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="ratio"):
        tube_mask(2, GRID, ratio, seed=0)


def test_bad_arguments_name_themselves() -> None:
    with pytest.raises(ValueError, match="seed"):
        tube_mask(2, GRID, 0.5, seed=-1)
    with pytest.raises(ValueError, match="batch: expected 0 or more clips, found -1"):
        tube_mask(-1, GRID, 0.5, seed=0)
    with pytest.raises(ValueError, match="step"):
        tube_mask(2, GRID, 0.5, seed=0, step=torch.tensor([1]))
    with pytest.raises(ValueError, match="same number"):
        TubeMask.from_bool(torch.tensor([[True, False], [True, True]]))
    with pytest.raises(ValueError, match="bool"):
        TubeMask.from_bool(torch.zeros(2, 2))


@pytest.mark.parametrize("draw", [tube_mask, random_mask])
@pytest.mark.parametrize("grid", [(4, 4), (2, 4, 4, 3), (0, 4, 4), (2, -4, 4)])
def test_what_is_no_grid_is_named(draw, grid: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"grid: expected 3 positive integers .* found \("):
        draw(2, grid, 0.5, seed=0)


def test_an_empty_batch_gives_empty_masks() -> None:
    assert tube_mask(0, GRID, 0.5, seed=0).masked.shape == (0, 4 * 17)


def test_a_compiled_step_is_not_specialized_on_the_step_number() -> None:
    compiles = CompileCounter()

    @torch.compile(backend=compiles, fullgraph=True)
    def draw(step: torch.Tensor) -> torch.Tensor:
        return tube_mask(2, GRID, 0.5, seed=9, step=step).masked

    for step in range(4):
        assert torch.equal(draw(torch.tensor(step)), tube_mask(2, GRID, 0.5, seed=9, step=step).masked)
    assert compiles.frame_count == 1
