"""Every Triton kernel, run by Triton's interpreter on the CPU, against float64.

Collected by test_kernels_in_interpreter.py in a process of its own: TRITON_INTERPRET must be set before Triton is
imported, and MAM2_KERNELS=triton sends CPU tensors to the kernels. A program takes milliseconds there, so the shapes
are as small as they can be and still hold every branch: a padded number of rows, runs of several lengths, one and
several segments, the last slot and others.
"""

import importlib
import os

import pytest
import torch
import torch.nn.functional as F

from mam2.kernels import (
    active_path,
    frame_difference,
    gather_tubes,
    linear_cross_entropy,
    masked_frame_difference_loss,
    masked_pixel_loss,
    random_mask,
    reference,
    tube_mask,
)
from mam2.kernels.scale_gradient import scale_gradient

assert os.environ["TRITON_INTERPRET"] == "1"
MEAN, STD = [0.5, 0.4, 0.45], [0.2, 0.3, 0.25]
BYTES, HALF, BRAIN, SINGLE, DOUBLE = torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN (or a huge number), so that a value a kernel forgets to write shows."""
    empty = torch.Tensor.new_empty

    def poisoned(self: torch.Tensor, *size, **options) -> torch.Tensor:
        out = empty(self, *size, **options)
        return out.fill_(float("nan") if out.dtype.is_floating_point else 2**40) if out.numel() else out

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


def clips(dtype: torch.dtype, layout: str, patch: tuple[int, int, int], channels: int = 3) -> torch.Tensor:
    """Two clips [2,C,2τ,2p,p] in a layout: the loader's, contiguous, or a window of a larger buffer."""
    frames, height, width = 2 * patch[0], 2 * patch[1], patch[2]
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (2, frames, height + 2, width + 3, channels), generator=generator, dtype=BYTES)
    video = (raw if dtype == BYTES else raw / 255).to(dtype).permute(0, 4, 1, 2, 3)
    window = video[..., 1:-1, 2:-1]
    if layout == "channels_last":
        return window.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    return window.contiguous() if layout == "contiguous" else window


CASES = [
    # patch, layout, clip, prediction, target, normalize, mean and std
    ((2, 4, 4), "channels_last", BYTES, SINGLE, "adjacent", "channel", False),
    ((2, 4, 4), "window", BYTES, BRAIN, "pixel", "channel", False),
    ((2, 4, 4), "channels_last", BYTES, HALF, "intra", "patch", False),
    ((3, 2, 2), "contiguous", SINGLE, BRAIN, "pixel", "patch", True),
    ((3, 2, 2), "channels_last", BRAIN, SINGLE, "adjacent", "patch", True),
    ((3, 2, 4), "window", HALF, HALF, "intra", "channel", True),
    ((1, 4, 4), "channels_last", BYTES, SINGLE, "adjacent", None, False),
    ((2, 2, 8), "contiguous", BYTES, SINGLE, "pixel", None, False),
    ((2, 3, 5), "channels_last", BYTES, SINGLE, "pixel", "channel", False),
    ((2, 4, 4), "channels_last", DOUBLE, DOUBLE, "adjacent", "channel", True),
]


@pytest.mark.parametrize(("patch", "layout", "clip", "kind", "target", "normalize", "undo"), CASES)
@pytest.mark.parametrize("every_token", [False, True])
def test_masked_loss(patch, layout, clip, kind, target, normalize, undo, every_token: bool) -> None:
    video = clips(clip, layout, patch)
    mask = tube_mask(2, (2, 2, 1), 0.5, seed=0)
    values = patch[0] * patch[1] * patch[2] * 3
    values -= values // patch[0] if target == "intra" else 0
    generator = torch.Generator().manual_seed(1)
    pred = torch.randn(2, 4 if every_token else 2, values, generator=generator).to(kind).requires_grad_()
    options = {"patch_size": patch, "normalize": normalize, "eps": 0.01}
    options |= {"mean": MEAN, "std": STD} if undo else {}
    function = masked_pixel_loss
    if target != "pixel":
        function, options["difference"] = masked_frame_difference_loss, target
    loss = function(pred, video, mask, **options)
    upstream = torch.tensor(0.3, dtype=loss.dtype)
    (gradient,) = torch.autograd.grad(loss, pred, upstream)

    statistics = (MEAN, STD) if undo else (None, None)
    errors, doubled = reference.masked_loss(
        pred.detach().double(), video, mask.masked, patch, target, normalize, 0.01, *statistics, True
    )
    existing = errors.numel() * values - (2 * values // patch[0] if target == "adjacent" else 0)
    exact, exact_gradient = errors.sum() / existing, doubled * 0.3 / existing
    assert abs(loss - exact) <= (2e-6 if kind != DOUBLE else 1e-12) * exact
    # rounded twice, and the interpreter cuts bfloat16 off instead of rounding it
    limit = (6 if kind == BRAIN else 3) * (
        exact_gradient.to(kind).double() - exact_gradient
    ).norm() + 1e-6 * exact_gradient.norm()
    assert (gradient.double() - exact_gradient).norm() <= limit
    assert torch.equal(gradient == 0, exact_gradient == 0)


@pytest.mark.parametrize(("patch", "layout", "clip", "kind", "target", "normalize", "undo"), CASES)
def test_frame_difference_and_gather(patch, layout, clip, kind, target, normalize, undo) -> None:
    video = clips(clip, layout, patch)
    mask = random_mask(2, (2, 2, 1), 0.5, seed=1)
    statistics = (MEAN, STD) if undo else (None, None)
    visible = gather_tubes(video, mask.visible, patch_size=patch, mean=statistics[0], std=statistics[1], dtype=kind)
    exact = reference.gather_tubes(video, mask.visible, patch, *statistics, DOUBLE)
    limit = 2 * (exact.to(kind).double() - exact).abs().max() + (1e-6 if kind != DOUBLE else 1e-14)
    assert (visible.double() - exact).abs().max() <= limit
    if target != "pixel":
        options = {"patch_size": patch, "difference": target, "normalize": normalize, "eps": 0.01, "mask": mask}
        out = frame_difference(video, mean=statistics[0], std=statistics[1], **options)
        truth = reference.target(video, mask.masked, patch, target, normalize, 0.01, *statistics, DOUBLE)
        torch.testing.assert_close(out.double(), truth.view(out.shape), rtol=1e-5, atol=1e-5)


def test_offsets_past_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The branch for cubes that span more than 2^31 elements gives the same numbers."""
    masked_loss = importlib.import_module("mam2.kernels.masked_loss")
    video, mask = clips(BYTES, "contiguous", (2, 4, 4)), tube_mask(2, (2, 2, 1), 0.5, seed=0)
    pred = torch.randn(2, 2, 96)
    narrow = masked_frame_difference_loss(pred, video, mask, patch_size=(2, 4, 4), reduction="none")
    meta = masked_loss.cube_meta
    monkeypatch.setattr(masked_loss, "cube_meta", lambda *arguments: meta(*arguments) | {"WIDE": True})
    wide = masked_frame_difference_loss(pred, video, mask, patch_size=(2, 4, 4), reduction="none")
    assert torch.equal(wide, narrow)


def test_a_token_out_of_range_reads_nothing_and_gives_nan() -> None:
    video, masked = clips(BYTES, "channels_last", (2, 4, 4)), torch.tensor([[4, 1], [-1, 0]])
    pred = torch.zeros(2, 2, 96)
    loss = masked_pixel_loss(pred, video, masked, patch_size=(2, 4, 4), reduction="none")
    assert torch.equal(loss.isnan(), torch.tensor([[True, False], [True, False]]))
    visible = gather_tubes(video, masked, patch_size=(2, 4, 4))
    assert torch.equal(visible.isnan().all(2), loss.isnan())


@pytest.mark.parametrize(("seed", "step", "sample"), [(0, 0, 0), (2**62 + 12345, 2**33 + 7, 2**32 - 1)])
@pytest.mark.parametrize(("slots", "positions", "hidden"), [(2, 5, 3), (1, 33, 7), (1, 2, 1)])
def test_masks_are_those_of_the_reference(seed, step, sample, slots, positions, hidden) -> None:
    arguments = (torch.tensor(step), seed, sample, 3, slots, positions, hidden)
    for drawn, expected in zip(torch.ops.mam2.draw_mask(*arguments), reference.draw_mask(*arguments), strict=True):
        assert torch.equal(drawn, expected)


@pytest.mark.parametrize("codes", [5, 64, 8200])
@pytest.mark.parametrize("kind", [SINGLE, BRAIN])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_cross_entropy(codes: int, kind: torch.dtype, reduction: str) -> None:
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(size, generator=generator).to(kind).requires_grad_() for size in ((4, 3), (codes, 3), (codes,))
    ]
    target = torch.tensor([0, codes - 1, -100, 2])
    smoothing = 0.1 if codes == 5 else 0.0

    def run(function, tensors):
        loss = function(*tensors)
        upstream = torch.tensor([0.1, 0.7, 0.5, 0.9]).to(loss.dtype)[: loss.numel()].view(loss.shape)
        return [loss.detach(), *torch.autograd.grad(loss, tensors, upstream)]

    def plain(hidden, weight, bias):
        logits = F.linear(hidden, weight, bias)
        return F.cross_entropy(logits, target, reduction=reduction, label_smoothing=smoothing)

    options = {"reduction": reduction, "label_smoothing": smoothing}
    ours = run(lambda h, w, b: linear_cross_entropy(h, w, target, b, **options), leaves)
    theirs = run(plain, leaves)
    exact = run(plain, [leaf.detach().double().requires_grad_() for leaf in leaves])
    for name, mine, other, truth in zip(("loss", "hidden", "weight", "bias"), ours, theirs, exact, strict=True):
        # the interpreter cuts bfloat16 off instead of rounding it: one unit in the last place more
        slack = 2**-8 if kind == BRAIN else 2e-6
        assert (mine.double() - truth).norm() <= 2 * (other.double() - truth).norm() + slack * truth.norm(), name


def test_a_target_out_of_range_gives_nan() -> None:
    hidden, weight = torch.randn(3, 2), torch.randn(5, 2)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([5, 0, -1]), reduction="none")
    assert torch.equal(loss.isnan(), torch.tensor([True, False, True]))


@pytest.mark.parametrize("kind", [SINGLE, HALF, BRAIN])
def test_scale_gradient(kind: torch.dtype) -> None:
    gradient, rows = torch.randn(3, 2, 5).to(kind), torch.rand(3, 2)
    for scale in (rows, rows[0, 0], rows[:, 0]):
        expected = reference.scale_gradient(gradient.double(), scale.double())
        out = scale_gradient(gradient, scale)
        assert out.dtype == kind
        tolerance = {SINGLE: 1e-6, HALF: 2**-10, BRAIN: 2**-7}[kind]
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=1e-7)


def test_runs_repeat_bit_for_bit() -> None:
    video, mask = clips(BYTES, "channels_last", (2, 4, 4)), tube_mask(2, (2, 2, 1), 0.5, seed=0)
    pred = torch.randn(2, 2, 96)
    first = masked_frame_difference_loss(pred, video, mask, patch_size=(2, 4, 4))
    for _ in range(3):
        assert torch.equal(masked_frame_difference_loss(pred, video, mask, patch_size=(2, 4, 4)), first)


def test_empty_inputs_launch_nothing() -> None:
    video, nothing = clips(BYTES, "channels_last", (2, 4, 4)), torch.zeros(2, 0, dtype=torch.int64)
    assert active_path(video) == "triton"
    assert gather_tubes(video, nothing, patch_size=(2, 4, 4)).shape == (2, 0, 96)
    assert masked_pixel_loss(torch.zeros(2, 0, 96), video, nothing, patch_size=(2, 4, 4), reduction="sum") == 0
    assert linear_cross_entropy(torch.zeros(0, 3), torch.zeros(5, 3), nothing[0], reduction="sum") == 0
