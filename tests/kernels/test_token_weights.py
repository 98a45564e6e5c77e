"""Weights of the masked tokens: which tokens a loss over decoded tokens, or over all of them, counts."""

from functools import partial

import pytest
import torch

from mam2.kernels import masked_frame_difference_loss, masked_pixel_loss, random_mask
from tests.kernels.inputs import random_clips

clips = partial(random_clips, width=8)

LOSSES = [masked_pixel_loss, masked_frame_difference_loss]
MASK = random_mask(2, (3, 2, 2), 0.5, seed=4)
OPTIONS = {"patch_size": (2, 4, 4), "eps": 0.01}


def predictions() -> torch.Tensor:
    return torch.randn(2, 6, 96, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()


def weights() -> torch.Tensor:
    return torch.rand(2, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()


def weighted(loss, pred: torch.Tensor, weight: torch.Tensor, reduction: str) -> torch.Tensor:
    """Computed from the means and the numbers of values of single tokens."""
    tokens = loss(pred, clips(), MASK, reduction="none", **OPTIONS)
    values = torch.full_like(tokens, 96)
    if loss is masked_frame_difference_loss:
        values[MASK.masked >= 8] = 48  # the last of three slots: one of its two frames has a next one
    if reduction == "none":
        return tokens * weight
    total = (tokens * values * weight).sum()
    return total if reduction == "sum" else total / (values * weight).sum()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_multiply_errors_and_the_mean_divides_by_them(loss, reduction: str) -> None:
    pred, weight = predictions(), weights()
    ours = loss(pred, clips(), MASK, weight=weight, reduction=reduction, **OPTIONS)
    expected = weighted(loss, pred, weight, reduction)
    torch.testing.assert_close(ours, expected)
    upstream = torch.randn_like(ours)
    for mine, other in zip(
        torch.autograd.grad(ours, (pred, weight), upstream),
        torch.autograd.grad(expected, (pred, weight), upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("loss", LOSSES)
def test_tokens_of_no_weight_do_not_count(loss) -> None:
    """Clips with different numbers of counted tokens; equal for bool and float weights and for selected tokens."""
    counted = torch.tensor([[True, False, True, True, False, False], [False, False, False, False, True, False]])
    pred = predictions()
    ours = loss(pred, clips(), MASK, weight=counted, **OPTIONS)
    assert torch.equal(loss(pred, clips(), MASK, weight=counted.float(), **OPTIONS), ours)
    sums, sizes = [], []
    for clip in range(2):
        index, kept = MASK.masked[clip : clip + 1, counted[clip]], pred[clip : clip + 1, counted[clip]]
        last = (index >= 8).sum() * 48 if loss is masked_frame_difference_loss else 0
        sums.append(loss(kept, clips()[clip : clip + 1], index, reduction="sum", **OPTIONS))
        sizes.append(kept.numel() - last)
    torch.testing.assert_close(ours, sum(sums) / sum(sizes))
    (gradient,) = torch.autograd.grad(ours, pred)
    assert torch.equal((gradient != 0).any(2), counted)


@pytest.mark.parametrize("loss", LOSSES)
def test_equal_weights_change_nothing(loss) -> None:
    pred = predictions()
    ours = loss(pred, clips(), MASK, weight=torch.full((2, 6), 0.7), **OPTIONS)
    torch.testing.assert_close(ours, loss(pred, clips(), MASK, **OPTIONS))


@pytest.mark.parametrize("loss", LOSSES)
def test_the_mean_over_nothing_is_nan(loss) -> None:
    assert loss(predictions(), clips(), MASK, weight=torch.zeros(2, 6), **OPTIONS).isnan()
    nothing = loss(torch.zeros(2, 0, 96), clips(), MASK.masked[:, :0], **OPTIONS)
    assert nothing.isnan()


@pytest.mark.parametrize("loss", LOSSES)
def test_no_mask_is_every_token(loss) -> None:
    pred = torch.randn(2, 12, 96, dtype=torch.float64)
    every = torch.arange(12).expand(2, -1)
    assert torch.equal(loss(pred, clips(), None, **OPTIONS), loss(pred, clips(), every, **OPTIONS))
    masked = loss(pred, clips(), None, weight=MASK.as_bool(), **OPTIONS)
    torch.testing.assert_close(masked, loss(pred, clips(), MASK, **OPTIONS))
