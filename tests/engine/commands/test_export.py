"""`mam2 export`: writes every format, and the program that each format is for reads it back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mam2.engine.checkpoints import checkpoint
from mam2.engine.checkpoints.export import write_hugging_face
from mam2.engine.checkpoints.load import load_encoder, load_model
from mam2.engine.checkpoints.traced import write_onnx, write_torch
from mam2.engine.config.pretrain import DecoderConfig, ModelConfig, PretrainConfig, RegressorConfig
from mam2.engine.config.training import DataConfig
from mam2.engine.model.classifier import Classifier, TextHead, linear_head
from mam2.engine.model.mam2 import MAM2
from mam2.engine.model.pixels import PIXEL_MEAN, PIXEL_STD
from mam2.engine.model.positions import set_clip_size
from tests.helpers.commands import exit_status
from tests.helpers.small_models import close, encoder, shaken

CONFIG = PretrainConfig(
    data=DataConfig(frames=4, size=24),
    model=ModelConfig(
        patch=8,
        width=48,
        depth=2,
        heads=4,
        mlp_ratio=2,
        regressor=RegressorConfig(depth=1, width=24, heads=3),
        decoder=DecoderConfig(depth=1, width=24, heads=3),
    ),
)


def clip(batch: int = 3) -> Tensor:
    """uint8 [B, 3, 4, 24, 24]."""
    return torch.randint(0, 256, (batch, 3, 4, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a MAM2."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    checkpoint.write(folder, 7, dict(shaken(MAM2(CONFIG, codes=9)).state_dict()), {}, CONFIG, metadata={})
    return folder


@torch.no_grad()
def test_to_hugging_face(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    assert exit_status("export", run, "--to", "huggingface", "--out", tmp_path / "new" / "hf") == 0
    assert "hf: VideoMAEModel, for clips [B, 3, 4, 24, 24]" in capsys.readouterr().out
    mean, std = (torch.tensor(values)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD))
    theirs = transformers.VideoMAEModel.from_pretrained(tmp_path / "new" / "hf").eval()
    found = theirs((clip().transpose(1, 2) / 255 - mean) / std).last_hidden_state
    expected = load_encoder(run).encode(clip())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert torch.equal(load_encoder(tmp_path / "new" / "hf").encode(clip()), expected)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["hf"]
    fine_tuned = transformers.VideoMAEForVideoClassification.from_pretrained(
        tmp_path / "new" / "hf", use_mean_pooling=True, num_labels=5
    )
    for (name, found), expected in zip(fine_tuned.videomae.named_parameters(), theirs.parameters(), strict=False):
        assert torch.equal(found, expected), name


@torch.no_grad()
def test_from_hugging_face_to_videomae(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classifier = shaken(Classifier(encoder(), linear_head(48, 3)))
    (tmp_path / "hf").mkdir()
    write_hugging_face(classifier, tmp_path / "hf", ("walk", "run", "jump"))
    assert exit_status("export", tmp_path / "hf", "--to", "videomae", "--out", tmp_path / "checkpoint.pth") == 0
    assert "checkpoint.pth: Classifier, for" in capsys.readouterr().out
    assert exit_status("export", run, "--to", "videomae", "--out", tmp_path / "encoder.pth") == 0
    for path, expected in (
        (tmp_path / "checkpoint.pth", classifier.encoder),
        (tmp_path / "encoder.pth", load_encoder(run)),
    ):
        again = load_encoder(path, heads=4)
        set_clip_size(again, 4, 24, "recompute")  # such a file does not state the size of its clips
        torch.testing.assert_close(again.encode(clip()), expected.encode(clip()), rtol=1e-5, atol=1e-5)
    state = torch.load(tmp_path / "encoder.pth", weights_only=True)["model"]
    assert all(name.startswith("encoder.") for name in state)
    assert sum(tensor.numel() for tensor in state.values()) == sum(p.numel() for p in load_encoder(run).parameters())


@pytest.mark.slow
@torch.no_grad()
def test_to_torch_without_this_project(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status("export", run, "--to", "torch", "--out", tmp_path / "encoder.pt2") == 0
    assert "encoder.pt2: Encoder" in capsys.readouterr().out
    torch.save(clip(), tmp_path / "clip.pt")
    code = (
        "import sys, torch; program = torch.export.load(sys.argv[1]).module(); video = torch.load(sys.argv[2]); "
        "torch.save([program(video[:n]).detach() for n in (1, 3)], sys.argv[3]); "
        "assert not any(name.startswith('mam2') for name in sys.modules)"
    )
    files = [str(tmp_path / name) for name in ("encoder.pt2", "clip.pt", "found.pt")]
    subprocess.run([sys.executable, "-c", code, *files], check=True)
    one, three = torch.load(tmp_path / "found.pt")
    expected = load_encoder(run).encode(clip())
    torch.testing.assert_close(three, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one, expected[:1], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_to_onnx(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    assert exit_status("export", run, "--to", "onnx", "--out", tmp_path / "encoder.onnx") == 0
    assert "encoder.onnx: Encoder" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.onnx"]
    session = runtime.InferenceSession(str(tmp_path / "encoder.onnx"))
    expected = load_encoder(run).encode(clip())
    for batch in (1, 3):
        (found,) = session.run(["tokens"], {"video": clip()[:batch].numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected[:batch], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("text", [False, True])
@torch.no_grad()
def test_a_classifier_as_a_graph_gives_logits(tmp_path: Path, text: bool) -> None:
    """Our format also keeps resampled positions and a head that compares with texts, which the others cannot."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    head = TextHead(48, torch.randn(3, 8, generator=torch.Generator().manual_seed(3))) if text else linear_head(48, 3)
    classifier = shaken(Classifier(encoder(), head))
    set_clip_size(classifier.encoder, 8, 24)
    video = clip().repeat_interleave(2, dim=2)
    expected = classifier(video)
    write_torch(classifier, tmp_path / "model.pt2")
    close(torch.export.load(tmp_path / "model.pt2").module()(video), expected)
    write_onnx(classifier, tmp_path / "model.onnx")
    (found,) = runtime.InferenceSession(str(tmp_path / "model.onnx")).run(["logits"], {"video": video.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)


def test_a_missing_package_is_named(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else object())
    assert exit_status("export", run, "--to", "onnx", "--out", tmp_path / "encoder.onnx") == 2
    assert "export to ONNX needs onnxscript: pip install onnxscript" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_mistakes_are_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status("export", tmp_path / "none", "--to", "torch", "--out", tmp_path / "out") == 2
    assert "none: no such file or folder" in capsys.readouterr().err
    (tmp_path / "there").write_text("mine")
    assert exit_status("export", run, "--to", "videomae", "--out", tmp_path / "there") == 2
    assert "there already exists" in capsys.readouterr().err
    assert exit_status("export", run, "--to", "videomae", "--out", tmp_path / "there" / "out.pth") == 2
    assert "cannot be written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there").read_text() == "mine"
    assert isinstance(load_model(run), MAM2)
