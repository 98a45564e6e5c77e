"""Training of a VQ model: it starts as k-means of patches, improves on it, and is repeatable."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mam2.engine.tokenizer import vqgan as vqgan_module
from mam2.engine.tokenizer.kmeans import kmeans, nearest_center, nearest_sum, residual_kmeans, tally
from mam2.engine.tokenizer.quality import measure_reconstruction
from mam2.engine.tokenizer.tokenizer import codebook_usage, scale_pixels
from mam2.engine.tokenizer.training import (
    MovingCodebook,
    first_frames,
    first_patches,
    gradient_error,
    train_vqgan,
)
from mam2.engine.tokenizer.vqgan import CONFIGS, small
from tests.helpers.frames import toy_frames


def batches() -> Iterator[Tensor]:
    frames = toy_frames(512)
    generator = torch.Generator().manual_seed(1)
    while True:
        yield frames[torch.randint(len(frames), (16,), generator=generator)]


@pytest.mark.slow
def test_training_lowers_the_loss_and_uses_most_codes() -> None:
    reports: list[tuple[int, dict[str, float]]] = []
    config = small(16, 64, 4)
    vqgan = train_vqgan(batches(), config, 200, progress=lambda step, metrics: reports.append((step, metrics))).vqgan
    assert [step for step, _ in reports] == list(range(20, 201, 20))
    assert reports[-1][1]["codes_used"] > 32
    assert reports[-1][1]["loss"] < reports[0][1]["loss"]
    assert reports[-1][1]["explained"] > reports[0][1]["explained"] + 0.02
    images = scale_pixels(toy_frames(64, seed=7).movedim(-1, 1))
    with torch.no_grad():
        codes = vqgan.codes(images)
        error = (vqgan.decode(codes) - images).square().mean()
        gray = (images.mean((0, 2, 3), keepdim=True) - images).square().mean()
    used, perplexity = codebook_usage(codes, 64)
    assert used > 32
    assert perplexity > 16
    assert error < 0.35 * gray, "pictures from codes are closer to new frames than their mean color is"


def smooth_frames(count: int, seed: int) -> Tensor:
    """Blurred blots of color, uint8 [count, 48, 48, 3]: k-means of their patches explains much."""
    blots = torch.rand(count, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
    blurred = torch.nn.functional.interpolate(blots, (48, 48), mode="bicubic").clamp(0, 1)
    return (255 * blurred).to(torch.uint8).movedim(1, -1)


@pytest.mark.parametrize(("factor", "least", "width"), [(8, 192, 192), (16, 192, 192), (16, 2, 32)])
def test_training_starts_as_k_means_of_patches(
    factor: int, least: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first step, the codes explain of new frames what k-means of raw patches explains. That takes as many
    dimensions as there are codes."""
    monkeypatch.setattr(vqgan_module, "LEAST_DIMENSIONS", least)
    codes = 32
    config = small(8, codes, factor)
    assert config.embed_dim == width
    frames, held_out = smooth_frames(128, seed=1).split(8), smooth_frames(48, seed=7)
    trained = train_vqgan(frames, config, 2, held_out=[held_out])
    result = measure_reconstruction(trained.vqgan, [held_out[None]], trained.centers)
    assert 0.3 < result.kmeans_explained < 0.99
    assert trained.start.explained == pytest.approx(result.kmeans_explained, abs=1e-5)
    assert trained.start.color == pytest.approx(result.kmeans_color_explained, abs=1e-5)
    patches = first_patches(first_frames(itertools.cycle(frames), config), config)
    assert torch.equal(trained.centers[0], kmeans(patches, codes, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("factor", [8, 16])
def test_further_codes_start_as_k_means_of_what_the_codes_before_leave(factor: int) -> None:
    """More codes per patch explain more, before the first step and after the last."""
    frames, held_out = smooth_frames(128, seed=1).split(8), smooth_frames(48, seed=7)
    found = {}
    for depth in (1, 3):
        trained = train_vqgan(frames, small(8, 32, factor, codes_per_patch=depth), 20, held_out=[held_out])
        result = measure_reconstruction(trained.vqgan, [held_out[None]], trained.centers)
        assert trained.centers.shape == (depth, 32, 3 * factor**2)
        assert trained.start.explained == pytest.approx(result.kmeans_explained, abs=1e-5)
        assert trained.start.color == pytest.approx(result.kmeans_color_explained, abs=1e-5)
        assert trained.kept > 0
        assert result.codes_used > 24 * depth
        found[depth] = trained.start.explained, result.explained
    assert found[3][0] > found[1][0] + 0.1
    assert found[3][1] > found[1][1] + 0.1


def test_residual_k_means_is_k_means_of_what_the_centers_before_leave() -> None:
    vectors = torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
    centers, sizes = residual_kmeans(vectors, 8, 2, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    first = kmeans(vectors, 8, generator)
    left = vectors - first[nearest_center(vectors, first)]
    second = kmeans(left, 8, generator)
    assert torch.equal(centers, torch.stack([first, second]))
    assert torch.equal(sizes[1], nearest_center(left, second).bincount(minlength=8).float())
    expected = first[nearest_center(vectors, first)] + second[nearest_center(left, second)]
    torch.testing.assert_close(nearest_sum(vectors, centers), expected)


@pytest.mark.parametrize(("factor", "rate"), [(8, 1e-3), (16, 1e-3), (8, 0.3)])
def test_training_never_ends_below_k_means(factor: int, rate: float) -> None:
    """A learning rate of 0.3 spoils the network: then the start is kept."""
    frames, held_out = smooth_frames(128, seed=1).split(8), smooth_frames(48, seed=7)
    trained = train_vqgan(frames, small(8, 32, factor), 20, learning_rate=rate, held_out=[held_out])
    assert (trained.kept == 0) == (rate == 0.3)
    result = measure_reconstruction(trained.vqgan, [held_out[None]], trained.centers)
    assert result.explained >= result.kmeans_explained - 1e-5
    assert result.color_explained is not None
    assert result.kmeans_color_explained is not None
    assert result.color_explained >= result.kmeans_color_explained - 1e-5
    assert trained.found.explained == pytest.approx(result.explained, abs=1e-6)


def test_the_gradient_error_is_that_of_differences_at_three_scales() -> None:
    generator = torch.Generator().manual_seed(0)
    pictures, images = torch.rand(2, 3, 3, 16, 24, generator=generator)
    expected = 0.0
    for side in (1, 2, 4):
        one, other = (
            part.unflatten(3, (-1, side)).unflatten(2, (-1, side)).mean((3, 5)) for part in (pictures, images)
        )
        for down, right in ((1, 0), (0, 1)):
            height, width = one.shape[2] - down, one.shape[3] - right
            found, true = (part[:, :, down:, right:] - part[:, :, :height, :width] for part in (one, other))
            expected += float((found - true).square().mean())
    assert float(gradient_error(pictures, images)) == pytest.approx(expected, rel=1e-5)
    assert gradient_error(images + 0.3, images) < 1e-10
    assert gradient_error(pictures[..., :2, :2], images[..., :2, :2]).isfinite()


def test_a_weight_of_the_gradient_error_changes_the_training_alone() -> None:
    frames, held_out = smooth_frames(128, seed=1).split(8), smooth_frames(48, seed=7)
    plain, none, weighted = (
        train_vqgan(frames, small(8, 32, 8), 6, held_out=[held_out], **options)
        for options in ({}, {"gradient_weight": 0.0}, {"gradient_weight": 1.0})
    )
    for name, tensor in plain.vqgan.state_dict().items():
        assert torch.equal(tensor, none.vqgan.state_dict()[name]), name
    assert weighted.start == plain.start
    assert weighted.found != plain.found
    assert weighted.found.explained >= weighted.start.explained


@pytest.mark.slow
def test_training_improves_on_k_means_of_patches() -> None:
    held_out = toy_frames(128, seed=7)
    trained = train_vqgan(batches(), small(8, 32, 4), 200, held_out=[held_out])
    assert trained.kept > 0
    assert 0.3 < trained.start.explained < trained.found.explained - 0.02


def test_k_means_finds_groups_that_random_starts_miss() -> None:
    """24 tight clusters: random starts merge some of them, which k-means cannot undo; spread starts do not."""
    generator = torch.Generator().manual_seed(0)
    groups = 100 * torch.rand(24, 6, generator=generator)
    vectors = groups.repeat(50, 1) + 0.1 * torch.randn(1200, 6, generator=generator)
    centers = kmeans(vectors, 24, torch.Generator().manual_seed(1))
    assert torch.cdist(groups, centers).amin(1).max() < 0.2
    assert torch.equal(nearest_center(vectors, centers), torch.cdist(vectors, centers).argmin(1))


def test_sums_of_centers_are_those_of_their_vectors() -> None:
    vectors = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    assigned = torch.arange(40) % 7 % 5  # center 5 has no points
    sizes, sums = tally(vectors, assigned, 6)
    assert sizes.tolist() == torch.bincount(assigned, minlength=6).tolist() == [11, 11, 6, 6, 6, 0]
    for center in range(6):
        torch.testing.assert_close(sums[center], vectors[assigned == center].sum(0))


def test_fewer_vectors_than_centers_are_all_centers() -> None:
    vectors = torch.arange(3.0)[:, None]
    centers = kmeans(vectors, 8, torch.Generator().manual_seed(0))
    assert centers.shape == (8, 1)
    assert set(centers.flatten().tolist()) == {0.0, 1.0, 2.0}


@pytest.mark.slow
def test_training_is_repeatable_and_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    one, two = (train_vqgan([toy_frames(4)], small(8, 8, 4), 6, seed=3).vqgan for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, two.state_dict()[name]), name


def test_dead_codes_are_moved_to_latents() -> None:
    """Latents at four corners, one code at a corner, the others far away: each corner receives a code."""
    corners = torch.tensor([[0.0, 0.0], [0.0, 9.0], [9.0, 0.0], [9.0, 9.0]])
    noise = 0.1 * torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
    latents = corners.repeat(100, 1) + noise
    codebook = MovingCodebook(torch.full((8, 2), 1000.0), torch.Generator().manual_seed(0))
    codebook.codes[0] = corners[0]
    codebook.counts = torch.full((8,), 50.0)
    codebook.sums = 50 * codebook.codes
    for _ in range(800):
        codebook.update(latents, torch.cdist(latents, codebook.codes).argmin(1))
    assert torch.cdist(corners, codebook.codes).amin(1).max() < 1
    assert codebook.alive >= 4


def test_training_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"quantizer.*'gumbel'"):
        train_vqgan(batches(), CONFIGS["gumbel-f8-8192"], 10)
    with pytest.raises(ValueError, match="patch_path"):
        train_vqgan(batches(), dataclasses.replace(small(8, 8, 4), patch_path=False), 10)
    with pytest.raises(ValueError, match="steps"):
        train_vqgan(batches(), small(8, 8, 4), 1)
    with pytest.raises(ValueError, match="at least 8"):
        train_vqgan([toy_frames(2, size=4)], small(8, 8, 8), 2)
    with pytest.raises(ValueError, match="iterated again"):
        train_vqgan(iter([toy_frames(2)]), small(8, 8, 8), 5)
