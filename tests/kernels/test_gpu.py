"""Properties of the operators that need a GPU: compiled steps, captured graphs, streams, devices, memory past 2^31.

The most important tests are first, the slow ones last: a time limit cuts off the end.
The tests with "cpu" in their name run the same code on a CPU, so that errors of the tests show without a GPU.
"""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only

from mam2.kernels import (
    active_path,
    frame_difference,
    gather_tubes,
    linear_cross_entropy,
    masked_frame_difference_loss,
    masked_pixel_loss,
    motion_tube_mask,
    random_mask,
    running_cell_mask,
    tube_mask,
)
from mam2.kernels.masked_subset import masked_subset
from tests.kernels.test_compile import operator_calls

PATCH, GRID, VALUES = (2, 16, 16), (2, 2, 2), 1536
WITH_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=WITH_GPU)])
Inputs = dict[str, torch.Tensor]


def clip(seed: int = 0, batch: int = 2) -> torch.Tensor:
    """uint8 [batch,3,4,32,32] on the CPU, channels last."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 4, 32, 32, 3), generator=generator, dtype=torch.uint8).permute(0, 4, 1, 2, 3)


def inputs(device: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    mask = random_mask(2, GRID, 0.5, seed=seed)
    sizes = {"pred": (2, 4, VALUES), "every": (2, 8, VALUES), "hidden": (300, 32), "weight": (64, 32), "bias": (64,)}
    floats = {name: torch.randn(size, generator=generator).to(dtype) for name, size in sizes.items()}
    target = torch.randint(0, 64, (300,), generator=generator)
    whole = {"video": clip(seed), "index": mask.masked, "hides": mask.as_bool(), "target": target}
    given = {name: tensor.to(device) for name, tensor in (floats | whole | {"step": torch.tensor(seed)}).items()}
    given["video"] = whole["video"].permute(0, 2, 3, 4, 1).to(device).permute(0, 4, 1, 2, 3)
    return given


def pixel(pred: torch.Tensor, video: torch.Tensor, index: torch.Tensor, **_: torch.Tensor) -> torch.Tensor:
    return masked_pixel_loss(pred, video, index)


def pixel_by_bool(pred: torch.Tensor, video: torch.Tensor, hides: torch.Tensor, **_: torch.Tensor) -> torch.Tensor:
    return masked_pixel_loss(pred, video, hides, normalize="patch")


def pixel_of_all(every: torch.Tensor, video: torch.Tensor, hides: torch.Tensor, **_: torch.Tensor) -> torch.Tensor:
    return masked_pixel_loss(every, video, hides, target="joint")


def picked_of_all(every: torch.Tensor, video: torch.Tensor, index: torch.Tensor, **_: torch.Tensor) -> torch.Tensor:
    return masked_pixel_loss(every, video, index, reduction="none").square().mean()


def motion(pred: torch.Tensor, video: torch.Tensor, index: torch.Tensor, **_: torch.Tensor) -> torch.Tensor:
    return masked_frame_difference_loss(pred, video, index, eps=0.05)


def codes(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, target: torch.Tensor, **_: torch.Tensor
) -> torch.Tensor:
    return linear_cross_entropy(hidden, weight, target, bias, label_smoothing=0.1)


def codes_by_row(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, **_: torch.Tensor) -> torch.Tensor:
    return linear_cross_entropy(hidden, weight, target, reduction="none").square().mean()


LOSSES: dict[Callable[..., torch.Tensor], tuple[str, ...]] = {
    pixel: ("pred",),
    pixel_by_bool: ("pred",),
    pixel_of_all: ("every",),
    picked_of_all: ("every",),
    motion: ("pred",),
    codes: ("hidden", "weight", "bias"),
    codes_by_row: ("hidden", "weight"),
}
"""Loss → the inputs that get a gradient."""


def masks_and_pixels(video: torch.Tensor, step: torch.Tensor, index: torch.Tensor, **_: torch.Tensor) -> list:
    """The operators without a gradient."""
    options: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.2,) * 3}
    moving = motion_tube_mask(video, 0.5, seed=0, step=step)
    return [
        *tube_mask(2, GRID, 0.5, seed=0, step=step),
        *running_cell_mask(2, GRID, seed=0, step=step),
        *moving,
        *(masked_subset(index, GRID, 3, by_cell=by_cell, seed=0, step=step) for by_cell in (False, True)),
        gather_tubes(video, moving, **options),
        frame_difference(video, mask=index),
    ]


def results(function: Callable[..., Any], given: Inputs) -> list[torch.Tensor]:
    """Loss and gradients, or the outputs of an operator without a gradient."""
    if function not in LOSSES:
        return list(function(**given))
    leaves = {name: given[name].detach().requires_grad_() for name in LOSSES[function]}
    loss = function(**(given | leaves))
    return [loss.detach(), *torch.autograd.grad(loss, list(leaves.values()))]


OPERATORS = pytest.mark.parametrize("function", [*LOSSES, masks_and_pixels], ids=lambda function: function.__name__)


def same(found: list[torch.Tensor], expected: list[torch.Tensor], **tolerances: float) -> None:
    assert len(found) == len(expected)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.cpu(), other.cpu(), **tolerances)


@DEVICES
@OPERATORS
def test_the_definition_gives_the_same(function: Callable[..., Any], device: str) -> None:
    same(results(function, inputs(device)), results(function, inputs("cpu")), rtol=2e-5, atol=2e-6)


@WITH_GPU
def test_every_case_is_right_on_the_gpu() -> None:
    assert active_path("cuda") == "triton"
    rows = list(importlib.import_module("benchmarks.correctness").rows(torch.device("cuda"), float("inf")))
    assert [row for row in rows if row["verdict"] != "right"] == []


def captured(function: Callable[..., Any], given: Inputs) -> Callable[[Inputs], list[torch.Tensor]]:
    """Replays results(function, given), captured as a CUDA graph, on other inputs; on a CPU it runs them again."""
    if given["video"].device.type == "cpu":
        return lambda other: results(function, other)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            results(function, given)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = results(function, given)

    def replay(other: Inputs) -> list[torch.Tensor]:
        for name, tensor in given.items():
            tensor.copy_(other[name])
        graph.replay()
        return [tensor.clone() for tensor in out]

    return replay


@DEVICES
@OPERATORS
def test_capture_and_replay(function: Callable[..., Any], device: str) -> None:
    replay = captured(function, inputs(device))
    for seed in (1, 2, 1):
        given = inputs(device, seed)
        same(replay(given), results(function, given), rtol=0, atol=0)


@WITH_GPU
def test_numbers_out_of_range_give_nan() -> None:
    """Changes loss and gradient of that token, row or clip; the others do not change."""
    given = inputs("cuda")
    given["index"][0, 1], given["target"][7] = 8, 64
    of_pred = results(pixel, given)[1]
    assert of_pred.isnan().all(2).sum() == 1
    assert of_pred.isnan().any(2).sum() == 1
    of_all = results(picked_of_all, given)[1]
    assert of_all[0].isnan().all()
    assert not of_all[1].isnan().any()
    _, of_hidden, of_weight = results(codes_by_row, given)
    assert of_hidden.isnan().any(1).nonzero().tolist() == [[7]]
    assert of_weight.isnan().all()


@DEVICES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, device: str) -> None:
    """Losses of half predictions stay float32; the head's products run in the autocast type, its gradients do not."""
    given = inputs(device)
    with torch.autocast(device, dtype=dtype):
        found = results(codes, given)
        visible = gather_tubes(given["video"], given["index"])
    assert visible.dtype == dtype
    assert {tensor.dtype for tensor in found} == {torch.float32}
    wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in given.items()}
    for mine, truth in zip(found, results(codes, wide), strict=True):
        assert (mine.double() - truth).norm() < 4 * torch.finfo(dtype).eps * truth.norm()
    half = inputs(device, dtype=dtype)
    for function in (pixel, pixel_of_all, motion):
        plain = results(function, half)
        with torch.autocast(device, dtype=dtype):
            same(results(function, half), plain, rtol=0, atol=0)
        assert [tensor.dtype for tensor in plain] == [torch.float32, dtype]


@WITH_GPU
@OPERATORS
def test_nothing_waits_for_the_device(function: Callable[..., Any]) -> None:
    given = inputs("cuda")
    results(function, given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(function, given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@WITH_GPU
@OPERATORS
def test_a_side_stream(function: Callable[..., Any]) -> None:
    """The inputs arrive late on that stream: a kernel on another stream would read old values."""
    expected = results(function, inputs("cuda"))
    late, given = inputs("cuda"), inputs("cuda", seed=1)
    results(function, given)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for name, tensor in given.items():
            tensor.copy_(late[name])
        found = results(function, given)
    side.synchronize()
    same(found, expected, rtol=0, atol=0)


@DEVICES
def test_a_patch_of_one_color_has_target_zero(device: str) -> None:
    levels = torch.arange(256, dtype=torch.uint8, device=device).view(256, 1, 1, 1, 1)
    for patch in ((2, 16, 16), (2, 14, 14), (3, 6, 6)):
        video = levels.expand(-1, 3, *patch)
        for normalize in ("channel", "patch"):
            pred = torch.zeros(256, 1, video[0].numel(), device=device)
            loss = masked_pixel_loss(pred, video, None, patch_size=patch, normalize=normalize, eps=1e-6)
            assert loss == 0, (patch, normalize)


@DEVICES
def test_the_head_equals_plain_cross_entropy(device: str) -> None:
    given = inputs(device, dtype=torch.bfloat16)
    wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in given.items()}
    exact = F.cross_entropy(
        F.linear(wide["hidden"], wide["weight"], wide["bias"]), given["target"], label_smoothing=0.1
    )
    torch.testing.assert_close(results(codes, given)[0].double(), exact, rtol=2e-2, atol=0)


def check_offsets(device: str, clips: int, frames: int, size: int) -> list[int]:
    """Checks the last clip where the offsets of a tensor are largest: each result of it is that of the clip alone.

    One tensor at a time is large; the others repeat one clip with a stride of 0. Returns the values of: predictions and
    their gradient, a gathered clip's tokens, the clips, and the distance between a clip's first and last value.
    """
    grid = frames // 2, size // 16, size // 16
    tokens, last = grid[0] * grid[1] * grid[2], slice(clips - 1, clips)
    video = torch.randint(0, 256, (1, frames, size, size, 3), dtype=torch.uint8, device=device).permute(0, 4, 1, 2, 3)
    videos = video.expand(clips, *video.shape[1:])
    every = torch.arange(tokens, device=device).expand(clips, -1)

    pred = torch.zeros(clips, tokens, VALUES, dtype=torch.bfloat16, device=device)
    pred[-1].uniform_()
    gradients = []
    for rows in (slice(0, clips), last):
        leaf = pred[rows].detach().requires_grad_()
        # a sum times a half: the whole gradient is scaled by one number, in place
        loss = masked_pixel_loss(leaf, videos[rows], every[rows], reduction="sum")
        gradients.append(torch.autograd.grad(loss, leaf, torch.full_like(loss, 0.5))[0][-1].clone())
    assert torch.equal(*gradients)
    assert gradients[0].any()
    values = [pred.numel()]
    del pred, leaf, loss

    gathered = gather_tubes(videos, every, dtype=torch.bfloat16)
    alone = gather_tubes(video, every[:1], dtype=torch.bfloat16)
    assert torch.equal(gathered[-1], alone[0])
    values.append(gathered.numel())
    del gathered

    far = torch.zeros(clips, frames, size, size, 3, dtype=torch.uint8, device=device).permute(0, 4, 1, 2, 3)
    far[-1:] = video
    two = every[:, -2:]
    assert torch.equal(gather_tubes(far, two, dtype=torch.bfloat16)[-1], alone[0, -2:])
    values.append(far.numel())
    stride = (far.numel() - frames * size**2) // 2  # between the channels of one clip
    wide = far.permute(0, 2, 3, 4, 1).view(-1).as_strided(video.shape, (0, stride, size**2, size, 1))
    wide.copy_(video)
    assert torch.equal(gather_tubes(wide, every[:1], dtype=torch.bfloat16), alone)
    values.append(2 * stride + frames * size**2)
    return values


@WITH_GPU
def test_more_than_2_31_values() -> None:
    """At most 8.3 GiB exist at a time."""
    needed = 10 << 30
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory")
    assert min(check_offsets("cuda", 900, 16, 224)) > 2**31


def test_offsets_on_a_cpu() -> None:
    assert check_offsets("cpu", 3, 4, 64) == [3 * 32 * VALUES] * 2 + [3 * 4 * 64 * 64 * 3] * 2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch sees fewer than two GPUs")
@OPERATORS
def test_a_second_device(function: Callable[..., Any]) -> None:
    assert torch.cuda.current_device() == 0
    found = results(function, inputs("cuda:1"))
    assert {tensor.device for tensor in found} == {torch.device("cuda", 1)}
    same(found, results(function, inputs("cuda:0")), rtol=0, atol=0)


@pytest.mark.slow
@DEVICES
@OPERATORS
def test_one_graph_of_torch_compile(function: Callable[..., Any], device: str) -> None:
    given = inputs(device)
    compiled = torch.compile(function, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    leaves = {name: given[name].detach().requires_grad_() for name in LOSSES.get(function, ())}
    out = compiled(**(given | leaves))
    found = list(out) if not leaves else [out.detach(), *torch.autograd.grad(out, list(leaves.values()))]
    same(found, results(function, given), rtol=2e-5, atol=2e-6)


CALLS = operator_calls()


@pytest.mark.slow
@DEVICES
@pytest.mark.parametrize("number", range(len(CALLS)), ids=[str(call[0]) for call in CALLS])
def test_operators_pass_opcheck(number: int, device: str) -> None:
    operator, arguments = CALLS[number]

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to(device).requires_grad_(tensor.requires_grad)

    torch.library.opcheck(operator, tree_map_only(torch.Tensor, moved, arguments))
