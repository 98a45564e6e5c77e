"""Running cells against a plain statement of VideoMAE v2's queue, and the subset of a tube mask that they decode."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from mam2.kernels import TubeMask, masked_pixel_loss, random_mask, running_cell_mask, running_cell_subset, tube_mask

GRID = (8, 4, 6)


def by_queue(phase: int, left_out: int) -> torch.Tensor:
    """True where left out: a queue of four flags, rotated by one place per slot, repeated in every 2x2 cell."""
    queue = [True] * left_out + [False] * (4 - left_out)
    slots = []
    for slot in range(GRID[0]):
        turned = torch.tensor([queue[(place + phase + slot + 1) % 4] for place in range(4)])
        slots.append(turned.view(2, 2).repeat(GRID[1] // 2, GRID[2] // 2))
    return torch.stack(slots).flatten()


@pytest.mark.parametrize(("ratio", "left_out"), [(0.25, 1), (0.5, 2), (0.75, 3), (0.6, 2)])
def test_every_clip_is_one_of_the_four_phases_and_all_occur(ratio: float, left_out: int) -> None:
    mask = running_cell_mask(400, GRID, ratio, seed=1)
    phases = torch.stack([by_queue(phase, left_out) for phase in range(4)])
    which = (mask.as_bool()[:, None] == phases).all(2)
    assert (which.sum(1) == 1).all()
    assert ((which.double().mean(0) - 0.25).abs() < 5 * (0.25 * 0.75 / 400) ** 0.5).all()


def test_rows_are_ascending_and_hold_every_token_once() -> None:
    visible, masked = running_cell_mask(5, GRID, 0.75, seed=3)
    assert visible.shape == (5, 48)
    assert (visible.diff(dim=1) > 0).all()
    assert (masked.diff(dim=1) > 0).all()
    assert torch.equal(torch.cat([visible, masked], 1).sort(1).values, torch.arange(192).expand(5, -1))


def test_phases_depend_on_seed_step_and_sample_and_not_on_the_tubes() -> None:
    whole = running_cell_mask(64, GRID, seed=11, step=5).masked
    part = running_cell_mask(3, GRID, seed=11, step=torch.tensor(5), first_sample=4).masked
    assert torch.equal(whole[4:7], part)
    for other in ({"seed": 12, "step": 5}, {"seed": 11, "step": 6}):
        assert not torch.equal(whole, running_cell_mask(64, GRID, **other).masked)
    # clips that hide position 0 in a tube mask of the same seed have every phase too
    hides_first = tube_mask(400, (1, 2, 2), 0.25, seed=11).masked[:, 0] == 0
    first_left_out = running_cell_mask(400, (1, 2, 2), 0.25, seed=11).masked[:, 0] == 0
    share = first_left_out[hides_first].double().mean()
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / hides_first.sum()) ** 0.5


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_the_subset_is_what_is_masked_and_decoded(ratio: float) -> None:
    key = {"seed": 7, "step": 3, "first_sample": 9}
    mask = tube_mask(6, GRID, 0.7, **key)
    subset = running_cell_subset(mask, GRID, ratio, **key)
    both = mask.as_bool() & ~running_cell_mask(6, GRID, ratio, **key).as_bool()
    assert subset.shape == (6, int(mask.masked.shape[1] * (1 - ratio)))
    assert torch.equal(subset, TubeMask.from_bool(both).masked)


def test_clips_whose_numbers_differ_are_refused_where_they_are_used() -> None:
    mask = random_mask(4, GRID, 0.5, seed=0)
    subset = running_cell_subset(mask, GRID, seed=0)
    both = (mask.as_bool() & ~running_cell_mask(4, GRID, seed=0).as_bool()).sum(1)
    assert torch.equal((subset == -1).all(1), both != 48)
    assert (both != 48).any()
    with pytest.raises(IndexError, match="found -1"):
        masked_pixel_loss(torch.zeros(4, 48, 6), torch.zeros(4, 3, 8, 4, 12), subset, patch_size=(1, 1, 2))


@pytest.mark.parametrize(
    ("grid", "ratio", "message"),
    [
        ((8, 3, 4), 0.5, "even numbers of rows and columns"),
        ((8, 4, 5), 0.5, "even numbers"),
        ((8, 0, 4), 0.5, "grid: expected 3 positive integers"),
        (GRID, 0.2, "0.25, 0.5 or 0.75"),
        (GRID, 1.0, "0.25, 0.5 or 0.75"),
    ],
)
def test_bad_arguments_name_themselves(grid: tuple[int, int, int], ratio: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        running_cell_mask(2, grid, ratio, seed=0)
    with pytest.raises(ValueError, match=message):
        running_cell_subset(tube_mask(2, GRID, 0.5, seed=0), grid, ratio, seed=0)


def test_a_mask_of_another_grid_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mask: expected 64 tokens per clip \(grid \(4, 4, 4\)\), found 128"):
        running_cell_subset(tube_mask(2, (8, 4, 4), 0.5, seed=0), (4, 4, 4), seed=0)


def test_slots_that_are_no_multiple_of_four_have_no_subset() -> None:
    grid = (6, 4, 4)
    assert running_cell_mask(2, grid, seed=0).visible.shape == (2, 48)
    with pytest.raises(ValueError, match="multiple of 4 slots"):
        running_cell_subset(tube_mask(2, grid, 0.5, seed=0), grid, seed=0)


def test_a_compiled_step_is_not_specialized_on_the_step_number() -> None:
    compiles = CompileCounter()

    def draw(step: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tubes = tube_mask(2, GRID, 0.5, seed=9, step=step)
        return running_cell_mask(2, GRID, seed=9, step=step).visible, running_cell_subset(
            tubes, GRID, seed=9, step=step
        )

    compiled = torch.compile(draw, backend=compiles, fullgraph=True)
    for step in range(4):
        for found, expected in zip(compiled(torch.tensor(step)), draw(torch.tensor(step)), strict=True):
            assert torch.equal(found, expected)
    assert compiles.frame_count == 1
