"""Every operator, type of clip, target and prediction on a device, against its definition in float64 on the CPU.

Fresh memory is filled with NaN, clips come in several layouts and patch sizes, and every result must repeat bit for
bit. B = 2 clips of 2·2·2 tokens: a Triton program has one token, so more of them are more of the same.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.operators import MEAN, STD, relative_error
from mam2.kernels import (
    active_path,
    frame_difference,
    gather_tubes,
    linear_cross_entropy,
    masked_frame_difference_loss,
    masked_pixel_loss,
    reference,
    tube_mask,
)

BYTES, HALF, BRAIN, SINGLE, DOUBLE = torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64
GRID = (2, 2, 2)
EPS = 0.01
BUDGET = {SINGLE: 1e-5, HALF: 1e-3, BRAIN: 8e-3, DOUBLE: 1e-12}
"""Largest relative error of an output of a type."""
HEAD_BUDGET = {SINGLE: 1e-5, HALF: 2e-3, BRAIN: 1e-2, DOUBLE: 1e-9}
"""The same for all outputs of linear_cross_entropy by the inputs' type: even a float32 loss comes from logits of that
type, and Triton takes the label smoothing, a constant, as a float32."""
CLIPS = (
    ((2, 16, 16), "channels_last", BYTES),
    ((2, 16, 16), "contiguous", SINGLE),
    ((3, 4, 4), "window", BYTES),
    ((1, 8, 8), "channels_last", BRAIN),
    ((2, 3, 5), "channels_last", BYTES),
    ((2, 4, 4), "window", HALF),
    ((2, 4, 4), "channels_last", DOUBLE),
)
TARGETS = (("adjacent", "channel"), ("pixel", "channel"), ("intra", "patch"), ("pixel", "patch"), ("adjacent", None))
CODES = (5, 1000, 8192)


def make_clip(patch: Sequence[int], layout: str, dtype: torch.dtype) -> Tensor:
    """Two clips [2,3,T,H,W] on the CPU."""
    frames, height, width = (count * edge for count, edge in zip(GRID, patch, strict=True))
    raw = torch.randint(0, 256, (2, frames, height + 2, width + 3, 3), dtype=BYTES)
    window = (raw if dtype == BYTES else raw / 255).to(dtype).permute(0, 4, 1, 2, 3)[..., 1:-1, 2:-1]
    if layout == "channels_last":
        return window.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    return window.contiguous() if layout == "contiguous" else window


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """What `new_empty` gives holds NaN (integers: a huge number), so that a value nobody writes shows."""
    empty = torch.Tensor.new_empty

    def poisoned(self: Tensor, *size: Any, **options: Any) -> Tensor:
        out = empty(self, *size, **options)
        return out.fill_(float("nan") if out.dtype.is_floating_point else 2**40) if out.numel() else out

    torch.Tensor.new_empty = poisoned  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.Tensor.new_empty = empty  # type: ignore[method-assign]


class Case(NamedTuple):
    name: str
    run: Callable[[], list[Tensor]]
    exact: list[Tensor]
    """What `run` should give; integers exactly, the rest within the budget."""
    budget: float | None = None
    """In place of that of each output's type."""


def loss_case(
    device: torch.device, place: int, clip: tuple, target: str, normalize: str | None, kind: torch.dtype
) -> Case:
    patch, layout, dtype = clip
    video, mask, every = make_clip(patch, layout, dtype), tube_mask(2, GRID, 0.5, seed=place), place % 2 == 1
    values = patch[0] * patch[1] * patch[2] * 3
    values -= values // patch[0] if target == "intra" else 0
    pred = torch.randn(2, 8 if every else mask.masked.shape[1], values).to(kind)
    upstream = 0.5 + torch.rand(mask.masked.shape, dtype=DOUBLE)
    statistics = (None, None) if dtype == BYTES else (MEAN, STD)
    arguments = (video, mask.masked, patch, target, normalize, EPS, *statistics, True)
    errors, gradient = reference.masked_loss(pred.double(), *arguments)
    existing = torch.full(errors.shape, values, dtype=DOUBLE)
    if target == "adjacent":
        existing -= (mask.masked >= GRID[1] * GRID[2]) * (values / patch[0])
    existing.clamp_(min=1)
    scale = upstream / existing
    if every:
        scale = torch.zeros(2, 8, dtype=DOUBLE).scatter(1, mask.masked, scale)
    exact = [errors / existing, gradient * scale[..., None]]

    options: dict[str, Any] = {"patch_size": patch, "normalize": normalize, "eps": EPS, "reduction": "none"}
    options |= dict(zip(("mean", "std"), statistics, strict=True))
    function: Callable[..., Tensor] = masked_pixel_loss
    if target != "pixel":
        function, options["difference"] = masked_frame_difference_loss, target
    leaf, there, index = pred.to(device).requires_grad_(), on_device(video, device), mask.masked.to(device)

    def run() -> list[Tensor]:
        loss = function(leaf, there, index, **options)
        return [loss.detach(), *torch.autograd.grad(loss, leaf, upstream.to(device, loss.dtype))]

    tokens = "every token" if every else "masked tokens"
    return Case(f"{function.__name__} {target} {normalize} {clip_name(clip)} {str(kind)[6:]} {tokens}", run, exact)


def clip_name(clip: tuple) -> str:
    return f"{'x'.join(map(str, clip[0]))} {clip[1]} {str(clip[2])[6:]}"


def on_device(video: Tensor, device: torch.device) -> Tensor:
    """The clip with its strides, which `.to` keeps only for some layouts."""
    moved = torch.empty_strided(video.shape, video.stride(), dtype=video.dtype, device=device)
    return moved.copy_(video)


def gather_cases(device: torch.device, clip: tuple, kind: torch.dtype) -> Iterator[Case]:
    patch, layout, dtype = clip
    video, mask = make_clip(patch, layout, dtype), tube_mask(2, GRID, 0.5, seed=3)
    there, index = on_device(video, device), mask.visible.to(device)
    exact = reference.gather_tubes(video, mask.visible, patch, MEAN, STD, DOUBLE)
    yield Case(
        f"gather_tubes {clip_name(clip)} {str(kind)[6:]}",
        lambda: [gather_tubes(there, index, patch_size=patch, mean=MEAN, std=STD, dtype=kind)],
        [exact],
    )
    statistics = (None, None) if dtype == BYTES else (MEAN, STD)
    difference = reference.target(video, mask.visible, patch, "adjacent", "channel", EPS, *statistics, DOUBLE)
    options: dict[str, Any] = {"patch_size": patch, "eps": EPS, "mask": index}
    options |= dict(zip(("mean", "std"), statistics, strict=True))
    yield Case(
        f"frame_difference {clip_name(clip)}",
        lambda: [frame_difference(there, **options)],
        [difference.view(*index.shape, -1)],
    )


def head_case(device: torch.device, codes: int, kind: torch.dtype, reduction: str) -> Case:
    sizes = (33, 64), (codes, 64), (codes,)
    drawn = [torch.randn(size).mul(0.5).to(kind) for size in sizes]
    target = torch.randint(codes, (33,))
    target[4] = -100
    upstream = 0.5 + torch.rand(33, dtype=DOUBLE)
    smoothing = 0.1 if codes == 1000 else 0.0

    def outputs(tensors: list[Tensor], function: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [tensor.requires_grad_() for tensor in tensors]
        loss = function(*leaves)
        given = upstream.to(loss.device, loss.dtype)[: loss.numel()].view(loss.shape)
        return [loss.detach(), *torch.autograd.grad(loss, leaves, given)]

    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
    exact = outputs(
        [tensor.double() for tensor in drawn],
        lambda hidden, weight, bias: F.cross_entropy(F.linear(hidden, weight, bias), target, **options),
    )
    there, labels = [tensor.to(device) for tensor in drawn], target.to(device)
    name = f"linear_cross_entropy V{codes} {str(kind)[6:]} {reduction}"
    budget = HEAD_BUDGET[kind]
    ours = lambda h, w, b: linear_cross_entropy(h, w, labels, b, **options)  # noqa: E731
    return Case(name, lambda: outputs(there, ours), exact, budget)


def mask_case(device: torch.device, seed: int, step: int, sample: int, positions: int, hidden: int) -> Case:
    arguments = (seed, sample, 3, 2, positions, hidden)
    exact = reference.draw_mask(torch.tensor(step), *arguments)
    at = torch.tensor(step, device=device)
    return Case(f"draw_mask {step} {arguments}", lambda: list(torch.ops.mam2.draw_mask(at, *arguments)), list(exact))


def cases(device: torch.device) -> Iterator[Case]:
    kinds = itertools.cycle((SINGLE, BRAIN, HALF, BRAIN, DOUBLE))
    for place, (clip, (target, normalize)) in enumerate(itertools.product(CLIPS, TARGETS)):
        if not (target == "intra" and clip[0][0] == 1):
            yield loss_case(device, place, clip, target, normalize, next(kinds))
    for clip, kind in zip(CLIPS, (BRAIN, BRAIN, SINGLE, HALF, BRAIN, SINGLE, DOUBLE), strict=True):
        yield from gather_cases(device, clip, kind)
    for codes, kind, reduction in itertools.product(CODES, (SINGLE, BRAIN, HALF, DOUBLE), ("mean", "none")):
        yield head_case(device, codes, kind, reduction)
    for positions, hidden in ((196, 176), (5, 3), (1568, 1411)):
        yield mask_case(device, 0, 0, 0, positions, hidden)
        yield mask_case(device, 2**62 + 12345, 2**33 + 7, 2**32 - 1, positions, hidden)


def verdict(case: Case) -> dict[str, Any]:
    row: dict[str, Any] = {"check": case.name, "verdict": "wrong"}
    try:
        found, again = case.run(), case.run()
    except Exception as problem:
        return row | {"reason": f"{type(problem).__name__}: {problem}"[:300]}
    for place, (mine, other, truth) in enumerate(zip(found, again, case.exact, strict=True)):
        if not mine.dtype.is_floating_point:
            if not torch.equal(mine.cpu(), truth):
                return row | {"reason": f"output {place}: other numbers than the definition's"}
            continue
        error = relative_error(mine.cpu(), truth)
        row["error"] = max(error, row.get("error", 0.0))
        if not error <= (case.budget or BUDGET[mine.dtype]):
            return row | {"error": error, "reason": f"output {place}: relative error {error:.2g}"}
        if not torch.equal(mine, other):
            return row | {"reason": f"output {place}: a second run gave other bits"}
    return row | {"verdict": "right"}


def rows(device: torch.device, deadline: float) -> Iterator[dict[str, Any]]:
    """A verdict for each case; one left out for want of time counts as not checked."""
    torch.manual_seed(0)
    path = active_path(device)
    with poisoned_memory():
        for case in cases(device):
            late = time.monotonic() > deadline
            row = {"check": case.name, "verdict": "skipped", "reason": "out of time"} if late else verdict(case)
            yield {"path": path, **row}
