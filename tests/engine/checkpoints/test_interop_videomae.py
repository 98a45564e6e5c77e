"""Checkpoints from and to VideoMAE's code: the same numbers as its formulas, and files that do not fit."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from mam2.engine.checkpoints.export import write_videomae
from mam2.engine.checkpoints.load import load_encoder, load_model
from mam2.engine.errors import UserError
from mam2.engine.model.blocks import sincos_positions
from mam2.engine.model.encoder import Encoder
from mam2.engine.model.positions import set_clip_size
from mam2.engine.model.videomae import VideoMAE
from tests.helpers.small_models import CONFIG, PATCH, classifier, clip, close, normalized, shaken


def plain_encoder(state: dict[str, Tensor], video: Tensor, heads: int, final: str | None) -> Tensor:
    """VideoMAE's forward pass by its formulas, on its own parameters: uint8 [B, 3, T, H, W] -> [B, N, D]."""
    pixels = normalized(video).transpose(1, 2)
    weight = state["patch_embed.proj.weight"]
    tokens = (
        F.conv3d(pixels, weight, state["patch_embed.proj.bias"], stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    )
    tokens = tokens + sincos_positions(tokens.shape[1], tokens.shape[2])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    for number in range(2):
        block = f"blocks.{number}"
        q, k, v = F.linear(norm(tokens, f"{block}.norm1"), state[f"{block}.attn.qkv.weight"]).chunk(3, -1)
        q, v = q + state[f"{block}.attn.q_bias"], v + state[f"{block}.attn.v_bias"]
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        attended = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        tokens = tokens + linear(attended.transpose(1, 2).flatten(2), f"{block}.attn.proj")
        hidden = F.gelu(linear(norm(tokens, f"{block}.norm2"), f"{block}.mlp.fc1"))
        tokens = tokens + linear(hidden, f"{block}.mlp.fc2")
    return norm(tokens, final) if final else tokens


def videomae_state(*, fine_tuned: bool, width: int = 384) -> dict[str, Tensor]:
    """Parameters with the names and shapes of VideoMAE's code, two blocks of a ViT-S; any values."""
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (width, 3, *PATCH),
        "patch_embed.proj.bias": (width,),
    }
    for number in range(2):
        shapes |= {
            f"blocks.{number}.{name}": shape
            for name, shape in {
                "norm1.weight": (width,),
                "norm1.bias": (width,),
                "attn.q_bias": (width,),
                "attn.v_bias": (width,),
                "attn.qkv.weight": (3 * width, width),
                "attn.proj.weight": (width, width),
                "attn.proj.bias": (width,),
                "norm2.weight": (width,),
                "norm2.bias": (width,),
                "mlp.fc1.weight": (2 * width, width),
                "mlp.fc1.bias": (2 * width,),
                "mlp.fc2.weight": (width, 2 * width),
                "mlp.fc2.bias": (width,),
            }.items()
        }
    end = {"fc_norm.weight": (width,), "fc_norm.bias": (width,), "head.weight": (3, width), "head.bias": (3,)}
    shapes |= end if fine_tuned else {"norm.weight": (width,), "norm.bias": (width,)}
    generator = torch.Generator().manual_seed(3)
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


ARGUMENTS = argparse.Namespace(
    model="vit_small_patch16_224", num_frames=4, input_size=24, window_size=(2, 3, 3), lr=1e-3
)


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["", "module.", "backbone.", "_orig_mod.", "_orig_mod.module.", "model."])
@pytest.mark.parametrize("key", ["model", "module", None])
@torch.no_grad()
def test_a_fine_tuned_checkpoint_of_videomae(tmp_path: Path, key: str | None, wrapper: str) -> None:
    state = videomae_state(fine_tuned=True)
    wrapped = {wrapper + name: tensor for name, tensor in state.items()}
    path = tmp_path / "checkpoint-best.pth"
    torch.save({key: wrapped, "epoch": 3, "args": ARGUMENTS} if key else wrapped | {"args": ARGUMENTS}, path)
    expected = plain_encoder(state, clip(), heads=6, final=None)
    close(load_encoder(path).encode(clip()), expected)
    pooled = F.layer_norm(expected.mean(1), (384,), state["fc_norm.weight"], state["fc_norm.bias"], 1e-6)
    close(load_model(path)(clip()), F.linear(pooled, state["head.weight"], state["head.bias"]))


@torch.no_grad()
def test_a_checkpoint_without_a_head_as_videomae_v2_gives_them_for_features(tmp_path: Path) -> None:
    state = {f"model.{n}": t for n, t in videomae_state(fine_tuned=True).items() if not n.startswith("head.")}
    save_file(state, tmp_path / "model.safetensors")
    ours = load_model(tmp_path / "model.safetensors")
    assert isinstance(ours, Encoder)
    assert ours.grid == (8, 28, 28)  # the default, because the file states none
    set_clip_size(ours, 4, 24, "recompute")
    bare = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    close(ours.encode(clip()), plain_encoder(bare, clip(), heads=6, final=None))


@torch.no_grad()
def test_a_pre_training_checkpoint_of_videomae(tmp_path: Path) -> None:
    ours = shaken(VideoMAE(CONFIG))
    write_videomae(ours, tmp_path / "plain.pth")
    state = torch.load(tmp_path / "plain.pth", weights_only=True)["model"]
    encoder_state = {n.removeprefix("encoder."): t for n, t in state.items() if n.startswith("encoder.")}
    close(plain_encoder(encoder_state, clip(), heads=4, final="norm"), ours.encode(clip()))

    path = tmp_path / "checkpoint-799.pth"
    torch.save({"model": {f"module.{n}": t.half() for n, t in state.items()}, "args": ARGUMENTS}, path)
    with pytest.raises(UserError, match="the width 48; pass --heads or heads="):
        load_model(path)
    with pytest.raises(UserError, match="the width 24; pass --decoder-heads or decoder_heads="):
        load_model(path, heads=4)
    again = load_model(path, heads=4, decoder_heads=3)
    assert isinstance(again, VideoMAE)
    for (name, tensor), (same, expected) in zip(again.state_dict().items(), ours.state_dict().items(), strict=True):
        assert name == same
        torch.testing.assert_close(tensor, expected.half().float(), rtol=0, atol=0)
    close(load_encoder(path, heads=4).encode(clip()), again.encode(clip()))


@torch.no_grad()
def test_our_classifier_in_the_names_of_videomaes_fine_tuning(tmp_path: Path) -> None:
    ours = shaken(classifier())
    write_videomae(ours, tmp_path / "out.pth")
    state = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    assert state.keys() == videomae_state(fine_tuned=True).keys()
    close(plain_encoder(state, clip(), heads=4, final=None), ours.encoder.encode(clip()))
    torch.testing.assert_close(state["head.weight"], ours.head.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.1.attn.v_bias"), "lacks encoder.blocks.1.attn.v_bias"),
        (
            lambda s: s.update({"blocks.0.gamma_1": torch.ones(384)}),
            r"lacks encoder\.blocks\.0\.gamma_2, encoder\.blocks\.1\.gamma_1",
        ),
        (lambda s: s.update({"pos_embed": torch.ones(1, 18, 384)}), "contains unexpected pos_embed"),
        (lambda s: s.update({"blocks.0.mlp.fc2.bias": torch.ones(3)}), r"fc2.bias \[3\], expected \[384\]"),
        (lambda s: s.pop("patch_embed.proj.weight"), "expected the weights of a VideoMAE"),
        (lambda s: [s.pop(n) for n in [*s] if n.startswith("blocks.")], "lacks encoder.blocks.0.mlp.fc1.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    state = videomae_state(fine_tuned=True)
    change(state)
    torch.save({"model": state, "args": ARGUMENTS}, tmp_path / "some.pth")
    for load in (load_encoder, load_model):
        with pytest.raises(UserError, match=rf"some.pth: .*{message}"):
            load(tmp_path / "some.pth")


def test_code_in_a_checkpoint_never_runs(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save({"model": videomae_state(fine_tuned=True), "args": Malicious()}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match=r"needs .*mkdir; not loaded"):
        load_encoder(tmp_path / "bad.pth")
    assert not (tmp_path / "made").exists()
