"""Augmentation: operations against Pillow's, draws that depend on (seed, step, place) alone, mixing and its targets."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch.utils._python_dispatch import TorchDispatchMode

from mam2.engine.config.finetune import AugmentConfig
from mam2.engine.train import augment as augmenting
from mam2.engine.train import randaugment as operations
from mam2.engine.train.augment import augment, feature_scales, mix, path_scales, smoothed
from mam2.engine.train.randaugment import OPERATIONS

KEY = {"seed": 3, "step": 7}
NOTHING = AugmentConfig(operations=0, erase=0.0, mixup=0.0, cutmix=0.0, label_smoothing=0.0)
PILLOW = {
    "auto contrast": lambda image, _: ImageOps.autocontrast(image),
    "equalize": lambda image, _: ImageOps.equalize(image),
    "invert": lambda image, _: ImageOps.invert(image),
    "posterize": lambda image, bits: ImageOps.posterize(image, int(bits)),
    "solarize": lambda image, threshold: ImageOps.solarize(image, int(threshold)),
    "color": lambda image, change: ImageEnhance.Color(image).enhance(1 + change),
    "contrast": lambda image, change: ImageEnhance.Contrast(image).enhance(1 + change),
    "brightness": lambda image, change: ImageEnhance.Brightness(image).enhance(1 + change),
    "sharpness": lambda image, change: ImageEnhance.Sharpness(image).enhance(1 + change),
}


def clips(count=4, frames=4, size=24, seed=0):
    """Smooth moving clips [count, 3, frames, size, size], as the loader's: strided, channels last."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.randint(0, 256, (count * frames, 3, 6, 6), generator=generator).float()
    large = torch.nn.functional.interpolate(small, size=(size, size), mode="bilinear").round().to(torch.uint8)
    return large.view(count, frames, 3, size, size).permute(0, 1, 3, 4, 2).contiguous().permute(0, 4, 1, 2, 3)


def applied(operation, video, strength):
    strengths = torch.full((len(video),), float(strength))
    return operation.apply(video.float(), strengths).round().clamp(0, 255)


@pytest.mark.parametrize("operation", [o for o in OPERATIONS if o.name in PILLOW], ids=lambda o: o.name)
@pytest.mark.parametrize("magnitude", [0.2, 0.7, 1.0])
def test_an_operation_is_pillows_on_a_clip_of_one_frame(operation, magnitude):
    video = clips(frames=1)
    for sign in (1, -1) if operation.signed else (1,):
        strength = sign * operation.strength(magnitude)
        ours = applied(operation, video, strength)
        for clip, found in zip(video, ours, strict=True):
            image = Image.fromarray(clip[:, 0].permute(1, 2, 0).numpy())
            theirs = torch.from_numpy(np.array(PILLOW[operation.name](image, strength))).permute(2, 0, 1)
            # Pillow rounds gray and the blend by itself
            assert (found[:, 0] - theirs).abs().max() <= 2, operation.name


def test_moves_are_the_pixels_own_places():
    video = clips(size=8)
    turned = operations.rotate(video.float(), torch.full((4,), 90.0))
    torch.testing.assert_close(turned, video.float().rot90(1, (3, 4)), atol=1e-2, rtol=0)
    right = operations.translate_x(video.float(), torch.full((4,), 0.25))
    torch.testing.assert_close(right[..., :6], video[..., 2:].float(), atol=1e-3, rtol=0)
    down = operations.translate_y(video.float(), torch.full((4,), -0.5))
    torch.testing.assert_close(down[..., 4:, :], video[..., :4, :].float(), atol=1e-3, rtol=0)
    mean = 255 * torch.tensor([0.485, 0.456, 0.406])[:, None, None, None]
    torch.testing.assert_close(down[:, :, :, :3], mean.expand(4, 3, 4, 3, 8), atol=1e-3, rtol=0)
    sheared = operations.shear_x(video.float(), torch.full((4,), 2.0))  # row y reads 2 (y + 1/2) to the right
    torch.testing.assert_close(sheared[..., 1, :5], video[..., 1, 3:].float(), atol=1e-3, rtol=0)
    sheared = operations.shear_y(video.float(), torch.full((4,), 2.0))
    torch.testing.assert_close(sheared[..., :5, 1], video[..., 3:, 1].float(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
def test_a_still_clip_stays_still(operation):
    video = clips(frames=1).expand(-1, -1, 5, -1, -1)
    changed = applied(operation, video, operation.strength(0.7))
    assert torch.equal(changed, changed[:, :, :1].expand_as(changed))


@pytest.mark.parametrize("operation", [o for o in OPERATIONS if o.signed], ids=lambda o: o.name)
def test_no_strength_changes_nothing(operation):
    video = clips()
    assert torch.equal(applied(operation, video, 0.0), video.float())


def test_clips_of_a_batch_do_not_meet():
    """Each clip of a batch has the same result as alone, however the batch is split."""
    video, config = clips(6), AugmentConfig()
    whole = augment(video, config, **KEY, first_sample=10)
    parts = [augment(video[k : k + 2], config, **KEY, first_sample=10 + k) for k in (0, 2, 4)]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, augment(video, config, **KEY, first_sample=11))
    assert not torch.equal(whole, augment(video, config, seed=3, step=8, first_sample=10))
    assert whole.stride() == video.stride()


def test_nothing_asked_for_is_nothing_done():
    video = clips()
    assert torch.equal(augment(video, NOTHING, **KEY, first_sample=0), video)
    labels = torch.tensor([0, 1, 1, 0])
    mixed, targets = mix(video, labels, 2, NOTHING, views=1, **KEY, first_sample=0)
    assert torch.equal(mixed, video)
    assert torch.equal(targets, torch.nn.functional.one_hot(labels, 2).float())


def test_the_share_of_operations_is_carried_out():
    config = dataclasses.replace(NOTHING, operations=1, share=0.5)
    video = clips(1, frames=1).expand(400, -1, -1, -1, -1)
    changed = (augment(video, config, **KEY, first_sample=0) != video).flatten(1).any(1)
    assert 0.4 < float(changed.float().mean()) < 0.6


def test_a_box_is_erased_in_all_frames_of_some_clips():
    video = torch.full((400, 3, 2, 40, 30), 7, dtype=torch.uint8)
    erased = augment(video, dataclasses.replace(NOTHING, erase=0.25), **KEY, first_sample=0) != 7
    hit = erased.flatten(1).any(1)
    assert 0.19 < float(hit.float().mean()) < 0.31
    for clip in erased[hit]:
        places = clip.any(0).any(0).nonzero()
        (top, left), (bottom, right) = places.amin(0).tolist(), places.amax(0).tolist()
        inside = clip[..., top : bottom + 1, left : right + 1]
        assert inside.float().mean() > 0.9  # noise may equal 7 by chance
        assert int(clip.sum()) == int(inside.sum())
        assert 0.015 < (bottom - top + 1) * (right - left + 1) / 1200 < 0.36


def test_mixup_is_the_weighted_mean_and_targets_follow():
    video, labels = clips(6), torch.tensor([0, 1, 2, 3, 4, 4])
    config = dataclasses.replace(NOTHING, mixup=0.8, label_smoothing=0.1)
    mixed, targets = mix(video, labels, 5, config, views=1, **KEY, first_sample=0)
    plain = smoothed(labels, 5, 0.1)
    torch.testing.assert_close(plain.sum(1), torch.ones(6))
    for row in range(6):
        other = row ^ 1
        if labels[row] == labels[other]:
            continue
        weight = (targets[row, labels[row]] - plain[other, labels[row]]) / 0.9
        assert 0 <= weight <= 1
        torch.testing.assert_close(targets[row], weight * plain[row] + (1 - weight) * plain[other])
        expected = weight * video[row].float() + (1 - weight) * video[other].float()
        assert (mixed[row].float() - expected).abs().max() <= 0.5 + 1e-3
    torch.testing.assert_close(targets[0::2] + targets[1::2], plain[0::2] + plain[1::2])


def test_cutmix_weighs_by_the_area_it_takes():
    video = (torch.arange(8, dtype=torch.uint8) * 10)[:, None, None, None, None].expand(-1, 3, 2, 32, 48).clone()
    labels, config = torch.arange(8), dataclasses.replace(NOTHING, cutmix=1.0)
    mixed, targets = mix(video, labels, 8, config, views=2, **KEY, first_sample=0)
    partners = [2, 3, 0, 1, 6, 7, 4, 5]  # the neighbor's view of the same number
    for row, other in enumerate(partners):
        taken = (mixed[row] == video[other, 0, 0, 0, 0]).float()
        assert torch.equal(taken[0, 0], taken[2, 1])
        assert float(targets[row, other]) == pytest.approx(float(taken.mean()), abs=1e-6)
        assert float(targets[row, row]) == pytest.approx(1 - float(taken.mean()), abs=1e-6)
    assert 0.1 < float(1 - targets.diagonal().mean()) < 0.9


def test_mixing_does_not_depend_on_how_a_batch_is_cut():
    video, labels, config = clips(8), torch.arange(8), AugmentConfig()
    whole = mix(video, labels, 8, config, views=2, **KEY, first_sample=4)
    parts = [mix(video[k : k + 4], labels[k : k + 4], 8, config, views=2, **KEY, first_sample=4 + k) for k in (0, 4)]
    assert torch.equal(whole[0], torch.cat([part[0] for part in parts]))
    assert torch.equal(whole[1], torch.cat([part[1] for part in parts]))


def test_both_kinds_of_mixing_have_half_of_the_pairs():
    video = torch.tensor([0, 200], dtype=torch.uint8).repeat(200)[:, None, None, None, None].expand(-1, 3, 1, 16, 16)
    mixed, _ = mix(
        video.clone(), torch.zeros(400, dtype=torch.int64), 2, AugmentConfig(), views=1, **KEY, first_sample=0
    )
    blended = ((mixed != 0) & (mixed != 200)).flatten(1).any(1)
    assert 0.35 < float(blended.float().mean()) < 0.6  # a mixup weight may round to one of the two


def test_paths_are_dropped_more_often_the_deeper_and_keep_their_mean():
    scales = path_scales(4000, 3, 0.2, **KEY, first_sample=0, device=torch.device("cpu"))
    assert scales.shape == (3, 2, 4000)
    dropped = (scales == 0).float().mean(-1)
    torch.testing.assert_close(dropped, torch.tensor([0.0, 0.1, 0.2])[:, None].expand(3, 2), atol=0.02, rtol=0)
    torch.testing.assert_close(scales.mean(-1), torch.ones(3, 2), atol=0.03, rtol=0)
    part = path_scales(10, 3, 0.2, **KEY, first_sample=100, device=torch.device("cpu"))
    assert torch.equal(part, scales[..., 100:110])
    assert path_scales(4, 3, 0.0, **KEY, first_sample=0, device=torch.device("cpu")) is None


def test_features_are_dropped_by_share_and_keep_their_mean():
    scales = feature_scales(64, 256, 0.5, **KEY, first_sample=0, device=torch.device("cpu"))
    assert set(scales.unique().tolist()) == {0.0, 2.0}
    assert float(scales.mean()) == pytest.approx(1, abs=0.05)
    assert torch.equal(scales[8:12], feature_scales(4, 256, 0.5, **KEY, first_sample=8, device=torch.device("cpu")))


EVERYTHING = {
    "data": {"views": 2, "size": 24, "frames": 4},
    "model": {"classes": 5, "depth": 2, "width": 12},
    "augment": {"operations": 3, "share": 1.0, "erase": 0.5},
    "head": {"dropout": 0.3},
    "optim": {"drop_path": 0.2, "batch": 8},
}


def test_all_draws_of_a_batch_are_sent_in_one_copy(small_finetuning, monkeypatch):
    """The result equals that of the single operations, each of which copies its own draws."""
    config, video, labels = small_finetuning(**EVERYTHING), clips(8), torch.arange(8) % 5
    key = {"seed": config.run.seed, "step": 7, "first_sample": 16}
    on_cpu = {**key, "device": torch.device("cpu")}
    mixed = mix(augment(video, config.augment, **key), labels, 5, config.augment, views=2, **key)
    expected = (*mixed, path_scales(8, 2, 0.2, **on_cpu), feature_scales(8, 12, 0.3, **on_cpu))
    copies, to = [], torch.Tensor.to

    def counted(self, *given, **options):
        if options.get("non_blocking"):
            copies.append(self.dtype)
        return to(self, *given, **options)

    monkeypatch.setattr(torch.Tensor, "to", counted)
    found = augmenting.prepare(video, labels, config, step=7, first_sample=16)
    assert copies == [torch.uint8]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
    assert [part.dtype for part in found] == [torch.uint8, torch.float32, torch.float32, torch.float32]


def test_nothing_but_the_draws_goes_to_a_gpu_or_comes_from_it(small_finetuning, monkeypatch):
    """Traced on tensors without values: any other copy would wait for the running step."""
    config = small_finetuning(**{**EVERYTHING, "augment": {"operations": 4, "share": 1.0, "erase": 0.0}})
    between = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            tensors = [part for part in (*args, found) if isinstance(part, torch.Tensor)]
            if len({part.device.type for part in tensors if part.ndim}) > 1 or "local_scalar" in str(function):
                between.append(str(function))
            return found

    def sent(drawn, device):
        copies = [
            [torch.empty(a.shape, dtype=torch.from_numpy(a).dtype, device=device) for a in one.arrays] for one in drawn
        ]
        return [augmenting.functools.partial(one.apply, those) for one, those in zip(drawn, copies, strict=True)]

    def empty(values, device):
        return torch.empty(len(values), device=device)

    monkeypatch.setattr(augmenting, "send", sent)
    monkeypatch.setattr(operations, "constant", empty)
    for owner, name in ((torch, "tensor"), (torch, "as_tensor"), (torch.Tensor, "new_tensor")):
        monkeypatch.setattr(owner, name, lambda *given, made=name, **_: between.append(made))
    labels = torch.arange(8) % 5
    video = torch.empty(8, 4, 24, 24, 3, dtype=torch.uint8, device="meta").permute(0, 4, 1, 2, 3)
    with Watch():
        found = augmenting.prepare(video, labels, config, step=7, first_sample=0)
    assert all(part.device.type == "meta" for part in found)
    assert between == []


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_differences_below_a_level_of_8_bits_survive(operation) -> None:
    """A clip of 16 bits whose values differ by less than 1/255: every operation but posterize keeps its contents."""
    fine = 100 + torch.rand(2, 1, 8, 32, 32, generator=torch.Generator().manual_seed(2)) * 0.9
    options = {"whole": False} if operation.rounds else {}
    found = operation.apply(fine, torch.full((2,), float(operation.strength(0.3))), **options)
    if operation.name == "posterize":
        assert len(found.unique()) == 1
        return
    assert len(found.unique()) > 1000
    if operation.name == "auto contrast":
        torch.testing.assert_close((found.min(), found.max()), (torch.tensor(0.0), torch.tensor(255.0)))


def test_gray_of_fine_clips_is_not_rounded() -> None:
    fine = 100 + torch.rand(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(2)) * 0.9
    changed = operations.color(fine, torch.full((2,), -1.0), whole=False)
    assert len(changed.unique()) > 100
    assert len(operations.color(fine, torch.full((2,), -1.0)).unique()) <= 2


def test_float_clips_are_augmented_like_uint8_clips_without_rounding() -> None:
    generator = torch.Generator().manual_seed(5)
    levels = torch.randint(0, 256, (6, 1, 4, 24, 24), dtype=torch.uint8, generator=generator)
    config = AugmentConfig(operations=2, share=1.0, erase=1.0)
    whole = augment(levels, config, seed=3, step=1, first_sample=0)
    floats = augment(levels.float() / 255, config, seed=3, step=1, first_sample=0)
    assert floats.dtype == torch.float32
    assert 0 <= floats.min() <= floats.max() <= 1
    close = (floats * 255 - whole.float()).abs() <= 2
    assert close.float().mean() > 0.9  # a rounded level may fall on the other side of a threshold
    fine = torch.full((2, 1, 2, 8, 8), 1 / 65535)
    mixed, _ = mix(fine, torch.tensor([0, 1]), 2, AugmentConfig(cutmix=0.0), views=1, seed=0, step=0, first_sample=0)
    torch.testing.assert_close(mixed, fine)
