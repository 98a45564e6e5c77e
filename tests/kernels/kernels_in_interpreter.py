"""Every Triton kernel, run by Triton's interpreter on the CPU: the cases of `make gpu`, and inputs drawn by hypothesis.

Collected by test_in_interpreter.py in a process of its own: TRITON_INTERPRET must be set before Triton is
imported, and MAM2_KERNELS=triton sends CPU tensors to the kernels. A program takes milliseconds there, so the shapes
are small. The interpreter also records accessed addresses: all must be inside of an argument.
"""

import importlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import Phase, assume, given, register_random, settings
from hypothesis import strategies as st

from benchmarks import cases, correctness
from benchmarks.cases import BRAIN, BYTES, DOUBLE, HALF, LAYOUTS, SINGLE, Case, Clip
from mam2.kernels import (
    TubeMask,
    active_path,
    frame_difference,
    gather_tubes,
    launch,
    linear_cross_entropy,
    linear_masked_loss,
    masked_frame_difference_loss,
    masked_pixel_loss,
    motion_tube_mask,
    random_mask,
    tube_mask,
)
from tests.kernels.interpreter_tools import as_a_gpu_rounds, patched_once, recorded

assert os.environ["TRITON_INTERPRET"] == "1"
CPU = torch.device("cpu")
FLOATS = (SINGLE, BRAIN, HALF, DOUBLE)
SMALL = Clip(patch=(2, 4, 4), layout="window", dtype=BYTES)
LOSSES = {
    "pixel": (masked_pixel_loss, {"target": "pixel"}),
    "joint": (masked_pixel_loss, {"target": "joint"}),
    "adjacent": (masked_frame_difference_loss, {"difference": "adjacent"}),
    "intra": (masked_frame_difference_loss, {"difference": "intra"}),
}
# no search for a smaller failing input, which would take minutes
drawn = settings(derandomize=True, deadline=None, database=None, phases=(Phase.generate,))


class TorchRandom:
    """PyTorch's generator, which hypothesis seeds before each example."""

    seed, getstate, setstate = map(staticmethod, (torch.manual_seed, torch.get_rng_state, torch.set_rng_state))


TORCH_RANDOM = TorchRandom()
register_random(TORCH_RANDOM)


@pytest.fixture(scope="module", autouse=True)
def _poisoned_memory() -> Iterator[None]:
    with correctness.poisoned_memory(), patched_once():
        yield


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)


def shared_cases() -> list[Case]:
    torch.manual_seed(0)
    return list(cases.cases(CPU))


def check(case: Case) -> None:
    with recorded() as launches:
        row = correctness.verdict(case, CPU, runs=1)
    assert row["verdict"] == "right", row
    for run in launches:
        assert run.outside() == 0, (run.kernel, row)


@pytest.mark.parametrize("case", shared_cases(), ids=lambda case: case.name)
def test_shared_case(case: Case) -> None:
    assert active_path(CPU) == "triton"
    check(case)


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
def test_a_byte_at_its_channel_s_mean_gives_zero(dtype: torch.dtype) -> None:
    """Also if the compiler rounds a product and a sum once."""
    video = torch.arange(256, dtype=BYTES).view(1, 1, 1, 16, 16).expand(1, 3, 2, -1, -1).contiguous()
    for first in range(0, 255, 3):
        mean = [(first + channel) / 255 for channel in range(3)]
        options = {"patch_size": (2, 16, 16), "mean": mean, "std": (0.2, 0.3, 0.25), "dtype": dtype}
        with as_a_gpu_rounds():
            out = gather_tubes(video, torch.tensor([[0]]), **options).view(2, 256, 3)
        assert [out[0, first + channel, channel].item() for channel in range(3)] == [0, 0, 0], first


@pytest.mark.parametrize("target", ["pixel", "joint"])
@pytest.mark.parametrize("normalize", ["channel", "patch"])
@pytest.mark.parametrize("patch", [(2, 14, 14), (3, 2, 2)])
def test_a_patch_of_one_color_has_target_zero_on_both_paths(
    target: str, normalize: str, patch: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For any color: with the smallest eps, a rounding error of the mean would be as large as the pixels."""
    levels = torch.tensor([3, 77, 149, 190, 247], dtype=BYTES)
    colors = torch.stack([levels, *([levels.flip(0), levels // 2] if normalize == "channel" else [levels] * 2)], dim=1)
    video = colors.view(5, 3, 1, 1, 1).expand(-1, -1, *patch)
    options = {"patch_size": patch, "target": target, "normalize": normalize, "eps": 1e-6, "reduction": "none"}
    for path in ("triton", "pytorch"):
        monkeypatch.setenv("MAM2_KERNELS", path)
        with as_a_gpu_rounds():
            loss = masked_pixel_loss(torch.zeros(5, 1, video[0].numel()), video, None, **options)
        assert loss.flatten().tolist() == [0] * 5, path


@st.composite
def clips(draw: Any, dtypes: tuple[torch.dtype, ...] = (BYTES, *FLOATS)) -> Clip:
    """Any clip of at most 8 tokens; a batch may be empty."""
    patch = tuple(draw(st.integers(1, most)) for most in (3, 4, 5))
    grid = tuple(draw(st.integers(1, most)) for most in (3, 2, 2))
    channels, batch = draw(st.sampled_from((1, 3, 4))), draw(st.sampled_from((1, 2, 1, 2, 0)))
    assume(batch * grid[0] * grid[1] * grid[2] <= 8)
    layout = draw(st.sampled_from(sorted(LAYOUTS)))
    dtype = draw(st.sampled_from(dtypes))
    return Clip(patch=patch, layout=layout, dtype=dtype, grid=grid, channels=channels, batch=batch)


@st.composite
def masks(draw: Any, clip: Clip) -> TubeMask:
    """Any number of tokens in any order, different for each clip."""
    masked = draw(st.integers(0, clip.tokens))
    seed = draw(st.integers(0, 2**31))
    order = torch.rand(clip.batch, clip.tokens, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return TubeMask(visible=order[:, masked:], masked=order[:, :masked])


def normalizations(clip: Clip) -> st.SearchStrategy[str | None]:
    """The motion targets that a cube is large enough for."""
    pixels = clip.values // clip.channels
    return st.sampled_from([None, *["patch"] * (clip.values > 1), *["channel"] * (pixels > 1)])


@given(data=st.data(), clip=clips())
@settings(drawn, max_examples=150)
def test_masked_losses(data: st.DataObject, clip: Clip) -> None:
    options = {
        "target": data.draw(st.sampled_from(["pixel", "adjacent", *["intra", "joint"] * (clip.patch[0] > 1)])),
        "normalize": data.draw(normalizations(clip)),
        "reduction": data.draw(st.sampled_from(("none", "mean", "sum"))),
        "every_token": data.draw(st.booleans()),
        "weighted": data.draw(st.booleans()),
        "mask": data.draw(masks(clip)),
    }
    check(cases.loss_case(clip, data.draw(st.sampled_from(FLOATS)), **options))


@given(data=st.data(), clip=clips())
@settings(drawn, max_examples=60)
def test_gather_tubes(data: st.DataObject, clip: Clip) -> None:
    options = {"normalized": data.draw(st.booleans()), "mask": data.draw(masks(clip))}
    check(cases.gather_case(clip, data.draw(st.sampled_from(FLOATS)), **options))


@given(data=st.data(), clip=clips())
@settings(drawn, max_examples=60)
def test_frame_difference(data: st.DataObject, clip: Clip) -> None:
    difference = data.draw(st.sampled_from(["adjacent", *["intra"] * (clip.patch[0] > 1)]))
    mask = data.draw(st.none() | masks(clip))
    check(cases.difference_case(clip, difference=difference, normalize=data.draw(normalizations(clip)), mask=mask))


@given(clip=clips())
@settings(drawn, max_examples=40)
def test_motion_energy(clip: Clip) -> None:
    check(cases.energy_case(clip))


@given(data=st.data(), clip=clips(dtypes=(BYTES, DOUBLE)), strength=st.sampled_from((0.0, 0.3, 1.0)))
@settings(drawn, max_examples=12)
def test_motion_tube_mask(data: st.DataObject, clip: Clip, strength: float) -> None:
    assume(clip.grid[1] * clip.grid[2] > 1)
    check(cases.motion_mask_case(clip, strength))


@given(
    data=st.data(),
    seed=st.integers(0, 2**63 - 1),
    step=st.integers(0, 2**40),
    sample=st.integers(0, 2**40),
    slots=st.integers(1, 3),
    positions=st.integers(2, 40),
)
@settings(drawn, max_examples=12)
def test_tube_mask(data: st.DataObject, seed: int, step: int, sample: int, slots: int, positions: int) -> None:
    hidden = data.draw(st.integers(1, positions - 1))
    check(cases.mask_case(seed, step, sample, slots, positions, hidden))


@given(
    data=st.data(),
    seed=st.integers(0, 2**63 - 1),
    step=st.integers(-(2**40), 2**40),
    sample=st.integers(0, 2**40),
    grid=st.tuples(*(st.integers(1, most) for most in (5, 4, 4))),
    by_cell=st.booleans(),
)
@settings(drawn, max_examples=20)
def test_masked_subset(data: st.DataObject, grid: tuple[int, int, int], **options: Any) -> None:
    hidden = data.draw(st.integers(1, grid[0] * grid[1] * grid[2]))
    check(cases.subset_case(grid=grid, hidden=hidden, count=data.draw(st.integers(1, hidden)), **options))


@given(
    data=st.data(),
    rows=st.integers(0, 6),
    width=st.integers(1, 5),
    codes=st.sampled_from((1, 2, 5, 63, 64, 65, 8193)),
    dtype=st.sampled_from(FLOATS),
    reduction=st.sampled_from(("none", "mean", "sum")),
    smoothing=st.sampled_from((0.0, 0.1, 1.0)),
    bias=st.booleans(),
)
@settings(drawn, max_examples=80)
def test_linear_cross_entropy(data: st.DataObject, rows: int, **options: Any) -> None:
    ignored = data.draw(st.lists(st.integers(0, rows - 1), max_size=rows) if rows else st.just([]))
    check(cases.head_case(rows, ignored=ignored, **options))


@given(data=st.data(), shape=st.lists(st.integers(0, 5), min_size=1, max_size=3), dtype=st.sampled_from(FLOATS))
@settings(drawn, max_examples=30)
def test_scale_gradient(data: st.DataObject, shape: list[int], dtype: torch.dtype) -> None:
    check(cases.scale_case(shape, data.draw(st.integers(0, len(shape))), dtype))


def loss_and_gradient(
    target: str, pred: torch.Tensor, video: torch.Tensor, index: torch.Tensor, **options: Any
) -> list:
    function, named = LOSSES[target]
    leaf = pred.detach().requires_grad_()
    loss = function(leaf, video, index, patch_size=SMALL.patch, reduction="none", **named)
    upstream = options.get("upstream", torch.ones_like(loss))
    return [loss.detach(), *torch.autograd.grad(loss, leaf, upstream)]


def prediction(target: str, index: torch.Tensor) -> torch.Tensor:
    return torch.randn(*index.shape, SMALL.values // (2 if target == "intra" else 1))


@pytest.mark.parametrize("target", LOSSES)
def test_order_of_clips_and_of_masked_tokens_does_not_matter(target: str) -> None:
    video, index = SMALL.make(), random_mask(2, SMALL.grid, 0.5, seed=1).masked
    pred, order = prediction(target, index), torch.tensor([2, 0, 3, 1])
    before = loss_and_gradient(target, pred, video, index)
    shuffled = loss_and_gradient(target, pred[:, order], video, index[:, order])
    swapped = loss_and_gradient(target, pred.flip(0), video.flip(0), index.flip(0))
    for plain, other, turned in zip(before, shuffled, swapped, strict=True):
        assert torch.equal(other, plain[:, order])
        assert torch.equal(turned, plain.flip(0))


@pytest.mark.parametrize("target", LOSSES)
def test_upstream_scales_the_gradient(target: str) -> None:
    video, index = SMALL.make(), random_mask(2, SMALL.grid, 0.5, seed=1).masked
    pred = prediction(target, index)
    factors = 2.0 ** torch.arange(-4, 4).view(2, 4)
    loss, gradient = loss_and_gradient(target, pred, video, index)
    scaled = loss_and_gradient(target, pred, video, index, upstream=factors)
    assert torch.equal(scaled[0], loss)
    assert torch.equal(scaled[1], gradient * factors[..., None])


@pytest.mark.parametrize("target", LOSSES)
def test_factors_of_tokens_of_any_strides(target: str) -> None:
    """A column or one number repeated, a transposed matrix, every second number; of a loss and of a head with it."""
    video, index = SMALL.make(), random_mask(2, SMALL.grid, 0.5, seed=1).masked
    pred, (function, named) = prediction(target, index), LOSSES[target]
    hidden, head = torch.randn(2, 4, 5), torch.randn(pred.shape[2], 5)
    layouts = torch.rand(2, 1).expand(2, 4), torch.rand(()).expand(2, 4), torch.rand(4, 2).t(), torch.rand(2, 8)[:, ::2]
    for weight in layouts:
        assert not weight.is_contiguous()
        for reduction in ("sum", "mean", "none"):
            options = {"patch_size": SMALL.patch, "reduction": reduction, **named}
            found, dense = (function(pred, video, index, weight=w, **options) for w in (weight, weight.contiguous()))
            torch.testing.assert_close(found, dense, rtol=1e-6, atol=0)
        options = {"patch_size": SMALL.patch, "reduction": "sum", "target": target}
        weights = weight, weight.contiguous()
        found, dense = (linear_masked_loss(hidden, head, video, index, token_weight=w, **options) for w in weights)
        assert torch.equal(found, dense)


def test_upstream_scales_the_gradient_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """With programs of several blocks each; a factor of 1 stores nothing."""
    monkeypatch.setattr(launch, "processors", lambda device: 1)
    for shape, scale in (((3, 40, 4096), torch.tensor([1.0, 0.5, 4.0])), ((70_000,), torch.tensor(0.25))):
        gradient = torch.randn(shape).bfloat16()
        expected = gradient.float() * scale.view(-1, *[1] * (len(shape) - 1))
        with recorded() as launches:
            torch.ops.mam2.scale_gradient_(gradient, scale)
            changed = sum(addresses.size for addresses, _ in launches[0].stores)
            torch.ops.mam2.scale_gradient_(gradient, torch.ones_like(scale))
        assert torch.equal(gradient, expected.bfloat16())
        assert changed == expected[scale != 1].numel()
        assert sum(addresses.size for addresses, _ in launches[1].stores) == 0
        assert launches[1].distinct_bytes == scale.nbytes


@pytest.mark.parametrize("target", LOSSES)
def test_only_masked_pixels_reach_a_loss_and_only_visible_ones_the_encoder(target: str) -> None:
    video, mask = SMALL.make(), tube_mask(2, SMALL.grid, 0.5, seed=1)
    pred = prediction(target, mask.masked)
    hidden = mask.as_bool().view(2, 1, *SMALL.grid)
    for dimension, edge in enumerate(SMALL.patch, start=2):
        hidden = hidden.repeat_interleave(edge, dimension)
    other_visible, other_masked = torch.where(hidden, video, 255 - video), torch.where(hidden, video // 2, video)
    before = loss_and_gradient(target, pred, video, mask.masked)
    for old, new in zip(before, loss_and_gradient(target, pred, other_visible, mask.masked), strict=True):
        assert torch.equal(old, new)
    assert (loss_and_gradient(target, pred, other_masked, mask.masked)[0] != before[0]).all()
    seen = [gather_tubes(clip, mask.visible, patch_size=SMALL.patch) for clip in (video, other_masked, other_visible)]
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


def test_a_static_clip_does_not_move() -> None:
    video = Clip(patch=(2, 4, 4), layout="still", dtype=BYTES).make()
    mask = tube_mask(2, SMALL.grid, 0.5, seed=1)
    for difference in ("adjacent", "intra"):
        assert frame_difference(video, patch_size=SMALL.patch, difference=difference).abs().max() == 0
    guided = motion_tube_mask(video, 0.5, patch_size=SMALL.patch, strength=1.0, seed=1)
    assert torch.equal(guided.masked, mask.masked)


def repeated_cases() -> list[Case]:
    """One call of each operator, as small as possible."""
    torch.manual_seed(0)
    tiny = Clip(patch=(2, 2, 2), layout="window", dtype=BYTES, grid=(2, 1, 2), batch=1)
    losses = [cases.loss_case(tiny, BRAIN, target=target, normalize="channel") for target in LOSSES]
    return [
        *losses,
        cases.gather_case(tiny, BRAIN, normalized=True),
        cases.difference_case(tiny, difference="adjacent", normalize="patch"),
        cases.energy_case(tiny),
        cases.motion_mask_case(tiny, 0.5),
        cases.mask_case(0, 0, 0, 1, 4, 2),
        cases.subset_case(0, 0, 0, (2, 2, 2), 5, 3, by_cell=True),
        cases.head_case(3, 2, 5, BRAIN, reduction="none"),
        cases.scale_case((3, 2), 1, BRAIN),
    ]


@pytest.mark.parametrize("case", repeated_cases(), ids=lambda case: case.name)
def test_twenty_runs_give_the_same_bits(case: Case) -> None:
    row = correctness.verdict(case, CPU, runs=20)
    assert row["verdict"] == "right", row


def test_offsets_past_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The branch for cubes that span more than 2^31 elements gives the same numbers."""
    masked_error = importlib.import_module("mam2.kernels.masked_error")
    video, mask = SMALL.make(), tube_mask(2, SMALL.grid, 0.5, seed=0)
    preds = {target: prediction(target, mask.masked) for target in LOSSES}
    narrow = {target: loss_and_gradient(target, pred, video, mask.masked) for target, pred in preds.items()}
    meta = masked_error.cube_meta
    monkeypatch.setattr(masked_error, "cube_meta", lambda *arguments: meta(*arguments) | {"WIDE": True})
    for target, pred in preds.items():
        for old, new in zip(narrow[target], loss_and_gradient(target, pred, video, mask.masked), strict=True):
            assert torch.equal(old, new)


def test_a_token_out_of_range_reads_nothing_and_gives_nan() -> None:
    video, masked = SMALL.make(), torch.tensor([[8, 1], [-1, 0]])
    with recorded() as launches:
        loss = masked_pixel_loss(torch.zeros(2, 2, 96), video, masked, patch_size=SMALL.patch, reduction="none")
        visible = gather_tubes(video, masked, patch_size=SMALL.patch)
    assert torch.equal(loss.isnan(), torch.tensor([[True, False], [True, False]]))
    assert torch.equal(visible.isnan().all(2), loss.isnan())
    assert [run.outside() for run in launches] == [0, 0]


@pytest.mark.parametrize("target", LOSSES)
@pytest.mark.parametrize("every", [False, True])
def test_the_gradient_of_a_token_out_of_range_is_nan(target: str, every: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With predictions for every token, the gradient of the whole clip is NaN. The memory contains old numbers."""
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *given, **options: empty(*given, **options).fill_(7))
    video, masked = SMALL.make(), torch.tensor([[8, 1], [3, 0], [-1, 2]])
    video = torch.cat([video, video[:1]])
    pred = prediction(target, torch.empty(3, 8) if every else masked)
    with recorded() as launches:
        loss, gradient = loss_and_gradient(target, pred, video, masked)
    bad = torch.tensor([[True, False], [False, False], [True, False]])
    assert torch.equal(loss.isnan(), bad)
    expected = bad.any(dim=1, keepdim=True).expand(-1, 8) if every else bad
    assert torch.equal(gradient.isnan().all(2), expected)
    assert torch.equal(gradient.isnan().any(2), expected)
    assert [run.outside() for run in launches] == [0, 0]


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("codes", [5, 8193])
def test_a_target_out_of_range_gives_nan(reduction: str, codes: int) -> None:
    hidden, weight = torch.randn(4, 2).requires_grad_(), torch.randn(codes, 2).requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.tensor([codes, 0, -1, -100]), reduction=reduction)
    bad = torch.tensor([True, False, True, False])
    assert torch.equal(loss.isnan(), bad if reduction == "none" else torch.tensor(True))
    upstream = torch.ones_like(loss)
    of_hidden, of_weight = torch.autograd.grad(loss, (hidden, weight), upstream)
    assert torch.equal(of_hidden.isnan().all(1), bad)
    assert torch.equal(of_hidden.isnan().any(1), bad)
    assert of_weight.isnan().all()


def test_a_masked_head_in_chunks_that_end_within_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient overwrites the predictions; a token out of range gives NaN to its own features' gradient only."""
    video, masked = SMALL.make(), torch.tensor([[7, 1, 0], [3, 8, 5]])
    hidden, weight = torch.randn(2, 3, 4).requires_grad_(), torch.randn(96, 4).requires_grad_()
    options = {"patch_size": SMALL.patch, "eps": cases.EPS}
    monkeypatch.setattr(launch, "chunk_rows", lambda *_: 2)
    with recorded() as launches:
        loss = linear_masked_loss(hidden, weight, video, masked, target="adjacent", **options)
    assert [run.kernel for run in launches] == ["_masked_loss_kernel"] * 3
    assert [run.outside() for run in launches] == [0] * 3
    of_hidden, of_weight = torch.autograd.grad(loss, (hidden, weight))
    assert loss.isnan()
    assert of_weight.isnan().all()
    bad = masked == 8
    assert torch.equal(of_hidden.isnan().any(2), bad)
    plain = masked_frame_difference_loss(hidden @ weight.t(), video, masked, **options)
    (expected,) = torch.autograd.grad(plain, hidden)
    torch.testing.assert_close(of_hidden[~bad], expected[~bad])


def test_masks_whose_numbers_do_not_fit_give_nan() -> None:
    """A repeated token, zeros and ones as token numbers, and more masked tokens than predictions or fewer."""
    video, numbers = SMALL.make(), torch.tensor([[0, 5, 0], [4, 5, 6]])
    pred = torch.randn(2, 3, 96)
    bad = torch.tensor([True, False])
    loss, gradient = loss_and_gradient("pixel", pred, video, numbers)
    assert torch.equal(loss.isnan().all(1), bad)
    assert torch.equal(gradient.flatten(1).isnan().all(1), bad)
    hidden = torch.zeros(2, 8, dtype=torch.bool).index_fill(1, torch.tensor([2, 4, 6]), True)
    right = loss_and_gradient("pixel", pred, video, torch.tensor([[2, 4, 6]] * 2))
    for found, expected in zip(loss_and_gradient("pixel", pred, video, hidden), right, strict=True):
        assert torch.equal(found, expected)
    hidden[0, 0] = True
    loss, gradient = loss_and_gradient("pixel", pred, video, hidden)
    assert torch.equal(loss.isnan().all(1), bad)
    assert torch.equal(gradient.flatten(1).isnan().all(1), bad)
    assert masked_pixel_loss(torch.randn(2, 8, 96), video, hidden.long(), patch_size=SMALL.patch).isnan()
    assert gather_tubes(video, hidden.long(), patch_size=SMALL.patch).isnan().all()


def test_frames_that_fill_no_tubelet_are_refused() -> None:
    video, index = SMALL.make()[:, :, :3], torch.zeros(2, 1, dtype=torch.int64)
    message = "video: expected frames to be a multiple of 2 .* found 3; crop"
    for function, options in LOSSES.values():
        with pytest.raises(ValueError, match=message):
            function(torch.zeros(2, 1, 96), video, index, patch_size=SMALL.patch, **options)
    with pytest.raises(ValueError, match=message):
        gather_tubes(video, index, patch_size=SMALL.patch)
    with pytest.raises(ValueError, match=message):
        frame_difference(video, patch_size=SMALL.patch)
    with pytest.raises(ValueError, match=message):
        motion_tube_mask(video, 0.5, patch_size=SMALL.patch, seed=0)
