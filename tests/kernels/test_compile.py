"""The operators inside torch.compile and PyTorch's own operator checks."""

import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch

from mam2.kernels import (
    active_path,
    gather_tubes,
    launch,
    linear_cross_entropy,
    masked_frame_difference_loss,
    masked_pixel_loss,
    motion_tube_mask,
    random_mask,
    running_cell_mask,
    tube_mask,
)
from tests.helpers.paths import ROOT
from tests.kernels.inputs import random_clips

clips = partial(random_clips, frames=4, width=8)

PATCH = (2, 4, 4)


def operator_calls() -> list[tuple[Any, tuple]]:
    """Every operator, with arguments for each branch of its fake implementation and its gradient."""
    video, mask = clips(), random_mask(2, (2, 2, 2), 0.5, seed=0)
    pred = torch.randn(2, 4, 96, requires_grad=True)
    every = torch.randn(2, 8, 96, requires_grad=True)
    hidden, weight, bias = (torch.randn(size, requires_grad=True) for size in ((6, 3), (5, 3), (5,)))
    target = torch.randint(0, 5, (6,))
    patch, op, single = list(PATCH), torch.ops.mam2, torch.float32
    statistics = ([0.5] * 3, [0.2] * 3)
    masked, index, factors = op.masked_loss.default, mask.masked, torch.rand(2, 4, requires_grad=True)
    both, only_pred = [True] * 2, [True, False]
    linear = op.linear_masked_loss.default
    head = [torch.randn(size, requires_grad=True) for size in ((2, 4, 3), (96, 3), (96,))]
    frozen = hidden.detach(), weight.detach(), None, target, torch.rand(6)
    return [
        (op.draw_mask.default, (torch.tensor(3), 1, 0, 2, 2, 9, 4)),
        (op.masked_subset.default, (mask.masked, torch.tensor(3), [2, 2, 2], 3, True, 1, 0)),
        (op.gather_tubes.default, (video, mask.visible, patch, *statistics, torch.bfloat16)),
        (op.gather_tubes.default, (video.float(), mask.visible, patch, None, None, torch.float32)),
        (op.frame_difference.default, (video, mask.masked, patch, "adjacent", "channel", 0.01, None, None)),
        (op.frame_difference.default, (video.double(), mask.masked, patch, "intra", None, 0.01, *statistics)),
        (masked, (pred, video, index, None, 768, True, only_pred, patch, "pixel", "channel", 0.01, None, None)),
        (masked, (every, video, index, factors, 1, True, both, patch, "adjacent", "patch", 0.01, None, None)),
        (masked, (every, video, index, None, 1, False, only_pred, patch, "joint", "patch", 0.01, None, None)),
        (masked, (pred.half(), video.float(), index, factors, 1, False, both, patch, "joint", None, 0.01, *statistics)),
        (masked, (pred.detach(), video, index, None, 1, True, [False] * 2, patch, "pixel", None, 0.01, None, None)),
        (op.scale_gradient.default, (torch.randn(2, 3, 4), torch.rand(2, 3))),
        (op.scale_gradient_.default, (torch.randn(2, 3, 4), torch.rand(2, 3))),
        (op.linear_cross_entropy_sum.default, (hidden, weight, bias, target, -100, 0.1, single, [True] * 3, True)),
        (
            op.linear_cross_entropy_sum.default,
            (hidden, weight, None, target, -100, 0.0, single, [True, True, False], False),
        ),
        (op.linear_cross_entropy_rows.default, (hidden, weight, bias, target, -100, 0.1, torch.float32)),
        (op.linear_cross_entropy_gradients.default, (*frozen, -100, 0.0, single, [True, False, False])),
        (linear, (*head, factors, video, index, 1, single, [True] * 4, patch, "adjacent", "patch", 0.01, None, None)),
        (linear, (*head, None, video, index, 768, single, [True] * 3 + [False], patch, "pixel", None, 0.0, None, None)),
    ]


CALLS = operator_calls()


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CALLS)), ids=[str(call[0]) for call in CALLS])
def test_operators_pass_opcheck(number: int) -> None:
    operator, arguments = CALLS[number]
    torch.library.opcheck(operator, arguments)


def step(video, hidden, weight, bias, pred, target, step_number):
    """All operators of a training step."""
    mask = tube_mask(2, (2, 2, 2), 0.5, seed=0, step=step_number)
    visible = gather_tubes(video, mask.visible, patch_size=PATCH, mean=(0.5,) * 3, std=(0.2,) * 3)
    pixels = masked_pixel_loss(pred, video, mask, patch_size=PATCH)
    moving = motion_tube_mask(video, 0.5, patch_size=PATCH, seed=0, step=step_number)
    decoded = running_cell_mask(2, (2, 2, 2), seed=0, step=step_number).as_bool().logical_not()
    counted = decoded.gather(1, moving.masked)
    joint = masked_pixel_loss(pred.cos(), video, moving, patch_size=PATCH, target="joint", weight=counted)
    motion = masked_frame_difference_loss(pred.sin(), video, mask, patch_size=PATCH, eps=0.05)
    codes = linear_cross_entropy(hidden, weight, target, bias)
    rows = linear_cross_entropy(hidden, weight, target, reduction="none")
    return visible.mean() + pixels + joint + 2 * motion + codes + rows.square().mean()


def arguments() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    leaves = [torch.randn(size, requires_grad=True) for size in ((6, 3), (5, 3), (5,), (2, 4, 96))]
    return clips(), *leaves, torch.randint(0, 5, (6,)), torch.tensor(4)


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
def test_a_step_compiles_as_one_graph(autocast: bool) -> None:
    inputs = arguments()
    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = function(*inputs)
        results.append([loss, *torch.autograd.grad(loss, inputs[1:5])])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_boolean_mask_compiles_as_one_graph(reduction: str) -> None:
    """README's first example, VideoMAE; VideoMAE v2's line; MAE's predictions of every token."""
    hidden, cells = tube_mask(2, (2, 2, 2), 0.5, seed=0), running_cell_mask(2, (2, 2, 2), seed=0)
    masked, left_out = hidden.as_bool(), cells.as_bool()
    options = {"patch_size": PATCH, "mean": (0.5,) * 3, "std": (0.2,) * 3, "reduction": reduction}

    def losses(pred: torch.Tensor, every: torch.Tensor, videos: torch.Tensor) -> list[torch.Tensor]:
        return [
            masked_pixel_loss(pred, videos, masked, **options),
            masked_frame_difference_loss(pred, videos, masked, **options),
            masked_pixel_loss(pred, videos, ~left_out, weight=masked, **options),
            masked_pixel_loss(every, videos, None, weight=masked, **options),
            *([masked_pixel_loss(every, videos, masked, **options)] if reduction == "mean" else []),
        ]

    inputs = torch.randn(2, 4, 96, requires_grad=True), torch.randn(2, 8, 96, requires_grad=True), clips() / 255
    found = torch.compile(losses, fullgraph=True)(*inputs)
    for compiled, eager in zip(found, losses(*inputs), strict=True):
        torch.testing.assert_close(compiled, eager)
    total = sum(loss.sum() for loss in found)
    expected = torch.autograd.grad(sum(loss.sum() for loss in losses(*inputs)), inputs[:2])
    for mine, other in zip(torch.autograd.grad(total, inputs[:2]), expected, strict=True):
        torch.testing.assert_close(mine, other)


def test_what_needs_the_host_says_so_under_compile() -> None:
    mask, videos = tube_mask(2, (2, 2, 2), 0.5, seed=0).as_bool(), clips()

    @torch.compile(backend="eager", fullgraph=True)
    def loss(every: torch.Tensor) -> torch.Tensor:
        return masked_pixel_loss(every, videos, mask, patch_size=PATCH, reduction="none")

    with pytest.raises(Exception, match="cannot count a boolean mask"):
        loss(torch.randn(2, 8, 96))


def test_the_path_can_be_forced_and_errors_say_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAM2_KERNELS", raising=False)
    assert active_path(torch.zeros(1)) == "pytorch"
    monkeypatch.setenv("MAM2_KERNELS", "pytorch")
    assert active_path("cuda") == "pytorch"
    monkeypatch.setenv("MAM2_KERNELS", "fast")
    with pytest.raises(ValueError, match="triton, pytorch"):
        active_path("cpu")
    monkeypatch.delenv("MAM2_KERNELS")
    monkeypatch.setattr(launch, "triton", None)
    with pytest.raises(RuntimeError, match="install `triton`"):
        active_path("cuda")


@pytest.mark.slow
def test_the_package_imports_without_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import mam2.kernels; print(mam2.kernels.active_path('cpu'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "pytorch", done.stderr


@pytest.mark.slow
def test_importing_the_folder_by_its_own_name_registers_nothing() -> None:
    """transformers imports a module `kernels` if there is one, as in the root of this repository."""
    code = "import mam2.kernels, kernels, torch; print(dir(kernels).count('gather_tubes'), len(kernels.__path__))"
    root = ROOT
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["0", "1"], done.stderr
