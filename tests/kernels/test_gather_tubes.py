"""gather_tubes against einops: split and normalize the whole clip, then select."""

from functools import partial

import einops
import pytest
import torch

from mam2.kernels import gather_tubes, random_mask
from tests.kernels.inputs import random_clips

clips = partial(random_clips, frames=4)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PATCH = (2, 4, 6)


def by_einops(video: torch.Tensor, visible: torch.Tensor, mean=None, std=None) -> torch.Tensor:
    pixels = video.double() / (255 if video.dtype == torch.uint8 else 1)
    if mean is not None:
        pixels = (pixels - torch.tensor(mean).double().view(-1, 1, 1, 1)) / torch.tensor(std).double().view(-1, 1, 1, 1)
    tokens = einops.rearrange(
        pixels, "b c (s t) (y h) (x w) -> b (s y x) (t h w c)", t=PATCH[0], h=PATCH[1], w=PATCH[2]
    )
    return torch.stack([clip[index] for clip, index in zip(tokens, visible, strict=True)])


VISIBLE = torch.tensor([[0, 3, 6], [7, 1, 2]])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_equals_einops_on_the_whole_clip(dtype: torch.dtype) -> None:
    video = clips(dtype)
    out = gather_tubes(video, VISIBLE, patch_size=PATCH, mean=MEAN, std=STD, dtype=torch.float64)
    torch.testing.assert_close(out, by_einops(video, VISIBLE, MEAN, STD))
    raw = gather_tubes(video, VISIBLE, patch_size=PATCH, dtype=torch.float64)
    torch.testing.assert_close(raw, by_einops(video, VISIBLE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_result_type_is_rounded_once(dtype: torch.dtype) -> None:
    out = gather_tubes(clips(), VISIBLE, patch_size=PATCH, mean=MEAN, std=STD, dtype=dtype)
    exact = by_einops(clips(), VISIBLE, MEAN, STD)
    floor = 1e-6 if dtype == torch.float32 else 0.0
    assert (out.double() - exact).abs().max() <= 2 * (exact.to(dtype).double() - exact).abs().max() + floor


def test_default_type_follows_autocast_then_the_clip() -> None:
    assert gather_tubes(clips(), VISIBLE, patch_size=PATCH).dtype == torch.float32
    assert gather_tubes(clips(torch.float16), VISIBLE, patch_size=PATCH).dtype == torch.float16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert gather_tubes(clips(), VISIBLE, patch_size=PATCH).dtype == torch.bfloat16


def test_any_strides_and_channels() -> None:
    for video in (
        clips().contiguous(),
        clips().flip(3).transpose(3, 4).contiguous().transpose(3, 4),
        torch.cat([clips(), clips()], 2)[:, :, ::2],
        torch.nn.functional.pad(clips(), (3, 2, 1, 1))[..., 1:-1, 3:-2],
        clips(channels=1),
        clips(channels=4),
        clips()[:1].expand(2, -1, -1, -1, -1),
    ):
        out = gather_tubes(video, VISIBLE, patch_size=PATCH, dtype=torch.float64)
        torch.testing.assert_close(out, by_einops(video, VISIBLE))


def test_a_tube_mask_gives_its_visible_tokens() -> None:
    mask = random_mask(2, (2, 2, 2), 0.5, seed=0)
    expected = gather_tubes(clips(), mask.visible, patch_size=PATCH)
    assert torch.equal(gather_tubes(clips(), mask, patch_size=PATCH), expected)


def test_all_tokens_in_another_order() -> None:
    order = torch.stack([torch.arange(8).flip(0), torch.arange(8)])
    out = gather_tubes(clips(), order, patch_size=PATCH, dtype=torch.float64)
    torch.testing.assert_close(out, by_einops(clips(), order))


def test_no_visible_token_gives_no_row() -> None:
    assert gather_tubes(clips(), VISIBLE[:, :0], patch_size=PATCH).shape == (2, 0, 144)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video": clips().float().requires_grad_()}, "video: no gradient"),
        ({"video": clips()[0]}, "5 dimensions"),
        ({"video": clips().to(torch.int32)}, "uint8"),
        ({"patch_size": (2, 4, 5)}, "width to be a multiple of 5"),
        ({"patch_size": (3, 4, 6)}, "frames to be a multiple of 3"),
        ({"patch_size": (2, 4)}, "patch_size"),
        ({"patch_size": 16}, "patch_size: expected 3 positive integers .* found 16"),
        (
            {"video": torch.zeros(2, 4, 3, 8, 12)},
            r"found 3; pass \[B,C,T,H,W\], of \[B,T,C,H,W\] its transpose\(1, 2\)",
        ),
        ({"video": clips().numpy()}, "video: expected a tensor .* found ndarray"),
        ({"visible": VISIBLE[0]}, r"visible: expected shape \[2, K\]"),
        ({"visible": VISIBLE.int()}, "int64"),
        ({"visible": torch.eye(2, 8, dtype=torch.int64)}, "each at most once per clip, found one twice"),
        ({"visible": torch.ones(2, 8, dtype=torch.bool)}, "TubeMask, found torch.bool; .*from_bool"),
        ({"mean": MEAN}, "both or neither"),
        ({"mean": (0.5,), "std": (0.5,)}, "mean: expected 3 values"),
        ({"mean": 0.5, "std": 0.5}, "mean: expected 3 values .* found the number 0.5"),
        ({"mean": MEAN, "std": (0.2, 0.0, 0.2)}, "positive"),
        ({"dtype": torch.int64}, "dtype"),
    ],
)
def test_bad_arguments_name_themselves(change: dict, message: str) -> None:
    arguments = {"video": clips(), "visible": VISIBLE, "patch_size": PATCH} | change
    with pytest.raises(ValueError, match=message):
        gather_tubes(arguments.pop("video"), arguments.pop("visible"), **arguments)


@pytest.mark.parametrize("token", [-1, 8])
def test_a_token_that_does_not_exist_is_an_error(token: int) -> None:
    with pytest.raises(IndexError, match="0 to 7"):
        gather_tubes(clips(), torch.tensor([[0], [token]]), patch_size=PATCH)
