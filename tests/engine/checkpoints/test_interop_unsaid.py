"""Weights of other projects with missing or wrong metadata: assumptions are logged, errors name the cause."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from mam2.engine.checkpoints import checkpoint
from mam2.engine.checkpoints.export import write_hugging_face, write_videomae
from mam2.engine.checkpoints.load import class_names, load_encoder, load_model
from mam2.engine.checkpoints.pickles import load_pickle
from mam2.engine.checkpoints.traced import write_onnx, write_torch
from mam2.engine.config.pretrain import LossConfig
from mam2.engine.errors import UserError
from mam2.engine.model.classifier import Classifier
from mam2.engine.model.encoder import Encoder
from mam2.engine.model.mam2 import MAM2
from mam2.engine.model.videomae import VideoMAE
from mam2.engine.tokenizer.files import VQGANFileError, load_vqgan
from mam2.kernels import tube_mask
from tests.helpers.commands import exit_status
from tests.helpers.small_models import CLASSES, CONFIG, classifier, clip, close, encoder, normalized, shaken


def bare(path: Path, **others: object) -> Path:
    """A .pth of the small encoder without arguments."""
    write_videomae(shaken(encoder()), path)
    torch.save({"model": load_pickle(path)["model"], **others}, path)
    return path


@torch.no_grad()
def test_an_unknown_clip_size_is_assumed_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = bare(tmp_path / "bare.pth")
    with caplog.at_level(logging.WARNING, logger="mam2"):
        assert load_encoder(path, size=24, heads=4).encode(clip(16)).shape == (2, 72, 48)
    assert "does not state the frames of its clips; 16 frames of 24² are assumed" in caplog.text
    caplog.clear()
    # the size of its training: its positions are used as they are
    close(load_encoder(path, frames=4, size=24, heads=4).encode(clip()), shaken(encoder()).encode(clip()))
    close(load_model(path, frames=4, size=24, heads=4).encode(clip()), shaken(encoder()).encode(clip()))
    write_videomae(shaken(encoder()), tmp_path / "said.pth")
    close(load_encoder(tmp_path / "said.pth", heads=4).encode(clip()), shaken(encoder()).encode(clip()))
    assert not caplog.text
    with pytest.raises(UserError, match=r"pass --heads or heads="):
        load_encoder(path)
    for wrong in ({"frames": 0}, {"size": -8}, {"frames": 3}):
        with pytest.raises(UserError, match=r"bare\.pth: .*(at least 1 frame|do not divide into tokens)"):
            load_encoder(path, heads=4, **wrong)


def test_a_decoder_takes_no_other_clips(tmp_path: Path) -> None:
    folder = checkpoint.write(tmp_path / "run", 1, dict(VideoMAE(CONFIG).state_dict()), {}, CONFIG, metadata={})
    with pytest.raises(UserError, match="its decoder predicts clips of 4 frames of 24², not 8 of 24²"):
        load_model(folder, frames=8)
    assert load_encoder(folder, frames=8).grid == (4, 3, 3)


@pytest.mark.parametrize(("mean_pooling", "hidden"), [(True, 48), (False, 60), (True, 37)])
@torch.no_grad()
def test_hugging_faces_pre_training_models_of_any_kind(tmp_path: Path, mean_pooling: bool, hidden: int) -> None:
    """Mean pooling (the default: no LayerNorm after the encoder), and a decoder with a different MLP ratio."""
    transformers = pytest.importorskip("transformers")
    sizes = {"image_size": 24, "patch_size": 8, "num_frames": 4, "hidden_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "intermediate_size": 97, "decoder_hidden_size": 24}
    sizes |= {"decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 3, "decoder_intermediate_size": hidden}
    config = transformers.VideoMAEConfig(**sizes, use_mean_pooling=mean_pooling, attn_implementation="eager")
    theirs = shaken(transformers.VideoMAEForPreTraining(config))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    assert isinstance(ours, VideoMAE)
    mask = tube_mask(2, (2, 3, 3), 0.7, seed=0, device="cpu")
    output = theirs(normalized(clip()), bool_masked_pos=mask.as_bool())
    close(ours.predict_pixels(clip(), mask), output.logits)
    close(ours.loss(clip(), mask), output.loss)
    (tmp_path / "ours").mkdir()
    assert write_hugging_face(ours, tmp_path / "ours") == "VideoMAEForPreTraining"
    close(load_model(tmp_path / "ours").predict_pixels(clip(), mask), output.logits, 1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 0}, "patch_size in config.json to be an integer of at least 1, found 0"),
        ({"num_frames": 10**8}, "would be 450000000 tokens per clip; expected at most"),
        ({"num_frames": "16"}, "num_frames to be an integer of at least 1, found '16'"),
        ({"tubelet_size": -2}, "tubelet_size to be an integer of at least 1, found -2"),
        ({"num_attention_heads": 0}, "num_attention_heads to be an integer"),
        ({"image_size": []}, "expected image_size to be a square"),
        ({"id2label": {"x": "walk"}}, "expected id2label to map numbers to names"),
    ],
)
def test_sizes_of_a_folder_that_cannot_be_are_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    write_hugging_face(encoder(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message):
        load_encoder(tmp_path)


def test_sizes_of_a_pickle_that_cannot_be_are_named(tmp_path: Path) -> None:
    path = bare(tmp_path / "bad.pth", args={"num_frames": 0, "input_size": 24})
    with pytest.raises(UserError, match=r"args\.num_frames to be an integer of at least 1, found 0"):
        load_encoder(path, heads=4)


@torch.no_grad()
def test_a_legacy_file_is_read_and_its_code_is_not_run(tmp_path: Path) -> None:
    path = bare(tmp_path / "old.pth")
    torch.save(load_pickle(path), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    close(load_encoder(path, frames=4, size=24, heads=4).encode(clip()), shaken(encoder()).encode(clip()))

    class Malicious:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.mkdir, (tmp_path / "made",)

    torch.save({"model": Malicious()}, tmp_path / "bad.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"bad\.pth: expected only tensors, found a pickle that needs .*; not loaded"):
        load_encoder(tmp_path / "bad.pth")
    assert not (tmp_path / "made").exists()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 345678\n"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".ckpt"])
def test_what_is_no_file_of_weights_is_named_for_what_it_is(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"file{suffix}"
    read: Callable[[Path], object] = load_vqgan if suffix == ".ckpt" else load_encoder
    for content, message in (
        (POINTER, r"a Git LFS pointer \(\d+ bytes\), not the weights; `git lfs pull`"),
        (b"<!DOCTYPE html><html>", "a web page, not weights"),
        (b"", "the file is empty"),
    ):
        path.write_bytes(content)
        with pytest.raises(VQGANFileError if suffix == ".ckpt" else UserError, match=message):
            read(path)


def test_a_truncated_file_is_said_to_be_cut_short(tmp_path: Path) -> None:
    whole = bare(tmp_path / "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=rf"cut\.pth: truncated after {len(whole) // 2} bytes"):
        load_encoder(tmp_path / "cut.pth")
    torch.save(load_pickle(tmp_path / "whole.pth"), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    old = (tmp_path / "old.pth").read_bytes()
    for length in (100, len(old) // 2, len(old) - 10):
        (tmp_path / "old.pth").write_bytes(old[:length])
        with pytest.raises(UserError, match=r"old\.pth: expected a PyTorch checkpoint, found a broken one"):
            load_encoder(tmp_path / "old.pth")


@torch.no_grad()
def test_wrappers_of_other_codes(tmp_path: Path) -> None:
    state = load_pickle(bare(tmp_path / "plain.pth"))["model"]
    torch.save({"teacher": state, "epoch": 3}, tmp_path / "one.pth")
    close(
        load_encoder(tmp_path / "one.pth", frames=4, size=24, heads=4).encode(clip()), shaken(encoder()).encode(clip())
    )
    torch.save({"student": state, "teacher": state}, tmp_path / "two.pth")
    with pytest.raises(UserError, match=r"several models \('student', 'teacher'\); save one of them"):
        load_encoder(tmp_path / "two.pth")
    torch.save({"encoder": {"w": torch.ones(2)}, "target_encoder": {"w": torch.ones(2)}}, tmp_path / "none.pth")
    with pytest.raises(
        UserError, match=r"found the keys 'encoder', 'target_encoder', none of which contains a patch_embed"
    ):
        load_encoder(tmp_path / "none.pth")


def other_target(**change: str) -> VideoMAE:
    objective = change.pop("objective", "videomae")
    model = dataclasses.replace(CONFIG.model, objective=objective)
    return shaken(VideoMAE(dataclasses.replace(CONFIG, model=model, loss=LossConfig(**change))))  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("change", [{"objective": "joint"}, {"pixel_normalize": "patch"}])
@torch.no_grad()
def test_a_decoder_of_another_target_is_left_out(tmp_path: Path, change: dict[str, str]) -> None:
    ours = other_target(**change)
    (tmp_path / "hf").mkdir()
    assert write_hugging_face(ours, tmp_path / "hf") == "VideoMAEModel"
    assert write_videomae(ours, tmp_path / "out.pth") == "Encoder"
    for path in (tmp_path / "hf", tmp_path / "out.pth"):
        again = load_model(path, heads=4)
        assert isinstance(again, Encoder)
        close(again.encode(clip()), ours.encode(clip()))


@torch.no_grad()
def test_a_decoder_of_plain_pixels_keeps_its_target(tmp_path: Path) -> None:
    ours, mask = other_target(pixel_normalize="none"), tube_mask(2, (2, 3, 3), 0.7, seed=0, device="cpu")
    write_videomae(ours, tmp_path / "out.pth")
    close(load_model(tmp_path / "out.pth", heads=4, decoder_heads=3).loss(clip(), mask), ours.loss(clip(), mask))


@torch.no_grad()
def test_layer_scale_goes_into_the_layers_before_it(tmp_path: Path) -> None:
    """Our projection's norm does not exist in other code; the exported function is the same."""
    config = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(
            CONFIG.model,
            objective="mam2",
            layer_scale=0.1,
            projection_norm=True,
            regressor=dataclasses.replace(CONFIG.model.regressor, width=24, heads=3, depth=1),
        ),
    )
    ours = shaken(MAM2(config, codes=5))
    folder = checkpoint.write(tmp_path / "run", 1, dict(ours.state_dict()), {}, config, metadata={})
    close(load_encoder(folder).encode(clip()), ours.encode(clip()))
    (tmp_path / "hf").mkdir()
    write_hugging_face(ours, tmp_path / "hf")
    write_videomae(ours, tmp_path / "out.pth")
    assert not any("gamma" in name for name in load_pickle(tmp_path / "out.pth")["model"])
    for path in (tmp_path / "hf", tmp_path / "out.pth"):
        close(load_encoder(path, heads=4).encode(clip()), ours.encode(clip()))
    assert any("gamma_1" in name for name in ours.encoder.state_dict())


def named(run: Path) -> Classifier:
    from mam2.engine.config.finetune import EncoderConfig, FinetuneConfig

    model = shaken(classifier())
    sizes = EncoderConfig(patch=8, width=48, depth=2, heads=4, mlp_ratio=2, classes=len(CLASSES))
    notes = {"classes": json.dumps(CLASSES)}
    checkpoint.write(
        run, 1, dict(model.state_dict()), {}, FinetuneConfig(data=CONFIG.data, model=sizes), metadata=notes
    )
    assert isinstance(model, nn.Module)
    return model  # type: ignore[return-value]


def test_exports_carry_the_order_of_the_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named(tmp_path / "run")
    for to, name in (("torch", "model.pt2"), ("videomae", "model.pth"), ("huggingface", "hf")):
        assert exit_status("export", tmp_path / "run", "--to", to, "--out", tmp_path / name) == 0
        assert "classes, in the order of the logits: 0 walk, 1 run, 2 jump (3)" in capsys.readouterr().out
    files = {"classes.json": ""}
    torch.export.load(tmp_path / "model.pt2", extra_files=files)
    assert json.loads(files["classes.json"]) == list(CLASSES)
    assert class_names(tmp_path / "model.pth") == class_names(tmp_path / "hf") == CLASSES


@pytest.mark.slow
def test_onnx_carries_the_order_of_the_classes(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    model = named(tmp_path / "run")
    write_onnx(model, tmp_path / "model.onnx", CLASSES)
    found = {entry.key: entry.value for entry in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert json.loads(found["classes"]) == list(CLASSES)
    write_torch(model, tmp_path / "plain.pt2")
