"""`mam2 train-tokenizer`: a VQ model of the user's clips, measured on held-out videos; a complete folder or none."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from torch import Tensor

from mam2.engine.checkpoints.load import load_model
from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.errors import UserError
from mam2.engine.tokenizer import from_videos
from mam2.engine.tokenizer.from_videos import verdict
from mam2.engine.tokenizer.quality import Reconstruction, measure_reconstruction
from mam2.engine.tokenizer.tokenizer import scale_pixels
from mam2.engine.tokenizer.vqgan import VQGAN, small
from mam2.engine.train.pretrain import pretrain
from tests.helpers.commands import exit_status

OPTIONS = ("--codes", "16", "--channels", "8", "--factor", "4", "--size", "32", "--steps", "40", "--batch", "8")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory, synthetic_clips: Callable[..., None]) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    synthetic_clips(folder, train=24)
    return folder / "train"


def train(data: Path, out: Path, *options: str) -> int:
    return exit_status("train-tokenizer", data, "--out", out, *OPTIONS, "--threads", "1", *options)


@pytest.mark.slow
def test_it_leaves_a_tokenizer_that_pretrain_takes_with_numbers_and_pictures(
    clips: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    small: Callable[..., PretrainConfig],
) -> None:
    seen: list[set[str]] = []

    class Watched(from_videos.ClipLoader):
        def __init__(self, manifest, *args, **options) -> None:  # type: ignore[no-untyped-def]
            seen.append({video.path for video in manifest.videos})
            super().__init__(manifest, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(from_videos, "ClipLoader", Watched)
        assert train(clips, tmp_path / "tokenizer") == 0
    held_out, trained = seen
    assert not trained & held_out
    assert (len(trained), len(held_out)) == (22, 2)
    names = {path.name for path in (tmp_path / "tokenizer").iterdir()}
    assert names == {"tokenizer.safetensors", "reconstructions.png", "training.png", "training.jsonl", "report.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]
    numbers = json.loads((tmp_path / "tokenizer" / "report.json").read_text())
    assert numbers["frames"] == 4
    assert numbers["explained"] >= numbers["kmeans_explained"]
    out = capsys.readouterr().out
    state = f"kept: step {numbers['kept_step']} of 40" if numbers["kept_step"] else "kept: the start"
    assert f"held out: 2 videos, 4 frames; {state}" in out
    shares = f"{numbers['explained']:.1%} ({numbers['color_explained']:.1%} of its color)"
    assert f"variance within a frame: {shares}; k-means of raw" in out
    assert f"centers: {numbers['kmeans_explained']:.1%}" in out
    assert 0 < numbers["kmeans_explained"] < 1
    assert f"PSNR {numbers['psnr_db']:.1f} dB" in out
    assert f"{numbers['codes_used']} of 16 codes used, perplexity {numbers['perplexity']:.0f}" in out
    curve = [json.loads(line) for line in (tmp_path / "tokenizer" / "training.jsonl").read_text().splitlines()]
    assert [point["step"] for point in curve] == [20, 40]
    for picture in ("reconstructions.png", "training.png"):
        assert imread(tmp_path / "tokenizer" / picture).std() > 0.02
    config = small(tokenizer={"path": str(tmp_path / "tokenizer" / "tokenizer.safetensors")}, optim={"epochs": 1.0})
    assert pretrain(config, clips, tmp_path / "run", progress=False).step > 0
    assert f"16 codes from {tmp_path}" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.slow
def test_several_codes_per_patch_explain_more_and_pretrain_must_name_them(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], small: Callable[..., PretrainConfig]
) -> None:
    assert train(clips, tmp_path / "one") == 0
    assert train(clips, tmp_path / "three", "--codes-per-patch", "3") == 0
    out = capsys.readouterr().out
    one, three = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "three"))
    assert three["explained"] > one["explained"] + 0.02
    assert three["explained"] >= three["kmeans_explained"] > one["kmeans_explained"]
    assert f"{three['codes_used']} of 48 codes used" in out
    assert "tokenizer.safetensors --tokenizer.codes-per-patch 3" in out
    path = {"path": str(tmp_path / "three" / "tokenizer.safetensors")}
    with pytest.raises(UserError, match=r"has 3 codes per patch, tokenizer.codes_per_patch is 1; set it to 3"):
        pretrain(small(tokenizer=path), clips, tmp_path / "refused", progress=False)
    config = small(tokenizer={**path, "codes_per_patch": 3}, optim={"epochs": 1.0})
    assert pretrain(config, clips, tmp_path / "run", progress=False).step > 0
    assert f"3 × 16 codes from {tmp_path}" in (tmp_path / "run" / "log.txt").read_text()
    assert load_model(tmp_path / "run").appearance_decoder.head.out_features == 3 * 16


@pytest.mark.parametrize(
    ("explained", "kept", "message"),
    [
        (-0.01, 20, "not fit for pre-training"),
        (0.8, 0, "weak: training found nothing better"),
        (0.81, 20, "better than k-means"),
    ],
)
def test_the_verdict_follows_the_numbers(explained: float, kept: int, message: str) -> None:
    empty = torch.empty(0)
    result = Reconstruction(
        frames=4,
        psnr_db=15.0,
        mean_color_psnr_db=15.1,
        explained=explained,
        color_explained=None,
        kmeans_explained=0.8,
        kmeans_color_explained=None,
        codes_used=3,
        perplexity=2.0,
        original=empty,
        reconstructed=empty,
        from_kmeans=empty,
    )
    assert verdict(result, kept, Path("tokenizer.safetensors")).startswith(message)


@pytest.mark.slow
def test_interrupted_it_leaves_nothing(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for name in ("train_with_progress", "draw_training"):
        with monkeypatch.context() as patch:
            patch.setattr(from_videos, name, interrupted)
            assert train(clips, tmp_path / "tokenizer") == 130
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--factor", "6"), "factor: expected a power of two from 2, found 6"),
        (("--channels", "12"), "channels: expected a multiple of 8, found 12"),
        (("--size", "30"), "--size 30 is not a multiple of --factor 4"),
        (("--steps", "1"), "--steps 1: expected at least 2"),
        (("--gradient-weight", "-1"), "--gradient-weight -1.0: expected at least 0"),
        (("--codes-per-patch", "0"), "--codes-per-patch 0: expected at least 1"),
    ],
)
def test_wrong_values_are_named(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    assert train(clips, tmp_path / "tokenizer", *options) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_holds_something_and_too_few_videos_are_refused(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kept.txt").write_text("")
    assert train(clips, tmp_path) == 2
    assert "already exists: choose another folder" in capsys.readouterr().err
    assert train(next(clips.rglob("*.mp4")), tmp_path / "tokenizer") == 2
    assert "expected at least two" in capsys.readouterr().err


def test_reconstruction_is_measured_as_defined() -> None:
    torch.manual_seed(0)
    vqgan = VQGAN(small(8, 16, 4)).eval()
    clips = [torch.randint(0, 256, (batch, 2, 16, 16, 3), dtype=torch.uint8) for batch in (2, 1)]
    centers = torch.rand(5, 48) * 2 - 1
    result = measure_reconstruction(vqgan, clips, centers[None])
    images = torch.cat([clip.flatten(0, 1) for clip in clips]).movedim(-1, 1)
    with torch.no_grad():
        codes = vqgan.codes(scale_pixels(images))
        back = ((vqgan.decode(codes) + 1) / 2).clamp(0, 1)
    original = images / 255
    by_patch = torch.empty_like(original)
    for row, column in itertools.product(range(0, 16, 4), repeat=2):
        window = original[:, :, row : row + 4, column : column + 4]
        chosen = (torch.cdist((window * 2 - 1).flatten(1), centers)).argmin(1)
        by_patch[:, :, row : row + 4, column : column + 4] = (centers[chosen].view_as(window) + 1) / 2

    def psnr(error: Tensor) -> float:
        return float(-10 * error.square().double().mean().log10())

    def explained(found: Tensor, true: Tensor) -> float:
        deviation = true - true.mean((2, 3), keepdim=True)
        return float(1 - (found - true).square().sum() / deviation.square().sum())

    def color(frames: Tensor) -> Tensor:
        return frames - frames.mean(1, keepdim=True)

    assert result.frames == 6
    assert result.psnr_db == pytest.approx(psnr(back - original), abs=1e-3)
    assert result.mean_color_psnr_db == pytest.approx(psnr(original - original.mean((2, 3), keepdim=True)), abs=1e-3)
    assert result.explained == pytest.approx(explained(back, original), abs=1e-4)
    assert result.color_explained == pytest.approx(explained(color(back), color(original)), abs=1e-4)
    assert result.kmeans_explained == pytest.approx(explained(by_patch, original), abs=1e-4)
    assert result.kmeans_color_explained == pytest.approx(explained(color(by_patch), color(original)), abs=1e-4)
    assert result.codes_used == len(codes.unique())
    assert len(result.original) == len(result.reconstructed) == len(result.from_kmeans) == 3  # one frame per clip
    torch.testing.assert_close(result.original[1], original[2].movedim(0, -1), rtol=0, atol=1e-6)
    torch.testing.assert_close(result.reconstructed[2], back[4].movedim(0, -1), rtol=0, atol=1e-4)
    torch.testing.assert_close(result.from_kmeans[2], by_patch[4].movedim(0, -1), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="found none"):
        measure_reconstruction(vqgan, [], centers[None])


def test_gray_frames_have_no_color_to_explain() -> None:
    vqgan = VQGAN(small(8, 16, 4)).eval()
    gray = torch.randint(0, 256, (1, 2, 16, 16, 1), dtype=torch.uint8).expand(-1, -1, -1, -1, 3)
    assert measure_reconstruction(vqgan, [gray], torch.rand(1, 5, 48)).color_explained is None
