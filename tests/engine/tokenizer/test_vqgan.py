"""The VQGAN: equal to Hugging Face's models, in all published forms, and safe to load from a file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import sys
import types
from collections import OrderedDict, defaultdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mam2.engine.errors import UserError
from mam2.engine.tokenizer.files import fingerprint, load_vqgan, save_vqgan
from mam2.engine.tokenizer.vqgan import CONFIGS, VQGAN, VQGANConfig, small

TINY = VQGANConfig(
    codes=40,
    embed_dim=12,
    z_channels=24,
    channels=32,
    channel_multipliers=(1, 2, 2),
    res_blocks=1,
    attention_levels=(2,),
)
TINY_GUMBEL = dataclasses.replace(TINY, quantizer="gumbel", embed_dim=24)


RESIDUAL = small(8, 16, 4, codes_per_patch=3)


def build(config: VQGANConfig = TINY) -> VQGAN:
    torch.manual_seed(0)
    vqgan = VQGAN(config).eval()
    spread_codes(vqgan)
    return vqgan


@torch.no_grad()
def spread_codes(vqgan: nn.Module) -> None:
    """Moves codebook vectors to latents, so that many codes are used."""
    if hasattr(vqgan.quantize, "embedding"):
        latents = vqgan.encode(images(8)).movedim(1, -1).flatten(0, 2)
        order = torch.randperm(len(latents), generator=torch.Generator().manual_seed(1)).split(vqgan.config.codes)
        for codebook, chosen in zip(vqgan.quantize.codebooks, order, strict=False):
            codebook.copy_(latents[chosen])
            latents = latents - codebook[torch.cdist(latents, codebook).argmin(1)]
    else:
        vqgan.quantize.proj.weight.normal_(generator=torch.Generator().manual_seed(1))


def images(batch: int = 3, size: int = 32) -> Tensor:
    """[B, 3, size, size] in [-1, 1], smooth enough that neighbors differ little."""
    noise = torch.rand(batch, 3, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 - 1
    return torch.nn.functional.interpolate(noise, (size, size), mode="bilinear")


def test_codes_equal_chameleons() -> None:
    chameleon = pytest.importorskip("transformers.models.chameleon.modeling_chameleon")
    config = chameleon.ChameleonVQVAEConfig(
        embed_dim=12,
        num_embeddings=40,
        latent_channels=24,
        resolution=32,
        base_channels=32,
        channel_multiplier=[1, 2, 2],
        num_res_blocks=1,
        attn_resolutions=[8],
    )
    theirs = chameleon.ChameleonVQVAE(config).eval()
    ours = build()
    missing, unexpected = theirs.load_state_dict(
        {name: tensor for name, tensor in ours.state_dict().items() if not name.startswith(("decoder", "post_quant"))},
        strict=False,
    )
    assert not unexpected
    assert all(name.startswith(("decoder", "post_quant")) for name in missing)
    with torch.no_grad():
        latents = theirs.quant_conv(theirs.encoder(images()))
        expected = theirs.quantize(latents)[2].view(3, 8, 8)
        torch.testing.assert_close(ours.encode(images()), latents, rtol=1e-4, atol=1e-5)
    found = ours.codes(images())
    assert len(found.unique()) > 10
    assert torch.equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["f16-1024", "f16-16384"])
def test_codes_of_the_published_forms_equal_chameleons(name: str) -> None:
    """Random weights; the codebook vectors are latents, so that many codes are used."""
    chameleon = pytest.importorskip("transformers.models.chameleon.modeling_chameleon")
    config = CONFIGS[name]
    theirs = chameleon.ChameleonVQVAE(
        chameleon.ChameleonVQVAEConfig(
            embed_dim=256,
            num_embeddings=config.codes,
            latent_channels=256,
            resolution=256,
            base_channels=128,
            channel_multiplier=[1, 1, 2, 2, 4],
            num_res_blocks=2,
            attn_resolutions=[16],
        )
    ).eval()
    torch.manual_seed(0)
    ours = VQGAN(config).eval()
    state = {key: value for key, value in ours.state_dict().items() if not key.startswith(("decoder", "post_quant"))}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(key.startswith(("decoder", "post_quant")) for key in missing)
    for size in (224, 256):
        image = images(1, size)
        with torch.no_grad():
            latents = theirs.quant_conv(theirs.encoder(image))
            mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
            codebook = mean + deviation * torch.randn(config.codes, 256)
            theirs.quantize.embedding.weight.copy_(codebook)
            ours.quantize.embedding.weight.copy_(codebook)
            expected = theirs.quantize(latents)[2].view(1, size // 16, size // 16)
        found = ours.codes(image)
        assert found.shape == (1, size // 16, size // 16)
        assert len(found.unique()) > 20
        assert torch.equal(found, expected), size


def test_pictures_equal_januss() -> None:
    """Janus' decoder is taming's with the levels listed as they run."""
    janus = pytest.importorskip("transformers.models.janus.modeling_janus")
    config = janus.JanusVQVAEConfig(
        latent_channels=24, base_channels=32, channel_multiplier=[1, 2, 2], num_res_blocks=1, out_channels=3
    )
    theirs = janus.JanusVQVAEDecoder(config).eval()
    ours = build()
    renamed = {}
    for name, tensor in ours.decoder.state_dict().items():
        parts = name.split(".")
        if parts[0] == "up":
            parts[1] = str(2 - int(parts[1]))
        renamed[".".join(parts)] = tensor
    theirs.load_state_dict(renamed)
    codes = torch.arange(40).repeat(4)[: 2 * 64].view(2, 8, 8)
    with torch.no_grad():
        expected = theirs(ours.post_quant_conv(ours.quantize.lookup(codes)))
        found = ours.decode(codes)
    assert found.shape == (2, 3, 32, 32)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_gumbel_codes_are_the_largest_logits_without_noise() -> None:
    vqgan = build(TINY_GUMBEL)
    with torch.no_grad():
        logits = vqgan.quantize.proj(vqgan.quant_conv(vqgan.encoder(images())))
    codes = vqgan.codes(images())
    assert len(codes.unique()) > 5
    assert torch.equal(codes, logits.argmax(1))
    assert torch.equal(vqgan.train().codes(images()), codes)


def test_choosing_a_code_is_no_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN would round the logits to TF32."""
    vqgan = build(TINY_GUMBEL)
    latents = vqgan.encode(images()).detach()
    expected = vqgan.quantize.proj(latents).argmax(1)
    monkeypatch.setattr(torch.nn.functional, "conv2d", None)
    assert torch.equal(vqgan.quantize.codes(latents), expected)


@pytest.mark.parametrize("config", [TINY, TINY_GUMBEL], ids=["vq", "gumbel"])
def test_codes_are_chosen_in_float32_under_autocast(config: VQGANConfig) -> None:
    vqgan = build(config)
    latents = vqgan.encode(images(8)).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = vqgan.quantize.codes(latents)
    assert torch.equal(found, vqgan.quantize.codes(latents))


@pytest.mark.parametrize(
    ("name", "factor", "attended"),
    [("f16-1024", 16, "down.4"), ("f16-16384", 16, "down.4"), ("gumbel-f8-8192", 8, "down.3")],
)
def test_published_models_have_their_form(name: str, factor: int, attended: str) -> None:
    with FakeTensorMode():
        vqgan = VQGAN(CONFIGS[name])
        codes = vqgan.codes(torch.empty(1, 3, 224, 224))
    assert codes.shape == (1, 224 // factor, 224 // factor)
    attention = {key.rsplit(".attn.", 1)[0] for key in vqgan.encoder.state_dict() if ".attn." in key}
    assert attention == {attended}, "attention follows the configured resolution, not that of the images"
    keys = vqgan.state_dict().keys()
    assert {"encoder.down.0.block.1.norm2.weight", "encoder.mid.attn_1.proj_out.bias"} <= keys
    assert {"decoder.up.1.upsample.conv.weight", "post_quant_conv.bias"} <= keys
    assert "encoder.down.2.block.0.nin_shortcut.weight" in keys
    assert (len(vqgan.quant_conv.weight), len(next(vqgan.quantize.parameters()))) == (256, int(name.split("-")[-1]))


@pytest.mark.parametrize("factor", [2, 4, 8, 16])
def test_small_ones_have_the_factor_asked_for(factor: int) -> None:
    assert VQGAN(small(16, 64, factor)).codes(images()).shape == (3, 32 // factor, 32 // factor)


def test_wrong_inputs_are_named() -> None:
    with pytest.raises(ValueError, match="power of two"):
        small(16, 64, 6)
    with pytest.raises(ValueError, match="multiple of 8"):
        small(12, 64, 8)
    with pytest.raises(ValueError, match=r"multiples of 4, found \(3, 3, 30, 30\)"):
        build().codes(images(size=30))


def lightning_checkpoint(path: Path, vqgan: VQGAN, **extra: object) -> Path:
    """A file as Lightning writes it: training's own parameters, and pickled classes of a framework not installed."""
    names = ("pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint")
    modules = {name: types.ModuleType(name) for name in names}
    callback = type("ModelCheckpoint", (), {"__module__": names[-1]})
    modules[names[-1]].ModelCheckpoint = callback
    settings = callback()
    settings.monitor = "val/rec_loss"
    state = OrderedDict(vqgan.state_dict())
    state["loss.discriminator.main.0.weight"] = torch.zeros(3)
    state["loss.perceptual_loss.lin0.model.1.weight"] = torch.zeros(2)
    checkpoint = {
        "epoch": 3,
        "pytorch-lightning_version": "1.0.8",
        "callbacks": {callback: {"best_model_score": torch.tensor(0.5)}},
        "hyper_parameters": {"callback": settings, "lists": defaultdict(list)},
        "state_dict": state,
        **extra,
    }
    sys.modules.update(modules)
    try:
        torch.save(checkpoint, path)
    finally:
        for name in names:
            del sys.modules[name]
    return path


class Malicious:
    """Its pickle makes a folder when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("config", [TINY, TINY_GUMBEL], ids=["vq", "gumbel"])
def test_a_lightning_checkpoint_loads_without_its_framework(tmp_path: Path, config: VQGANConfig) -> None:
    vqgan = build(config)
    loaded = load_vqgan(lightning_checkpoint(tmp_path / "last.ckpt", vqgan))
    assert loaded.config == config
    assert not loaded.training
    assert torch.equal(loaded.codes(images()), vqgan.codes(images()))
    assert "pytorch_lightning" not in sys.modules


def test_a_pickle_that_asks_for_more_is_refused_and_does_nothing(tmp_path: Path) -> None:
    target = tmp_path / "made"
    path = lightning_checkpoint(tmp_path / "last.ckpt", build(), surprise=Malicious(target))
    with pytest.raises(UserError, match=r"last.ckpt.*mkdir.*not loaded"):
        load_vqgan(path)
    assert not target.exists()


def test_a_bare_pickle_is_refused_and_does_nothing(tmp_path: Path) -> None:
    target, path = tmp_path / "made", tmp_path / "last.ckpt"
    path.write_bytes(pickle.dumps(Malicious(target)))
    with pytest.raises(UserError, match=r"last.ckpt.*expected a PyTorch checkpoint"):
        load_vqgan(path)
    assert not target.exists()


@pytest.mark.parametrize("config", [TINY_GUMBEL, small(8, 16, 4), RESIDUAL], ids=["gumbel", "small", "residual"])
def test_saved_and_loaded_is_the_same_model(tmp_path: Path, config: VQGANConfig) -> None:
    vqgan = build(config).to(memory_format=torch.channels_last)
    save_vqgan(vqgan, tmp_path / "tokenizer.safetensors")
    loaded = load_vqgan(tmp_path / "tokenizer.safetensors")
    assert loaded.config == config
    assert torch.equal(loaded.decode(loaded.codes(images())), vqgan.decode(vqgan.codes(images())))
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.safetensors"]


def test_a_model_without_the_linear_path_has_the_fingerprint_of_earlier_versions() -> None:
    """Caches of codes name it."""
    vqgan = build()
    fields = dataclasses.asdict(TINY)
    del fields["patch_path"], fields["image_channels"], fields["codes_per_patch"]
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name, tensor in sorted(vqgan.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    assert fingerprint(vqgan) == digest.hexdigest()


def test_the_linear_path_adds_what_it_says() -> None:
    """With both networks at zero a latent is the projected patch, and a picture its transpose."""
    vqgan = build(small(8, 16, 4))
    with torch.no_grad():
        for layer in (vqgan.quant_conv, vqgan.decoder.conv_out):
            layer.weight.zero_()
            layer.bias.zero_()
        latents = vqgan.encode(images())
        pictures = vqgan.decode_latents(latents)
    patches = nn.functional.unfold(images(), 4, stride=4)
    weight = vqgan.patch_in.weight.flatten(1)
    torch.testing.assert_close(latents.flatten(2), weight @ patches + vqgan.patch_in.bias[:, None])
    back = nn.functional.fold(vqgan.patch_out.weight.flatten(1).T @ latents.flatten(2), (32, 32), 4, stride=4)
    torch.testing.assert_close(pictures, back + vqgan.patch_out.bias[:, None, None])


@pytest.mark.parametrize("config", [TINY, dataclasses.replace(TINY, codes_per_patch=3)], ids=["one", "residual"])
def test_safetensors_without_our_metadata_are_inferred(tmp_path: Path, config: VQGANConfig) -> None:
    save_file(build(config).state_dict(), tmp_path / "vqgan.safetensors")
    assert load_vqgan(tmp_path / "vqgan.safetensors").config == config


def test_each_further_code_is_nearest_to_what_the_codes_before_it_leave() -> None:
    vqgan = build(RESIDUAL)
    with torch.no_grad():
        latents = vqgan.encode(images()).movedim(1, -1)
        codes = vqgan.codes(images())
        assert codes.shape == (3, 8, 8, 3)
        rest = latents
        for number, codebook in enumerate(vqgan.quantize.codebooks):
            distances = (rest[..., None, :] - codebook).square().sum(-1)
            assert torch.equal(distances.argmin(-1), codes[..., number])
            rest = rest - codebook[codes[..., number]]
        assert all(len(codes[..., number].unique()) > 4 for number in range(3))
        torch.testing.assert_close(vqgan.quantize.lookup(codes), (latents - rest).movedim(-1, 1))


@pytest.mark.parametrize(("quantizer", "codes_per_patch"), [("vq", 0), ("gumbel", 2)])
def test_codes_per_patch_that_do_not_exist_are_refused(quantizer: str, codes_per_patch: int) -> None:
    with pytest.raises(ValueError, match=rf"codes_per_patch.*found {codes_per_patch} with '{quantizer}'"):
        dataclasses.replace(TINY, quantizer=quantizer, codes_per_patch=codes_per_patch)


def test_a_wrong_shape_or_name_is_named(tmp_path: Path) -> None:
    state = build().state_dict()
    state["decoder.mid.block_1.conv1.bias"] = torch.zeros(5)
    save_file(state, tmp_path / "vqgan.safetensors")
    with pytest.raises(UserError, match=r"vqgan.safetensors.*decoder.mid.block_1.conv1.bias.*\(64,\).*\(5,\)"):
        load_vqgan(tmp_path / "vqgan.safetensors")
    del state["decoder.mid.block_1.conv1.bias"]
    save_file(state, tmp_path / "vqgan.safetensors")
    with pytest.raises(ValueError, match=r"decoder.mid.block_1.conv1.bias.*found none"):
        load_vqgan(tmp_path / "vqgan.safetensors")


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("missing.ckpt", None, "no such file"),
        ("text.ckpt", b"hello", "another kind"),
        ("text.safetensors", b"hello", "unreadable"),
        ("empty.ckpt", b"", "the file is empty"),
    ],
)
def test_other_files_are_named(tmp_path: Path, name: str, content: bytes | None, found: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}.*{found}"):
        load_vqgan(tmp_path / name)


def test_another_models_weights_are_named(tmp_path: Path) -> None:
    torch.save({"state_dict": {"conv.weight": torch.zeros(3)}}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match=r"other.ckpt.*expected the parameters of a VQGAN"):
        load_vqgan(tmp_path / "other.ckpt")
    torch.save(torch.zeros(3), tmp_path / "tensor.ckpt")
    with pytest.raises(UserError, match=r"tensor.ckpt.*expected the parameters of a VQGAN"):
        load_vqgan(tmp_path / "tensor.ckpt")
