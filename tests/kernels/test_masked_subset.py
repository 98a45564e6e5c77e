"""Some of the masked tokens: which ones, equal draws from any first sample, and bad arguments."""

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

from mam2.kernels import host_masks, reference_masks, tube_mask
from mam2.kernels.masked_subset import masked_subset

GRID = (4, 4, 6)
MASKED = tube_mask(6, GRID, 0.75, seed=1).masked


def subset(masked: torch.Tensor = MASKED, count: int = 20, **options: Any) -> torch.Tensor:
    return masked_subset(masked, GRID, count, **{"by_cell": True, "seed": 3, "step": 5, **options})


def test_a_subset_is_the_recorded_one() -> None:
    """Draws of an earlier version, which drew them on the host; the sample numbers cross 32 bits."""
    recorded = {
        False: [[8, 11, 34, 47, 63, 71, 82, 87], [10, 14, 29, 32, 40, 43, 80, 95]],
        True: [[9, 11, 34, 42, 46, 50, 62, 87], [10, 18, 22, 40, 65, 79, 93, 95]],
    }
    for by_cell, tokens in recorded.items():
        far = {"seed": 2**62 + 5, "step": 2**33 + 7, "first_sample": 2**32 - 1}
        assert masked_subset(torch.arange(96).expand(2, -1), GRID, 8, by_cell=by_cell, **far).tolist() == tokens


@pytest.mark.parametrize("by_cell", [False, True])
@pytest.mark.parametrize(("seed", "step", "sample"), [(0, 0, 0), (2**63 - 1, 2**40 + 3, 2**32 - 2), (7, -1, 2**33)])
def test_subsets_on_a_cpu_are_those_of_the_reference(by_cell: bool, seed: int, step: int, sample: int) -> None:
    """Samples that cross 32 bits."""
    arguments = MASKED, torch.tensor(step), GRID, 20, by_cell, seed, sample
    assert torch.equal(host_masks.draw_subset(*arguments), reference_masks.masked_subset(*arguments))


@pytest.mark.parametrize("by_cell", [False, True])
def test_the_drawn_tokens_are_masked_ones_in_order(by_cell: bool) -> None:
    found = subset(by_cell=by_cell)
    assert found.shape == (6, 20)
    assert (found.diff(dim=1) > 0).all()
    for some, all_ in zip(found.tolist(), MASKED.tolist(), strict=True):
        assert set(some) <= set(all_)
    assert torch.equal(subset(count=MASKED.shape[1], by_cell=by_cell), MASKED)


@pytest.mark.parametrize("by_cell", [False, True])
def test_a_subset_depends_on_seed_step_and_sample_alone(by_cell: bool) -> None:
    whole = subset(by_cell=by_cell)
    assert torch.equal(subset(MASKED[4:], by_cell=by_cell, first_sample=4, step=torch.tensor(5)), whole[4:])
    for other in ({"seed": 4}, {"step": 6}, {"first_sample": 2**32}):
        assert not torch.equal(subset(by_cell=by_cell, **other), whole)


def test_of_equal_keys_the_smaller_token_is_drawn() -> None:
    """Of sample 221542 of seed 0, tokens 45 and 122 have the same key, which is the 126th smallest."""
    drawn = masked_subset(torch.arange(196)[None], (1, 14, 14), 126, by_cell=False, seed=0, first_sample=221542)
    assert 45 in drawn
    assert 122 not in drawn


def test_the_operator_and_a_direct_call_draw_the_same() -> None:
    """Under a dispatch mode, as when a graph is recorded, the tokens come from the operator."""
    with FlopCounterMode(display=False):
        recorded = subset()
    assert torch.equal(recorded, subset())
    assert torch.equal(recorded, reference_masks.masked_subset(MASKED, torch.tensor(5), GRID, 20, True, 3, 0))


def test_a_compiled_step_is_not_specialized_on_the_step_number() -> None:
    compiles = CompileCounter()

    @torch.compile(backend=compiles, fullgraph=True)
    def draw(step: torch.Tensor) -> torch.Tensor:
        return subset(step=step)

    for step in range(4):
        assert torch.equal(draw(torch.tensor(step)), subset(step=step))
    assert compiles.frame_count == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"count": 0}, r"count: expected 1 to 72 of the masked tokens, found 0"),
        ({"count": 73}, r"count: expected 1 to 72 of the masked tokens, found 73"),
        ({"seed": 2**63}, r"seed: expected 0 to 2\*\*63 - 1"),
        ({"step": torch.tensor([1])}, r"step: expected an int or a 0-d int64 tensor"),
        ({"masked": MASKED.int()}, r"masked: expected int64 \[B,Nm\] of at most 96 tokens, found torch.int32"),
        ({"masked": MASKED[0]}, r"masked: expected int64 .* found torch.int64 \(72,\)"),
        ({"masked": MASKED.repeat(1, 2)}, r"masked: expected int64 .* found torch.int64 \(6, 144\)"),
    ],
)
def test_bad_arguments_name_themselves(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        subset(**changed)


def test_an_empty_batch_gives_an_empty_subset() -> None:
    assert subset(MASKED[:0]).shape == (0, 20)
