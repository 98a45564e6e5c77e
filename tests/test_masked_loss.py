"""The masked losses against plain statements of the losses they replace, and against Hugging Face's VideoMAE."""

import einops
import pytest
import torch
import torch.nn.functional as F

from mam2.kernels import (
    TubeMask,
    frame_difference,
    gather_tubes,
    masked_frame_difference_loss,
    masked_pixel_loss,
    random_mask,
    tube_mask,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PATCH, GRID = (2, 4, 6), (3, 2, 2)
LOSSES = [masked_pixel_loss, masked_frame_difference_loss]


def clips(batch: int = 2) -> torch.Tensor:
    raw = torch.randint(0, 256, (batch, 6, 8, 12, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return raw.permute(0, 4, 1, 2, 3)


def predictions(mask: TubeMask, values: int = 144, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*mask.masked.shape, values, generator=generator, dtype=dtype).requires_grad_()


def normalised(video: torch.Tensor) -> torch.Tensor:
    pixels = video.double() / 255
    return (pixels - torch.tensor(MEAN).double().view(-1, 1, 1, 1)) / torch.tensor(STD).double().view(-1, 1, 1, 1)


def same_loss_and_gradient(ours: torch.Tensor, theirs: torch.Tensor, pred: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs.detach(), check_dtype=False)
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (mine,) = torch.autograd.grad(ours, pred, upstream)
    (other,) = torch.autograd.grad(theirs, pred, upstream)
    torch.testing.assert_close(mine, other)


def videomae(pred: torch.Tensor, video: torch.Tensor, mask: TubeMask) -> torch.Tensor:
    """VideoMAE: undo the ImageNet normalisation, standardise each cube per channel, MSE on the masked ones."""
    restored = video * torch.tensor(STD).double().view(-1, 1, 1, 1) + torch.tensor(MEAN).double().view(-1, 1, 1, 1)
    cubes = einops.rearrange(restored, "b c (s t) (y h) (x w) -> b (s y x) (t h w) c", t=2, h=4, w=6)
    standard = (cubes - cubes.mean(2, keepdim=True)) / (cubes.var(2, unbiased=True, keepdim=True).sqrt() + 1e-6)
    labels = standard.flatten(2)[mask.as_bool()].view(pred.shape)
    return F.mse_loss(pred, labels)


def mae_st(pred: torch.Tensor, video: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """mae_st: standardise each whole cube, mean over its values, mean over the masked tokens by weight."""
    target = einops.rearrange(video, "b c (s t) (y h) (x w) -> b (s y x) (t h w c)", t=2, h=4, w=6)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    loss = ((pred - target) ** 2).mean(-1)
    return (loss * mask).sum() / mask.sum()


def test_channel_is_videomae() -> None:
    mask, video = tube_mask(2, GRID, 0.5, seed=0), normalised(clips())
    pred = predictions(mask)
    ours = masked_pixel_loss(pred, video, mask, patch_size=PATCH, mean=MEAN, std=STD)
    same_loss_and_gradient(ours, videomae(pred, video, mask), pred)
    from_bytes = masked_pixel_loss(pred, clips(), mask, patch_size=PATCH)
    same_loss_and_gradient(from_bytes, videomae(pred, video, mask), pred)


def test_patch_with_every_token_is_mae_st() -> None:
    mask, video = random_mask(2, GRID, 0.6, seed=0), normalised(clips())
    pred = torch.randn(2, 12, 144, dtype=torch.float64, requires_grad=True)
    for given in (mask, mask.masked, mask.as_bool()):
        ours = masked_pixel_loss(pred, video, given, patch_size=PATCH, normalize="patch")
        same_loss_and_gradient(ours, mae_st(pred, video, mask.as_bool()), pred)


def test_one_frame_is_mae_on_images() -> None:
    images = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    mask = random_mask(3, (1, 2, 2), 0.5, seed=0)
    pred = torch.randn(3, 4, 48, dtype=torch.float64, requires_grad=True)
    target = einops.rearrange(images, "n c (y p) (x q) -> n (y x) (p q c)", p=4, q=4)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    expected = (((pred - target) ** 2).mean(-1) * mask.as_bool()).sum() / mask.as_bool().sum()
    ours = masked_pixel_loss(pred, images[:, :, None], mask, patch_size=(1, 4, 4), normalize="patch")
    same_loss_and_gradient(ours, expected, pred)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_equals_hugging_face_on_its_own_logits(norm_pix_loss: bool) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    width = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    decoder = {f"decoder_{name}": value for name, value in width.items()}
    config = transformers.VideoMAEConfig(
        image_size=32, patch_size=16, num_frames=4, norm_pix_loss=norm_pix_loss, **width, **decoder
    )
    model = transformers.VideoMAEForPreTraining(config)
    frames = torch.randint(0, 256, (2, 4, 3, 32, 32), dtype=torch.uint8)
    statistics = [torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD)]
    mask = tube_mask(2, (2, 2, 2), 0.5, seed=0)
    output = model((frames / 255 - statistics[0]) / statistics[1], bool_masked_pos=mask.as_bool())
    ours = masked_pixel_loss(
        output.logits, frames.transpose(1, 2), mask, normalize="channel" if norm_pix_loss else None
    )
    torch.testing.assert_close(ours, output.loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalize", ["channel", "patch", None])
@pytest.mark.parametrize("difference", ["adjacent", "intra"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_frame_difference_loss_is_mse_against_the_target(normalize, difference, reduction) -> None:
    mask = random_mask(2, GRID, 0.6, seed=4)
    options = {"patch_size": PATCH, "difference": difference, "normalize": normalize, "eps": 0.01}
    target = frame_difference(clips(), mask=mask, **options).double()
    pred = predictions(mask, target.shape[2])
    exists = torch.ones_like(target).unflatten(2, (-1, 72))
    if difference == "adjacent":
        exists[:, :, -1] = (mask.masked < 8)[..., None]
    exists = exists.flatten(2)
    errors = (pred - target).square() * exists
    expected = {"mean": errors.sum() / exists.sum(), "sum": errors.sum(), "none": errors.sum(2) / exists.sum(2)}
    ours = masked_frame_difference_loss(pred, clips().double() / 255, mask, reduction=reduction, **options)
    torch.testing.assert_close(ours, expected[reduction], rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(ours)
    (mine,) = torch.autograd.grad(ours, pred, upstream)
    (other,) = torch.autograd.grad(expected[reduction], pred, upstream)
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_tokens_without_any_next_frame_lose_nothing() -> None:
    mask = tube_mask(2, (6, 2, 2), 0.5, seed=0)
    pred = predictions(mask, 72)
    loss = masked_frame_difference_loss(pred, clips(), mask, patch_size=(1, 4, 6), reduction="none")
    last = mask.masked >= 20
    assert (loss[last] == 0).all()
    assert (loss[~last] > 0).all()
    (gradient,) = torch.autograd.grad(loss.sum(), pred)
    assert gradient[last].abs().max() == 0


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("every", [False, True])
def test_gradcheck(loss, every: bool) -> None:
    video, mask = clips(1)[:, :2, :4, :2, :2], random_mask(1, (2, 1, 1), 0.5, seed=1)
    pred = torch.randn(1, 2 if every else 1, 16, dtype=torch.float64, requires_grad=True)
    for reduction in ("mean", "sum", "none"):
        assert torch.autograd.gradcheck(
            lambda p, reduction=reduction: loss(p, video, mask, patch_size=(2, 2, 2), eps=0.01, reduction=reduction),
            pred,
        )


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_budget(loss, dtype: torch.dtype) -> None:
    """Against float64: at most twice what plain PyTorch in float32 on the same prediction loses, plus a rounding."""
    mask = random_mask(2, GRID, 0.6, seed=0)
    pred = predictions(mask, dtype=dtype)
    upstream = torch.tensor(0.37)
    out = loss(pred, clips(), mask, patch_size=PATCH, eps=0.01)
    (gradient,) = torch.autograd.grad(out, pred, upstream)
    wide = pred.detach().double().requires_grad_()
    exact = loss(wide, clips().double() / 255, mask, patch_size=PATCH, eps=0.01)
    (exact_gradient,) = torch.autograd.grad(exact, wide, upstream.double())
    assert out.dtype == torch.float32
    assert gradient.dtype == dtype
    assert abs(out.item() - exact.item()) < 2e-6 * exact.item()
    rounding = 2 * (exact_gradient.to(dtype).double() - exact_gradient).norm() + 1e-6 * exact_gradient.norm()
    assert (gradient.double() - exact_gradient).norm() <= rounding


@pytest.mark.parametrize("loss", LOSSES)
def test_only_masked_pixels_count(loss) -> None:
    mask = tube_mask(2, GRID, 0.5, seed=3)
    pred, video = predictions(mask), clips()
    before = loss(pred, video, mask, patch_size=PATCH, reduction="none")
    seen = gather_tubes(video, mask.visible, patch_size=PATCH)
    hidden = mask.as_bool().view(2, 3, 1, 2, 1, 2, 1).expand(2, 3, 2, 2, 4, 2, 6).reshape(2, 6, 8, 12)[:, None]
    visible_changed = torch.where(hidden, video, 255 - video)
    assert torch.equal(loss(pred, visible_changed, mask, patch_size=PATCH, reduction="none"), before)
    masked_changed = torch.where(hidden, 255 - video + (video > 99).byte(), video)
    assert torch.equal(gather_tubes(masked_changed, mask.visible, patch_size=PATCH), seen)
    assert (loss(pred, masked_changed, mask, patch_size=PATCH, reduction="none") != before).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_order_of_clips_and_of_masked_tokens_does_not_matter(loss) -> None:
    mask = random_mask(2, GRID, 0.5, seed=3)
    pred = predictions(mask)
    tokens = loss(pred, clips(), mask, patch_size=PATCH, reduction="none")
    order = torch.randperm(6)
    shuffled = loss(pred[:, order], clips(), mask.masked[:, order], patch_size=PATCH, reduction="none")
    assert torch.equal(shuffled, tokens[:, order])
    swapped = loss(pred.flip(0), clips().flip(0), mask.masked.flip(0), patch_size=PATCH, reduction="none")
    assert torch.equal(swapped, tokens.flip(0))


@pytest.mark.parametrize("loss", LOSSES)
def test_upstream_scales_the_gradient_and_runs_repeat_bit_for_bit(loss) -> None:
    mask = random_mask(2, GRID, 0.5, seed=3)
    pred = predictions(mask, dtype=torch.float32)
    gradients = []
    for factor in (1, 4, 1):
        (gradient,) = torch.autograd.grad(
            loss(pred, clips(), mask, patch_size=PATCH), pred, torch.tensor(float(factor))
        )
        gradients.append(gradient)
    assert torch.equal(gradients[0], gradients[2])
    assert torch.equal(gradients[0] * 4, gradients[1])


@pytest.mark.parametrize("loss", LOSSES)
def test_float16_means_over_many_values_do_not_underflow(loss) -> None:
    mask = random_mask(2, GRID, 0.5, seed=3)
    pred = predictions(mask, dtype=torch.float16)
    upstream = torch.tensor(65536.0)
    (gradient,) = torch.autograd.grad(loss(pred, clips(), mask, patch_size=PATCH) * 1e-6, pred, upstream)
    assert (gradient != 0).double().mean() > 0.6  # the rest: values without a next frame


@pytest.mark.parametrize("loss", LOSSES)
def test_strided_predictions_and_clips(loss) -> None:
    mask = random_mask(2, GRID, 0.5, seed=3)
    pred, video = predictions(mask), clips()
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
def test_double_backward_is_refused(loss) -> None:
    mask = random_mask(2, GRID, 0.5, seed=3)
    pred = predictions(mask)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(loss(pred, clips(), mask, patch_size=PATCH), pred, create_graph=True)


@pytest.mark.parametrize("loss", LOSSES)
def test_without_gradient_nothing_is_kept(loss) -> None:
    mask = random_mask(2, GRID, 0.5, seed=3)
    pred = predictions(mask)
    recorded = loss(pred, clips(), mask, patch_size=PATCH)
    with torch.no_grad():
        plain = loss(pred, clips(), mask, patch_size=PATCH)
    assert not plain.requires_grad
    assert torch.equal(plain, recorded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pred": torch.zeros(2, 5, 144)}, r"pred: expected \[2, 6, 144\] \(masked tokens\) or \[2, 12, 144\]"),
        ({"pred": torch.zeros(2, 6, 140)}, "pred: expected"),
        ({"pred": torch.zeros(2, 6, 144).long()}, "pred: expected a float type"),
        ({"mask": torch.zeros(2, 11, dtype=torch.bool)}, r"mask: expected bool \[2, 12\]"),
        ({"mask": torch.zeros(2, 6)}, "mask: expected int64"),
        ({"reduction": "max"}, "reduction: expected one of 'mean', 'sum', 'none'"),
        ({"normalize": "global"}, "normalize"),
        ({"mean": MEAN}, "both or neither"),
    ],
)
@pytest.mark.parametrize("loss", LOSSES)
def test_bad_arguments_name_themselves(loss, change: dict, message: str) -> None:
    mask = random_mask(2, GRID, 0.5, seed=3)
    arguments = {"pred": torch.zeros(2, 6, 144), "video": clips(), "mask": mask, "patch_size": PATCH} | change
    with pytest.raises(ValueError, match=message):
        loss(**arguments)
