"""The declared costs against the loads, stores and operations of every kernel in Triton's interpreter.

Collected by test_in_interpreter.py in a process of its own. Bytes must match to the last one: each address
counts once for its loads and once for its stores. Operations are counted where the cube is float and normalized as a
patch, and may exceed the declaration by the work on padding and on the zeros from which sums start.

B clips, Nm masked tokens, P values per token.
"""

import importlib
import os
from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import BRAIN, BYTES, HALF, SINGLE, Clip
from mam2.kernels import (
    costs,
    frame_difference,
    gather_tubes,
    masked_frame_difference_loss,
    masked_pixel_loss,
    motion_tube_mask,
    random_mask,
    tube_mask,
)
from mam2.kernels.masked_subset import masked_subset
from mam2.kernels.scale_gradient import scale_gradient
from mam2.kernels.softmax_gradient import softmax_gradient_
from tests.kernels.interpreter_tools import Launch, patched_once, recorded

assert os.environ["TRITON_INTERPRET"] == "1"
BATCH, GRID = 2, (2, 2, 2)
TOKENS = 8
MOST_EXTRA_FLOPS = 1.2
CLIP = Clip(patch=(2, 8, 16), layout="channels_last", dtype=BYTES, grid=GRID, batch=BATCH)
LOSSES = {
    "pixel": (masked_pixel_loss, {"target": "pixel"}),
    "joint": (masked_pixel_loss, {"target": "joint"}),
    "adjacent": (masked_frame_difference_loss, {"difference": "adjacent"}),
    "intra": (masked_frame_difference_loss, {"difference": "intra"}),
}
VALUES, FRAME = CLIP.values, CLIP.values // 2


def clip(dtype: torch.dtype) -> torch.Tensor:
    video = CLIP.make()
    return video if dtype == BYTES else video.to(dtype)


def launched(call: Callable[[], object], kernel: str) -> Launch:
    """The only run of a kernel inside a call."""
    with patched_once(), recorded() as launches:
        call()
    (found,) = (launch for launch in launches if launch.kernel == kernel)
    return found


@pytest.mark.parametrize("dtype", [BYTES, SINGLE])
@pytest.mark.parametrize("target", LOSSES)
def test_masked_loss(target: str, dtype: torch.dtype) -> None:
    mask = tube_mask(BATCH, GRID, 0.5, seed=0)
    tubelet = 2 if target == "intra" else None
    pred = torch.randn(BATCH, 4, VALUES - FRAME if tubelet else VALUES).to(BRAIN).requires_grad_()
    function, options = LOSSES[target]
    found = launched(
        lambda: function(pred, clip(dtype), mask, patch_size=CLIP.patch, normalize="patch", **options),
        "_masked_loss_kernel",
    )
    sizes = {"clip_bytes": dtype.itemsize, "pred_bytes": 2, "tubelet": tubelet}
    declared = costs.masked_loss(BATCH, 4, VALUES, **sizes)
    # the last frame of the clip has no next one, so that its prediction is not read
    unread = BATCH * 2 * FRAME * 2 if target == "adjacent" else 0
    divisor = 4 if target == "adjacent" else 0  # counted on the device
    assert found.distinct_bytes == declared.bytes_moved - unread + divisor
    requested_twice = (BATCH * 4 - 1) * divisor
    frames_read_twice = {"pixel": 0, "joint": BATCH * 4, "intra": BATCH * 4, "adjacent": BATCH * 6}[target]
    read_twice = frames_read_twice * FRAME * dtype.itemsize + requested_twice
    assert found.requested_bytes == found.distinct_bytes + read_twice
    if dtype == SINGLE:
        assert 1 <= found.flops / declared.flops < MOST_EXTRA_FLOPS


def test_a_mask_without_tubes_reads_the_frames_after_its_cubes() -> None:
    mask = random_mask(BATCH, GRID, 0.5, seed=2)
    pred = torch.randn(BATCH, 4, VALUES)
    found = launched(
        lambda: masked_frame_difference_loss(pred, clip(BYTES), mask, patch_size=CLIP.patch), "_masked_loss_kernel"
    )
    without_gradient = costs.masked_loss(BATCH, 4, VALUES, pred_bytes=4).bytes_moved - BATCH * 4 * VALUES * 4
    hidden = mask.as_bool().unflatten(1, (2, 4))
    following = int((hidden[:, 0] & ~hidden[:, 1]).sum())
    unread = int(hidden[:, 1].sum())
    assert following > 0
    assert found.distinct_bytes == without_gradient + following * FRAME - unread * FRAME * 4 + 4


def test_tokens_of_weight_zero_are_not_read() -> None:
    """Neither the clip nor the prediction of such a token is read; its gradient is written."""
    pred, weight = torch.randn(BATCH, TOKENS, VALUES).to(BRAIN).requires_grad_(), torch.zeros(BATCH, TOKENS)
    weight[:, ::4] = 1
    found = launched(
        lambda: masked_pixel_loss(pred, clip(BYTES), None, patch_size=CLIP.patch, weight=weight), "_masked_loss_kernel"
    )
    every = costs.masked_loss(BATCH, TOKENS, VALUES)
    left_out = BATCH * (TOKENS - 2) * VALUES * (1 + 2)
    # without clips, the token numbers are the same for all; each token reads its factor
    assert found.distinct_bytes == every.bytes_moved - left_out + BATCH * TOKENS * 4


@pytest.mark.parametrize("dtype", [BYTES, SINGLE])
@pytest.mark.parametrize("difference", ["adjacent", "intra"])
def test_frame_difference(difference: str, dtype: torch.dtype) -> None:
    options = {"patch_size": CLIP.patch, "difference": difference, "normalize": "patch"}
    found = launched(lambda: frame_difference(clip(dtype), **options), "_frame_difference_kernel")
    tubelet = 2 if difference == "intra" else None
    declared = costs.frame_difference(BATCH, TOKENS, VALUES, clip_bytes=dtype.itemsize, tubelet=tubelet)
    assert found.distinct_bytes == declared.bytes_moved
    if dtype == SINGLE:
        assert 1 <= found.flops / declared.flops < MOST_EXTRA_FLOPS


@pytest.mark.parametrize("dtype", [BYTES, SINGLE])
def test_gather_tubes(dtype: torch.dtype) -> None:
    visible = tube_mask(BATCH, GRID, 0.5, seed=0).visible
    options = {"patch_size": CLIP.patch, "dtype": HALF, **CLIP.statistics}
    found = launched(lambda: gather_tubes(clip(dtype), visible, **options), "_gather_tubes_kernel")
    declared = costs.gather_tubes(BATCH, 4, VALUES, clip_bytes=dtype.itemsize, out_bytes=2)
    assert found.distinct_bytes == declared.bytes_moved
    assert 1 <= found.flops / declared.flops < MOST_EXTRA_FLOPS


@pytest.mark.parametrize("dtype", [BYTES, SINGLE])
def test_motion_energy(dtype: torch.dtype) -> None:
    found = launched(lambda: torch.ops.mam2.motion_energy(clip(dtype), CLIP.patch), "_motion_energy_kernel")
    declared = costs.motion_energy(BATCH, TOKENS, VALUES, clip_bytes=dtype.itemsize)
    assert found.distinct_bytes == declared.bytes_moved
    if dtype == SINGLE:
        assert 1 <= found.flops / declared.flops < MOST_EXTRA_FLOPS


def test_draw_mask() -> None:
    found = launched(lambda: tube_mask(BATCH, GRID, 0.5, seed=0), "_draw_mask_kernel")
    assert (found.distinct_bytes, found.flops) == costs.draw_mask(BATCH, TOKENS)
    by_motion = launched(lambda: motion_tube_mask(clip(BYTES), 0.5, patch_size=CLIP.patch, seed=0), "_draw_mask_kernel")
    assert by_motion.distinct_bytes == found.distinct_bytes + BATCH * TOKENS * 8  # the energies


def test_masked_subset() -> None:
    masked = tube_mask(BATCH, GRID, 0.5, seed=0).masked
    found = launched(lambda: masked_subset(masked, GRID, 3, by_cell=True, seed=0), "_masked_subset_kernel")
    assert (found.distinct_bytes, found.flops) == costs.masked_subset(BATCH, 4, 3)
    assert found.requested_bytes == found.distinct_bytes + (BATCH - 1) * 8  # every clip reads the step number


def test_scale_gradient() -> None:
    gradient, scale = torch.randn(2, 3, 8).to(HALF), torch.rand(2, 3)
    found = launched(lambda: scale_gradient(gradient, scale), "_scale_gradient_kernel")
    assert (found.distinct_bytes, found.flops) == costs.scale_gradient(6, 8)


def test_softmax_gradient() -> None:
    logits, target = torch.randn(3, 256), torch.tensor([0, 2, 255])
    found = launched(
        lambda: softmax_gradient_(logits, target, None, -100, 0.1, True, torch.empty(3)), "_softmax_gradient_kernel"
    )
    declared = costs.softmax_gradient(3, 256, item_bytes=4)
    assert found.distinct_bytes == declared.bytes_moved
    assert 1 <= found.flops / declared.flops < MOST_EXTRA_FLOPS


def test_linear_cross_entropy() -> None:
    """Its products are PyTorch's: counts the three products, and the bytes of their inputs and outputs."""
    rows, width, codes = 6, 5, 7
    hidden, weight = (torch.randn(size).to(HALF) for size in ((rows, width), (codes, width)))
    target, needs = torch.randint(codes, (rows,)), [True, True, False]
    declared = costs.linear_cross_entropy(rows, width, codes)
    run = importlib.import_module("mam2.kernels.linear_cross_entropy")._run
    with FlopCounterMode(display=False) as counter:
        losses, *gradients = run(hidden, weight, None, target, None, -100, 0.0, HALF, needs)
    assert counter.get_total_flops() == declared.flops
    tensors = (hidden, weight, target, losses, *gradients)
    assert sum(tensor.nbytes for tensor in tensors) == declared.bytes_moved
