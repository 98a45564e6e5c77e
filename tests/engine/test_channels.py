"""Clips of other channels than RGB, from the file to the result: decoding, model, tokenizer, checkpoints, pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mam2.engine import costs
from mam2.engine.checkpoints.channels import GRAY, gray_encoder
from mam2.engine.checkpoints.export import write_hugging_face, write_videomae
from mam2.engine.checkpoints.load import load_encoder
from mam2.engine.checkpoints.traced import write_torch
from mam2.engine.config.finetune import FinetuneConfig
from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.config.recipe import from_dict, to_dict
from mam2.engine.config.training import DataConfig
from mam2.engine.data.decoding import decode_frames
from mam2.engine.data.loader import ClipLoader
from mam2.engine.data.manifest import Manifest
from mam2.engine.errors import UserError
from mam2.engine.evaluation.embedding import embed
from mam2.engine.evaluation.visualize import visualize
from mam2.engine.model.build import build_model
from mam2.engine.model.mam2 import MAM2
from mam2.engine.model.motion_targets import motion_target
from mam2.engine.model.pixels import as_colors, pixel_statistics
from mam2.engine.tokenizer.prepare import build_tokenizer
from mam2.engine.tokenizer.vqgan import VQGAN, small
from mam2.engine.train.finetune import finetune
from mam2.engine.train.pretrain import pretrain
from mam2.kernels import TubeMask, tube_mask
from tests.helpers.small_models import encoder, shaken

Config = Callable[..., PretrainConfig]


@pytest.fixture(scope="module")
def gray_run(clips: Path, tmp_path_factory: pytest.TempPathFactory, small: Config) -> Path:
    """A pre-training on gray clips, with codes and motion."""
    folder = tmp_path_factory.mktemp("gray") / "run"
    pretrain(small(data={"channels": 1}, optim={"epochs": 1.0}), clips, folder, progress=False)
    return folder


def test_a_gray_clip_is_the_luma_of_a_color_video(tmp_path: Path, write_video: Callable[..., Path]) -> None:
    frames = np.zeros((4, 48, 64, 3), np.uint8)
    frames[:] = (200, 120, 40)
    path = write_video(tmp_path / "a.mp4", frames, "libx264")
    gray = decode_frames(str(path), [0, 3], channels=1)
    assert gray.shape == (2, 48, 64, 1)
    assert gray.dtype == np.uint8
    assert abs(gray.astype(float) - (0.299 * 200 + 0.587 * 120 + 0.114 * 40)).max() < 4


def test_gray_clips_have_the_draws_of_color_clips(videos: Manifest) -> None:
    """The frames, crops and flips are the same, so that a gray clip is the luma of the color clip."""
    config = DataConfig(frames=4, stride=2, size=32, threads=1)
    found = []
    for channels in (3, 1):
        own = dataclasses.replace(config, channels=channels)
        with ClipLoader(videos, own, batch=8, device="cpu", seed=3) as loader:
            found.append(next(loader.stream()))
    color, gray = found
    assert gray.clip.shape == (8, 4, 32, 32, 1)
    assert torch.equal(color.index, gray.index)
    assert torch.equal(color.box, gray.box)
    assert (color.clip.float().mean(-1) - gray.clip[..., 0]).abs().max() <= 3  # the videos are gray


def test_a_video_file_with_five_channels_is_refused(videos: Manifest) -> None:
    with pytest.raises(UserError, match=r"to 1 or 3 channels, not 5 \(data.channels\)"):
        ClipLoader(videos, DataConfig(channels=5), batch=1, device="cpu", seed=0)


@pytest.mark.parametrize("forced", ["nvdec", "dali-cpu"])
def test_a_decoder_of_rgb_is_refused_for_gray(videos: Manifest, forced: Any) -> None:
    with pytest.raises(UserError, match=f"{forced} decodes RGB, data.channels is 1"):
        ClipLoader(videos, DataConfig(channels=1, decoder=forced), batch=1, device="cpu", seed=0)


def test_an_rgb_encoder_becomes_a_gray_one_with_the_same_outputs() -> None:
    rgb = shaken(encoder())
    video = torch.rand(2, 1, 4, 24, 24)
    gray = gray_encoder(rgb, DataConfig(channels=1, mean=(0.3,), std=(0.4,)))  # type: ignore[arg-type]
    assert gray.patch_embed.weight.shape[1] * 3 == rgb.patch_embed.weight.shape[1]  # type: ignore[union-attr]
    expected = rgb.encode(video.expand(-1, 3, -1, -1, -1))  # type: ignore[operator]
    torch.testing.assert_close(gray.encode(video), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("motion", ["adjacent", "hog"])
def test_models_of_any_channels_have_the_declared_parameters(small: Config, channels: int, motion: str) -> None:
    loss = {"motion_target": motion, "appearance_target": "pixels"}
    for objective in ("mam2", "joint"):
        config = small(data={"channels": channels}, loss=loss, model={"objective": objective})
        model = build_model(config)
        declared = costs.part_costs(config)
        assert sum(cost.parameters for cost in declared.values()) == sum(p.numel() for p in model.parameters())
        size, frames = config.data.size, config.data.frames
        video = torch.randint(0, 256, (2, channels, frames, size, size), dtype=torch.uint8)
        mask = tube_mask(2, config.grid, 0.75, seed=0)
        if isinstance(model, MAM2):
            latents = model.complete(video, mask)
            loss_value = model.motion_loss(latents, mask, video) + model.pixel_loss(latents, mask, video)
            assert (
                motion_target(video, config.loss, config.patch_size).shape[2] == model.motion_decoder.head.out_features
            )
        else:
            loss_value = model.loss(video, mask)
        loss_value.backward()
        assert torch.isfinite(loss_value)


def test_a_channel_more_adds_its_own_error(small: Config) -> None:
    """Each channel is standardized on its own: the loss of two channels is the mean of the losses of each."""
    config = small(data={"channels": 2}, loss={"appearance_target": "pixels"})
    model = build_model(config)
    assert isinstance(model, MAM2)
    torch.manual_seed(0)
    video = torch.rand(2, 2, config.data.frames, config.data.size, config.data.size)
    mask = tube_mask(2, config.grid, 0.75, seed=0)
    latents = model.complete(video, mask)
    predicted = model.predict_pixels(latents, mask)
    from mam2.kernels import masked_pixel_loss

    parts = [
        masked_pixel_loss(predicted[..., c::2], video[:, c : c + 1], mask, patch_size=config.patch_size) for c in (0, 1)
    ]
    torch.testing.assert_close(model.pixel_loss(latents, mask, video), torch.stack(parts).mean())


def test_statistics_of_a_config_reach_the_encoder(small: Config) -> None:
    config = small(data={"channels": 2, "mean": (0.2, 0.6), "std": (0.5, 0.25)})
    own = build_model(config, 16).encoder
    video = torch.rand(1, 2, config.data.frames, config.data.size, config.data.size)
    every = torch.arange(len(own.positions))[None]
    tokens = own.tokens(video, every).unflatten(-1, (-1, 2))
    for channel, (mean, std) in enumerate(((0.2, 0.5), (0.6, 0.25))):
        normalized = (video[:, channel] - mean) / std
        assert tokens[..., channel].mean().item() == pytest.approx(normalized.mean().item(), abs=1e-4)
    assert pixel_statistics(1)[0][0] == pytest.approx(0.449)
    assert pixel_statistics(3)[1] == (0.229, 0.224, 0.225)


@pytest.mark.parametrize(("key", "value"), [("mean", [0.5, 0.5]), ("std", [0.5, 0.5])])
def test_statistics_need_a_number_per_channel(small: Config, key: str, value: list[float]) -> None:
    from mam2.engine.config.pretrain import check

    with pytest.raises(UserError, match=rf"data.{key}: expected 3 numbers, one per channel \(data.channels\), found 2"):
        check(small(data={key: tuple(value)}))
    with pytest.raises(UserError, match=r"data.std 0.0: expected above 0"):
        check(small(data={"std": (0.5, 0.0, 0.5)}))
    with pytest.raises(UserError, match=r"'mean' expects a list of float, found 0.5"):
        from_dict(PretrainConfig, {"data": {"mean": 0.5}})
    config = small(data={key: (0.1, 0.2, 0.3)})
    assert from_dict(PretrainConfig, to_dict(config)) == config


def test_a_tokenizer_of_other_channels_is_refused(small: Config) -> None:
    config = small(data={"channels": 1})
    vqgan = VQGAN(_small_vqgan(3))
    with pytest.raises(UserError, match=r"takes 3 channels, data.channels is 1; .*--image-channels 1"):
        build_tokenizer(vqgan, config, torch.device("cpu"))


def test_statistics_survive_an_export_or_are_refused(tmp_path: Path) -> None:
    own = shaken(encoder(channels=1, mean=(0.2,), std=(0.3,)))  # type: ignore[arg-type]
    (tmp_path / "hf").mkdir()
    write_hugging_face(own, tmp_path / "hf")  # type: ignore[arg-type]
    again = load_encoder(tmp_path / "hf")
    assert (again.channels, again.mean, again.std) == (1, (0.2,), (0.3,))
    with pytest.raises(UserError, match=r"cannot state data.mean and data.std"):
        write_videomae(own, tmp_path / "a.pth")  # type: ignore[arg-type]


def _small_vqgan(channels: int) -> Any:
    return small(8, 16, 8, channels)


def test_colors_of_pictures() -> None:
    picture = torch.rand(4, 4, 5)
    assert torch.equal(as_colors(picture), picture[..., :3])
    assert torch.equal(as_colors(picture[..., :1]), picture[..., :1].expand(-1, -1, 3))
    assert torch.equal(as_colors(picture[..., :2])[..., 2], torch.zeros(4, 4))


@pytest.mark.slow
def test_a_gray_run_is_evaluated_exported_and_fine_tuned(
    gray_run: Path, clips: Path, tmp_path: Path, small_finetuning: Callable[..., FinetuneConfig]
) -> None:
    own = load_encoder(gray_run)
    assert own.channels == 1
    assert embed(gray_run, clips, device="cpu", progress=False).features.shape == (32, own.width)
    windows = embed(gray_run, clips, window=8, device="cpu", progress=False)
    assert windows.features.shape[1] == own.width
    page = visualize([gray_run], clips, tmp_path / "page", clips=1, device="cpu", progress=False)
    (picture,) = page.parent.glob("01-*.png")
    with Image.open(picture) as image:
        assert image.convert("RGB").size[0] > 100
    sides = [tokens * size for tokens, size in zip(own.grid, own.patch_size, strict=True)]
    video = torch.randint(0, 256, (2, 1, *sides), dtype=torch.uint8)
    expected = own.encode(video)
    (tmp_path / "hf").mkdir()
    write_hugging_face(own, tmp_path / "hf")
    assert '"num_channels": 1' in (tmp_path / "hf" / "config.json").read_text(encoding="utf-8")
    torch.testing.assert_close(load_encoder(tmp_path / "hf").encode(video), expected, rtol=1e-5, atol=1e-5)
    write_torch(own, tmp_path / "gray.pt2")
    torch.testing.assert_close(torch.export.load(tmp_path / "gray.pt2").module()(video), expected, rtol=1e-4, atol=1e-4)

    config = small_finetuning(data={"channels": 1}, optim={"epochs": 1.0})
    found = finetune(config, clips, tmp_path / "ft", val=clips, encoder=gray_run, progress=False)
    assert found.steps
    assert load_encoder(tmp_path / "ft").channels == 1
    with pytest.raises(UserError, match=r"takes 1 channels, data.channels is 3; set --data.channels 1"):
        finetune(small_finetuning(), clips, tmp_path / "no", val=clips, encoder=gray_run, progress=False)


@pytest.mark.slow
def test_a_gray_run_starts_from_an_rgb_one(
    finished: Path,
    clips: Path,
    tmp_path: Path,
    small: Config,
    small_finetuning: Callable[..., FinetuneConfig],
) -> None:
    config = small_finetuning(data={"channels": 1}, optim={"epochs": 1.0})
    finetune(config, clips, tmp_path / "ft", val=clips, encoder=finished, progress=False)
    assert GRAY in (tmp_path / "ft" / "log.txt").read_text(encoding="utf-8")
    own = small(data={"channels": 1}, optim={"epochs": 0.5, "base_lr": 0.0, "min_lr": 0.0})
    pretrain(own, clips, tmp_path / "pt", checkpoint=finished, progress=False)
    expected = gray_encoder(load_encoder(finished), own.data).patch_embed.weight
    assert torch.equal(load_encoder(tmp_path / "pt").patch_embed.weight, expected)
    with pytest.raises(UserError, match=r"takes 3 channels, data\.channels is 2"):
        pretrain(small(data={"channels": 2}), clips, tmp_path / "no", checkpoint=finished, progress=False)


def test_masks_follow_the_motion_of_gray_clips(small: Config) -> None:
    from mam2.engine.model.masking import sample_masks

    config = small(data={"channels": 1}, mask={"kind": "motion", "strength": 1.0})
    video = torch.zeros(1, 1, config.data.frames, config.data.size, config.data.size, dtype=torch.uint8)
    video[..., ::2, : config.data.size // 2] = torch.randint(0, 255, (config.data.size // 2,)).byte()
    video[:, :, ::2] = 0
    mask = sample_masks(video, config, step=0)
    assert isinstance(mask, TubeMask)
    assert (mask.masked % config.grid[2] < config.grid[2] // 2).float().mean() > 0.5
