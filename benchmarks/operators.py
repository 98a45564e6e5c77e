"""The operators of `mam2.kernels` beside what their users would write, each checked against float64 before it is timed.

    ours       mam2.kernels
    eager      plain PyTorch as in VideoMAE's engine: normalise and cut the whole clip, then gather the masked tokens
               (by index, which spares it the wait of a boolean mask)
    compiled   `eager` under torch.compile
    torch      torch.nn.functional.linear_cross_entropy in chunks, from PyTorch 2.13 on

Differentiable operators are timed forward and backward, with a random upstream gradient.
B clips, T frames, N tokens, Nv/Nm visible/masked, P values a token, M rows, D width, V codes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import copy_gb_per_s, interleaved, matmul_tflop_per_s, peak_mib, ratios
from mam2.engine.train.runtime import why_not_compile
from mam2.kernels import (
    active_path,
    costs,
    gather_tubes,
    linear_cross_entropy,
    masked_frame_difference_loss,
    masked_pixel_loss,
    tube_mask,
)

Inputs = dict[str, Tensor]
Function = Callable[..., Any]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EPS = 1e-6
BUDGET = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest ‖out − exact‖ / ‖exact‖ of an output by its inputs' type: some roundings of that type."""
MOST_INPUT_SETS = 64


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A batch of clips in training and the heads on it; the clip is uint8 and channels-last, as the loader gives it."""

    batch: int
    frames: int = 16
    size: int = 224
    patch: tuple[int, int, int] = (2, 16, 16)
    ratio: float = 0.9
    width: int = 384
    codes: int = 8192
    dtype: torch.dtype = torch.bfloat16

    @property
    def grid(self) -> tuple[int, int, int]:
        tubelet, height, width = self.patch
        return self.frames // tubelet, self.size // height, self.size // width

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def masked(self) -> int:
        return self.grid[0] * int(self.ratio * self.grid[1] * self.grid[2])

    @property
    def values(self) -> int:
        return self.patch[0] * self.patch[1] * self.patch[2] * 3

    def __str__(self) -> str:
        return f"B{self.batch} {self.frames}x{self.size}² D{self.width} V{self.codes} {str(self.dtype)[6:]}"


SHAPES = {
    "cuda": (Shape(batch=64), Shape(batch=8)),
    "cpu": (Shape(batch=4, frames=8, size=64, patch=(2, 8, 8), width=96, codes=512, dtype=torch.float32),),
}
"""On a GPU a batch of training, and one so small that launches show."""


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One row of the registry."""

    name: str
    inputs: Callable[[Shape, torch.device], Inputs]
    providers: Callable[[Shape], dict[str, Function]]
    """Functions of the inputs by name; `eager`, on float64 inputs, is also the definition that all are held to."""
    cost: Callable[[Shape], costs.Cost]
    leaves: tuple[str, ...] = ()
    """Inputs that get a gradient."""
    check: Callable[[Shape, list[Tensor]], float] | None = None
    """For an operator with random output: the error of the outputs, in place of the distance to `eager`."""


def clip(shape: Shape, device: torch.device) -> Tensor:
    """uint8 [B,3,T,H,W] by strides."""
    extent = (shape.batch, shape.frames, shape.size, shape.size, 3)
    return torch.randint(0, 256, extent, dtype=torch.uint8, device=device).permute(0, 4, 1, 2, 3)


def mask(shape: Shape, device: torch.device) -> Any:
    seed = int(torch.randint(2**31, ()))
    return tube_mask(shape.batch, shape.grid, shape.ratio, seed=seed, device=device)


def loss_inputs(shape: Shape, device: torch.device) -> Inputs:
    pred = torch.randn(shape.batch, shape.masked, shape.values, device=device).to(shape.dtype)
    return {"video": clip(shape, device), "masked": mask(shape, device).masked, "pred": pred.requires_grad_()}


def head_inputs(shape: Shape, device: torch.device) -> Inputs:
    rows = shape.batch * shape.masked
    sizes = {"hidden": (rows, shape.width), "weight": (shape.codes, shape.width), "bias": (shape.codes,)}
    drawn = {name: torch.randn(size, device=device).mul(0.5).to(shape.dtype) for name, size in sizes.items()}
    leaves = {name: tensor.requires_grad_() for name, tensor in drawn.items()}
    return {**leaves, "target": torch.randint(shape.codes, (rows,), device=device)}


def pixels(video: Tensor) -> Tensor:
    """[0,1], in float32 from uint8; a float clip is there already."""
    return video.float() / 255 if video.dtype == torch.uint8 else video


def cubes(video: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """[B,C,T,H,W] -> [B,N,τ·p·p,C]."""
    tubelet, height, width = patch
    cut = video.unflatten(2, (-1, tubelet)).unflatten(4, (-1, height)).unflatten(6, (-1, width))
    return cut.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4, 6).flatten(1, 3)


def pick(tokens: Tensor, index: Tensor) -> Tensor:
    """[B,N,…] at [B,K] -> [B,K,P]."""
    return tokens.flatten(2).take_along_dim(index[..., None], 1)


def deviation(tokens: Tensor) -> Tensor:
    return tokens.var(2, unbiased=True, keepdim=True).sqrt() + EPS


def gather_inputs(shape: Shape, device: torch.device) -> Inputs:
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1, 1) for values in (MEAN, STD))
    return {"video": clip(shape, device), "visible": mask(shape, device).visible, "mean": mean, "std": std}


def eager_gather(shape: Shape, video: Tensor, visible: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    out = pick(cubes((pixels(video) - mean) / std, shape.patch), visible)
    return out if out.dtype == torch.float64 else out.to(shape.dtype)


def eager_pixel_loss(shape: Shape, video: Tensor, masked: Tensor, pred: Tensor) -> Tensor:
    tokens = cubes(pixels(video), shape.patch)
    target = pick((tokens - tokens.mean(2, keepdim=True)) / deviation(tokens), masked)
    return F.mse_loss(pred.to(target.dtype), target)


def eager_difference_loss(shape: Shape, video: Tensor, masked: Tensor, pred: Tensor) -> Tensor:
    frames = pixels(video)
    following = torch.cat([frames[:, :, 1:], frames[:, :, -1:]], 2)
    target = pick(cubes(following - frames, shape.patch) / deviation(cubes(frames, shape.patch)), masked)
    last = torch.zeros_like(frames[:1])
    last[:, :, -1] = 1
    exists = 1 - pick(cubes(last, shape.patch).expand(shape.batch, -1, -1, -1), masked)
    return ((pred.to(target.dtype) - target).square() * exists).sum() / exists.sum()


def eager_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), target)


def eager_mask(shape: Shape, step: Tensor) -> tuple[Tensor, Tensor]:
    slots, positions = shape.grid[0], shape.grid[1] * shape.grid[2]
    order = torch.rand(shape.batch, positions, device=step.device).argsort(1)
    offset = torch.arange(slots, device=step.device)[:, None] * positions
    hidden = shape.masked // slots
    parts = order[:, hidden:], order[:, :hidden]
    visible, masked = ((part.sort(1).values[:, None] + offset).flatten(1) for part in parts)
    return visible, masked


def mask_error(shape: Shape, outputs: list[Tensor]) -> float:
    """0 if every clip hides the same positions in all slots, as many as asked for, each token once and in order."""
    visible, masked = outputs
    everything = torch.arange(shape.tokens, device=masked.device).expand(shape.batch, -1)
    if masked.shape != (shape.batch, shape.masked) or visible.shape != (shape.batch, shape.tokens - shape.masked):
        return 1.0
    slots, positions = shape.grid[0], shape.grid[1] * shape.grid[2]
    by_slot = masked.view(shape.batch, slots, -1) % positions
    whole = torch.equal(torch.cat([visible, masked], 1).sort(1).values, everything)
    ordered = bool((masked.diff(dim=1) > 0).all() and (visible.diff(dim=1) > 0).all())
    return 0.0 if whole and ordered and torch.equal(by_slot, by_slot[:, :1].expand_as(by_slot)) else 1.0


def head_providers(shape: Shape) -> dict[str, Function]:
    found: dict[str, Function] = {
        "ours": lambda hidden, weight, bias, target: linear_cross_entropy(hidden, weight, target, bias),
        "eager": eager_cross_entropy,
    }
    if hasattr(F, "linear_cross_entropy") and hasattr(nn, "LinearCrossEntropyOptions"):
        options = nn.LinearCrossEntropyOptions()
        found["torch"] = lambda hidden, weight, bias, target: F.linear_cross_entropy(
            hidden, weight, target, linear_bias=bias, options=options
        )
    return found


def bind(shape: Shape, function: Function) -> Function:
    return lambda **inputs: function(shape, **inputs)


OPERATORS = (
    Operator(
        name="tube_mask",
        inputs=lambda shape, device: {"step": torch.randint(2**31, (), device=device)},
        providers=lambda shape: {
            "ours": lambda step: tube_mask(shape.batch, shape.grid, shape.ratio, seed=1, step=step),
            "eager": bind(shape, eager_mask),
        },
        cost=lambda shape: costs.draw_mask(shape.batch, shape.tokens),
        check=mask_error,
    ),
    Operator(
        name="gather_tubes",
        inputs=gather_inputs,
        providers=lambda shape: {
            "ours": lambda video, visible, **_: gather_tubes(
                video, visible, patch_size=shape.patch, mean=MEAN, std=STD, dtype=shape.dtype
            ),
            "eager": bind(shape, eager_gather),
        },
        cost=lambda shape: costs.gather_tubes(
            shape.batch, shape.tokens - shape.masked, shape.values, out_bytes=shape.dtype.itemsize
        ),
    ),
    Operator(
        name="masked_pixel_loss",
        inputs=loss_inputs,
        leaves=("pred",),
        providers=lambda shape: {
            "ours": lambda video, masked, pred: masked_pixel_loss(pred, video, masked, patch_size=shape.patch, eps=EPS),
            "eager": bind(shape, eager_pixel_loss),
        },
        cost=lambda shape: costs.masked_loss(shape.batch, shape.masked, shape.values, pred_bytes=shape.dtype.itemsize),
    ),
    Operator(
        name="masked_frame_difference_loss",
        inputs=loss_inputs,
        leaves=("pred",),
        providers=lambda shape: {
            "ours": lambda video, masked, pred: masked_frame_difference_loss(
                pred, video, masked, patch_size=shape.patch, eps=EPS
            ),
            "eager": bind(shape, eager_difference_loss),
        },
        cost=lambda shape: costs.masked_loss(shape.batch, shape.masked, shape.values, pred_bytes=shape.dtype.itemsize),
    ),
    Operator(
        name="linear_cross_entropy",
        inputs=head_inputs,
        leaves=("hidden", "weight", "bias"),
        providers=head_providers,
        cost=lambda shape: costs.linear_cross_entropy(
            shape.batch * shape.masked, shape.width, shape.codes, item_bytes=shape.dtype.itemsize
        ),
    ),
)


def outputs(operator: Operator, function: Function, inputs: Inputs, upstream: Tensor | None) -> list[Tensor]:
    """What a provider gives: its outputs, then the gradients of the leaves for `upstream`."""
    result = function(**inputs)
    if operator.leaves:
        return [result, *torch.autograd.grad(result, [inputs[name] for name in operator.leaves], upstream)]
    return list(result) if isinstance(result, tuple) else [result]


def upstream_of(operator: Operator, device: torch.device) -> Tensor | None:
    """A random gradient of the loss, 0.5 to 1.5."""
    return torch.rand((), device=device) + 0.5 if operator.leaves else None


def relative_error(found: Tensor, exact: Tensor) -> float:
    """‖found − exact‖ / ‖exact‖ in float64; NaN where `found` has one, infinite for another shape."""
    if found.shape != exact.shape:
        return float("inf")
    return float((found.detach().double() - exact).norm() / exact.norm())


def exact_outputs(operator: Operator, shape: Shape, inputs: Inputs, upstream: Tensor | None) -> list[Tensor]:
    """The outputs of `eager` on the same values in float64."""
    wide = {
        name: tensor.detach().double().requires_grad_(name in operator.leaves) if tensor.is_floating_point() else tensor
        for name, tensor in inputs.items()
    }
    if "video" in wide:
        wide["video"] = inputs["video"].double() / 255
    eager = operator.providers(shape)["eager"]
    found = outputs(operator, eager, wide, None if upstream is None else upstream.double())
    return [tensor.detach() for tensor in found]


def gate(
    operator: Operator, shape: Shape, function: Function, inputs: Inputs, upstream: Tensor | None, exact: list[Tensor]
) -> float:
    """The largest relative error of a provider's outputs."""
    found = outputs(operator, function, inputs, upstream)
    if operator.check:
        return operator.check(shape, found)
    errors = [relative_error(mine, truth) for mine, truth in zip(found, exact, strict=True)]
    return max(errors, key=lambda error: float("inf") if error != error else error)


def all_providers(operator: Operator, shape: Shape, device: torch.device, *, compiled: bool) -> dict[str, Function]:
    """The registry's and, if asked for and possible here, `eager` compiled."""
    found = operator.providers(shape)
    if compiled and not why_not_compile(device):
        found["compiled"] = torch.compile(found["eager"], fullgraph=True, dynamic=False)
    return found


def compare(
    operator: Operator,
    shape: Shape,
    device: torch.device,
    *,
    compiled: bool = True,
    rounds: int = 30,
    peaks: dict[str, float] | None = None,
    providers: dict[str, Function] | None = None,
) -> list[dict[str, Any]]:
    """A row for each provider: its error and, if that is within the budget, its times.

    peaks: measured "copy_gb_per_s" and "matmul_tflop_per_s" of the device. On a CPU only ratios to `eager` are given.
    """
    providers = providers or all_providers(operator, shape, device, compiled=compiled)
    cost, cuda = operator.cost(shape), device.type == "cuda"
    count = 2
    if cuda:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        count = min(2 * cache // cost.bytes_moved + 2, MOST_INPUT_SETS)
    sets = [operator.inputs(shape, device) for _ in range(count)]
    upstream = upstream_of(operator, device)
    exact = exact_outputs(operator, shape, sets[0], upstream)
    budget = 0.0 if operator.check else BUDGET[shape.dtype]
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, list[Callable[[], Any]]] = {}
    for name, function in providers.items():
        row = rows[name] = {"operator": operator.name, "provider": name, "shape": str(shape)}
        try:
            row["error"] = gate(operator, shape, function, sets[0], upstream, exact)
        except Exception as problem:  # a provider that cannot run here costs its own row only
            row |= {"verdict": "failed", "reason": f"{type(problem).__name__}: {problem}"[:300]}
            continue
        row["verdict"] = "right" if row["error"] <= budget else "wrong"
        if row["verdict"] == "right":
            calls[name] = [
                lambda function=function, inputs=inputs: outputs(operator, function, inputs, upstream)
                for inputs in sets
            ]
    del exact
    held = {name: peak_mib(mine[0], device) for name, mine in calls.items()}
    timings = interleaved(calls, device, rounds=rounds)
    faster = ratios(timings, "eager")
    for name, timing in timings.items():
        row = rows[name] | {"ratio_to_eager": faster[name]}
        if cuda:
            row |= timing._asdict() | {"peak_mib": held[name], "bytes": cost.bytes_moved, "flops": cost.flops}
            row["gb_per_s"] = cost.bytes_moved / timing.median_ms / 1e6
            row["tflop_per_s"] = cost.flops / timing.median_ms / 1e9
            if peaks:
                row["percent_of_copy"] = 100 * row["gb_per_s"] / peaks["copy_gb_per_s"]
                row["percent_of_matmul"] = 100 * row["tflop_per_s"] / peaks["matmul_tflop_per_s"]
        rows[name] = row
    return [{"path": active_path(device), **row} if row["provider"] == "ours" else row for row in rows.values()]


def rows(device: torch.device, deadline: float, *, compiled: bool) -> Iterator[dict[str, Any]]:
    """The measured ceilings of a GPU, then every operator at every shape, until `deadline` (time.monotonic)."""
    torch.manual_seed(0)
    peaks = None
    if device.type == "cuda":
        peaks = {"copy_gb_per_s": copy_gb_per_s(device), "matmul_tflop_per_s": matmul_tflop_per_s(device)}
        yield {"operator": "ceilings", **peaks}
    for shape in SHAPES[device.type]:
        for operator in OPERATORS:
            if time.monotonic() > deadline:
                yield {"operator": operator.name, "shape": str(shape), "verdict": "skipped", "reason": "out of time"}
                continue
            yield from compare(operator, shape, device, compiled=compiled, rounds=30 if peaks else 10, peaks=peaks)
            torch.compiler.reset()
            if device.type == "cuda":
                torch.cuda.empty_cache()
