"""Motion targets, objectives and masks other than the defaults: their values, and that a model trains with them."""

import dataclasses
import importlib.util
import math
import sys
import typing

import numpy as np
import pytest
import torch

from mam2.engine.config.pretrain import LossConfig, check
from mam2.engine.errors import UserError
from mam2.engine.evaluation.motion_pictures import DRAWINGS, motion_pictures
from mam2.engine.model import motion_targets
from mam2.engine.model.mam2 import MAM2
from mam2.engine.model.masking import sample_masks
from mam2.engine.model.motion_targets import hog_of_difference, motion_loss, motion_target, motion_values, optical_flow
from mam2.engine.model.videomae import VideoMAE
from mam2.engine.runtime.log import read_log
from mam2.engine.train.objective import build_objective
from mam2.engine.train.pretrain import pretrain
from mam2.kernels import motion_tube_mask, random_mask, reference, tube_mask

PATCH = (2, 8, 8)
needs_opencv = pytest.mark.skipif(importlib.util.find_spec("cv2") is None, reason="needs opencv-python-headless")
TARGETS = ["adjacent", "intra", "hog", pytest.param("flow", marks=needs_opencv)]


def noise(batch: int = 2, seed: int = 0) -> torch.Tensor:
    """uint8 [B, 3, 8, 32, 32], viewed from [B, 8, 32, 32, 3] as the loader's are."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 8, 32, 32, 3), dtype=torch.uint8, generator=generator).permute(0, 4, 1, 2, 3)


def blobs(shift: tuple[int, int], frames: int = 8, size: int = 64) -> torch.Tensor:
    """A smooth texture that moves right and down by the given pixels per frame: uint8 [1, 3, T, size, size]."""
    generator = torch.Generator().manual_seed(1)
    texture = torch.nn.functional.interpolate(
        torch.rand(1, 1, 24, 24, generator=generator), size=(2 * size, 2 * size), mode="bicubic"
    ).clamp(0, 1)
    places = [(size // 2 - shift[1] * t, size // 2 - shift[0] * t) for t in range(frames)]
    clip = torch.stack([texture[0, 0, y : y + size, x : x + size] for y, x in places])
    return (clip * 255).round().byte().expand(1, 3, -1, -1, -1)


def test_hog_is_the_loop_over_pixels_that_defines_it():
    video, eps = noise(), 0.05
    found = hog_of_difference(video, PATCH, eps=eps).unflatten(-1, (2, 2, 3, 9))
    token, cell, channel = (3, 1, 2), (1, 0), 1  # slot 3, patch row 1, column 2
    clip = video[0].double() / 255
    difference = (clip[channel, 2 * token[0] + 1] - clip[channel, 2 * token[0]]).numpy()
    padded = np.pad(difference, 1, mode="edge")
    histogram = np.zeros(9)
    for y in range(token[1] * 8 + cell[0] * 4, token[1] * 8 + cell[0] * 4 + 4):
        for x in range(token[2] * 8 + cell[1] * 4, token[2] * 8 + cell[1] * 4 + 4):
            across = padded[y + 1, x + 2] - padded[y + 1, x]
            down = padded[y + 2, x + 1] - padded[y, x + 1]
            bin_ = int((math.atan2(down, across) % math.pi) / math.pi * 9) % 9
            histogram[bin_] += math.hypot(across, down) / 16
    expected = histogram / (np.linalg.norm(histogram) + eps)
    row = found[0, (token[0] * 4 + token[1]) * 4 + token[2], cell[0], cell[1], channel]
    np.testing.assert_allclose(row.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_hog_of_a_static_clip_is_zero_and_of_a_turned_one_turns():
    static = noise()[:, :, :1].expand(-1, -1, 8, -1, -1)
    assert not hog_of_difference(static, PATCH, eps=1e-6).any()
    bars = torch.zeros(1, 3, 2, 32, 32)
    bars[:, :, 1, :, 12:20] = 1  # appears: its edges are vertical, their gradients horizontal (bin 0)
    for clip, orientation in ((bars, 0), (bars.transpose(3, 4), 4)):
        histograms = hog_of_difference(clip, PATCH, eps=1e-6).unflatten(-1, (-1, 9))
        strong = histograms[histograms.sum(-1) > 0.5]
        assert len(strong)
        assert (strong.argmax(-1) == orientation).all()
    float_clip = hog_of_difference(noise().float() / 255, PATCH, eps=0.01)
    torch.testing.assert_close(float_clip, hog_of_difference(noise(), PATCH, eps=0.01))


@needs_opencv
def test_flow_is_the_way_that_was_moved():
    for shift in ((2, 0), (0, -2), (1, 2)):
        flow = optical_flow(blobs(shift), (2, 16, 16)).unflatten(-1, (4, 4, 2))
        inside = flow.view(1, 4, 4, 4, 4, 4, 2)[:, :, 1:3, 1:3].flatten(0, -2)
        torch.testing.assert_close(inside.median(0).values, torch.tensor(shift).float(), atol=0.25, rtol=0)
    assert optical_flow(blobs((0, 0)), (2, 16, 16)).abs().max() < 0.05


@needs_opencv
def test_flow_is_an_operator_that_compiles_whole():
    video = blobs((2, 1), frames=4, size=32)
    torch.library.opcheck(torch.ops.mam2_engine.optical_flow, (video, [2, 8, 8]))
    compiled = torch.compile(lambda clip: optical_flow(clip, PATCH) * 2, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(video), optical_flow(video, PATCH) * 2)


def test_flow_without_opencv_says_what_to_install(monkeypatch, small):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match="opencv-python-headless"):
        MAM2(small(loss={"motion_target": "flow"}), 16)


@pytest.mark.parametrize("target", TARGETS)
def test_the_loss_is_the_error_of_the_hidden_tokens(small, target):
    config = small(loss={"motion_target": target, "motion_eps": 0.1})
    video, mask = noise(), sample_masks(noise(), config, step=3)
    goal = motion_target(video, config.loss, config.patch_size)
    assert goal.shape == (2, 64, motion_values(target, config.patch_size))
    hidden = goal.gather(1, mask.masked[..., None].expand(-1, -1, goal.shape[-1]))
    assert motion_loss(hidden, video, mask, config.loss, PATCH) < 1e-9
    pred = hidden + 1
    each = motion_loss(pred, video, mask, config.loss, PATCH, reduction="none")
    torch.testing.assert_close(each, torch.ones_like(each), atol=1e-4, rtol=0)
    torch.testing.assert_close(motion_loss(pred, video, mask, config.loss, PATCH), torch.tensor(1.0), atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("target", [*TARGETS, "none"])
def test_a_model_learns_each_target(small, target):
    config = small(loss={"motion_target": target, "balance": "fixed" if target == "none" else "gradient"})
    check(config)
    torch.manual_seed(0)
    model = MAM2(config, 16)
    objective = build_objective(model, config, lambda part: part)
    video, codes = noise(4), torch.randint(16, (4, 64))
    mask = sample_masks(video, config, step=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    logged = []
    for _ in range(20):
        total, losses, figures = objective(video, mask, codes, inspect=True)
        total.backward()
        losses |= objective.gradient_norms()
        optimizer.step()
        optimizer.zero_grad()
        logged.append({name: float(value) for name, value in (losses | figures).items()})
    motion = {"loss/motion", "gradient/motion", "loss/motion_relative"}
    if target == "none":
        assert not hasattr(model, "motion_decoder")
        assert not motion & logged[0].keys()
        assert logged[-1]["loss/appearance"] < logged[0]["loss/appearance"]
    else:
        assert motion <= logged[0].keys()
        assert logged[-1]["loss/motion"] < logged[0]["loss/motion"]


def test_the_joint_decoder_predicts_a_frame_and_what_changes(small):
    config = small(model={"objective": "joint"})
    model, video = VideoMAE(config), noise()
    mask = sample_masks(video, config, step=0)
    options = (PATCH, "joint", "channel", 1e-6, None, None, torch.float32)
    target = reference.target(video, mask.masked, *options).view(*mask.masked.shape, -1)
    with torch.no_grad():
        expected = (model.predict_pixels(video, mask) - target).square().mean()
        torch.testing.assert_close(model.loss(video, mask), expected)
        pixels = VideoMAE(small(model={"objective": "videomae"}))
        pixels.load_state_dict(model.state_dict())
        assert float(pixels.loss(video, mask)) != pytest.approx(float(expected), rel=1e-3)


def test_masks_are_those_asked_for(small):
    video, key = noise(), {"seed": 0, "step": 5, "first_sample": 3}
    drawn = {
        kind: sample_masks(video, small(mask={"kind": kind, "strength": 0.8}), step=5, first_sample=3).masked
        for kind in ("tube", "random", "motion")
    }
    assert torch.equal(drawn["tube"], tube_mask(2, (4, 4, 4), 0.5, **key).masked)
    assert torch.equal(drawn["random"], random_mask(2, (4, 4, 4), 0.5, **key).masked)
    assert torch.equal(drawn["motion"], motion_tube_mask(video, 0.5, patch_size=PATCH, strength=0.8, **key).masked)
    for kind, masked in drawn.items():
        config = small(mask={"kind": kind, "ratio": 0.9})
        assert config.masked_tokens == sample_masks(video, config, step=0).masked.shape[1]
        assert masked.shape == (2, 32)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"model": {"tubelet": 1}, "loss": {"motion_target": "hog"}}, "'hog' needs model.tubelet"),
        ({"model": {"patch": 2}, "loss": {"motion_target": "flow"}}, "multiple of 4"),
        ({"model": {"tubelet": 1, "objective": "joint"}}, "'joint' needs model.tubelet"),
        ({"loss": {"motion_target": "none"}}, "loss.balance 'fixed'"),
        ({"mask": {"strength": 2.0}}, "mask.strength"),
        ({"mask": {"kind": "random", "ratio": 0.01}}, "masks 0 of 64 tokens"),
    ],
)
def test_values_that_cannot_work_are_named(small, tables, message):
    with pytest.raises(UserError, match=message):
        check(small(**tables))


@pytest.mark.parametrize("target", ["hog", pytest.param("flow", marks=needs_opencv)])
def test_a_perfect_prediction_looks_like_the_truth(small, target):
    config = small(loss={"motion_target": target, "motion_eps": 0.01})
    video = blobs((2, 1), size=32)
    mask = sample_masks(video, config, step=0)
    goal = motion_target(video, config.loss, config.patch_size)
    hidden = goal.gather(1, mask.masked[..., None].expand(-1, -1, goal.shape[-1]))
    truth, prediction = motion_pictures(video, mask, hidden, config)
    assert truth.shape == (1, 4, 32, 32, 3)
    assert (truth - 0.5).abs().max() > 0.05
    shown = mask.as_bool().view(1, 4, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    torch.testing.assert_close(prediction[shown], truth[shown])
    assert (prediction[~shown] == 0.5).all()


def test_a_target_without_a_drawing_is_not_drawn_as_another_one(small, monkeypatch):
    assert {*DRAWINGS, *motion_targets.PIXEL_DIFFERENCES, "none"} == set(motion_targets.TARGETS)
    config = small(loss={"motion_target": "hog"})
    video, mask = noise(), sample_masks(noise(), config, step=0)
    predicted = torch.zeros(*mask.masked.shape, motion_values("hog", PATCH))
    monkeypatch.setitem(motion_targets.TARGETS, "other", motion_targets.TARGETS["hog"])
    renamed = dataclasses.replace(config, loss=dataclasses.replace(config.loss, motion_target="other"))
    with pytest.raises(KeyError, match="other"):
        motion_pictures(video, mask, predicted, renamed)


@pytest.mark.slow
def test_runs_of_other_targets_objectives_and_masks(tmp_path, small, synthetic_clips):
    synthetic_clips(tmp_path, train=16)
    for name, tables in {
        "hog": {"loss": {"motion_target": "hog"}, "mask": {"kind": "random"}},
        "none": {"loss": {"motion_target": "none", "balance": "fixed"}},
        "joint": {"model": {"objective": "joint"}, "mask": {"kind": "motion"}},
    }.items():
        config = small(**tables, optim={"epochs": 1.0})
        pretrain(config, tmp_path / "train", tmp_path / name, progress=False)
        line = read_log(tmp_path / name)[-1]
        assert math.isfinite(line["loss/pixels" if name == "joint" else "loss/appearance"])
        assert ("loss/motion" in line) == (name == "hog")


def test_every_target_of_the_config_is_defined_and_needs_what_check_asks_for(small):
    assert set(motion_targets.TARGETS) == set(typing.get_args(typing.get_type_hints(LossConfig)["motion_target"]))
    for name, target in motion_targets.TARGETS.items():
        loss = {"motion_target": name, "balance": "fixed", "motion": float(name != "none")}
        given = small(loss=loss, model={"tubelet": 1})
        if target.tubelet == 1:
            check(given)
        else:
            with pytest.raises(UserError, match=rf"{name}.*needs model.tubelet of at least {target.tubelet}"):
                check(given)


def test_a_target_says_itself_which_frames_it_leaves_out(small, monkeypatch):
    config = small(loss={"motion_target": "intra"}, mask={"kind": "random"})
    mask = sample_masks(noise(), config, step=0)
    assert not motion_targets.motion_values_vary(config)
    assert motion_targets.motion_frames(mask, config) == 2 * mask.masked.numel()
    leaves_out = dataclasses.replace(
        motion_targets.TARGETS["intra"], missing=lambda mask, config: (mask.masked < 3).sum()
    )
    monkeypatch.setitem(motion_targets.TARGETS, "intra", leaves_out)
    assert motion_targets.motion_values_vary(config)
    assert motion_targets.motion_frames(mask, config) == 2 * mask.masked.numel() - (mask.masked < 3).sum()
    tubes = small(loss={"motion_target": "intra"}, mask={"kind": "tube"})
    assert not motion_targets.motion_values_vary(tubes)  # all clips leave out as many
