"""Weights in and out: the same numbers as Hugging Face's VideoMAE both ways, and as VideoMAE's formulas."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mam2.engine.config import DataConfig, DecoderConfig, ModelConfig, PretrainConfig, RegressorConfig, UserError
from mam2.engine.finetune_config import EncoderConfig, FinetuneConfig
from mam2.engine.interop.load import class_names, load_encoder, load_model
from mam2.engine.interop.names import from_hugging_face, from_videomae, to_hugging_face, to_videomae
from mam2.engine.interop.write import write_hugging_face, write_videomae
from mam2.engine.model.blocks import sincos_positions
from mam2.engine.model.classifier import Classifier, TextHead, linear_head
from mam2.engine.model.encoder import PIXEL_MEAN, PIXEL_STD, Encoder
from mam2.engine.model.mam2 import MAM2
from mam2.engine.model.positions import set_clip_size
from mam2.engine.model.videomae import VideoMAE
from mam2.engine.train import checkpoint
from mam2.kernels import tube_mask

CLASSES = ("walk", "run", "jump")
PATCH = (2, 8, 8)
SIZES = {
    "image_size": 24,
    "patch_size": 8,
    "num_frames": 4,
    "tubelet_size": 2,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "decoder_hidden_size": 24,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 3,
    "decoder_intermediate_size": 48,
    "attn_implementation": "eager",
}
CONFIG = PretrainConfig(
    data=DataConfig(frames=4, size=24),
    model=ModelConfig(
        objective="videomae",
        patch=8,
        width=48,
        depth=2,
        heads=4,
        mlp_ratio=2,
        decoder=DecoderConfig(depth=2, width=24, heads=3),
    ),
)


def clip(frames: int = 4, size: int = 24) -> Tensor:
    """uint8 [2, 3, T, H, W], viewed from [B, T, H, W, 3] as the loader's are."""
    generator = torch.Generator().manual_seed(2)
    video = torch.randint(0, 256, (2, frames, size, size, 3), dtype=torch.uint8, generator=generator)
    return video.permute(0, 4, 1, 2, 3)


def normalized(video: Tensor) -> Tensor:
    """[B, 3, T, H, W] uint8 -> [B, T, 3, H, W], what Hugging Face's processor gives its model."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD))
    return (video.transpose(1, 2) / 255 - mean) / std


def shaken(model: nn.Module) -> nn.Module:
    """With every parameter moved: biases start at 0 and norms at 1, which would hide their loss."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def encoder(**changes: int) -> Encoder:
    torch.manual_seed(0)
    return Encoder((2, 3, 3), PATCH, **{"width": 48, "depth": 2, "heads": 4, "mlp_ratio": 2, **changes})


def classifier() -> Classifier:
    return Classifier(encoder(), linear_head(48, len(CLASSES)))


@pytest.fixture
def hugging_face() -> Callable[..., nn.Module]:
    """hugging_face(class name, config=value, …): one of its models, every parameter shaken."""
    transformers = pytest.importorskip("transformers")

    def build(name: str, **config: object) -> nn.Module:
        return shaken(getattr(transformers, name)(transformers.VideoMAEConfig(**SIZES, **config)))

    return build


# --- in, from Hugging Face


@pytest.mark.parametrize("mean_pooling", [True, False])
@pytest.mark.parametrize("eps", [1e-12, 1e-6])
@torch.no_grad()
def test_an_encoder_gives_what_hugging_faces_gives(
    hugging_face: Callable[..., nn.Module], tmp_path: Path, mean_pooling: bool, eps: float
) -> None:
    theirs = hugging_face("VideoMAEModel", use_mean_pooling=mean_pooling, layer_norm_eps=eps)
    theirs.save_pretrained(tmp_path)
    close(load_encoder(tmp_path).encode(clip()), theirs(normalized(clip())).last_hidden_state)


@torch.no_grad()
def test_a_pre_training_model_gives_what_hugging_faces_gives(
    hugging_face: Callable[..., nn.Module], tmp_path: Path
) -> None:
    theirs = hugging_face("VideoMAEForPreTraining", use_mean_pooling=False, norm_pix_loss=False)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert isinstance(ours, VideoMAE)
    mask = tube_mask(2, (2, 3, 3), 0.7, seed=0, device="cpu")
    output = theirs(normalized(clip()), bool_masked_pos=mask.as_bool())
    close(ours.predict_pixels(clip(), mask), output.logits)
    close(ours.loss(clip(), mask), output.loss)
    expected = theirs.videomae(normalized(clip())).last_hidden_state
    close(load_encoder(tmp_path).encode(clip()), expected)


@torch.no_grad()
def test_a_classifier_gives_what_hugging_faces_gives(hugging_face: Callable[..., nn.Module], tmp_path: Path) -> None:
    theirs = hugging_face("VideoMAEForVideoClassification", id2label=dict(enumerate(CLASSES)))
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert isinstance(ours, Classifier)
    close(ours(clip()), theirs(normalized(clip())).logits)
    close(load_encoder(tmp_path).encode(clip()), theirs.videomae(normalized(clip())).last_hidden_state)
    assert class_names(tmp_path) == CLASSES


@pytest.mark.parametrize("form", ["q_bias", "query.bias", "pickle", "shards", "half"])
@torch.no_grad()
def test_every_form_of_a_folder_is_read(hugging_face: Callable[..., nn.Module], tmp_path: Path, form: str) -> None:
    theirs = hugging_face("VideoMAEForVideoClassification")
    if form == "half":
        theirs.half().float()
        theirs.load_state_dict({name: tensor.half().float() for name, tensor in theirs.state_dict().items()})
    theirs.save_pretrained(tmp_path)
    state = dict(theirs.state_dict())
    (tmp_path / "model.safetensors").unlink()
    if form == "q_bias":
        state = {n.replace("query.bias", "q_bias").replace("value.bias", "v_bias"): t for n, t in state.items()}
    if form == "half":
        state = {name: tensor.half() for name, tensor in state.items()}
    if form == "pickle":
        torch.save(state, tmp_path / "pytorch_model.bin")
    elif form == "shards":
        places = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(state)}
        for file in set(places.values()):
            save_file({name: state[name] for name, place in places.items() if place == file}, tmp_path / file)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    else:
        save_file(state, tmp_path / "model.safetensors")
    close(load_model(tmp_path)(clip()), theirs(normalized(clip())).logits)


@torch.no_grad()
def test_a_model_without_biases_of_query_and_value(hugging_face: Callable[..., nn.Module], tmp_path: Path) -> None:
    theirs = hugging_face("VideoMAEModel", qv_bias=False)
    theirs.save_pretrained(tmp_path)
    close(load_encoder(tmp_path).encode(clip()), theirs(normalized(clip())).last_hidden_state)


# --- out, to Hugging Face


@torch.no_grad()
def test_hugging_face_gives_what_our_encoder_gives(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = shaken(encoder())
    assert write_hugging_face(ours, tmp_path) == "VideoMAEModel"
    theirs, report = transformers.VideoMAEModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    expected = ours.encode(clip())
    close(theirs.eval()(normalized(clip())).last_hidden_state, expected)
    for bias in ("q_bias", "v_bias"):
        getattr(ours.blocks[0].attn, bias).zero_()
        assert (ours.encode(clip()) - expected).abs().max() > 0.01 * expected.abs().max(), bias


@torch.no_grad()
def test_hugging_face_gives_what_our_pre_training_model_gives(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = shaken(VideoMAE(CONFIG))
    assert write_hugging_face(ours, tmp_path) == "VideoMAEForPreTraining"
    theirs, report = transformers.VideoMAEForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    mask = tube_mask(2, (2, 3, 3), 0.7, seed=0, device="cpu")
    output = theirs.eval()(normalized(clip()), bool_masked_pos=mask.as_bool())
    close(output.logits, ours.predict_pixels(clip(), mask), 1e-4)  # another epsilon after the decoder's blocks
    close(output.loss, ours.loss(clip(), mask), 1e-4)


@torch.no_grad()
def test_hugging_face_gives_what_our_classifier_gives(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = shaken(classifier())
    assert write_hugging_face(ours, tmp_path, CLASSES) == "VideoMAEForVideoClassification"
    theirs, report = transformers.VideoMAEForVideoClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    theirs.eval()
    close(theirs.videomae(normalized(clip())).last_hidden_state, ours.encoder.encode(clip()))
    close(theirs(normalized(clip())).logits, ours(clip()), 1e-4)  # another epsilon before the head
    assert theirs.config.id2label == dict(enumerate(CLASSES))
    close(load_model(tmp_path)(clip()), theirs(normalized(clip())).logits)


def test_both_names_of_a_bias_are_written(tmp_path: Path) -> None:
    """Releases of transformers that know one name leave the other out without an error."""
    ours = shaken(encoder())
    write_hugging_face(ours, tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    for layer in range(2):
        attention = f"encoder.layer.{layer}.attention.attention"
        for bias, name in (("q_bias", "query"), ("v_bias", "value")):
            expected = getattr(ours.blocks[layer].attn, bias)
            assert torch.equal(written[f"{attention}.{bias}"], expected)
            assert torch.equal(written[f"{attention}.{name}.bias"], expected)


def test_the_image_processor_gives_what_the_encoder_expects(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    write_hugging_face(encoder(), tmp_path)
    # transformers 5 has one for PIL and one for torchvision, which has no wheel for every torch
    kind = getattr(transformers, "VideoMAEImageProcessorPil", None) or transformers.VideoMAEImageProcessor
    processor = kind.from_pretrained(tmp_path)
    frames = [list(video.permute(1, 2, 3, 0).numpy()) for video in clip()]
    torch.testing.assert_close(processor(frames, return_tensors="pt")["pixel_values"], normalized(clip()))
    assert processor(list(clip(4, 64)[0].permute(1, 2, 3, 0).numpy()), return_tensors="pt")["pixel_values"].shape == (
        1,
        4,
        3,
        24,
        24,
    )


# --- VideoMAE's code


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
    assert ours.grid == (8, 28, 28)  # nothing in the file says otherwise
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
    with pytest.raises(UserError, match="a width of 48 has; pass heads="):
        load_model(path)
    with pytest.raises(UserError, match="a width of 24 has; pass decoder_heads="):
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


@pytest.mark.parametrize("build", [encoder, classifier, lambda: VideoMAE(CONFIG)])
def test_names_go_there_and_back(build: Callable[[], nn.Module]) -> None:
    model = build()
    name = "encoder." if isinstance(model, Encoder) else ""
    tensors = {name + key: tensor for key, tensor in shaken(model).state_dict().items()}
    for back, there in ((from_videomae, to_videomae), (from_hugging_face, to_hugging_face)):
        found = back(there(tensors, PATCH))
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[key], tensors[key]) for key in tensors)


# --- our own


def test_our_runs_checkpoints_and_files(tmp_path: Path) -> None:
    regressor = RegressorConfig(depth=1, width=24, heads=3)
    mam2_config = dataclasses.replace(
        CONFIG, model=dataclasses.replace(CONFIG.model, objective="mam2", regressor=regressor)
    )
    for name, model, config in (
        ("videomae", VideoMAE(CONFIG), CONFIG),
        ("mam2", MAM2(mam2_config, codes=7), mam2_config),
    ):
        folder = checkpoint.write(tmp_path / name, 3, dict(shaken(model).state_dict()), {}, config, notes={})
        expected = model.eval().encode(clip())
        for path in (tmp_path / name, folder, folder / checkpoint.WEIGHTS):
            loaded = load_model(path)
            assert type(loaded) is type(model)
            assert not loaded.training
            assert torch.equal(load_encoder(str(path)).encode(clip()), expected)


def test_our_fine_tuned_classifier(tmp_path: Path) -> None:
    ours = shaken(classifier())
    model = EncoderConfig(patch=8, width=48, depth=2, heads=4, mlp_ratio=2, classes=len(CLASSES))
    config = FinetuneConfig(data=CONFIG.data, model=model)
    weights, notes = dict(ours.state_dict()), {"classes": json.dumps(CLASSES)}
    checkpoint.write(tmp_path / "run", 3, weights, {}, config, notes=notes)
    assert torch.equal(load_model(tmp_path / "run")(clip()), ours(clip()))
    assert torch.equal(load_encoder(tmp_path / "run").encode(clip()), ours.encoder.encode(clip()))
    assert class_names(tmp_path / "run") == CLASSES


def test_an_encoder_for_clips_of_another_size(tmp_path: Path) -> None:
    write_hugging_face(encoder(), tmp_path)
    longer, larger = load_encoder(tmp_path, frames=8), load_encoder(tmp_path, size=48, positions="recompute")
    assert longer.encode(clip(8)).shape == (2, 4 * 9, 48)
    assert larger.encode(clip(4, 48)).shape == (2, 2 * 36, 48)
    assert not torch.equal(longer.positions, sincos_positions(4 * 9, 48))
    assert torch.equal(larger.positions, sincos_positions(2 * 36, 48))
    with pytest.raises(UserError, match=r"size: expected a multiple of the patch, 8, found 20"):
        load_encoder(tmp_path, size=20)


# --- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.1.attn.v_bias"), "lacks encoder.blocks.1.attn.v_bias"),
        (lambda s: s.update({"blocks.0.gamma_1": torch.ones(384)}), "no place for, encoder.blocks.0.gamma_1"),
        (lambda s: s.update({"pos_embed": torch.ones(1, 18, 384)}), "no place for, pos_embed"),
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
    with pytest.raises(UserError, match=r"asks for .*mkdir; not loaded"):
        load_encoder(tmp_path / "bad.pth")
    assert not (tmp_path / "made").exists()


def test_a_head_on_the_first_token_is_refused(hugging_face: Callable[..., nn.Module], tmp_path: Path) -> None:
    theirs = hugging_face("VideoMAEForVideoClassification", use_mean_pooling=False)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="reads the first token"):
        load_model(tmp_path)
    close(load_encoder(tmp_path).encode(clip()), theirs.videomae(normalized(clip())).last_hidden_state)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "vivit"}, "model_type 'videomae', found 'vivit'"),
        ({"model_type": "videomae", "hidden_act": "relu"}, "hidden_act 'gelu', found 'relu'"),
        ({"model_type": "videomae", "num_channels": 1}, "num_channels 3, found 1"),
        ({"model_type": "videomae"}, "found neither"),
    ],
)
def test_other_folders_are_refused(tmp_path: Path, config: dict[str, object], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        load_model(tmp_path)


def test_tensors_of_a_folder_that_do_not_fit_are_named(tmp_path: Path) -> None:
    write_hugging_face(classifier(), tmp_path)
    file = tmp_path / "model.safetensors"
    written = load_file(file)
    embedding = "videomae.embeddings.patch_embeddings.projection.weight"
    save_file(written | {"videomae.embeddings.position_embeddings": torch.ones(18, 48)}, file)
    with pytest.raises(UserError, match=r"no place for, embeddings.position_embeddings$"):
        load_model(tmp_path)
    save_file({name: tensor for name, tensor in written.items() if name != embedding}, file)
    with pytest.raises(UserError, match=r"lacks encoder.patch_embed.weight"):
        load_encoder(tmp_path)
    save_file({name: tensor for name, tensor in written.items() if "layer.1." not in name or "key" in name}, file)
    with pytest.raises(UserError, match=r"lacks encoder.blocks.1.norm1.weight, .* and \d more"):
        load_encoder(tmp_path)


def test_other_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none: no such file"):
        load_encoder(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: expected a folder of Hugging Face, config.json"):
        load_encoder(tmp_path / "empty")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="run: a run without a checkpoint yet"):
        load_encoder(tmp_path / "run")
    for name in ("text.pth", "text.safetensors"):
        (tmp_path / name).write_text("not a checkpoint")
        with pytest.raises(UserError, match=name):
            load_encoder(tmp_path / name)


def test_what_others_cannot_compute_is_not_written(tmp_path: Path) -> None:
    resampled = encoder()
    set_clip_size(resampled, 8, 24)
    with pytest.raises(UserError, match="positions are resampled"):
        write_hugging_face(resampled, tmp_path)
    with pytest.raises(UserError, match="text embeddings"):
        write_videomae(Classifier(encoder(), TextHead(48, torch.randn(3, 8))), tmp_path / "out.pth")
    assert not any(tmp_path.iterdir())
