"""Test cases of the operators: clips in every layout, every type, target and reduction, and unusual inputs.

correctness.py runs them on a GPU; the tests run them in Triton's interpreter, with more inputs. Clips are surrounded by
NaN in memory, so that a read outside of the clip changes the result.

B clips, C channels, T frames, N tokens, K selected tokens, P values per token, M rows, D width, V codes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mam2.kernels import (
    TubeMask,
    frame_difference,
    gather_tubes,
    linear_cross_entropy,
    linear_masked_loss,
    masked_frame_difference_loss,
    masked_pixel_loss,
    motion_tube_mask,
    random_mask,
    tube_mask,
)
from mam2.kernels.masked_subset import masked_subset
from mam2.kernels.scale_gradient import scale_gradient

BYTES, HALF, BRAIN, SINGLE, DOUBLE = torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64
MEAN, STD = (0.5, 0.4, 0.45, 0.3), (0.2, 0.3, 0.25, 0.4)
EPS = 0.01


class Layout(NamedTuple):
    """Memory layout of a clip: its dimensions from the slowest to the fastest."""

    order: str
    margin: str = ""
    """Dimensions in which the clip is a window of a larger buffer."""
    repeated: str = ""
    """Dimensions of stride 0."""


LAYOUTS = {
    "channels_last": Layout("bthwc"),
    "contiguous": Layout("bcthw"),
    "window": Layout("bthwc", margin="bthw"),
    "inner": Layout("bcthw", margin="bcthw"),
    "frames_first": Layout("btchw", margin="tw"),
    "turned": Layout("bwhtc", margin="h"),
    "still": Layout("bthwc", repeated="t"),
    "gray": Layout("bcthw", repeated="c"),
    "one_clip": Layout("bthwc", repeated="b"),
}


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Shape and layout of a clip; `grid` counts tokens in time, height and width."""

    patch: tuple[int, int, int]
    layout: str
    dtype: torch.dtype
    grid: tuple[int, int, int] = (2, 2, 2)
    batch: int = 2
    channels: int = 3

    @property
    def values(self) -> int:
        return self.patch[0] * self.patch[1] * self.patch[2] * self.channels

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def statistics(self) -> dict[str, Any]:
        """Returns mean and standard deviation of each channel."""
        return {"mean": MEAN[: self.channels], "std": STD[: self.channels]}

    def make(self) -> Tensor:
        """Returns a random clip [B,C,T,H,W] on the CPU."""
        layout = LAYOUTS[self.layout]
        extent = (count * edge for count, edge in zip(self.grid, self.patch, strict=True))
        sizes = dict(zip("bcthw", (self.batch, self.channels, *extent), strict=True))
        stored = [1 if name in layout.repeated else sizes[name] for name in layout.order]
        margins = [int(name in layout.margin) for name in layout.order]
        buffer_size = [size + 2 * margin for size, margin in zip(stored, margins, strict=True)]
        if self.dtype == BYTES:
            buffer = torch.randint(0, 256, buffer_size, dtype=BYTES)
        else:
            buffer = torch.full(buffer_size, float("nan"), dtype=self.dtype)
        window = buffer[tuple(slice(margin, margin + size) for size, margin in zip(stored, margins, strict=True))]
        if self.dtype != BYTES:
            window.copy_(torch.rand(window.shape))
        return window.permute([layout.order.index(name) for name in "bcthw"]).expand(list(sizes.values()))

    def __str__(self) -> str:
        cut = f"{'x'.join(map(str, self.patch))} of {'x'.join(map(str, self.grid))}"
        return f"{self.batch} clips {cut} C{self.channels} {self.layout} {short(self.dtype)}"


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Case(NamedTuple):
    name: str
    dtype: torch.dtype
    """Type of the prediction, or of the output."""
    inputs: dict[str, Tensor]
    """Inputs by name, on the CPU."""
    run: Callable[..., list[Tensor]]
    """run(dtype, **inputs) returns the outputs, on the device of the inputs."""
    plain: Callable[..., list[Tensor]] | None = None
    """The same in plain PyTorch; None: `run` on the PyTorch path."""

    @property
    def group(self) -> tuple[str, ...]:
        """Returns operator, target and memory layout, or codes: the cases of a group launch the same kernels."""
        words = self.name.replace(",", "").split()
        return words[0], *(word for word in words[1:] if word in LAYOUTS or word in TARGETS or word[0] == "V")


def few(cases: Iterator[Case]) -> list[Case]:
    """Returns the first case of each group."""
    found: dict[tuple[str, ...], Case] = {}
    for case in cases:
        found.setdefault(case.group, case)
    return list(found.values())


def by_columns(tensor: Tensor) -> Tensor:
    """Returns a matrix with its columns one after the other in memory, as token weights may be."""
    return tensor.t().contiguous().t()


def loss_case(
    clip: Clip,
    dtype: torch.dtype,
    *,
    target: str,
    normalize: str | None,
    reduction: str = "none",
    every_token: bool = False,
    weighted: bool = False,
    mask: TubeMask | None = None,
) -> Case:
    """Returns a case of a masked loss and its gradient, with a random upstream gradient; default mask: half the tokens.

    A float clip counts as normalized, so that the loss must undo it.
    """
    if mask is None:
        mask = random_mask(clip.batch, clip.grid, 0.5, seed=clip.values)
    values = clip.values - (clip.values // clip.patch[0] if target == "intra" else 0)
    masked = mask.masked
    pred_shape = (clip.batch, clip.tokens if every_token else masked.shape[1], values)
    inputs = {"video": clip.make(), "masked": masked, "pred": torch.randn(pred_shape).to(dtype)}
    inputs["upstream"] = 0.5 + torch.rand(masked.shape if reduction == "none" else (), dtype=DOUBLE)
    if weighted:
        inputs["weight"] = by_columns(torch.rand(masked.shape) * (torch.rand(masked.shape) > 0.3))
    options: dict[str, Any] = {"patch_size": clip.patch, "normalize": normalize, "eps": EPS, "reduction": reduction}
    options |= {} if clip.dtype == BYTES else clip.statistics
    motion = target in ("adjacent", "intra")
    function: Callable[..., Tensor] = masked_frame_difference_loss if motion else masked_pixel_loss
    options["difference" if motion else "target"] = target

    def run(_: torch.dtype, *, video: Tensor, masked: Tensor, pred: Tensor, upstream: Tensor, **more: Tensor) -> list:
        leaf = pred.detach().requires_grad_()
        loss = function(leaf, video, masked, **options, **more)
        return [loss.detach(), *torch.autograd.grad(loss, leaf, upstream.to(loss.dtype))]

    tokens = f"{'every' if every_token else masked.shape[1]} token{'s, weighted' if weighted else 's'}"
    return Case(f"loss {target} {normalize} {reduction} {short(dtype)} {tokens}, {clip}", dtype, inputs, run)


def gather_case(clip: Clip, dtype: torch.dtype, *, normalized: bool, mask: TubeMask | None = None) -> Case:
    """Returns a case of `gather_tubes`; default mask: half the tokens."""
    if mask is None:
        mask = random_mask(clip.batch, clip.grid, 0.5, seed=clip.values)
    statistics = clip.statistics if normalized else {}

    def run(dtype: torch.dtype, *, video: Tensor, visible: Tensor) -> list[Tensor]:
        return [gather_tubes(video, visible, patch_size=clip.patch, dtype=dtype, **statistics)]

    inputs = {"video": clip.make(), "visible": mask.visible}
    return Case(f"gather_tubes {short(dtype)}{' normalized' * normalized}, {clip}", dtype, inputs, run)


def difference_case(clip: Clip, *, difference: str, normalize: str | None, mask: TubeMask | None = None) -> Case:
    """Returns a case of `frame_difference` for the masked tokens, or for every token without a mask."""
    options: dict[str, Any] = {"patch_size": clip.patch, "difference": difference, "normalize": normalize, "eps": EPS}
    options |= {} if clip.dtype == BYTES else clip.statistics

    def run(_: torch.dtype, *, video: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        return [frame_difference(video, mask=mask, **options)]

    inputs = {"video": clip.make()} | ({} if mask is None else {"mask": mask.masked})
    return Case(f"frame_difference {difference} {normalize}, {clip}", SINGLE, inputs, run)


def head_case(
    rows: int,
    width: int,
    codes: int,
    dtype: torch.dtype,
    *,
    reduction: str,
    smoothing: float = 0.0,
    ignored: Sequence[int] = (),
    bias: bool = True,
) -> Case:
    """Returns a case of linear_cross_entropy and its gradients.

    Reference: PyTorch's cross-entropy of a linear layer.
    """
    sizes: dict[str, tuple[int, ...]] = {"hidden": (rows, width), "weight": (codes, width)}
    sizes |= {"bias": (codes,)} if bias else {}
    inputs = {name: torch.randn(size).mul(0.5).to(dtype) for name, size in sizes.items()}
    inputs["target"] = torch.randint(codes, (rows,)).index_fill_(0, torch.tensor(ignored, dtype=torch.int64), -100)
    inputs["upstream"] = 0.5 + torch.rand((rows,) if reduction == "none" else (), dtype=DOUBLE)
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, target, bias, **options)

    def theirs(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
        logits = F.linear(hidden, weight, bias)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, SINGLE)), target, **options)

    def outputs(function: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
        def run(_: torch.dtype, *, target: Tensor, upstream: Tensor, **given: Tensor) -> list[Tensor]:
            leaves = {name: tensor.detach().requires_grad_() for name, tensor in given.items()}
            loss = function(leaves["hidden"], leaves["weight"], leaves.get("bias"), target)
            return [loss.detach(), *torch.autograd.grad(loss, list(leaves.values()), upstream.to(loss.dtype))]

        return run

    name = f"linear_cross_entropy M{rows} D{width} V{codes} {short(dtype)} {reduction} {smoothing}"
    return Case(name + " bias" * bias, dtype, inputs, outputs(ours), outputs(theirs))


def masked_head_case(clip: Clip, dtype: torch.dtype, *, target: str, width: int = 16, weighted: bool = False) -> Case:
    """Returns a case of linear_masked_loss and its gradients. Reference: the masked loss of a linear layer."""
    values = clip.values - (clip.values // clip.patch[0] if target == "intra" else 0)
    masked = random_mask(clip.batch, clip.grid, 0.5, seed=clip.values).masked
    sizes = {"hidden": (*masked.shape, width), "weight": (values, width), "bias": (values,)}
    inputs = {name: torch.randn(size).mul(0.5).to(dtype) for name, size in sizes.items()}
    inputs |= {"video": clip.make(), "masked": masked, "upstream": 0.5 + torch.rand((), dtype=DOUBLE)}
    if weighted:
        inputs["factor"] = by_columns(torch.rand(masked.shape) * (torch.rand(masked.shape) > 0.3))
    options: dict[str, Any] = {"patch_size": clip.patch, "eps": EPS, "normalize": "patch"}
    options |= {} if clip.dtype == BYTES else clip.statistics

    def ours(leaves: list[Tensor], video: Tensor, masked: Tensor, factor: Tensor | None) -> Tensor:
        hidden, weight, bias = leaves
        return linear_masked_loss(hidden, weight, video, masked, bias, target=target, token_weight=factor, **options)

    def theirs(leaves: list[Tensor], video: Tensor, masked: Tensor, factor: Tensor | None) -> Tensor:
        pred = F.linear(*leaves)
        if target in ("adjacent", "intra"):
            return masked_frame_difference_loss(pred, video, masked, difference=target, weight=factor, **options)
        return masked_pixel_loss(pred, video, masked, target=target, weight=factor, **options)

    def outputs(function: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
        def run(_: torch.dtype, *, upstream: Tensor, factor: Tensor | None = None, **given: Tensor) -> list[Tensor]:
            leaves = [given[name].detach().requires_grad_() for name in sizes]
            loss = function(leaves, given["video"], given["masked"], factor)
            return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))]

        return run

    name = f"linear_masked_loss {target} D{width} {short(dtype)}{' weighted' * weighted}, {clip}"
    return Case(name, dtype, inputs, outputs(ours), outputs(theirs))


def scale_case(shape: Sequence[int], leading: int, dtype: torch.dtype) -> Case:
    """Returns a case of a gradient times one factor per index of its `leading` dimensions."""
    inputs = {
        "gradient": torch.randn(shape).to(dtype),
        "scale": torch.rand(shape[:leading]).to(torch.promote_types(dtype, SINGLE)),
    }

    def run(_: torch.dtype, *, gradient: Tensor, scale: Tensor) -> list[Tensor]:
        return [scale_gradient(gradient, scale)]

    return Case(f"scale_gradient {list(shape)} by {leading} {short(dtype)}", dtype, inputs, run)


def energy_case(clip: Clip) -> Case:
    """Returns a case of motion energies; those of a uint8 clip are integers, which are exact in float64."""

    def run(_: torch.dtype, *, video: Tensor) -> list[Tensor]:
        energy = torch.ops.mam2.motion_energy(video, clip.patch)
        in_bytes = clip.dtype == BYTES and video.dtype == DOUBLE
        return [energy.mul(255**2).round().long() if in_bytes else energy]

    return Case(f"motion_energy, {clip}", SINGLE, {"video": clip.make()}, run)


def mask_case(seed: int, step: int, sample: int, slots: int, positions: int, hidden: int) -> Case:
    """Returns a case of tube masks of three clips."""

    def run(_: torch.dtype, *, step: Tensor) -> list[Tensor]:
        ratio = (hidden + 0.5) / positions
        return list(tube_mask(3, (slots, 1, positions), ratio, seed=seed, step=step, first_sample=sample))

    name = f"tube_mask {(seed, step, sample)} {slots}x{positions}, {hidden} hidden"
    return Case(name, torch.int64, {"step": torch.tensor(step)}, run)


def subset_case(
    seed: int, step: int, sample: int, grid: tuple[int, int, int], hidden: int, count: int, *, by_cell: bool
) -> Case:
    """Returns a case of some of the `hidden` masked tokens of three clips."""
    tokens = torch.rand(3, grid[0] * grid[1] * grid[2]).argsort(1)[:, :hidden].sort(1).values

    def run(_: torch.dtype, *, masked: Tensor, step: Tensor) -> list[Tensor]:
        return [masked_subset(masked, grid, count, by_cell=by_cell, seed=seed, step=step, first_sample=sample)]

    name = f"masked_subset {(seed, step, sample)} {'x'.join(map(str, grid))}, {count} of {hidden}{' by cell' * by_cell}"
    return Case(name, torch.int64, {"masked": tokens, "step": torch.tensor(step)}, run)


def motion_mask_case(clip: Clip, strength: float) -> Case:
    """Returns a case of tube masks drawn by motion."""

    def run(_: torch.dtype, *, video: Tensor) -> list[Tensor]:
        return list(motion_tube_mask(video, 0.5, patch_size=clip.patch, strength=strength, **FAR))

    return Case(f"motion_tube_mask {strength}, {clip}", torch.int64, {"video": clip.make()}, run)


FAR: dict[str, Any] = {"seed": 2**62 + 12345, "step": 2**33 + 7, "first_sample": 2**32 - 1}
CLIPS = (
    Clip(patch=(2, 16, 16), layout="channels_last", dtype=BYTES),
    Clip(patch=(2, 16, 16), layout="contiguous", dtype=SINGLE, grid=(2, 1, 2)),
    Clip(patch=(3, 4, 4), layout="window", dtype=BYTES),
    Clip(patch=(1, 8, 8), layout="channels_last", dtype=BRAIN),
    Clip(patch=(3, 2, 1), layout="channels_last", dtype=BYTES),
    Clip(patch=(2, 4, 4), layout="inner", dtype=HALF),
    Clip(patch=(2, 4, 4), layout="turned", dtype=DOUBLE, grid=(3, 1, 2)),
    Clip(patch=(2, 2, 8), layout="frames_first", dtype=BYTES, channels=1),
    Clip(patch=(2, 3, 2), layout="gray", dtype=SINGLE, channels=4),
)
TARGETS = ("pixel", "intra", "adjacent", "joint")
NORMALIZATIONS = ("patch", None, "channel")
REDUCTIONS = ("none", "mean", "sum")
TYPES = (SINGLE, BRAIN, HALF, BRAIN, DOUBLE)


def cases(device: torch.device) -> Iterator[Case]:
    """All cases, the same on every device, except a mask of a clip's full size, too slow for the interpreter."""
    for place, (clip, target) in enumerate(itertools.product(CLIPS, TARGETS)):
        if clip.patch[0] > 1 or target not in ("intra", "joint"):
            yield loss_case(
                clip,
                TYPES[place % 5],
                target=target,
                normalize=NORMALIZATIONS[place % 3],
                reduction=REDUCTIONS[place // 3 % 3],
                every_token=place // 4 % 2 == 0,
                weighted=place % 7 < 3,
            )
    for place, clip in enumerate(CLIPS):
        mask = tube_mask(clip.batch, clip.grid, 0.5, seed=3)
        yield gather_case(clip, TYPES[place % 5], normalized=place % 4 != 2, mask=mask)
        difference = "intra" if place % 4 == 0 else "adjacent"
        normalize = NORMALIZATIONS[place % 3]
        yield difference_case(clip, difference=difference, normalize=normalize, mask=mask if place % 2 else None)
        yield energy_case(clip)
    for place, (codes, dtype) in enumerate(itertools.product((5, 1000, 8200), (SINGLE, BRAIN, HALF, DOUBLE))):
        reduction, smoothing = REDUCTIONS[place % 3], 0.1 if codes == 1000 else 0.0
        yield head_case(5, 64, codes, dtype, reduction=reduction, smoothing=smoothing, ignored=[2])
    if device.type == "cuda":
        for place, dtype in enumerate((SINGLE, BRAIN, HALF, DOUBLE)):
            codes, reduction = (1000, 8192)[place % 2], ("mean", "sum")[place // 2]
            yield head_case(900, 64, codes, dtype, reduction=reduction, smoothing=0.1, ignored=[2, 899])
    for place, target in enumerate(TARGETS):
        yield masked_head_case(CLIPS[2 * place], TYPES[(place + 1) % 5], target=target, weighted=place % 2 == 1)
    for dtype in (SINGLE, BRAIN, HALF, DOUBLE):
        for leading in (0, 1, 2):
            yield scale_case((3, 2, 4099), leading, dtype)
    for strength in (0.0, 0.5, 1.0):
        yield motion_mask_case(Clip(patch=(2, 4, 4), layout="window", dtype=BYTES, grid=(3, 4, 4)), strength)
    sizes = ((2, 5, 3), (1, 33, 7), (1, 2, 1), *(((8, 196, 176), (1, 1568, 1411)) if device.type == "cuda" else ()))
    for slots, positions, hidden in sizes:
        yield mask_case(0, 0, 0, slots, positions, hidden)
        yield mask_case(*FAR.values(), slots, positions, hidden)
    large = (((8, 14, 14), 1408, 704),) if device.type == "cuda" else ()
    for (grid, hidden, count), by_cell in itertools.product(
        (((2, 3, 5), 21, 8), ((1, 1, 2), 1, 1), *large), (False, True)
    ):
        yield subset_case(0, 0, 0, grid, hidden, count, by_cell=by_cell)
        yield subset_case(*FAR.values(), grid, hidden, count, by_cell=by_cell)
