"""frame_difference against loops over frames: standardize the cube, then subtract."""

import itertools

import einops
import pytest
import torch

from mam2.kernels import TubeMask, frame_difference, random_mask
from tests.kernels.inputs import random_clips

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PATCH = (2, 4, 6)


def by_loops(pixels: torch.Tensor, patch, difference: str, normalize: str | None, eps: float) -> torch.Tensor:
    """Token by token in float64: every frame (also the one after the cube) standardized by the cube's statistics."""
    tubelet, height, width = patch
    batch, _, frames, rows, columns = pixels.shape
    tokens = []
    for clip, start, y, x in itertools.product(
        range(batch), range(0, frames, tubelet), range(0, rows, height), range(0, columns, width)
    ):
        column = pixels[clip, :, :, y : y + height, x : x + width]
        cube = column[:, start : start + tubelet]
        if normalize == "channel":
            mean, scale = cube.mean((1, 2, 3), keepdim=True), cube.std((1, 2, 3), keepdim=True) + eps
        elif normalize == "patch":
            mean, scale = cube.mean(), (cube.var() + eps).sqrt()
        else:
            mean, scale = 0.0, 1.0
        standard = (column - mean) / scale
        last = start + tubelet - (difference == "intra")
        steps = [
            standard[:, t + 1] - standard[:, t] if t + 1 < frames else torch.zeros_like(standard[:, t])
            for t in range(start, last)
        ]
        tokens.append(einops.rearrange(torch.stack(steps), "t c h w -> (t h w c)"))
    return torch.stack(tokens).view(batch, -1, len(tokens[0]))


@pytest.mark.parametrize(
    ("difference", "patch"),
    [("adjacent", PATCH), ("adjacent", (3, 4, 4)), ("adjacent", (1, 8, 12)), ("intra", PATCH), ("intra", (3, 4, 4))],
)
@pytest.mark.parametrize("normalize", ["channel", "patch", None])
def test_equals_standardizing_and_subtracting(patch, normalize, difference) -> None:
    video = random_clips()
    out = frame_difference(video, patch_size=patch, difference=difference, normalize=normalize, eps=0.01)
    expected = by_loops(video.double() / 255, patch, difference, normalize, 0.01)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("normalize", ["channel", "patch", None])
def test_a_normalized_float_clip_is_restored_first(normalize) -> None:
    pixels = random_clips().double() / 255
    normalized = (pixels - torch.tensor(MEAN).double().view(-1, 1, 1, 1)) / torch.tensor(STD).double().view(-1, 1, 1, 1)
    out = frame_difference(normalized, patch_size=PATCH, normalize=normalize, eps=0.01, mean=MEAN, std=STD)
    torch.testing.assert_close(out, by_loops(pixels, PATCH, "adjacent", normalize, 0.01))


def test_a_mask_picks_its_rows() -> None:
    mask = random_mask(2, (3, 2, 2), 0.5, seed=0)
    every = frame_difference(random_clips(), patch_size=PATCH)
    expected = every.gather(1, mask.masked[..., None].expand(-1, -1, every.shape[2]))
    assert torch.equal(frame_difference(random_clips(), patch_size=PATCH, mask=mask), expected)
    assert torch.equal(frame_difference(random_clips(), patch_size=PATCH, mask=mask.masked), expected)


@pytest.mark.parametrize("normalize", ["channel", "patch", None])
def test_a_static_clip_does_not_move(normalize) -> None:
    still = random_clips()[:, :, :1].expand(-1, -1, 6, -1, -1)
    for video in (still, torch.full_like(still, 77)):
        assert frame_difference(video, patch_size=PATCH, normalize=normalize).abs().max() == 0


def test_reversing_time_inside_tubelets_negates_intra_differences() -> None:
    video = random_clips()
    reversed_pairs = video.unflatten(2, (3, 2)).flip(3).flatten(2, 3)
    for normalize in ("channel", "patch", None):
        forward = frame_difference(video, patch_size=PATCH, difference="intra", normalize=normalize)
        backward = frame_difference(reversed_pairs, patch_size=PATCH, difference="intra", normalize=normalize)
        torch.testing.assert_close(forward, -backward)


def test_a_token_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(IndexError, match="token numbers: expected 0 to 1, found 0 to 2"):
        frame_difference(torch.zeros(1, 3, 4, 2, 2), patch_size=(2, 2, 2), mask=torch.tensor([[0, 2]]))


def test_bad_arguments_name_themselves() -> None:
    with pytest.raises(ValueError, match="difference"):
        frame_difference(random_clips(), patch_size=PATCH, difference="flow")
    with pytest.raises(ValueError, match="at least 2 frames"):
        frame_difference(random_clips(), patch_size=(1, 4, 6), difference="intra")
    with pytest.raises(ValueError, match="normalize"):
        frame_difference(random_clips(), patch_size=PATCH, normalize="global")
    with pytest.raises(ValueError, match="at least 2 values"):
        frame_difference(random_clips(), patch_size=(1, 1, 1), normalize="channel")
    with pytest.raises(ValueError, match="mask"):
        frame_difference(
            random_clips(), patch_size=PATCH, mask=TubeMask(torch.zeros(1, 1).long(), torch.zeros(1, 1).long())
        )
