"""linear_masked_loss against the linear layer and the masked loss one after the other."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mam2.kernels import launch, linear_masked_loss, masked_frame_difference_loss, masked_pixel_loss, random_mask
from tests.kernels.inputs import random_clips

PATCH, GRID, WIDTH = (2, 4, 6), (3, 2, 2), 5
MASK = random_mask(3, GRID, 0.6, seed=4)
TARGETS = ("pixel", "joint", "adjacent", "intra")
Tensors = tuple[torch.Tensor, ...]


@pytest.fixture(autouse=True)
def _several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of one clip."""
    monkeypatch.setitem(launch.CHUNK_BYTES, "cpu", 1)
    monkeypatch.setattr(launch, "TILE", 1)


def leaves(target: str = "pixel", dtype: torch.dtype = torch.float64) -> Tensors:
    """hidden, weight, bias."""
    values, generator = 72 if target == "intra" else 144, torch.Generator().manual_seed(0)
    sizes = (3, 7, WIDTH), (values, WIDTH), (values,)
    return tuple(torch.randn(size, generator=generator, dtype=dtype).requires_grad_() for size in sizes)


def clips() -> torch.Tensor:
    return random_clips(batch=3)


def two_steps(inputs: Tensors, mask: Any, target: str, weight: torch.Tensor | None = None, **options: Any):
    hidden, layer, *bias = inputs
    pred = F.linear(hidden, layer, *bias)
    if target in ("pixel", "joint"):
        return masked_pixel_loss(pred, clips(), mask, target=target, patch_size=PATCH, weight=weight, **options)
    return masked_frame_difference_loss(
        pred, clips(), mask, difference=target, patch_size=PATCH, weight=weight, **options
    )


def one_step(inputs: Tensors, mask: Any, target: str, weight: torch.Tensor | None = None, **options: Any):
    hidden, layer, *bias = inputs
    options |= {"patch_size": PATCH, "target": target, "token_weight": weight}
    return linear_masked_loss(hidden, layer, clips(), mask, *bias, **options)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_two_steps_in_float64(target: str, reduction: str, weighted: bool) -> None:
    weight = torch.rand(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    weight.data[:, ::3] = 0
    more = [weight] if weighted else []
    for inputs in (leaves(target), leaves(target)[:2]):
        found, expected = (step(inputs, MASK, target, *more, reduction=reduction) for step in (one_step, two_steps))
        torch.testing.assert_close(found, expected)
        for factor in (1.0, -3.0):
            upstream = torch.tensor(factor, dtype=torch.float64)
            for mine, other in zip(
                *(torch.autograd.grad(out, [*inputs, *more], upstream, retain_graph=True) for out in (found, expected)),
                strict=True,
            ):
                torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("target", ["pixel", "adjacent"])
def test_masks_and_normalizations_are_those_of_the_masked_losses(target: str) -> None:
    inputs = leaves(target)
    for mask in (MASK.masked, MASK.as_bool()):
        for normalize in ("patch", None):
            options = {"normalize": normalize, "eps": 0.01}
            torch.testing.assert_close(
                one_step(inputs, mask, target, **options), two_steps(inputs, mask, target, **options)
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_budget(dtype: torch.dtype) -> None:
    """Errors of loss and gradients in half types are at most twice those of two steps in the same type."""
    inputs = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves()]
    wide = [leaf.detach().double().requires_grad_() for leaf in inputs]
    upstream = torch.tensor(2.0**10 if dtype == torch.float16 else 1.0)
    results = []
    for step, given in ((one_step, inputs), (two_steps, inputs), (two_steps, wide)):
        loss = step(given, MASK, "pixel")
        gradients = torch.autograd.grad(loss, given, upstream.to(loss.dtype))
        assert [gradient.dtype for gradient in gradients] == [leaf.dtype for leaf in given]
        results.append([loss.detach(), *gradients])
    for mine, other, exact in zip(*results, strict=True):
        limit = 2 * (other.double() - exact).norm() + (1e-6 + torch.finfo(dtype).eps / 4) * exact.norm()
        assert (mine.double() - exact).norm() <= limit


def test_autocast_keeps_float32_gradients() -> None:
    inputs = leaves(dtype=torch.float32)
    exact = two_steps(inputs, MASK, "pixel")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = one_step(inputs, MASK, "pixel")
    assert loss.dtype == torch.float32
    assert 0 < abs(loss - exact) < 0.01 * exact
    assert all(gradient.dtype == torch.float32 for gradient in torch.autograd.grad(loss, inputs))


class Largest(TorchDispatchMode):
    """The largest number of values that an operator returned."""

    values = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_floating_point():
            self.values = max(self.values, out.untyped_storage().nbytes() // out.itemsize)
        return out


def test_the_predictions_are_never_whole() -> None:
    inputs = leaves()
    with Largest() as one:
        torch.autograd.grad(one_step(inputs, MASK, "pixel"), inputs)
    with Largest() as two:
        torch.autograd.grad(two_steps(inputs, MASK, "pixel"), inputs)
    assert two.values >= 3 * 7 * 144
    assert one.values <= max(7 * 144, 144 * WIDTH, clips().numel())


def test_gradients_go_only_where_they_are_wanted() -> None:
    expected = torch.autograd.grad(two_steps(leaves(), MASK, "pixel"), leaves(), allow_unused=True)
    assert expected == (None,) * 3
    for wanted in range(3):
        inputs = [leaf.detach().requires_grad_(number == wanted) for number, leaf in enumerate(leaves())]
        one_step(inputs, MASK, "pixel").backward()
        other = [leaf.detach().requires_grad_() for leaf in leaves()]
        two_steps(other, MASK, "pixel").backward()
        assert [leaf.grad is not None for leaf in inputs] == [number == wanted for number in range(3)]
        torch.testing.assert_close(inputs[wanted].grad, other[wanted].grad)


def test_no_token_at_all() -> None:
    inputs = leaves()
    empty = inputs[0][:, :0], *inputs[1:]
    assert one_step(empty, MASK.masked[:, :0], "pixel").isnan()
    assert one_step(empty, MASK.masked[:, :0], "adjacent", reduction="sum") == 0


@pytest.mark.slow
def test_compiles_as_one_graph() -> None:
    inputs, video = leaves(dtype=torch.float32), clips()

    def step(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        masked = MASK.as_bool()
        pixels = linear_masked_loss(hidden.cos(), weight, video, masked, bias, patch_size=PATCH)
        return pixels + 2 * linear_masked_loss(hidden, weight, video, MASK, patch_size=PATCH, target="adjacent")

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        loss = function(*inputs)
        results.append([loss, *torch.autograd.grad(loss, inputs)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3, 7)}, r"hidden: expected floats \[B, Nm, D\]"),
        ({"hidden": torch.zeros(3, 12, WIDTH)}, r"hidden: expected \[3, 7\] tokens, the masked ones, found \[3, 12\]"),
        ({"weight": torch.zeros(140, WIDTH)}, r"weight: expected \[144, 5\], found \[140, 5\]"),
        ({"bias": torch.zeros(140)}, r"bias: expected \[144\]"),
        ({"weight": torch.zeros(144, WIDTH).double()}, "weight: expected the type of hidden"),
        ({"target": "depth"}, "target: expected one of 'pixel'"),
        ({"reduction": "none"}, "reduction: expected one of 'mean', 'sum'"),
        ({"token_weight": torch.ones(3, 6)}, r"weight: expected bool or real \[3, 7\]"),
        ({"mask": torch.full((3, 7), 11)}, "each at most once per clip"),
        ({"mask": torch.full((3, 7), 12)}, "token numbers: expected 0 to 11, found 12 to 12"),
        ({"mask": torch.arange(6, 13).expand(3, -1)}, "token numbers: expected 0 to 11, found 6 to 12"),
    ],
)
def test_bad_arguments_name_themselves(change: dict, message: str) -> None:
    hidden, weight, bias = (leaf.detach() for leaf in leaves(dtype=torch.float32))
    arguments = {"hidden": hidden, "weight": weight, "bias": bias, "video": clips(), "mask": MASK, "patch_size": PATCH}
    with pytest.raises((ValueError, IndexError), match=message):
        linear_masked_loss(**(arguments | change))
