"""The masked losses in every type and layout: accuracy against float64, gradients, reproducible bits."""

import pytest
import torch

from mam2.kernels import masked_frame_difference_loss, masked_pixel_loss, random_mask, reference
from tests.kernels.inputs import random_clips, random_predictions

PATCH, GRID = (2, 4, 6), (3, 2, 2)
LOSSES = [masked_pixel_loss, masked_frame_difference_loss]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("every", [False, True])
def test_gradcheck(loss, every: bool) -> None:
    video, mask = random_clips(batch=1)[:, :2, :4, :2, :2], random_mask(1, (2, 1, 1), 0.5, seed=1)
    pred = torch.randn(1, 2 if every else 1, 16, dtype=torch.float64, requires_grad=True)
    for reduction in ("mean", "sum", "none"):
        assert torch.autograd.gradcheck(
            lambda p, reduction=reduction: loss(p, video, mask, patch_size=(2, 2, 2), eps=0.01, reduction=reduction),
            pred,
        )


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_budget(loss, dtype: torch.dtype) -> None:
    """The error against float64 is at most twice that of plain PyTorch in float32, plus one rounding."""
    mask = random_mask(2, GRID, 0.6, seed=0)
    pred = random_predictions(mask, dtype=dtype)
    upstream = torch.tensor(0.37)
    out = loss(pred, random_clips(), mask, patch_size=PATCH, eps=0.01)
    (gradient,) = torch.autograd.grad(out, pred, upstream)
    wide = pred.detach().double().requires_grad_()
    exact = loss(wide, random_clips().double() / 255, mask, patch_size=PATCH, eps=0.01)
    (exact_gradient,) = torch.autograd.grad(exact, wide, upstream.double())
    assert out.dtype == torch.float32
    assert gradient.dtype == dtype
    assert abs(out.item() - exact.item()) < 2e-6 * exact.item()
    rounding = 2 * (exact_gradient.to(dtype).double() - exact_gradient).norm() + 1e-6 * exact_gradient.norm()
    assert (gradient.double() - exact_gradient).norm() <= rounding


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("clip", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_type_of_clip_and_prediction(loss, clip: torch.dtype, dtype: torch.dtype) -> None:
    """Sums are float64 where either is, else float32, also under autocast; the gradient is rounded to pred's type."""
    mask, options = random_mask(2, GRID, 0.6, seed=0), {"patch_size": PATCH, "eps": 0.01}
    video = random_clips() if clip == torch.uint8 else (random_clips() / 255).to(clip)
    pred = random_predictions(mask, dtype=dtype)
    out = loss(pred, video, mask, **options)
    wide = pred.detach().double().requires_grad_()
    exact = loss(wide, video.double() / 255 if clip == torch.uint8 else video.double(), mask, **options)
    assert out.dtype == (torch.float64 if clip == torch.float64 else torch.float32)
    torch.testing.assert_close(out.double(), exact, rtol=2e-6, atol=0)
    (gradient,) = torch.autograd.grad(out, pred)
    (exact_gradient,) = torch.autograd.grad(exact, wide)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, exact_gradient.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(pred, video, mask, **options), out)


@pytest.mark.parametrize("loss", LOSSES)
def test_an_empty_batch_has_no_tokens(loss) -> None:
    pred, nothing = torch.zeros(0, 6, 144, requires_grad=True), torch.zeros(0, 6, dtype=torch.int64)
    out = loss(pred, random_clips()[:0], nothing, patch_size=PATCH, reduction="none")
    assert out.shape == (0, 6)
    assert torch.autograd.grad(out.sum(), pred)[0].shape == pred.shape


@pytest.mark.parametrize("loss", LOSSES)
def test_upstream_scales_the_gradient_and_runs_repeat_bit_for_bit(loss) -> None:
    mask = random_mask(2, GRID, 0.5, seed=3)
    pred = random_predictions(mask, dtype=torch.float32)
    gradients = []
    for factor in (1, 4, 1):
        (gradient,) = torch.autograd.grad(
            loss(pred, random_clips(), mask, patch_size=PATCH), pred, torch.tensor(float(factor))
        )
        gradients.append(gradient)
    assert torch.equal(gradients[0], gradients[2])
    assert torch.equal(gradients[0] * 4, gradients[1])


@pytest.mark.parametrize("loss", LOSSES)
def test_float16_means_over_many_values_do_not_underflow(loss) -> None:
    mask = random_mask(2, GRID, 0.5, seed=3)
    pred = random_predictions(mask, dtype=torch.float16)
    upstream = torch.tensor(65536.0)
    (gradient,) = torch.autograd.grad(loss(pred, random_clips(), mask, patch_size=PATCH) * 1e-6, pred, upstream)
    assert (gradient != 0).double().mean() > 0.6  # the rest: values without a next frame


@pytest.mark.parametrize("loss", LOSSES)
def test_strided_predictions_and_clips(loss) -> None:
    mask = random_mask(2, GRID, 0.5, seed=3)
    pred, video = random_predictions(mask), random_clips()
    expected = loss(pred, video, mask, patch_size=PATCH)
    wide = torch.cat([pred, pred], 2).detach()[:, :, :144].requires_grad_()
    strided = video.double().contiguous() / 255
    torch.testing.assert_close(loss(wide, strided, mask, patch_size=PATCH), expected)
    transposed = pred.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    out = loss(transposed, video, mask, patch_size=PATCH)
    assert torch.equal(out, expected)
    (gradient,) = torch.autograd.grad(out, transposed)
    assert torch.equal(gradient, torch.autograd.grad(expected, pred)[0])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_slices_of_any_size_give_the_same_bits(loss, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = random_mask(3, GRID, 0.5, seed=4)
    found = []
    for size in (reference.CHUNK_BYTES, 1, 3000):
        monkeypatch.setattr(reference, "CHUNK_BYTES", size)
        pred = random_predictions(mask, dtype=torch.bfloat16)
        value = loss(pred, random_clips(batch=3), mask, patch_size=PATCH, reduction=reduction)
        (gradient,) = torch.autograd.grad(value, pred, torch.linspace(0.1, 1, value.numel()).view(value.shape))
        assert gradient.count_nonzero() > gradient.numel() / 2
        found.append((value.detach(), gradient))
    for value, gradient in found[1:]:
        torch.testing.assert_close(value, found[0][0], rtol=1e-6, atol=0)
        assert torch.equal(gradient, found[0][1])
