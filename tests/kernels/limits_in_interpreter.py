"""Inputs at which integers of the kernels could overflow or their order is ambiguous; run by test_in_interpreter.py."""

import importlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from triton import language as tl
from triton.runtime import interpreter

from mam2.kernels import (
    frame_difference,
    gather_tubes,
    host_masks,
    launch,
    linear_cross_entropy,
    masked_frame_difference_loss,
    masked_pixel_loss,
    reference,
    reference_masks,
)
from mam2.kernels.softmax_gradient import softmax_gradient_

importlib.import_module("mam2.kernels.masked_subset")  # the package imports it only where the engine needs it


@pytest.mark.parametrize(
    ("extent", "dimension", "stride"),
    [((3, 3, 3, 4, 4), 0, 2**30), ((1, 3, 9, 4, 4), 2, 3 * 2**27), ((1, 3, 3, 4, 4), 2, 2**30)],
    ids=["clips", "slots", "frames"],
)
def test_offsets_that_reach_past_32_bits(
    extent: tuple[int, ...], dimension: int, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Single strides fit into 32 bits, the offsets do not. Only the clip's pages of the buffer are used.

    An offset that wraps reads zeros in the first half.
    """
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)  # would copy it onto itself
    near = torch.randint(256, extent, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    strides = [stride if place == dimension else step for place, step in enumerate(near.stride())]
    reach = sum((size - 1) * step for size, step in zip(extent, strides, strict=True))
    assert reach >= 2**31
    far = torch.empty(2**31 + reach + 1, dtype=torch.uint8).as_strided(extent, strides, 2**31).copy_(near)
    index, patch = torch.arange(extent[2] // 3).repeat(extent[0], 1), (3, 4, 4)
    pred = torch.zeros(*index.shape, 144)

    common = {"patch_size": patch, "reduction": "none"}
    for operator in (
        lambda video: gather_tubes(video, index, patch_size=patch),
        lambda video: frame_difference(video, patch_size=patch),
        lambda video: torch.ops.mam2.motion_energy(video, patch),
        lambda video: masked_frame_difference_loss(pred, video, index, **common),
        lambda video: masked_pixel_loss(pred, video, index, **common),
        lambda video: masked_pixel_loss(pred, video, index, target="joint", **common),
    ):
        assert torch.equal(operator(near), operator(far))


@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "planes"])
def test_offsets_past_32_bits_give_the_same_numbers(last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The branch for cubes that span more than 2^31 values, on cubes that do not."""
    video = torch.rand(1, 3, 4, 4, 8, generator=torch.Generator().manual_seed(0))
    if last:
        video = video.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    index, pred, patch = torch.tensor([[2, 1]]), torch.zeros(1, 2, 96), (2, 4, 4)

    def results() -> list[torch.Tensor]:
        common = {"patch_size": patch, "reduction": "none"}
        return [
            gather_tubes(video, index, patch_size=patch),
            frame_difference(video, mask=index, patch_size=patch),
            torch.ops.mam2.motion_energy(video, patch),
            masked_frame_difference_loss(pred, video, index, **common),
            *(masked_pixel_loss(pred, video, index, target=target, **common) for target in ("pixel", "joint")),
        ]

    narrow = results()
    for name in ("gather_tubes", "frame_difference", "motion_mask", "masked_error"):
        module = importlib.import_module(f"mam2.kernels.{name}")
        monkeypatch.setattr(module, "cube_meta", lambda *given, meta=module.cube_meta: meta(*given) | {"WIDE": True})
    for one, other in zip(narrow, results(), strict=True):
        assert torch.equal(one, other)


def test_a_gradient_of_more_than_2_31_values_is_scaled_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the last program runs; the rest of the memory is never touched."""
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)  # would copy it onto itself
    values, block = 2**31 + 100, 4096
    last = interpreter.TensorHandle(np.array([values // block], dtype=np.int32), tl.int32)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_get_program_id", lambda *_: last)
    monkeypatch.setattr(launch, "run_kernel", lambda kernel, _, *arguments, **meta: kernel[(1,)](*arguments, **meta))
    gradient = torch.empty(values, dtype=torch.float16)
    gradient[-101:] = torch.arange(101)
    torch.ops.mam2.scale_gradient_(gradient, torch.tensor(2.0))
    assert gradient[-101:].tolist() == [0, *range(2, 202, 2)]


def test_sums_of_large_bright_patches_need_64_bits() -> None:
    """2 · 128 · 132 squares of 255 pass 2^31."""
    patch, index = (2, 128, 132), torch.tensor([[0]])
    flicker = torch.tensor([0, 255, 0, 255], dtype=torch.uint8).view(1, 1, 4, 1, 1).expand(1, 1, 4, 128, 132)
    energy = torch.ops.mam2.motion_energy(flicker, patch)
    assert energy.tolist() == [[2 * 128 * 132 * 255**2, 128 * 132 * 255**2]]

    bright = 255 - torch.randint(3, (1, 1, 2, 128, 132), generator=torch.Generator().manual_seed(0)).byte()
    pred = torch.zeros(1, 1, 2 * 128 * 132)
    for normalize in ("channel", "patch"):
        loss = masked_pixel_loss(pred, bright, index, patch_size=patch, normalize=normalize, reduction="sum")
        exact = reference.masked_errors(
            pred.double(), bright, index, None, 1, [False] * 2, patch, "pixel", normalize, 1e-6, None, None
        )[0].sum()
        torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("slope", [8.0, -8.0])
def test_the_largest_logit_may_stand_in_any_block(slope: float) -> None:
    hidden, target = torch.tensor([[1.0], [-0.5]]).requires_grad_(), torch.tensor([8195, 1])
    weight = torch.linspace(0, slope, 8200)[:, None].requires_grad_()
    results = []
    for leaves in ((hidden, weight), [leaf.detach().double().requires_grad_() for leaf in (hidden, weight)]):
        exact = leaves[0].dtype == torch.float64
        loss = F.cross_entropy(F.linear(*leaves), target) if exact else linear_cross_entropy(*leaves, target)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    for mine, truth in zip(*results, strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_unused_codes_at_minus_infinity_may_fill_a_block(smoothing: float) -> None:
    """As in PyTorch: the loss stays finite unless smoothing puts weight on them or one is the target; so do gradients.

    The third row is ignored, the fourth's target is such a code.
    """
    logits, target = torch.randn(4, 16500), torch.tensor([16400, 8200, -100, 5])
    logits[::2, :16390] = logits[1, 8201:] = logits[3, :16390] = float("-inf")
    leaf = logits.double().requires_grad_()
    exact = F.cross_entropy(leaf, target, reduction="none", label_smoothing=smoothing)
    (gradient,) = torch.autograd.grad(exact.sum(), leaf)
    loss = torch.empty(4)
    softmax_gradient_(logits, target, None, -100, smoothing, True, loss)
    torch.testing.assert_close(loss, exact.detach().float())
    torch.testing.assert_close(logits, gradient.float(), rtol=2e-5, atol=1e-7)
    assert loss[:2].isfinite().all() == (smoothing == 0)
    assert logits.isfinite().all()


def test_of_equal_keys_the_smaller_position_is_hidden() -> None:
    """Of sample 221542 of seed 0, positions 45 and 122 have the same key, which is the 126th smallest."""
    step, sample = torch.tensor(0), 221542
    keys = host_masks.position_keys(0, sample, 1, 196, 0)[0]
    assert keys[45] == keys[122]
    for draw in (torch.ops.mam2.draw_mask, reference_masks.draw_mask, host_masks.draw_mask):
        visible, masked = draw(step, 0, sample, 1, 1, 196, 126, None, 0)
        assert 45 in masked
        assert 122 in visible
    every = torch.arange(196)[None]
    for subset in (torch.ops.mam2.masked_subset, reference_masks.masked_subset):
        drawn = subset(every, step, [1, 14, 14], 126, False, 0, sample)
        assert 45 in drawn
        assert 122 not in drawn
