"""linear_cross_entropy against cross_entropy of the full logits."""

import pytest
import torch
import torch.nn.functional as F

from mam2.kernels import launch, linear_cross_entropy


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 128 rows, so that 300 rows need three, the last of them short."""
    monkeypatch.setitem(launch.CHUNK_BYTES, "cpu", 1)


def problem(rows: int = 300, width: int = 7, codes: int = 11, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(codes, width, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(codes, generator=generator).to(dtype).requires_grad_()
    target = torch.randint(0, codes, (rows,), generator=generator)
    target[::7] = -100
    return hidden, weight, bias, target


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_cross_entropy_in_float64(reduction: str, smoothing: float, with_bias: bool) -> None:
    hidden, weight, bias, target = problem()
    inputs = [hidden, weight, *([bias] if with_bias else [])]
    options = {"reduction": reduction, "label_smoothing": smoothing}
    ours = linear_cross_entropy(hidden, weight, target, bias if with_bias else None, **options)
    theirs = F.cross_entropy(F.linear(*inputs), target, **options)
    torch.testing.assert_close(ours, theirs)
    upstream = torch.randn(ours.shape, dtype=torch.float64)
    for mine, other in zip(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(theirs, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_budget(reduction: str, dtype: torch.dtype) -> None:
    """The error is at most twice that of PyTorch in the same type."""
    inputs = problem(codes=50, width=32, dtype=dtype)
    target = inputs[3]

    def run(function, tensors):
        loss = function(*tensors)
        upstream = torch.linspace(0.1, 1, loss.numel(), dtype=torch.float64).view(loss.shape).to(loss.dtype)
        return [loss.detach(), *torch.autograd.grad(loss, tensors, upstream)]

    def plain(hidden, weight, bias):
        return F.cross_entropy(F.linear(hidden, weight, bias), target, reduction=reduction)

    leaves = inputs[:3]
    ours = run(lambda h, w, b: linear_cross_entropy(h, w, target, b, reduction=reduction), leaves)
    theirs = run(plain, leaves)
    exact = run(plain, [leaf.detach().double().requires_grad_() for leaf in leaves])
    for name, mine, other, truth in zip(("loss", "hidden", "weight", "bias"), ours, theirs, exact, strict=True):
        limit = 2 * (other.double() - truth).norm() + 1e-6 * truth.norm()
        assert (mine.double() - truth).norm() <= limit, name


def test_gradcheck() -> None:
    hidden, weight, bias, target = problem(rows=5, width=3, codes=4)
    for reduction in ("mean", "sum", "none"):
        assert torch.autograd.gradcheck(
            lambda h, w, b, reduction=reduction: linear_cross_entropy(
                h, w, target, b, reduction=reduction, label_smoothing=0.1
            ),
            (hidden, weight, bias),
        )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_go_only_where_they_are_wanted(reduction: str) -> None:
    hidden, weight, bias, target = problem()
    expected = torch.autograd.grad(F.cross_entropy(F.linear(hidden, weight, bias), target), (hidden, weight, bias))
    for wanted in range(3):
        inputs = [
            tensor.detach().requires_grad_(number == wanted) for number, tensor in enumerate((hidden, weight, bias))
        ]
        loss = linear_cross_entropy(inputs[0], inputs[1], target, inputs[2], reduction=reduction)
        loss = loss.sum() / (target != -100).sum() if reduction == "none" else loss
        loss.backward()
        for number, tensor in enumerate(inputs):
            assert (tensor.grad is not None) == (number == wanted)
        torch.testing.assert_close(inputs[wanted].grad, expected[wanted])


def test_autocast_keeps_float32_gradients() -> None:
    hidden, weight, bias, target = problem(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, target, bias)
    assert loss.dtype == torch.float32
    loss.backward()
    assert weight.grad.dtype == hidden.grad.dtype == bias.grad.dtype == torch.float32
    exact = F.cross_entropy(F.linear(hidden.detach(), weight.detach(), bias.detach()), target)
    assert abs(loss - exact) < 0.01 * exact
    assert abs(loss - exact) > 0


def test_huge_logits_stay_finite() -> None:
    hidden, weight, _, target = problem(dtype=torch.float32)
    loss = linear_cross_entropy(hidden * 1e4, weight, target)
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(hidden * 1e4, weight), target))


def test_ignored_rows() -> None:
    hidden, weight, _, target = problem()
    kept = target != -100
    loss = linear_cross_entropy(hidden, weight, target)
    torch.testing.assert_close(loss, linear_cross_entropy(hidden[kept], weight, target[kept]))
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert gradient[~kept].abs().max() == 0
    assert linear_cross_entropy(hidden, weight, torch.full_like(target, -100)).isnan()
    assert linear_cross_entropy(hidden, weight, torch.full_like(target, 3), ignore_index=3, reduction="sum") == 0


def test_no_row_at_all() -> None:
    hidden, weight, bias, target = problem()
    assert linear_cross_entropy(hidden[:0], weight, target[:0], bias, reduction="sum") == 0
    assert linear_cross_entropy(hidden[:0], weight, target[:0], bias).isnan()
    assert linear_cross_entropy(hidden[:0], weight, target[:0], bias, reduction="none").shape == (0,)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_one_row_and_one_code(reduction: str) -> None:
    for rows, codes in ((1, 11), (3, 1), (1, 1)):
        hidden, weight, bias, _ = problem(rows=rows, codes=codes)
        target = torch.full((rows,), codes - 1)
        leaves = (hidden, weight, bias)
        ours = linear_cross_entropy(hidden, weight, target, bias, reduction=reduction)
        theirs = F.cross_entropy(F.linear(*leaves), target, reduction=reduction)
        torch.testing.assert_close(ours, theirs)
        for mine, other in zip(
            torch.autograd.grad(ours.sum(), leaves), torch.autograd.grad(theirs.sum(), leaves), strict=True
        ):
            torch.testing.assert_close(mine, other)


def test_strided_inputs() -> None:
    hidden, weight, bias, target = problem()
    expected = linear_cross_entropy(hidden, weight, target, bias)
    transposed = [tensor.detach().t().contiguous().t() for tensor in (hidden, weight)]
    torch.testing.assert_close(linear_cross_entropy(*transposed, target.repeat_interleave(2)[::2], bias), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(11, 6)}, r"expected \[M,D\] and \[V,D\]"),
        ({"target": torch.zeros(299).long()}, r"target: expected int64 \[300\]"),
        ({"target": torch.zeros(300)}, "target"),
        ({"bias": torch.zeros(10)}, r"bias: expected \[11\]"),
        ({"weight": torch.zeros(11, 7).double()}, "weight: expected the type of hidden"),
        ({"weight": torch.zeros(0, 7)}, "at least 1 code"),
        ({"hidden": torch.zeros(300, 7).long()}, "expected floats"),
        ({"label_smoothing": 1.5}, "label_smoothing"),
        ({"reduction": "avg"}, "reduction"),
    ],
)
def test_bad_arguments_name_themselves(change: dict, message: str) -> None:
    arguments = {"hidden": torch.zeros(300, 7), "weight": torch.zeros(11, 7), "target": torch.zeros(300).long()}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**(arguments | change))


def test_a_target_out_of_range_is_an_error() -> None:
    hidden, weight, _, target = problem()
    target[5] = 11
    with pytest.raises((IndexError, RuntimeError)):
        linear_cross_entropy(hidden, weight, target)
