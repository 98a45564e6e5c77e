"""VideoMAE against Hugging Face's with the same weights: encoder, prediction, loss and gradients."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from mam2.engine.config.pretrain import DecoderConfig, LossConfig, ModelConfig, PretrainConfig
from mam2.engine.model.encoder import Encoder
from mam2.engine.model.videomae import VideoMAE
from mam2.kernels import tube_mask
from tests.helpers.small_models import CONFIG, clip, normalized


def copy_block(block: nn.Module, layer: nn.Module) -> None:
    """Copies Hugging Face's VideoMAELayer into our Block."""
    projections = layer.attention.attention
    block.attn.qkv.weight.copy_(torch.cat([projections.query.weight, projections.key.weight, projections.value.weight]))
    old = hasattr(projections, "q_bias")  # transformers 4
    block.attn.q_bias.copy_(projections.q_bias if old else projections.query.bias)
    block.attn.v_bias.copy_(projections.v_bias if old else projections.value.bias)
    for ours, theirs in [
        (block.attn.proj, layer.attention.output.dense),
        (block.mlp.fc1, layer.intermediate.dense),
        (block.mlp.fc2, layer.output.dense),
        (block.norm1, layer.layernorm_before),
        (block.norm2, layer.layernorm_after),
    ]:
        ours.load_state_dict(theirs.state_dict())


@torch.no_grad()
def copy_encoder(encoder: Encoder, model: nn.Module) -> None:
    """Copies Hugging Face's VideoMAEModel into our Encoder; Conv3d weights become rows in (t,h,w,c) order."""
    convolution = model.embeddings.patch_embeddings.projection
    encoder.patch_embed.weight.copy_(convolution.weight.permute(0, 2, 3, 4, 1).flatten(1))
    encoder.patch_embed.bias.copy_(convolution.bias)
    for block, layer in zip(encoder.blocks, model.encoder.layer, strict=True):
        copy_block(block, layer)
    encoder.norm.load_state_dict(model.layernorm.state_dict())


def build(normalize: str = "channel") -> VideoMAE:
    torch.manual_seed(0)
    return VideoMAE(dataclasses.replace(CONFIG, loss=LossConfig(pixel_normalize=normalize)))


@pytest.fixture
def hugging_face() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.VideoMAEConfig(
        image_size=24,
        patch_size=8,
        num_frames=4,
        tubelet_size=2,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        decoder_hidden_size=24,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=3,
        decoder_intermediate_size=48,
        layer_norm_eps=1e-6,
        use_mean_pooling=False,
        attn_implementation="eager",
        initializer_range=0.2,
    )
    torch.manual_seed(1)
    model = transformers.VideoMAEForPreTraining(config).eval()
    model.decoder.norm.eps = 1e-6  # VideoMAE's own; Hugging Face leaves PyTorch's 1e-5 in this one place
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # biases and norms start at 0 and 1
    return model


@torch.no_grad()
def copy(ours: VideoMAE, theirs: nn.Module) -> None:
    copy_encoder(ours.encoder, theirs.videomae)
    ours.encoder_to_decoder.load_state_dict(theirs.encoder_to_decoder.state_dict())
    ours.mask_token.copy_(theirs.mask_token)
    for block, layer in zip(ours.decoder.blocks, theirs.decoder.decoder_layers, strict=True):
        copy_block(block, layer)
    ours.decoder.norm.load_state_dict(theirs.decoder.norm.state_dict())
    ours.decoder.head.load_state_dict(theirs.decoder.head.state_dict())


def test_the_encoder_equals_hugging_face_on_all_tokens(hugging_face: nn.Module) -> None:
    ours = build()
    copy(ours, hugging_face)
    with torch.no_grad():
        found = ours.encode(clip())
        expected = hugging_face.videomae(normalized(clip())).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_the_encoder_equals_hugging_face_on_visible_tokens(hugging_face: nn.Module) -> None:
    ours = build()
    copy(ours, hugging_face)
    visible = torch.tensor([[0, 4, 9, 13], [2, 8, 11, 17]])
    hidden = torch.ones(2, math.prod(ours.encoder.grid), dtype=torch.bool).scatter(1, visible, False)
    with torch.no_grad():
        found = ours.encoder(ours.encoder.tokens(clip(), visible), visible)
        expected = hugging_face.videomae(normalized(clip()), bool_masked_pos=hidden).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("normalize", ["channel", "none"])
def test_loss_and_gradients_equal_hugging_face(hugging_face: nn.Module, normalize: str) -> None:
    ours = build(normalize)
    copy(ours, hugging_face)
    hugging_face.config.norm_pix_loss = hugging_face.decoder.config.norm_pix_loss = normalize == "channel"
    mask = tube_mask(2, (2, 3, 3), 0.7, seed=0, device="cpu")
    loss = ours.loss(clip(), mask)
    theirs = hugging_face(normalized(clip()), bool_masked_pos=mask.as_bool())
    torch.testing.assert_close(ours.predict_pixels(clip(), mask), theirs.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss, theirs.loss, rtol=1e-5, atol=0)
    loss.backward()
    theirs.loss.backward()
    for name, found, expected in [
        ("head", ours.decoder.head, hugging_face.decoder.head),
        ("encoder_to_decoder", ours.encoder_to_decoder, hugging_face.encoder_to_decoder),
        ("norm", ours.encoder.norm, hugging_face.videomae.layernorm),
    ]:
        error = (found.weight.grad - expected.weight.grad).norm() / expected.weight.grad.norm()
        assert error < 1e-4, f"{name}: relative error {error:.1e}"


def test_hidden_pixels_never_reach_the_prediction() -> None:
    model, mask = build(), tube_mask(2, (2, 3, 3), 0.7, seed=0, device="cpu")
    video = clip()
    hidden = mask.as_bool()[:, None].unflatten(-1, (2, 3, 3))
    for dim, size in ((2, 2), (3, 8), (4, 8)):
        hidden = hidden.repeat_interleave(size, dim)
    assert torch.equal(
        model.predict_pixels(torch.where(hidden, 255 - video, video), mask), model.predict_pixels(video, mask)
    )


def test_patch_normalization_is_another_target() -> None:
    mask = tube_mask(2, (2, 3, 3), 0.7, seed=0, device="cpu")
    losses = {normalize: build(normalize).loss(clip(), mask).item() for normalize in ("channel", "patch", "none")}
    assert len(set(losses.values())) == 3


def test_every_parameter_is_trained() -> None:
    model = build()
    model.loss(clip(), tube_mask(2, (2, 3, 3), 0.7, seed=0, device="cpu")).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_weights_start_as_videomaes() -> None:
    """Standard deviations of VideoMAE's code at ViT-B (PyTorch's defaults if it does not initialize a layer)."""
    config = dataclasses.replace(
        PretrainConfig(),
        model=ModelConfig(objective="videomae", depth=1, decoder=DecoderConfig(depth=1, width=384, heads=6)),
    )
    torch.manual_seed(0)
    model = VideoMAE(config)
    for tensor, official in (
        (model.encoder.patch_embed.weight, 0.0147),
        (model.encoder.patch_embed.bias, 0.0147),
        (model.encoder_to_decoder.weight, 0.0208),
        (model.decoder.head.weight, 0.0323),
        (model.encoder.blocks[0].attn.qkv.weight, math.sqrt(2 / (768 + 3 * 768))),
        (model.decoder.blocks[0].mlp.fc1.weight, math.sqrt(2 / (384 + 4 * 384))),
    ):
        error = 6 / math.sqrt(2 * tensor.numel())  # six deviations of a sample's deviation
        assert tensor.std().item() == pytest.approx(official, rel=error + 0.005)
    assert model.encoder.patch_embed.weight.abs().max() <= 1536**-0.5
    assert not model.decoder.head.bias.any()
    # normal with 0.02, cut at one deviation: 0.0108; 384 values
    assert model.mask_token.abs().max() <= 0.02
    assert model.mask_token.std().item() == pytest.approx(0.0108, rel=0.12)


def test_encode_sees_the_whole_clip() -> None:
    assert build().encode(clip()).shape == (2, 18, 48)
