"""Weights from and to Hugging Face's VideoMAE: the same numbers both ways, and folders that do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mam2.engine.checkpoints.export import write_hugging_face
from mam2.engine.checkpoints.load import class_names, load_encoder, load_model
from mam2.engine.errors import UserError
from mam2.engine.model.classifier import Classifier
from mam2.engine.model.videomae import VideoMAE
from mam2.kernels import tube_mask
from tests.helpers.small_models import CLASSES, CONFIG, classifier, clip, close, encoder, normalized, shaken

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


@pytest.fixture
def hugging_face() -> Callable[..., nn.Module]:
    """hugging_face(class name, config=value, …): one of its models, every parameter shaken."""
    transformers = pytest.importorskip("transformers")

    def build(name: str, **config: object) -> nn.Module:
        return shaken(getattr(transformers, name)(transformers.VideoMAEConfig(**SIZES, **config)))

    return build


def loaded(folder: Path, name: str) -> nn.Module:
    """Loads a folder that we wrote into the class `name`.

    transformers may lack only the bias of the keys (with which it starts at 0), and may leave out only the names of
    biases that it does not know.
    """
    transformers = pytest.importorskip("transformers")
    theirs, report = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    found = {kind: set(names) for kind, names in report.items() if kind != "error_msgs"}
    state = theirs.state_dict()
    assert found.pop("missing_keys") == {name for name in state if name.endswith("key.bias")}
    unknown = {name.rpartition(".attention.attention.")[2] for name in found.pop("unexpected_keys")}
    assert unknown in (set(), {"q_bias", "v_bias"}, {"query.bias", "value.bias"})
    assert not any(found.values())
    assert not report["error_msgs"]
    assert not any(tensor.any() for name, tensor in state.items() if name.endswith("key.bias"))
    return theirs.eval()


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


@pytest.mark.parametrize("form", ["q_bias", "query.bias", "key.bias", "pickle", "shards", "half"])
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
    if form == "query.bias":
        state = {n.replace("q_bias", "query.bias").replace("v_bias", "value.bias"): t for n, t in state.items()}
    if form == "key.bias":
        torch.manual_seed(4)
        queries = [name for name in state if name.endswith("query.weight")]
        state |= {name.replace("query.weight", "key.bias"): torch.randn(48) for name in queries}
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
    theirs = hugging_face("VideoMAEModel", qkv_bias=False)  # releases with the key qv_bias accept this one too
    assert not any(name.endswith(("query.bias", "q_bias")) for name in theirs.state_dict())
    theirs.save_pretrained(tmp_path)
    close(load_encoder(tmp_path).encode(clip()), theirs(normalized(clip())).last_hidden_state)


@torch.no_grad()
def test_biases_in_the_file_count_more_than_a_key_that_the_release_did_not_know(
    hugging_face: Callable[..., nn.Module], tmp_path: Path
) -> None:
    """A release that knows only one of qkv_bias and qv_bias stores the other one, and has biases all the same."""
    theirs = hugging_face("VideoMAEModel")
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"qv_bias": False}))
    close(load_encoder(tmp_path).encode(clip()), theirs(normalized(clip())).last_hidden_state)


@torch.no_grad()
def test_hugging_face_gives_what_our_encoder_gives(tmp_path: Path) -> None:
    ours = shaken(encoder())
    assert write_hugging_face(ours, tmp_path) == "VideoMAEModel"
    theirs = loaded(tmp_path, "VideoMAEModel")
    expected = ours.encode(clip())
    close(theirs(normalized(clip())).last_hidden_state, expected)
    for bias in ("q_bias", "v_bias"):
        getattr(ours.blocks[0].attn, bias).zero_()
        assert (ours.encode(clip()) - expected).abs().max() > 0.01 * expected.abs().max(), bias


@torch.no_grad()
def test_hugging_face_gives_what_our_pre_training_model_gives(tmp_path: Path) -> None:
    ours = shaken(VideoMAE(CONFIG))
    assert write_hugging_face(ours, tmp_path) == "VideoMAEForPreTraining"
    theirs = loaded(tmp_path, "VideoMAEForPreTraining")
    mask = tube_mask(2, (2, 3, 3), 0.7, seed=0, device="cpu")
    output = theirs(normalized(clip()), bool_masked_pos=mask.as_bool())
    close(output.logits, ours.predict_pixels(clip(), mask), 1e-4)  # another epsilon after the decoder's blocks
    close(output.loss, ours.loss(clip(), mask), 1e-4)


@torch.no_grad()
def test_hugging_face_gives_what_our_classifier_gives(tmp_path: Path) -> None:
    ours = shaken(classifier())
    assert write_hugging_face(ours, tmp_path, CLASSES) == "VideoMAEForVideoClassification"
    theirs = loaded(tmp_path, "VideoMAEForVideoClassification")
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
    with pytest.raises(UserError, match=r"contains unexpected embeddings.position_embeddings$"):
        load_model(tmp_path)
    save_file({name: tensor for name, tensor in written.items() if name != embedding}, file)
    with pytest.raises(UserError, match=r"lacks encoder.patch_embed.weight"):
        load_encoder(tmp_path)
    save_file({name: tensor for name, tensor in written.items() if "layer.1." not in name or "key" in name}, file)
    with pytest.raises(UserError, match=r"lacks encoder.blocks.1.norm1.weight, .* and \d more"):
        load_encoder(tmp_path)
