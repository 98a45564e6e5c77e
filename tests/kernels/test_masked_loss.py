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
    running_cell_mask,
    running_cell_subset,
    tube_mask,
)
from tests.kernels.inputs import random_clips, random_predictions

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PATCH, GRID = (2, 4, 6), (3, 2, 2)
LOSSES = [masked_pixel_loss, masked_frame_difference_loss]


def normalized(video: torch.Tensor) -> torch.Tensor:
    pixels = video.double() / 255
    return (pixels - torch.tensor(MEAN).double().view(-1, 1, 1, 1)) / torch.tensor(STD).double().view(-1, 1, 1, 1)


def same_loss_and_gradient(ours: torch.Tensor, theirs: torch.Tensor, pred: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs.detach(), check_dtype=False)
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (mine,) = torch.autograd.grad(ours, pred, upstream)
    (other,) = torch.autograd.grad(theirs, pred, upstream, retain_graph=True)
    torch.testing.assert_close(mine, other)


def videomae(pred: torch.Tensor, video: torch.Tensor, mask: TubeMask) -> torch.Tensor:
    """VideoMAE: undo the ImageNet normalization, standardize each cube per channel, MSE on the masked ones."""
    restored = video * torch.tensor(STD).double().view(-1, 1, 1, 1) + torch.tensor(MEAN).double().view(-1, 1, 1, 1)
    cubes = einops.rearrange(restored, "b c (s t) (y h) (x w) -> b (s y x) (t h w) c", t=2, h=4, w=6)
    standard = (cubes - cubes.mean(2, keepdim=True)) / (cubes.var(2, unbiased=True, keepdim=True).sqrt() + 1e-6)
    labels = standard.flatten(2)[mask.as_bool()].view(pred.shape)
    return F.mse_loss(pred, labels)


def mae_st(pred: torch.Tensor, video: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """mae_st: standardize each whole cube, mean over its values, mean over the masked tokens by weight."""
    target = einops.rearrange(video, "b c (s t) (y h) (x w) -> b (s y x) (t h w c)", t=2, h=4, w=6)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    loss = ((pred - target) ** 2).mean(-1)
    return (loss * mask).sum() / mask.sum()


def videomae_v2(pred: torch.Tensor, video: torch.Tensor, masked: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
    """VideoMAE v2: every decoded token is predicted; the mean over those that are masked too. bool [B,N] twice."""
    restored = video * torch.tensor(STD).double().view(-1, 1, 1, 1) + torch.tensor(MEAN).double().view(-1, 1, 1, 1)
    cubes = einops.rearrange(restored, "b c (s t) (y h) (x w) -> b (s y x) (t h w) c", t=2, h=4, w=6)
    standard = (cubes - cubes.mean(2, keepdim=True)) / (cubes.var(2, keepdim=True).sqrt() + 1e-6)
    errors = (pred - standard.flatten(2)[decoded].view(pred.shape)).square().mean(2)
    counted = masked[decoded].view(errors.shape)
    return (errors * counted).sum() / counted.sum()


def mae_dfer(pred: torch.Tensor, video: torch.Tensor, mask: TubeMask) -> torch.Tensor:
    """MAE-DFER: VideoMAE's standardized clip, put together again; odd frames minus even ones; cut once more; MSE."""
    restored = video * torch.tensor(STD).double().view(-1, 1, 1, 1) + torch.tensor(MEAN).double().view(-1, 1, 1, 1)
    cubes = einops.rearrange(restored, "b c (s t) (y h) (x w) -> b s y x (t h w) c", t=2, h=4, w=6)
    standard = (cubes - cubes.mean(-2, keepdim=True)) / (cubes.var(-2, keepdim=True).sqrt() + 1e-6)
    clip = einops.rearrange(standard, "b s y x (t h w) c -> b c (s t) (y h) (x w)", t=2, h=4, w=6)
    joint = torch.stack([clip[:, :, ::2], clip[:, :, 1::2] - clip[:, :, ::2]], 3).flatten(2, 3)
    labels = einops.rearrange(joint, "b c (s t) (y h) (x w) -> b (s y x) (t h w c)", t=2, h=4, w=6)
    return F.mse_loss(pred, labels[mask.as_bool()].view(pred.shape))


def test_channel_is_videomae() -> None:
    mask, video = tube_mask(2, GRID, 0.5, seed=0), normalized(random_clips())
    pred = random_predictions(mask)
    ours = masked_pixel_loss(pred, video, mask, patch_size=PATCH, mean=MEAN, std=STD)
    same_loss_and_gradient(ours, videomae(pred, video, mask), pred)
    from_bytes = masked_pixel_loss(pred, random_clips(), mask, patch_size=PATCH)
    same_loss_and_gradient(from_bytes, videomae(pred, video, mask), pred)


def test_decoded_tokens_with_a_weight_are_videomae_v2() -> None:
    raw = torch.randint(0, 256, (3, 8, 8, 12, 3), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    clips, grid = raw.permute(0, 4, 1, 2, 3), (4, 2, 2)
    video, tubes = normalized(clips), tube_mask(3, grid, 0.75, seed=0)
    cells = running_cell_mask(3, grid, seed=0)
    masked, decoded = tubes.as_bool(), ~cells.as_bool()
    pred = torch.randn(3, 8, 144, dtype=torch.float64, requires_grad=True)
    expected = videomae_v2(pred, video, masked, decoded)
    weight = masked.gather(1, cells.visible)
    ours = masked_pixel_loss(pred, video, cells.visible, patch_size=PATCH, mean=MEAN, std=STD, weight=weight)
    same_loss_and_gradient(ours, expected, pred)
    ours = masked_pixel_loss(pred, clips, decoded, patch_size=PATCH, weight=masked[decoded].view(3, -1))
    same_loss_and_gradient(ours, expected, pred)
    subset = running_cell_subset(tubes, grid, seed=0)
    only_counted = pred[weight].view(*subset.shape, 144)
    same_loss_and_gradient(masked_pixel_loss(only_counted, clips, subset, patch_size=PATCH), expected, pred)


def test_joint_is_mae_dfer() -> None:
    mask, video = tube_mask(2, GRID, 0.5, seed=0), normalized(random_clips())
    pred = random_predictions(mask)
    expected = mae_dfer(pred, video, mask)
    ours = masked_pixel_loss(pred, video, mask, target="joint", patch_size=PATCH, mean=MEAN, std=STD)
    same_loss_and_gradient(ours, expected, pred)
    same_loss_and_gradient(
        masked_pixel_loss(pred, random_clips(), mask, target="joint", patch_size=PATCH), expected, pred
    )


@pytest.mark.parametrize("normalize", ["channel", "patch", None])
def test_joint_of_longer_tubelets_subtracts_the_first_frame(normalize) -> None:
    mask = random_mask(2, (2, 2, 2), 0.5, seed=0)
    options = {"patch_size": (3, 4, 6), "normalize": normalize, "eps": 0.01}
    video = random_clips().double() / 255
    pixels = gather_tubes(video, mask.masked, patch_size=(3, 4, 6)).view(*mask.masked.shape, 3, 24, 3)
    if normalize == "channel":
        pixels = (pixels - pixels.mean((2, 3), keepdim=True)) / (pixels.flatten(2, 3).std(2)[:, :, None, None] + 0.01)
    elif normalize == "patch":
        mean, variance = (
            statistic(pixels.flatten(2), 2)[:, :, None, None, None] for statistic in (torch.mean, torch.var)
        )
        pixels = (pixels - mean) / (variance + 0.01).sqrt()
    target = torch.cat([pixels[:, :, :1], pixels[:, :, 1:] - pixels[:, :, :1]], 2).flatten(2)
    pred = random_predictions(mask, 216)
    ours = masked_pixel_loss(pred, video, mask, target="joint", **options)
    same_loss_and_gradient(ours, F.mse_loss(pred, target), pred)


def test_patch_with_every_token_is_mae_st() -> None:
    mask, video = random_mask(2, GRID, 0.6, seed=0), normalized(random_clips())
    pred = torch.randn(2, 12, 144, dtype=torch.float64, requires_grad=True)
    for given in (mask, mask.masked, mask.as_bool()):
        ours = masked_pixel_loss(pred, video, given, patch_size=PATCH, normalize="patch")
        same_loss_and_gradient(ours, mae_st(pred, video, mask.as_bool()), pred)


def test_frames_picked_as_mae_st_picks_them() -> None:
    """mae_st predicts `pred_t_dim` frames of the clip, tubelets of one; bytes do, as its three channels share a std."""
    raw = torch.randint(0, 256, (2, 6, 8, 12, 3), dtype=torch.uint8).permute(0, 4, 1, 2, 3)
    picked = torch.linspace(0, 5, 3).long()
    video = (raw.double() / 255 - 0.45) / 0.225
    target = einops.rearrange(video[:, :, picked], "b c t (y h) (x w) -> b (t y x) (h w c)", h=4, w=6)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    pred = torch.randn(2, 12, 72, dtype=torch.float64, requires_grad=True)
    weight = random_mask(2, (3, 2, 2), 0.6, seed=0).as_bool().double()
    expected = (((pred - target) ** 2).mean(-1) * weight).sum() / weight.sum()
    settings = {"patch_size": (1, 4, 6), "normalize": "patch", "weight": weight}
    same_loss_and_gradient(masked_pixel_loss(pred, video[:, :, picked], None, **settings), expected, pred)
    ours = masked_pixel_loss(pred, raw[:, :, picked], None, eps=1e-6 * 0.225**2, **settings)
    same_loss_and_gradient(ours, expected, pred)


def test_one_frame_is_mae_on_images() -> None:
    images = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    mask = random_mask(3, (1, 2, 2), 0.5, seed=0)
    pred = torch.randn(3, 4, 48, dtype=torch.float64, requires_grad=True)
    target = einops.rearrange(images, "n c (y p) (x q) -> n (y x) (p q c)", p=4, q=4)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    expected = (((pred - target) ** 2).mean(-1) * mask.as_bool()).sum() / mask.as_bool().sum()
    for arguments in ({"mask": mask}, {"mask": None, "weight": mask.as_bool()}):
        ours = masked_pixel_loss(pred, images[:, :, None], **arguments, patch_size=(1, 4, 4), normalize="patch")
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
    target = frame_difference(random_clips(), mask=mask, **options).double()
    pred = random_predictions(mask, target.shape[2])
    exists = torch.ones_like(target).unflatten(2, (-1, 72))
    if difference == "adjacent":
        exists[:, :, -1] = (mask.masked < 8)[..., None]
    exists = exists.flatten(2)
    errors = (pred - target).square() * exists
    expected = {"mean": errors.sum() / exists.sum(), "sum": errors.sum(), "none": errors.sum(2) / exists.sum(2)}
    ours = masked_frame_difference_loss(pred, random_clips().double() / 255, mask, reduction=reduction, **options)
    torch.testing.assert_close(ours, expected[reduction], rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(ours)
    (mine,) = torch.autograd.grad(ours, pred, upstream)
    (other,) = torch.autograd.grad(expected[reduction], pred, upstream)
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_tokens_without_any_next_frame_lose_nothing() -> None:
    mask = tube_mask(2, (6, 2, 2), 0.5, seed=0)
    pred = random_predictions(mask, 72)
    loss = masked_frame_difference_loss(pred, random_clips(), mask, patch_size=(1, 4, 6), reduction="none")
    last = mask.masked >= 20
    assert (loss[last] == 0).all()
    assert (loss[~last] > 0).all()
    (gradient,) = torch.autograd.grad(loss.sum(), pred)
    assert gradient[last].abs().max() == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_only_masked_pixels_count(loss) -> None:
    mask = tube_mask(2, GRID, 0.5, seed=3)
    pred, video = random_predictions(mask), random_clips()
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
    pred = random_predictions(mask)
    tokens = loss(pred, random_clips(), mask, patch_size=PATCH, reduction="none")
    order = torch.randperm(6)
    shuffled = loss(pred[:, order], random_clips(), mask.masked[:, order], patch_size=PATCH, reduction="none")
    assert torch.equal(shuffled, tokens[:, order])
    swapped = loss(pred.flip(0), random_clips().flip(0), mask.masked.flip(0), patch_size=PATCH, reduction="none")
    assert torch.equal(swapped, tokens.flip(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pred": torch.zeros(2, 5, 144)}, r"pred: expected \[2, 6, 144\] \(masked tokens\) or \[2, 12, 144\]"),
        ({"pred": torch.zeros(2, 6, 140)}, "pred: expected"),
        ({"pred": torch.zeros(2, 6, 144).long()}, "pred: expected a float type"),
        ({"mask": torch.zeros(2, 11, dtype=torch.bool)}, r"mask: expected bool \[2, 12\]"),
        ({"mask": torch.zeros(2, 6)}, r"mask: expected int64 .* TubeMask.from_bool\(mask.bool\(\)\)"),
        ({"mask": torch.eye(2, 12, dtype=torch.int64)}, "pred: .*a mask of zeros and ones must be bool"),
        (
            {"mask": torch.eye(2, 12, dtype=torch.int64), "pred": torch.zeros(2, 12, 144)},
            "each at most once per clip, found one twice; .* mask.bool",
        ),
        ({"mask": torch.tensor([[0, 1, 2, 3, 4, 5], [6, 5, 4, 7, 3, 6]])}, "each at most once per clip"),
        ({"mask": torch.arange(12).expand(2, -1) < 5}, "expected 6 masked tokens in every clip, .* a clip with 5"),
        ({"mask": [[1, 2]]}, "mask: expected a TubeMask, a tensor or None, found list"),
        ({"mask": torch.tensor([[0, 1, 2, 3, 4, -2]] * 2)}, "token numbers: expected 0 to 11, found -2 to 4"),
        ({"weight": torch.ones(2, 7)}, r"weight: expected bool or real \[2, 6\] \(masked tokens\) or \[2, 12\]"),
        ({"weight": torch.ones(2, 6, dtype=torch.complex64)}, "weight: expected bool or real"),
        ({"reduction": "max"}, "reduction: expected one of 'mean', 'sum', 'none'"),
        ({"normalize": "global"}, "normalize"),
        ({"mean": MEAN}, "both or neither"),
    ],
)
@pytest.mark.parametrize("loss", LOSSES)
def test_bad_arguments_name_themselves(loss, change: dict, message: str) -> None:
    mask = random_mask(2, GRID, 0.5, seed=3)
    arguments = {"pred": torch.zeros(2, 6, 144), "video": random_clips(), "mask": mask, "patch_size": PATCH} | change
    with pytest.raises((ValueError, IndexError), match=message):
        loss(**arguments)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [None, "masked", "every"])
def test_a_boolean_mask_is_its_token_numbers(loss, every: bool, reduction: str, weighted: str | None) -> None:
    mask = random_mask(2, GRID, 0.6, seed=3)
    pred = torch.randn(2, 12 if every else 7, 144, dtype=torch.float64, requires_grad=True)
    options = {"patch_size": PATCH, "reduction": reduction}
    weights = torch.rand(2, 12, dtype=torch.float64, requires_grad=True)
    given = {None: None, "masked": weights.gather(1, mask.masked), "every": weights}[weighted]
    picked = None if weighted is None else weights.gather(1, mask.masked)
    ours = loss(pred, random_clips(), mask.as_bool(), weight=given, **options)
    expected = loss(pred, random_clips(), mask, weight=picked, **options)
    torch.testing.assert_close(ours, expected)
    upstream = torch.randn_like(expected)
    leaves = [pred] if weighted is None else [pred, weights]
    for mine, other in zip(
        *(torch.autograd.grad(out, leaves, upstream, retain_graph=True) for out in (ours, expected)), strict=True
    ):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("loss", LOSSES)
def test_predictions_that_are_not_masked_may_be_infinite(loss) -> None:
    mask = random_mask(2, GRID, 0.6, seed=3)
    pred = torch.randn(2, 12, 144)
    expected = loss(pred, random_clips(), mask, patch_size=PATCH)
    pred.scatter_(1, mask.visible[..., None].expand(-1, -1, 144), float("inf"))
    torch.testing.assert_close(loss(pred, random_clips(), mask.as_bool(), patch_size=PATCH), expected)
