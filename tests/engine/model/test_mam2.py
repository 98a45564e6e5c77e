"""MAM2: which outputs depend on which inputs, gradients by part, whole-graph compilation, learning."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mam2.engine.config.pretrain import (
    DecoderConfig,
    LossConfig,
    MaskConfig,
    ModelConfig,
    PretrainConfig,
    RegressorConfig,
)
from mam2.engine.config.training import DataConfig
from mam2.engine.model.blocks import RegressorBlock
from mam2.engine.model.mam2 import MAM2
from mam2.kernels import TubeMask, frame_difference, tube_mask

CODES = 12


def config(keys: str = "visible", width: int = 24, **loss: object) -> PretrainConfig:
    """4 frames of 24×24, patch 8: 2×3×3 tokens, of which a tube mask hides 6 of 9 positions."""
    return PretrainConfig(
        data=DataConfig(frames=4, size=24),
        mask=MaskConfig(ratio=0.7),
        model=ModelConfig(
            patch=8,
            width=32,
            depth=2,
            heads=2,
            regressor=RegressorConfig(depth=2, width=width, heads=2, keys=keys),
            decoder=DecoderConfig(depth=1, width=width, heads=2),
        ),
        loss=LossConfig(**loss),
    )


def build(cfg: PretrainConfig | None = None) -> MAM2:
    torch.manual_seed(0)
    return MAM2(cfg or config(), CODES)


def clip() -> Tensor:
    frames = torch.randint(0, 256, (2, 4, 24, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return frames.permute(0, 4, 1, 2, 3)


def drawn_mask() -> TubeMask:
    return tube_mask(2, (2, 3, 3), 0.7, seed=0, device="cpu")


def codes() -> Tensor:
    return torch.randint(0, CODES, (2, 18), generator=torch.Generator().manual_seed(2))


def token_pixels(video: Tensor) -> Tensor:
    """A view of the clip as tokens: [B, T', H', W', t, h, w, C], writable."""
    return (
        video.permute(0, 2, 3, 4, 1)
        .unflatten(3, (3, 8))
        .unflatten(2, (3, 8))
        .unflatten(1, (2, 2))
        .permute(0, 1, 3, 5, 2, 4, 6, 7)
    )


def repaint(video: Tensor, index: Tensor) -> Tensor:
    """The clip with the tokens at index [B, n] inverted."""
    painted = video.clone(memory_format=torch.preserve_format)
    tokens = token_pixels(painted)
    for batch, row in enumerate(index.tolist()):
        for token in row:
            slot, place = divmod(token, 9)
            tokens[batch, slot, place // 3, place % 3] ^= 255
    return painted


@pytest.mark.parametrize("keys", ["visible", "all"])
def test_hidden_pixels_never_reach_the_latents(keys: str) -> None:
    model, mask = build(config(keys)), drawn_mask()
    latents = model.complete(clip(), mask)
    assert latents.shape == (2, mask.masked.shape[1], 24)
    assert torch.equal(model.complete(repaint(clip(), mask.masked), mask), latents)
    assert not torch.allclose(model.complete(repaint(clip(), mask.visible[:, :1]), mask), latents, atol=1e-3)


@pytest.mark.parametrize("keys", ["visible", "all"])
def test_permuting_the_masked_tokens_permutes_the_latents(keys: str) -> None:
    model, mask = build(config(keys)), drawn_mask()
    order = torch.randperm(mask.masked.shape[1], generator=torch.Generator().manual_seed(3))
    permuted = TubeMask(mask.visible, mask.masked[:, order])
    torch.testing.assert_close(model.complete(clip(), permuted), model.complete(clip(), mask)[:, order])


@pytest.mark.parametrize(("keys", "alone"), [("visible", True), ("all", False)])
def test_masked_tokens_hear_of_each_other_only_with_all_keys(keys: str, alone: bool) -> None:
    model, mask = build(config(keys)), drawn_mask()
    fewer = TubeMask(mask.visible, mask.masked[:, :3])
    same = torch.allclose(model.complete(clip(), fewer), model.complete(clip(), mask)[:, :3], atol=1e-6)
    assert same == alone


def test_a_regressor_block_is_caes_cross_attention() -> None:
    """Against torch's own multi-head attention: positions reach queries and keys, never values nor the state."""
    torch.manual_seed(0)
    block, peer = RegressorBlock(16, 2, 2.0), torch.nn.MultiheadAttention(16, 2, batch_first=True)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        peer.in_proj_weight.copy_(torch.cat([block.attn.q.weight, block.attn.k.weight, block.attn.v.weight]))
        peer.in_proj_bias.copy_(torch.cat([block.attn.q.bias, torch.zeros(16), block.attn.v.bias]))
    peer.out_proj.load_state_dict(block.attn.proj.state_dict())
    masked, masked_positions = torch.randn(2, 2, 5, 16)
    context, context_positions = torch.randn(2, 2, 7, 16)
    queries, keys = block.norm_q(masked + masked_positions), block.norm_k(context + context_positions)
    state = masked + peer(queries, keys, block.norm_v(context))[0]
    expected = state + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(state))))
    torch.testing.assert_close(block(masked, context, masked_positions, context_positions), expected)


@torch.no_grad()
def test_layer_scale_multiplies_every_branch_and_the_projection_has_its_norm() -> None:
    """LayerScale is initially 0.1 in encoder, regressor and decoders, as in CAE; at 0 a block is the identity."""
    cfg = config("all")
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, layer_scale=0.1, projection_norm=True))
    model = build(cfg)
    gammas = {name: p for name, p in model.named_parameters() if "gamma_" in name}
    assert len(gammas) == 2 * (2 + 2 + 1 + 1)
    assert all(torch.equal(p, torch.full_like(p, 0.1)) for p in gammas.values())
    tokens = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    block = model.encoder.blocks[0]
    halfway = tokens + 0.1 * block.attn(block.norm1(tokens))
    torch.testing.assert_close(block(tokens), halfway + 0.1 * block.mlp(block.norm2(halfway)))
    scales = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    left_out = block(tokens, scales)
    torch.testing.assert_close(left_out[1], (tokens + 0.2 * block.mlp(block.norm2(tokens)))[1])
    projected = model.regressor.project(tokens)
    torch.testing.assert_close(projected.mean(-1), torch.zeros(2, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(projected.var(-1, correction=0), torch.ones(2, 5), atol=1e-3, rtol=0)
    regressor, masked, seen = model.regressor.blocks[0], torch.randn(2, 2, 3, 24), torch.randn(2, 2, 4, 24)
    for parameter in gammas.values():
        parameter.zero_()
    assert torch.equal(block(tokens), tokens)
    assert torch.equal(regressor(masked[0], seen[0], masked[1], seen[1]), masked[0])


def test_every_regressor_block_sees_the_state_the_last_one_left() -> None:
    model = build(config("all"))
    visible, visible_positions = torch.randn(2, 2, 6, 24, generator=torch.Generator().manual_seed(0))
    masked_positions = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))
    regressor = model.regressor
    regressor.project = torch.nn.Identity()
    first, second = regressor.blocks
    positions = torch.cat([visible_positions, masked_positions], 1)
    start = regressor.mask_token.expand(2, 5, -1)
    state = first(start, torch.cat([visible, start], 1), masked_positions, positions)
    state = second(state, torch.cat([visible, state], 1), masked_positions, positions)
    found = regressor(visible, visible_positions, masked_positions)
    torch.testing.assert_close(found, regressor.norm(state))


def test_clips_of_a_batch_do_not_mix() -> None:
    model, mask = build(config("all")), drawn_mask()
    swapped = TubeMask(mask.visible.flip(0), mask.masked.flip(0))
    torch.testing.assert_close(model.complete(clip().flip(0), swapped), model.complete(clip(), mask).flip(0))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_appearance_loss_is_the_cross_entropy_of_the_hidden_codes(smoothing: float) -> None:
    model, mask = build(config(label_smoothing=smoothing)), drawn_mask()
    latents = model.complete(clip(), mask)
    logits = model.appearance_decoder.head(model.appearance_decoder(latents + model.positions[mask.masked]))
    expected = F.cross_entropy(
        logits.flatten(0, 1), codes().gather(1, mask.masked).flatten(), label_smoothing=smoothing
    )
    torch.testing.assert_close(model.appearance_loss(latents, mask, codes()), expected)
    assert torch.equal(model.predict_codes(latents, mask), logits.argmax(-1))


@pytest.mark.parametrize(("normalize", "eps"), [("none", 1e-6), ("channel", 0.05)])
def test_motion_loss_is_the_error_of_the_predicted_difference(normalize: str, eps: float) -> None:
    model, mask = build(config(motion_target="intra", motion_normalize=normalize, motion_eps=eps)), drawn_mask()
    latents = model.complete(clip(), mask)
    predicted = model.motion_decoder.head(model.motion_decoder(latents + model.positions[mask.masked]))
    target = frame_difference(
        clip(), patch_size=(2, 8, 8), difference="intra", normalize=None if normalize == "none" else normalize, eps=eps
    )
    expected = F.mse_loss(predicted, target.gather(1, mask.masked[..., None].expand(-1, -1, target.shape[-1])))
    torch.testing.assert_close(model.motion_loss(latents, mask, clip()), expected)
    assert torch.equal(model.predict_motion(latents, mask), predicted)


@pytest.mark.parametrize(("target", "values"), [("adjacent", 384), ("intra", 192)])
def test_motion_head_has_the_size_of_the_target(target: str, values: int) -> None:
    model, mask = build(config(motion_target=target)), drawn_mask()
    assert model.predict_motion(model.complete(clip(), mask), mask).shape == (2, 12, values)


@pytest.mark.parametrize("width", [24, 32])
def test_alignment_pulls_the_latents_and_nothing_else(width: int) -> None:
    """At width 24 the target goes through the regressor's projection, at 32 there is none."""
    model, mask = build(config(width=width)), drawn_mask()
    latents = model.complete(clip(), mask).detach().requires_grad_()
    loss = model.alignment_loss(latents, mask, clip())
    loss.backward()
    target = model.regressor.project(model.encoder(model.encoder.tokens(clip(), mask.masked), mask.masked))
    torch.testing.assert_close(loss, F.mse_loss(latents, target))
    torch.testing.assert_close(latents.grad, 2 * (latents - target).detach() / latents.numel())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_each_loss_trains_its_own_decoder_and_the_shared_trunk() -> None:
    mask = drawn_mask()
    for trained, idle in [("appearance_decoder", "motion_decoder"), ("motion_decoder", "appearance_decoder")]:
        model = build()
        latents = model.complete(clip(), mask)
        if trained == "appearance_decoder":
            model.appearance_loss(latents, mask, codes()).backward()
        else:
            model.motion_loss(latents, mask, clip()).backward()
        for part in (trained, "encoder", "regressor"):
            for name, parameter in getattr(model, part).named_parameters():
                assert parameter.grad is not None, f"{part}.{name}"
                assert parameter.grad.abs().sum() > 0, f"{part}.{name}"
        assert all(parameter.grad is None for parameter in getattr(model, idle).parameters())


def test_encode_sees_the_whole_clip() -> None:
    assert build().encode(clip()).shape == (2, 18, 32)


def test_only_learned_values_are_saved() -> None:
    model = build()
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


@pytest.mark.slow
def test_it_learns_one_batch() -> None:
    model, mask = build(), drawn_mask()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        latents = model.complete(clip(), mask)
        loss = torch.stack([model.appearance_loss(latents, mask, codes()), model.motion_loss(latents, mask, clip())])
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        losses.append(loss.detach())
    assert losses[0][0] == pytest.approx(math.log(CODES), rel=0.3)
    assert losses[-1][0] < 0.3 * losses[0][0]
    assert losses[-1][1] < 0.8 * losses[0][1]


@pytest.mark.slow
def test_every_step_compiles_as_one_graph() -> None:
    model, mask, video = build(config("all")), drawn_mask(), clip()
    latents = model.complete(video, mask).detach()
    for name, arguments in {
        "complete": (video, mask),
        "appearance_loss": (latents, mask, codes()),
        "motion_loss": (latents, mask, video),
        "alignment_loss": (latents, mask, video),
    }.items():
        method = getattr(model, name)
        found = torch.compile(method, fullgraph=True, dynamic=False, backend="aot_eager")(*arguments)
        expected = method(*arguments)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        weights = list(model.parameters())
        upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4))
        if expected.requires_grad:
            compiled, eager = (
                torch.autograd.grad(out, weights, upstream, allow_unused=True) for out in (found, expected)
            )
            torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_inductor_computes_the_same_latents() -> None:
    model, mask, video = build(), drawn_mask(), clip()
    with torch.no_grad():
        compiled = torch.compile(model.complete, fullgraph=True, dynamic=False)(video, mask)
        torch.testing.assert_close(compiled, model.complete(video, mask), rtol=1e-4, atol=1e-5)


def test_wrong_configs_are_named() -> None:
    cfg = config()
    wider = dataclasses.replace(cfg.model, decoder=DecoderConfig(width=32, heads=2))
    with pytest.raises(ValueError, match=r"model.decoder.width.*24.*32"):
        build(dataclasses.replace(cfg, model=wider))
    single = dataclasses.replace(config(motion_target="intra"), model=dataclasses.replace(cfg.model, tubelet=1))
    with pytest.raises(ValueError, match="tubelet"):
        build(single)
    keyless = dataclasses.replace(cfg.model.regressor, keys="masked")
    with pytest.raises(ValueError, match="'masked'"):
        build(dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, regressor=keyless)))
