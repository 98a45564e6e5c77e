"""What fine-tuning does to clips on the device: RandAugment, random erasing, mixup and cutmix, and its dropped parts.

Shapes: B clips, T frames, C = 3 channels, V classes. Clips stay uint8; every operation rounds to whole grey levels.
Everything drawn for a clip is keyed by (seed, step, the clip's place in the step's batch): repeated, resumed and shared
out to any number of processes, a step sees the same. All frames of a clip get the same; operations that look at the
picture (equalize, autocontrast, contrast) look at the whole clip, so that none makes still things flicker.

RandAugment "m7-n4-mstd0.5-inc1", VideoMAE's choice of timm's variants; it comes after the crop here, before it there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mam2.engine.finetune_config import AugmentConfig
from mam2.engine.model.encoder import PIXEL_MEAN, PIXEL_STD
from mam2.engine.train.operations import OPERATIONS, Operation

_RAND_AUGMENT, _ERASE, _MIX, _DROP = range(16, 20)  # beside those of mam2.engine.data.sampling
ERASED_AREA = (0.02, 1 / 3)
"""Smallest and largest share of the frame that is erased."""
ERASED_ASPECT = 10 / 3
"""Aspect ratios are drawn log-uniformly from its inverse to it."""
ERASE_TRIES = 10


def augment(video: Tensor, config: AugmentConfig, *, seed: int, step: int, first_sample: int) -> Tensor:
    """RandAugment, then random erasing.

    video: [B, C, T, H, W] uint8, any strides; of it a new one is returned. first_sample: its first clip's place in the
    step's batch.
    """
    video = video.clone(memory_format=torch.preserve_format)
    samples = range(first_sample, first_sample + len(video))
    plans = [_plan(config, _generator(_RAND_AUGMENT, seed, step, sample)) for sample in samples]
    for number in range(config.operations):
        for operation in OPERATIONS:
            rows = [row for row, plan in enumerate(plans) if plan[number][0] is operation]
            if rows:
                strengths = video.new_tensor([plans[row][number][1] for row in rows], dtype=torch.float32)
                chosen = torch.tensor(rows, device=video.device)
                changed = operation.apply(video[chosen].float(), strengths)
                video[chosen] = changed.round_().clamp_(0, 255).to(torch.uint8)
    for row, sample in enumerate(samples):
        _erase(video[row], config.erase, _generator(_ERASE, seed, step, sample))
    return video


def _plan(config: AugmentConfig, generator: np.random.Generator) -> list[tuple[Operation | None, float]]:
    """A clip's operations with their strengths; None where one is left out."""
    plan: list[tuple[Operation | None, float]] = []
    for _ in range(config.operations):
        operation = OPERATIONS[generator.integers(len(OPERATIONS))]
        left_out = generator.random() >= config.share
        magnitude = min(max(generator.normal(config.magnitude, config.magnitude_std), 0.0), 10.0)
        sign = 1 if generator.random() < 0.5 else -1
        strength = operation.strength(magnitude / 10) * (sign if operation.signed else 1)
        plan.append((None if left_out else operation, strength))
    return plan


def _erase(clip: Tensor, chance: float, generator: np.random.Generator) -> None:
    """Puts noise into a box of a clip [C, T, H, W], the same box in every frame: normal with ImageNet's statistics."""
    if generator.random() >= chance:
        return
    height, width = clip.shape[-2:]
    for _ in range(ERASE_TRIES):
        area = generator.uniform(*ERASED_AREA) * height * width
        aspect = math.exp(generator.uniform(-math.log(ERASED_ASPECT), math.log(ERASED_ASPECT)))
        high, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if high < height and wide < width:
            top, left = generator.integers(height - high + 1), generator.integers(width - wide + 1)
            box = clip[..., top : top + high, left : left + wide]
            # a box of noise is too much to draw on the host
            noise = torch.Generator(clip.device).manual_seed(int(generator.integers(2**63)))
            drawn = torch.randn(box.shape, generator=noise, device=clip.device)
            mean, std = (255 * clip.new_tensor(values, dtype=torch.float32) for values in (PIXEL_MEAN, PIXEL_STD))
            pixels = drawn * std[:, None, None, None] + mean[:, None, None, None]
            box.copy_(pixels.round_().clamp_(0, 255))
            return


def mix(
    video: Tensor,
    labels: Tensor,
    classes: int,
    config: AugmentConfig,
    *,
    views: int,
    seed: int,
    step: int,
    first_sample: int,
) -> tuple[Tensor, Tensor]:
    """Mixes neighbouring videos in pairs, by mixup or cutmix, and makes the soft targets that go with it.

    A pair shares its draw: the first clip keeps the weight w and gets 1 - w of the second, and the other way round
    (timm's mode "pair"; VideoMAE has one draw for a batch of each process, which depends on their number).

    Args:
        video: [B, C, T, H, W] uint8; the `views` of a video lie next to each other, and are mixed each with the
            neighbour's of the same number. B is a multiple of 2 · views.
        labels: [B] int64, 0 to V - 1.
        classes: V.

    Returns:
        Clips like `video` and targets [B, V] float32, each summing to 1.
    """
    targets = smoothed(labels, classes, config.label_smoothing)
    if not config.mixes:
        return video, targets
    partner = np.arange(len(video)).reshape(-1, 2, views)[:, ::-1].reshape(-1)
    draws = [
        _mixture(config, video.shape[-2:], _generator(_MIX, seed, step, first_sample + min(row, int(other))))
        for row, other in enumerate(partner)
    ]
    other = torch.from_numpy(partner.copy()).to(video.device)
    weight = torch.tensor([draw[0] for draw in draws], dtype=torch.float32).to(video.device)
    mixed = torch.empty_like(video)
    for row, (share, box) in enumerate(draws):
        mine, its = video[row], video[int(partner[row])]
        if box is None:
            mixed[row] = torch.lerp(its.float(), mine.float(), share).round_().to(torch.uint8)
        else:
            rows, columns = box
            mixed[row] = mine
            mixed[row, ..., rows, columns] = its[..., rows, columns]
    return mixed, torch.lerp(targets[other], targets, weight[:, None])


def smoothed(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """[B] int64 -> [B, V] float32: 1 - smoothing at the label, and smoothing spread over all classes."""
    targets = torch.full((len(labels), classes), smoothing / classes, device=labels.device)
    return targets.scatter_(1, labels[:, None], 1 - smoothing + smoothing / classes)


def _mixture(
    config: AugmentConfig, size: Sequence[int], generator: np.random.Generator
) -> tuple[float, tuple[slice, slice] | None]:
    """The weight of a clip's own part, and the box that its partner fills; None for mixup."""
    cutmix = config.cutmix > 0 and (config.mixup == 0 or generator.random() < 0.5)
    alpha = config.cutmix if cutmix else config.mixup
    weight = float(generator.beta(alpha, alpha))
    if not cutmix:
        return weight, None
    box = []
    for length in size:
        half, centre = int(length * math.sqrt(1 - weight)) // 2, int(generator.integers(length))
        box.append(slice(max(centre - half, 0), min(centre + half, length)))
    filled = math.prod(part.stop - part.start for part in box) / math.prod(size)
    return 1 - filled, (box[0], box[1])


def path_scales(
    clips: int, depth: int, drop_path: float, *, seed: int, step: int, first_sample: int, device: torch.device
) -> Tensor | None:
    """For stochastic depth, float32 [depth, 2, B], see `mam2.engine.model.blocks.Block`; None without it.

    A branch of block k is left out with a chance of drop_path · k / (depth - 1), for each clip by itself.
    """
    if not drop_path:
        return None
    stay = 1 - np.linspace(0, drop_path, depth)[:, None]
    drawn = [
        _generator(_DROP, seed, step, sample).random((depth, 2)) for sample in range(first_sample, first_sample + clips)
    ]
    scales = np.stack([(draw < stay) / stay for draw in drawn], axis=-1)
    return torch.from_numpy(scales).float().to(device)


def feature_scales(
    clips: int, width: int, dropout: float, *, seed: int, step: int, first_sample: int, device: torch.device
) -> Tensor | None:
    """For dropout of features, float32 [B, D]: 0, or 1 / (1 - dropout); None without it."""
    if not dropout:
        return None
    drawn = [
        _generator(_DROP, seed, step, sample, part=1).random(width)
        for sample in range(first_sample, first_sample + clips)
    ]
    return torch.from_numpy((np.stack(drawn) >= dropout) / (1 - dropout)).float().to(device)


def _generator(purpose: int, seed: int, step: int, sample: int, part: int = 0) -> np.random.Generator:
    # The first counter word is Philox's own: it counts the numbers drawn here.
    counter = np.array([0, step, sample, part], np.uint64)
    return np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, purpose], np.uint64), counter=counter))
