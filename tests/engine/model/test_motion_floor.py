"""The motion target on clips whose patches have no contrast: its default floor, and the warning where a loss jumps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mam2.engine.config.pretrain import LossConfig, PretrainConfig
from mam2.engine.config.recipe import from_dict, load_recipe, recipe_names
from mam2.engine.data.manifest import Manifest
from mam2.engine.model.motion_targets import motion_loss
from mam2.engine.runtime.log import read_log
from mam2.engine.train.pretrain import pretrain
from mam2.engine.train.spikes import FACTOR, PEAK, Spikes
from mam2.kernels import MaskedFrameDifferenceLoss, frame_difference, masked_frame_difference_loss, tube_mask
from tests.helpers.paths import REAL_CLIPS, needs_real_clips

GRID, PATCH = (4, 2, 2), (2, 8, 8)
LARGEST = (1 / 255 / 0.05) ** 2 * (1 + 1e-6)
"""Squared target of a patch of one color that changes by one gray level."""


def fade() -> torch.Tensor:
    """uint8 [2, 3, 8, 16, 16]: one color, brighter by one gray level from each token to the next."""
    level = 100 + torch.arange(8) // 2
    return level.to(torch.uint8)[None, None, :, None, None].expand(2, 3, 8, 16, 16)


@pytest.fixture
def still() -> torch.Tensor:
    """The prediction of no motion, for the hidden tokens of `fade`."""
    return torch.zeros(2, 8, 2 * 8 * 8 * 3)


def test_a_fade_of_one_gray_level_does_not_decide_the_loss(still: torch.Tensor) -> None:
    mask = tube_mask(2, GRID, 0.5, seed=0, device="cpu")
    loss = masked_frame_difference_loss(still, fade(), mask, patch_size=PATCH)
    assert 0 < loss <= LARGEST
    assert MaskedFrameDifferenceLoss(patch_size=PATCH)(still, fade(), mask) == loss
    assert motion_loss(still, fade(), mask, LossConfig(), PATCH) == loss
    assert frame_difference(fade(), patch_size=PATCH).square().max() <= LARGEST


def test_the_published_formula_is_one_argument_away(still: torch.Tensor) -> None:
    mask = tube_mask(2, GRID, 0.5, seed=0, device="cpu")
    exact = masked_frame_difference_loss(still, fade(), mask, patch_size=PATCH, eps=1e-6)
    assert exact > 1e5


def test_frames_that_change_within_the_token_need_no_floor() -> None:
    clip = (100 + torch.arange(8)).to(torch.uint8)[None, None, :, None, None].expand(2, 3, 8, 16, 16)
    target = frame_difference(clip, patch_size=PATCH, difference="intra", eps=1e-6)
    assert target.abs().max() == pytest.approx(2, rel=0.05)


def test_every_recipe_has_a_floor_of_gray_levels() -> None:
    for name in recipe_names():
        assert load_recipe(name).loss.motion_eps >= 0.05


def test_a_config_that_was_saved_with_another_floor_keeps_it() -> None:
    assert from_dict(PretrainConfig, {"loss": {"motion_eps": 1e-6}}).loss.motion_eps == 1e-6


def test_a_jump_is_told_once_with_its_steps() -> None:
    spikes = Spikes()
    messages = []
    for line in range(4):
        for step in range(5):
            spikes.see({"loss/motion": torch.tensor(1e6 if line >= 2 and step == 1 else 1.0 + line)})
        numbers = {"loss/motion": 1.0 + line, **{name: float(value) for name, value in spikes.peak().items()}}
        messages.append(spikes.warning(range(5 * line + 1, 5 * line + 6), numbers))
    assert messages[0] is messages[1] is messages[3] is None
    assert messages[2] is not None
    assert "steps 11 to 15: the motion loss rose to 1e+06" in messages[2]
    assert "its median 2" in messages[2]
    assert "\n" not in messages[2]
    assert spikes.peak() == {}


def test_a_loss_below_the_factor_is_no_jump_and_other_runs_have_no_peak() -> None:
    spikes = Spikes()
    spikes.see({"loss/motion": torch.tensor(FACTOR * 0.99)})
    assert spikes.warning(range(1, 2), {"loss/motion": 1.0, PEAK: FACTOR * 0.99}) is None
    spikes = Spikes()
    spikes.see({"loss/pixels": torch.tensor(1.0)})
    assert spikes.peak() == {}
    assert spikes.warning(range(1, 2), {"loss/pixels": 1.0}) is None


@pytest.mark.slow
def test_a_run_logs_the_peak_of_its_motion_loss(
    videos: Manifest, tmp_path: Path, small: Callable[..., PretrainConfig]
) -> None:
    source = Path(videos.videos[0].path).parents[1]
    config = small(loss={"appearance_target": "none", "balance": "fixed"}, run={"log_every": 4})
    pretrain(config, source, tmp_path / "run", progress=False)
    for line in read_log(tmp_path / "run"):
        assert line[PEAK] >= line["loss/motion"] > 0


@pytest.mark.slow
@needs_real_clips
def test_the_motion_loss_of_real_clips_stays_small(tmp_path: Path, small: Callable[..., PretrainConfig]) -> None:
    names = ["moviepy/transparent.webm", "moviepy/big_buck_bunny_432_433.webm", "torchvision/R6llTwEh07w.mp4"]
    names += ["libwebm/test_stereo_left_right.webm", "libwebm/bbb_480p_vp9_opus_1second.webm"]
    (tmp_path / "clips.csv").write_text("".join(f"{REAL_CLIPS / name} 0\n" for name in names), encoding="utf-8")
    config = small(
        data={"size": 64, "stride": 1, "views": 1},
        model={"patch": 16},
        loss={"appearance_target": "none", "balance": "fixed", "motion_eps": LossConfig().motion_eps},
        optim={"batch": 5, "epochs": 16.0, "base_lr": 0.05, "warmup_epochs": 1.0},
    )
    pretrain(config, tmp_path / "clips.csv", tmp_path / "run", progress=False)
    lines = read_log(tmp_path / "run")
    assert lines[-1]["step"] == 16
    assert max(line[PEAK] for line in lines) < 2
    assert lines[-1]["loss/motion_relative"] < 1.1
    assert "warning: steps" not in (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")
