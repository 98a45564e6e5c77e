"""`mam2 train-tokenizer`: a VQ model of the user's clips, measured on videos it has not seen, whole or not there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from torch import Tensor

from mam2.engine.commands.train_tokenizer import verdict
from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.data import loader as loaders
from mam2.engine.tokenizer import prepare as training
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

    class Watched(loaders.ClipLoader):
        def __init__(self, manifest, *args, **options) -> None:  # type: ignore[no-untyped-def]
            seen.append({video.path for video in manifest.videos})
            super().__init__(manifest, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loaders, "ClipLoader", Watched)
        assert train(clips, tmp_path / "tokenizer") == 0
    trained, held_out = seen
    assert not trained & held_out
    assert (len(trained), len(held_out)) == (22, 2)
    names = {path.name for path in (tmp_path / "tokenizer").iterdir()}
    assert names == {"tokenizer.safetensors", "reconstructions.png", "training.png", "training.jsonl", "report.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]
    numbers = json.loads((tmp_path / "tokenizer" / "report.json").read_text())
    assert numbers["frames"] == 4
    out = capsys.readouterr().out
    assert f"PSNR {numbers['psnr_db']:.1f} dB" in out
    assert f"{numbers['codes_used']} of 16 codes used, perplexity {numbers['perplexity']:.0f}" in out
    curve = [json.loads(line) for line in (tmp_path / "tokenizer" / "training.jsonl").read_text().splitlines()]
    assert [point["step"] for point in curve] == [20, 40]
    for picture in ("reconstructions.png", "training.png"):
        assert imread(tmp_path / "tokenizer" / picture).std() > 0.02
    config = small(tokenizer={"path": str(tmp_path / "tokenizer" / "tokenizer.safetensors")}, optim={"epochs": 1.0})
    assert pretrain(config, clips, tmp_path / "run", progress=False).step > 0
    assert f"16 codes from {tmp_path}" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize(("psnr", "told"), [(15.0, "not fit for pre-training"), (15.2, "use it with --tokenizer.path")])
def test_one_worse_than_the_mean_color_is_not_recommended(psnr: float, told: str) -> None:
    empty = torch.empty(0)
    result = Reconstruction(
        frames=4,
        psnr_db=psnr,
        mean_colour_psnr_db=15.1,
        codes_used=3,
        perplexity=2.0,
        original=empty,
        reconstructed=empty,
    )
    assert verdict(result, Path("tokenizer.safetensors")).startswith(told)


@pytest.mark.slow
def test_interrupted_it_leaves_nothing(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    from mam2.engine.tokenizer import quality as reconstruction

    for module, name in ((training, "train_tokenizer"), (reconstruction, "draw_training")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, interrupted)
            assert train(clips, tmp_path / "tokenizer") == 130
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--factor", "6"), "factor: expected a power of two from 2, found 6"),
        (("--channels", "12"), "channels: expected a multiple of 8, found 12"),
        (("--size", "30"), "--size 30 is not a multiple of --factor 4"),
        (("--steps", "1"), "--steps 1: expected at least 2"),
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
    assert "is there already; name another folder" in capsys.readouterr().err
    assert train(next(clips.rglob("*.mp4")), tmp_path / "tokenizer") == 2
    assert "at least two are needed" in capsys.readouterr().err


def test_reconstruction_is_measured_as_defined() -> None:
    torch.manual_seed(0)
    vqgan = VQGAN(small(8, 16, 4)).eval()
    clips = [torch.randint(0, 256, (batch, 2, 16, 16, 3), dtype=torch.uint8) for batch in (2, 1)]
    result = measure_reconstruction(vqgan, clips)
    images = torch.cat([clip.flatten(0, 1) for clip in clips]).movedim(-1, 1)
    with torch.no_grad():
        codes = vqgan.codes(scale_pixels(images))
        back = ((vqgan.decode(codes) + 1) / 2).clamp(0, 1)
    original = images / 255

    def psnr(error: Tensor) -> float:
        return float(-10 * error.square().double().mean().log10())

    assert result.frames == 6
    assert result.psnr_db == pytest.approx(psnr(back - original), abs=1e-3)
    assert result.mean_colour_psnr_db == pytest.approx(psnr(original - original.mean((2, 3), keepdim=True)), abs=1e-3)
    assert result.codes_used == len(codes.unique())
    assert len(result.original) == len(result.reconstructed) == 3  # one of each clip
    torch.testing.assert_close(result.original[1], original[2].movedim(0, -1), rtol=0, atol=1e-6)
    torch.testing.assert_close(result.reconstructed[2], back[4].movedim(0, -1), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="found none"):
        measure_reconstruction(vqgan, [])
