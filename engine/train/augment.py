"""Augmentation of fine-tuning on the device: RandAugment, random erasing, mixup, cutmix, stochastic depth, dropout.

Shapes: B clips, T frames, C channels, V classes. Clips of uint8 stay uint8: every operation rounds to integer levels;
float clips (0 to 1) are not rounded.
All random draws of a clip are keyed by (seed, step, index of the clip in the step's batch), so that a step is the same
if it is repeated, resumed or distributed over any number of processes. All frames of a clip are augmented equally;
operations that depend on the image (equalize, autocontrast, contrast) use the whole clip, so that none causes flicker.

Everything is drawn on the host. `prepare` sends the draws to the device in one asynchronous copy, and queues the work.

RandAugment is "m7-n4-mstd0.5-inc1", VideoMAE's choice of timm's variants; here it follows the crop, there it precedes
it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mam2.engine.config.finetune import AugmentConfig, FinetuneConfig
from mam2.engine.data.draws import Draw, generator_of
from mam2.engine.model.pixels import pixel_statistics
from mam2.engine.train.finetune_targets import ClassTargets, Targets, smoothed
from mam2.engine.train.randaugment import OPERATIONS, Operation, constant

ERASED_AREA = (0.02, 1 / 3)
"""Smallest and largest share of the frame that is erased."""
ERASED_ASPECT = 10 / 3
"""Aspect ratios are drawn log-uniformly from the inverse of this value to this value."""
ERASE_TRIES = 10
ALIGNMENT = 16
"""Arrays in the copy to the device start at multiples of this number of bytes."""


class Drawn(NamedTuple):
    """Draws on the host for a batch."""

    arrays: list[Any]
    """NumPy arrays that the device needs."""
    apply: Callable[..., Any]
    """Called with these arrays as tensors on the device, and with the tensors to which the draws are applied."""


class Prepared(NamedTuple):
    """Inputs of a fine-tuning objective, on the device."""

    video: Tensor
    """[B, C, T, H, W] uint8, augmented and mixed."""
    targets: Tensor
    """[B, V] float32; of one class per video without class weights, each row sums to 1."""
    path_scales: Tensor | None
    feature_scales: Tensor | None


def prepare(
    video: Tensor,
    labels: Tensor,
    config: FinetuneConfig,
    targets: Targets | None = None,
    *,
    step: int,
    first_sample: int,
) -> Prepared:
    """Applies all augmentation of fine-tuning to a batch.

    Args:
        video: [B, C, T, H, W] uint8, any strides; B as for `mix`.
        labels: [B] int64 on the CPU, 0 to V - 1.
        config: the tables augment, model, head and optim are used.
        targets: what makes targets of labels; None for one class per video, without class weights.
        step: optimizer step.
        first_sample: index of the first clip in the step's batch.
    """
    model, count, height, width = config.model, len(video), *video.shape[-2:]
    targets = targets or ClassTargets(model.classes, config.augment.label_smoothing)
    key = (config.run.seed, step, first_sample)
    drawn = [
        _draw_augmentation(config.augment, (height, width), count, *key),
        _draw_mixing(config.augment, (height, width), count, config.data.views, *key),
        _draw_paths(count, model.depth, config.optim.drop_path, *key, frozen=config.frozen_blocks),
        _draw_features(count, model.width, config.head.dropout, *key),
        Drawn(targets.arrays(labels), targets.on_device),
    ]
    augmented, mixed, paths, features, plain = send(drawn, video.device)
    clips, soft = mixed(augmented(video), plain())
    return Prepared(clips, soft, paths(), features())


def send(drawn: Sequence[Drawn], device: torch.device) -> list[Callable[..., Any]]:
    """Copies all arrays to a device, packed into one pinned array; returns each `apply`, bound to its tensors."""
    arrays = [np.ascontiguousarray(array) for one in drawn for array in one.arrays]
    starts = np.cumsum([0, *(-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays)]).tolist()
    host = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    for start, array in zip(starts, arrays, strict=False):
        host.numpy()[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
    packed = host.to(device, non_blocking=True)
    tensors = iter(
        packed[start : start + array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
        for start, array in zip(starts, arrays, strict=False)
    )
    return [functools.partial(one.apply, [next(tensors) for _ in one.arrays]) for one in drawn]


def augment(video: Tensor, config: AugmentConfig, *, seed: int, step: int, first_sample: int) -> Tensor:
    """Applies RandAugment, then random erasing; returns a new tensor.

    video: [B, C, T, H, W] uint8, any strides. first_sample: index of its first clip in the step's batch.
    """
    size = (video.shape[-2], video.shape[-1])
    (apply,) = send([_draw_augmentation(config, size, len(video), seed, step, first_sample)], video.device)
    return apply(video)


def _draw_augmentation(
    config: AugmentConfig, size: tuple[int, int], count: int, seed: int, step: int, first_sample: int
) -> Drawn:
    samples = range(first_sample, first_sample + count)
    plans = [_plan(config, generator_of(Draw.RAND_AUGMENT, seed, step, sample)) for sample in samples]
    operations: list[Operation] = []
    arrays: list[Any] = []
    for number in range(config.operations):
        for operation in OPERATIONS:
            rows = [row for row, plan in enumerate(plans) if plan[number][0] is operation]
            if rows:
                operations.append(operation)
                strengths = [plans[row][number][1] for row in rows]
                arrays += [np.array(rows, np.int64), np.array(strengths, np.float32)]
    boxes = [_draw_box(size, config.erase, generator_of(Draw.ERASE, seed, step, sample)) for sample in samples]

    def apply(sent: Sequence[Tensor], video: Tensor) -> Tensor:
        video = video.clone(memory_format=torch.preserve_format)
        levels = 255.0 if video.is_floating_point() else 1.0
        for operation, chosen, strengths in zip(operations, sent[::2], sent[1::2], strict=True):
            whole = {"whole": not video.is_floating_point()} if operation.rounds else {}
            changed = operation.apply(video[chosen].float() * levels, strengths, **whole)
            video[chosen] = _stored(changed.clamp_(0, 255) / levels, video.dtype)
        for row, box in enumerate(boxes):
            if box:
                _erase(video[row, ..., box.rows, box.columns], box.seed)
        return video

    return Drawn(arrays, apply)


def _stored(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Converts values in the unit of a clip to its type: uint8 rounded to levels, floats as they are."""
    return values.round_().to(dtype) if dtype == torch.uint8 else values.to(dtype)


def _plan(config: AugmentConfig, generator: np.random.Generator) -> list[tuple[Operation | None, float]]:
    """Draws a clip's operations with their strengths; None for an operation that is not applied."""
    plan: list[tuple[Operation | None, float]] = []
    for _ in range(config.operations):
        operation = OPERATIONS[generator.integers(len(OPERATIONS))]
        left_out = generator.random() >= config.share
        magnitude = min(max(generator.normal(config.magnitude, config.magnitude_std), 0.0), 10.0)
        sign = 1 if generator.random() < 0.5 else -1
        strength = operation.strength(magnitude / 10) * (sign if operation.signed else 1)
        plan.append((None if left_out else operation, strength))
    return plan


class _Box(NamedTuple):
    rows: slice
    columns: slice
    seed: int
    """Seed of the noise in the box."""


def _draw_box(size: tuple[int, int], chance: float, generator: np.random.Generator) -> _Box | None:
    """Draws a box of the frame to erase, or None."""
    height, width = size
    if generator.random() >= chance:
        return None
    for _ in range(ERASE_TRIES):
        area = generator.uniform(*ERASED_AREA) * height * width
        aspect = math.exp(generator.uniform(-math.log(ERASED_ASPECT), math.log(ERASED_ASPECT)))
        high, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if high < height and wide < width:
            top, left = int(generator.integers(height - high + 1)), int(generator.integers(width - wide + 1))
            return _Box(slice(top, top + high), slice(left, left + wide), int(generator.integers(2**63)))
    return None


def _erase(box: Tensor, seed: int) -> None:
    """Fills a box [C, T, h, w] of a clip with noise, different in every frame: normal, see `pixel_statistics`."""
    # drawing a box of noise on the host would be too slow
    noise = torch.Generator(box.device).manual_seed(seed)
    drawn = torch.randn(box.shape, generator=noise, device=box.device)
    mean, std = (255 * constant(values, box.device) for values in pixel_statistics(len(box)))
    pixels = (drawn * std[:, None, None, None] + mean[:, None, None, None]).clamp_(0, 255)
    box.copy_(pixels / 255 if box.is_floating_point() else pixels.round_())


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
    """Mixes adjacent videos in pairs, by mixup or cutmix, and returns the corresponding soft targets.

    Both videos of a pair use the same draw: the first clip keeps the weight w and gets 1 - w of the second, and vice
    versa (timm's mode "pair"; VideoMAE has one draw per batch and process, so that its result depends on their number).

    Args:
        video: [B, C, T, H, W] uint8; the `views` of a video are adjacent, and each is mixed with the view of the same
            number of the other video. B is a multiple of 2 · views.
        labels: [B] int64, 0 to V - 1.
        classes: V.

    Returns:
        Clips like `video` and targets [B, V] float32, each summing to 1.
    """
    size = (video.shape[-2], video.shape[-1])
    drawn = _draw_mixing(config, size, len(video), views, seed, step, first_sample)
    (apply,) = send([drawn], video.device)
    return apply(video, smoothed(labels, classes, config.label_smoothing))


def _draw_mixing(
    config: AugmentConfig,
    size: tuple[int, int],
    count: int,
    views: int,
    seed: int,
    step: int,
    first_sample: int,
) -> Drawn:
    if not config.mixes:
        return Drawn([], lambda _, video, targets: (video, targets))
    partner = np.arange(count).reshape(-1, 2, views)[:, ::-1].reshape(-1)
    draws = [
        _mixture(config, size, generator_of(Draw.MIX, seed, step, first_sample + min(row, int(other))))
        for row, other in enumerate(partner)
    ]

    def apply(sent: Sequence[Tensor], video: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        other, weight = sent
        mixed = torch.empty_like(video)
        for row, (share, box) in enumerate(draws):
            mine, its = video[row], video[int(partner[row])]
            if box is None:
                mixed[row] = _stored(torch.lerp(its.float(), mine.float(), share), video.dtype)
            else:
                rows, columns = box
                mixed[row] = mine
                mixed[row, ..., rows, columns] = its[..., rows, columns]
        return mixed, torch.lerp(targets[other], targets, weight[:, None])

    return Drawn([partner.astype(np.int64), np.array([share for share, _ in draws], np.float32)], apply)


def _mixture(
    config: AugmentConfig, size: Sequence[int], generator: np.random.Generator
) -> tuple[float, tuple[slice, slice] | None]:
    """Draws the weight of a clip, and the box that its partner fills; None for mixup."""
    cutmix = config.cutmix > 0 and (config.mixup == 0 or generator.random() < 0.5)
    alpha = config.cutmix if cutmix else config.mixup
    weight = float(generator.beta(alpha, alpha))
    if not cutmix:
        return weight, None
    box = []
    for length in size:
        half, center = int(length * math.sqrt(1 - weight)) // 2, int(generator.integers(length))
        box.append(slice(max(center - half, 0), min(center + half, length)))
    filled = math.prod(part.stop - part.start for part in box) / math.prod(size)
    return 1 - filled, (box[0], box[1])


def path_scales(
    clips: int, depth: int, drop_path: float, *, seed: int, step: int, first_sample: int, device: torch.device
) -> Tensor | None:
    """Draws stochastic depth, float32 [depth, 2, B], see `mam2.engine.model.blocks.Block`; None without it.

    A branch of block k is dropped with probability drop_path · k / (depth - 1), independently for each clip.
    """
    (apply,) = send([_draw_paths(clips, depth, drop_path, seed, step, first_sample)], device)
    return apply()


def _draw_paths(
    clips: int, depth: int, drop_path: float, seed: int, step: int, first_sample: int, *, frozen: int = 0
) -> Drawn:
    """frozen: first blocks, whose branches are never left out."""
    if not drop_path:
        return Drawn([], lambda _: None)
    stay = 1 - np.linspace(0, drop_path, depth)[:, None]
    stay[:frozen] = 1
    drawn = [
        generator_of(Draw.DROP, seed, step, sample).random((depth, 2))
        for sample in range(first_sample, first_sample + clips)
    ]
    scales = np.stack([(draw < stay) / stay for draw in drawn], axis=-1)
    return Drawn([scales.astype(np.float32)], lambda sent: sent[0])


def feature_scales(
    clips: int, width: int, dropout: float, *, seed: int, step: int, first_sample: int, device: torch.device
) -> Tensor | None:
    """Draws dropout factors of the features, float32 [B, D]: 0 or 1 / (1 - dropout); None without dropout."""
    (apply,) = send([_draw_features(clips, width, dropout, seed, step, first_sample)], device)
    return apply()


def _draw_features(clips: int, width: int, dropout: float, seed: int, step: int, first_sample: int) -> Drawn:
    if not dropout:
        return Drawn([], lambda _: None)
    drawn = [
        generator_of(Draw.DROP, seed, step, sample, 1).random(width)
        for sample in range(first_sample, first_sample + clips)
    ]
    return Drawn([((np.stack(drawn) >= dropout) / (1 - dropout)).astype(np.float32)], lambda sent: sent[0])
