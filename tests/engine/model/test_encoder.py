"""The encoder and its blocks: known sizes, position formula, input forms. (test_videomae.py: Hugging Face's.)"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from mam2.engine.config.pretrain import ModelConfig, PretrainConfig, check
from mam2.engine.config.recipe import load_recipe
from mam2.engine.config.sizes import PRESETS, SIZES, parameters_by_part, resized, with_preset
from mam2.engine.config.training import DataConfig
from mam2.engine.costs import part_costs
from mam2.engine.model.blocks import Attention, mlp_width, sincos_positions
from mam2.engine.model.encoder import Encoder

GRID, PATCH = (2, 3, 3), (2, 8, 8)


@pytest.fixture
def encoder() -> Encoder:
    torch.manual_seed(1)
    return Encoder(GRID, PATCH, width=48, depth=3, heads=4, mlp_ratio=2)


def clip(batch: int = 2) -> torch.Tensor:
    """uint8 [B, 3, T, H, W], viewed from [B, T, H, W, 3] as the loader's are."""
    frames = torch.randint(0, 256, (batch, 4, 24, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    return frames.permute(0, 4, 1, 2, 3)


def test_float_clips_and_uint8_clips_are_the_same_clip(encoder: Encoder) -> None:
    torch.testing.assert_close(encoder.encode(clip().float() / 255), encoder.encode(clip()))


def test_token_order_carries_no_meaning_beyond_the_index(encoder: Encoder) -> None:
    index = torch.arange(math.prod(GRID)).expand(2, -1)
    order = torch.randperm(math.prod(GRID), generator=torch.Generator().manual_seed(3))
    tokens = encoder.tokens(clip(), index)
    torch.testing.assert_close(encoder(tokens[:, order], index[:, order]), encoder(tokens, index)[:, order])


def test_positions_follow_the_formula() -> None:
    table = sincos_positions(7, 6)
    for token in (0, 3, 6):
        for value in range(6):
            angle = token / 10000 ** (2 * (value // 2) / 6)
            assert table[token, value] == pytest.approx(math.cos(angle) if value % 2 else math.sin(angle), abs=1e-7)


def test_positions_stay_out_of_checkpoints(encoder: Encoder) -> None:
    assert "positions" not in encoder.state_dict()


def test_bfloat16_autocast_stays_close(encoder: Encoder) -> None:
    expected = encoder.encode(clip())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = encoder.encode(clip())
    assert (found.float() - expected).norm() / expected.norm() < 0.02


def test_weights_start_as_videomae_starts_them() -> None:
    torch.manual_seed(0)
    fresh = Encoder(GRID, PATCH, width=48, depth=1, heads=4)
    weight = fresh.blocks[0].mlp.fc1.weight
    bound = math.sqrt(6 / sum(weight.shape))
    assert bound * 0.98 < weight.abs().max() <= bound
    assert not fresh.blocks[0].mlp.fc1.bias.any()
    assert not fresh.blocks[0].attn.q_bias.any()


@pytest.mark.parametrize(("size", "millions"), [("small", 21.9), ("base", 86.2), ("large", 303.9), ("huge", 631.7)])
def test_sizes_are_the_known_ones(size: str, millions: float) -> None:
    """Known: the encoder of VideoMAE's pre-training at 16 frames, patch 16, tubelet 2, without positions."""
    width, depth, heads = SIZES[size]
    with torch.device("meta"):
        encoder = Encoder((8, 14, 14), (2, 16, 16), width=width, depth=depth, heads=heads)
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    block = 12 * width**2 + 2 * width + 4 * width + 5 * width + width  # weights, q and v bias, norms, MLP, projection
    assert parameters == 1536 * width + width + depth * block + 2 * width
    assert parameters / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.parametrize("recipe", ["mam2-fast", "mam2-cae", "videomae", "demo"])
@pytest.mark.parametrize("size", SIZES)
def test_a_size_scales_the_whole_model(recipe: str, size: str) -> None:
    before = load_recipe(recipe)
    config = dataclasses.replace(before, model=resized(before.model, size))
    check(config)
    model = config.model
    assert (model.width, model.depth, model.heads) == SIZES[size]
    parts = {"decoder": model.decoder}
    if model.objective == "mam2":
        parts["regressor"] = model.regressor
    for name, part in parts.items():
        old = getattr(before.model, name)
        assert part.width / model.width == old.width / before.model.width
        assert part.depth == min(old.depth, max(model.depth // 3, 1))


@pytest.mark.parametrize(("size", "width", "heads"), [("small", 192, 3), ("base", 384, 6), ("large", 512, 8)])
def test_videomaes_decoders_have_its_widths(size: str, width: int, heads: int) -> None:
    decoder = resized(load_recipe("videomae").model, size).decoder
    assert (decoder.width, decoder.heads, decoder.depth) == (width, heads, 4)


def test_base_is_the_recipes_size_and_a_preset_is_scaled_to_the_encoder() -> None:
    fast, cae = load_recipe("mam2-fast").model, load_recipe("mam2-cae").model
    assert resized(fast, "base") == fast
    assert with_preset(fast, "cae") == cae
    assert with_preset(resized(fast, "small"), "cae") == resized(cae, "small")
    assert resized(with_preset(fast, "cae"), "small") == resized(cae, "small")


def test_tiny_is_small() -> None:
    """22.9 M parameters and 89 GFLOP forward at 16 frames of 224² where only the encoder shrinks."""
    recipe = load_recipe("mam2-fast")
    parts = part_costs(dataclasses.replace(recipe, model=resized(recipe.model, "tiny")), 1024)
    assert sum(cost.parameters for cost in parts.values()) < 1e6
    assert sum(cost.forward_flops for cost in parts.values()) < 4e9


def test_every_preset_builds() -> None:
    for preset in PRESETS.values():
        assert preset.regressor.width == preset.decoder.width
        assert preset.regressor.width % preset.regressor.heads == 0


def test_parameters_by_part_adds_up(encoder: Encoder) -> None:
    parts = parameters_by_part(encoder)
    assert list(parts) == ["patch_embed", "blocks", "norm"]
    assert sum(parts.values()) == sum(parameter.numel() for parameter in encoder.parameters())


def test_from_config_reads_every_field() -> None:
    model = ModelConfig(patch=8, tubelet=2, width=32, depth=2, heads=2, mlp_ratio=3)
    encoder = Encoder.from_config(PretrainConfig(data=DataConfig(frames=4, size=24), model=model))
    assert (encoder.grid, encoder.patch_size, encoder.width, len(encoder.blocks)) == (GRID, PATCH, 32, 2)
    assert encoder.blocks[0].mlp.fc1.out_features == 96
    assert encoder.blocks[0].attn.heads == 2


def test_wrong_inputs_are_named(encoder: Encoder) -> None:
    with pytest.raises(ValueError, match=r"video: expected \[B, 3, 4, 24, 24\], found \(2, 3, 4, 24, 16\)"):
        encoder.encode(clip()[..., :16])
    with pytest.raises(ValueError, match="heads"):
        Attention(48, 5)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda video: video.float(), "0 to 255"),
        (lambda video: (video.float() / 255 - 0.45) / 0.225, "-2 to 2.444"),
        (lambda video: (video.float() / 255).masked_fill(video == 7, math.nan), "nan to nan"),
        (lambda video: (video.float() / 255).masked_fill(video == 7, math.inf), "0 to inf"),
    ],
)
def test_float_clips_out_of_range_are_refused_in_evaluation(encoder: Encoder, change: object, found: str) -> None:
    encoder.eval()
    with pytest.raises(ValueError, match=rf"expected floats from 0 to 1, found {found}; divide bytes by 255"):
        encoder.encode(change(clip()))  # type: ignore[operator]
    overshoot = clip().float() / 255 * 1.2 - 0.1  # as bicubic resizing may return it
    assert encoder.encode(overshoot).isfinite().all()


def test_a_clip_without_token_numbers_is_told_to_encode(encoder: Encoder) -> None:
    with pytest.raises(ValueError, match=r"index: expected .* call encoder\.encode\(video\)"):
        encoder(clip())


def test_an_mlps_width_survives_its_ratio() -> None:
    """A ratio computed from the shapes of a file gives these shapes; others are rounded down as in VideoMAE."""
    for width in (48, 96, 384, 768, 1408):
        assert all(mlp_width(width, hidden / width) == hidden for hidden in range(1, 5 * width))
    assert mlp_width(10, 1.29) == 12
