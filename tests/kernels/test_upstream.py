"""Gradients are final after the forward pass: backward does not change them at an upstream gradient of 1."""

from collections.abc import Callable

import pytest
import torch

from mam2.kernels import linear_cross_entropy, masked_frame_difference_loss, masked_pixel_loss, random_mask, reference
from tests.kernels.inputs import random_clips

MASK = random_mask(2, (3, 2, 2), 0.5, seed=4)
OPTIONS = {"patch_size": (2, 4, 6), "eps": 0.01}
TARGET = torch.tensor([0, 4, -100, 2, 1, 3])

Loss = Callable[[torch.Tensor], torch.Tensor]


def weights() -> torch.Tensor:
    return torch.tensor([[1.0, 0, 0.5, 2, 0, 1], [0, 0, 3, 0, 1, 1]])


def head(hidden: torch.Tensor, **options: object) -> torch.Tensor:
    weight = torch.linspace(-1, 1, 5 * 144).view(5, 144).to(hidden)
    return linear_cross_entropy(hidden.flatten(0, 1)[::2], weight, TARGET, **options)


LOSSES: dict[str, Loss] = {
    "pixel": lambda pred: masked_pixel_loss(pred, random_clips(), MASK, **OPTIONS),
    "pixel of some": lambda pred: masked_pixel_loss(pred, random_clips(), MASK, weight=weights(), **OPTIONS),
    "pixel of a boolean mask": lambda pred: masked_pixel_loss(pred, random_clips(), MASK.as_bool(), **OPTIONS),
    "joint, sum": lambda pred: masked_pixel_loss(
        pred, random_clips(), MASK, target="joint", reduction="sum", **OPTIONS
    ),
    "motion": lambda pred: masked_frame_difference_loss(pred, random_clips(), MASK, **OPTIONS),
    "motion of some": lambda pred: masked_frame_difference_loss(
        pred, random_clips(), MASK, weight=weights(), **OPTIONS
    ),
    "codes": head,
    "codes, sum": lambda hidden: head(hidden, reduction="sum", label_smoothing=0.1),
}
losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def leaf(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 6, 144, generator=generator).to(dtype).requires_grad_()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_final_gradient_is_not_touched(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """At an upstream gradient of 1 nothing is multiplied or rounded a second time."""
    loss, pred = LOSSES[name], leaf(dtype)
    out = loss(pred)
    with monkeypatch.context() as patch:
        patch.setattr(reference, "scale_gradient", lambda *_, **__: pytest.fail("a gradient was scaled"))
        (gradient,) = torch.autograd.grad(out, pred)
    wide = leaf().to(dtype).detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(loss(wide), wide)
    roundings = 3 if name.startswith("codes") else 1.05  # the logits and their gradient are bfloat16 too
    rounding = (exact.to(dtype).double() - exact).norm() + 1e-6 * exact.norm()
    assert (gradient.double() - exact).norm() <= roundings * rounding


@losses
@pytest.mark.parametrize("factor", [1.0, 0.0, -2.5, 65536.0])
def test_any_upstream_gradient(loss: Loss, factor: float) -> None:
    pred = leaf(torch.float64)
    upstream = torch.tensor(factor, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(loss(pred), pred, upstream)
    (of_one,) = torch.autograd.grad(loss(pred), pred)
    torch.testing.assert_close(gradient, factor * of_one)
    assert of_one.abs().max() > 0


@losses
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_a_kept_graph_gives_the_same_gradient_again(loss: Loss, factor: float) -> None:
    """Also if the first gradient is overwritten in between, as gradient clipping does."""
    pred = leaf()
    out = factor * loss(pred)
    out.backward(retain_graph=True)
    first = pred.grad.clone()
    pred.grad.mul_(7)
    pred.grad = None
    out.backward(retain_graph=True)
    assert torch.equal(pred.grad, first)
    (2 * out).backward()
    torch.testing.assert_close(pred.grad, 3 * first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.backward()


def test_two_losses_of_one_prediction_add_up() -> None:
    pred = leaf(torch.float64)
    total = LOSSES["pixel"](pred) + 0.5 * LOSSES["motion"](pred)
    (gradient,) = torch.autograd.grad(total, pred)
    parts = [torch.autograd.grad(LOSSES[name](pred), pred)[0] for name in ("pixel", "motion")]
    torch.testing.assert_close(gradient, parts[0] + 0.5 * parts[1])


def test_rows_of_factor_one_are_left_alone_in_place() -> None:
    gradient, scale = torch.randn(3, 4).bfloat16(), torch.tensor([1.0, 0.5, 1.0])
    expected = (gradient.float() * scale[:, None]).bfloat16()
    torch.ops.mam2.scale_gradient_(gradient, scale)
    assert torch.equal(gradient, expected)


def test_a_weight_of_zero_hides_a_prediction_that_is_not_finite() -> None:
    pred = leaf()
    spoiled = torch.where(weights()[..., None] == 0, float("inf"), pred.detach()).requires_grad_()
    for name in ("pixel of some", "motion of some"):
        one, other = LOSSES[name](pred), LOSSES[name](spoiled)
        assert torch.equal(one, other)
        assert torch.equal(*(torch.autograd.grad(out, of)[0] for out, of in ((one, pred), (other, spoiled))))


def test_a_weight_of_zero_that_learns_gets_its_gradient() -> None:
    """d loss / d weight = (error − loss · values) / total, also where the weight is 0."""
    weight = weights().double().requires_grad_()
    pred = leaf(torch.float64)
    tokens = masked_pixel_loss(pred, random_clips(), MASK, reduction="none", **OPTIONS)
    expected = (tokens.detach() * weight).sum() / weight.sum()
    found = masked_pixel_loss(pred, random_clips(), MASK, weight=weight, **OPTIONS)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(out, weight)[0] for out in (found, expected)))


def test_float16_gradients_hold_the_divisor_only_after_the_upstream_gradient() -> None:
    """A gradient scaler multiplies by up to 2^24; the gradient of a mean over many values is below float16's range."""
    clips, mask = random_clips().repeat(256, 1, 1, 1, 1), random_mask(512, (3, 2, 2), 0.5, seed=4)
    pred = torch.randn(512, 6, 144, generator=torch.Generator().manual_seed(1)).half().requires_grad_()
    loss = masked_pixel_loss(pred, clips, mask, **OPTIONS)
    (gradient,) = torch.autograd.grad(loss, pred, torch.tensor(2.0**20))
    wide = pred.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(masked_pixel_loss(wide, clips, mask, **OPTIONS), wide)
    assert (gradient.double() - 2**20 * exact).norm() <= 1e-3 * (2**20 * exact).norm()


def test_upstream_gradients_of_masked_tokens_among_predictions_of_every_token() -> None:
    every = torch.randn(2, 12, 144, dtype=torch.float64, requires_grad=True)
    index = MASK.masked[..., None].expand(-1, -1, 144)
    some = every.detach().gather(1, index).requires_grad_()
    upstream = torch.linspace(-1, 2, 12, dtype=torch.float64).view(2, 6)
    of_every, of_some = (
        torch.autograd.grad(masked_pixel_loss(pred, random_clips(), MASK, reduction="none", **OPTIONS), pred, upstream)[
            0
        ]
        for pred in (every, some)
    )
    torch.testing.assert_close(of_every, torch.zeros_like(every).scatter(1, index, of_some))
