"""Attention: both implementations against the textbook formula in float64, forward and backward."""

from __future__ import annotations

import importlib.machinery
import sys
import types

import pytest
import torch
from torch import Tensor

from mam2.engine.model import attention as attention_module
from mam2.engine.model.attention import active_backend, attention

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"))


def textbook(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bnhk,bmhk->bhnm", q.double(), k.double()) / q.shape[-1] ** 0.5
    return torch.einsum("bhnm,bmhk->bnhk", scores.softmax(-1), v.double())


def inputs(dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """q [2,7,3,16], k and v [2,11,3,16], as slices of a packed projection are: not contiguous."""
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(2, 11, 3, 3, 16, generator=generator).to(device, dtype).requires_grad_()
    q, k, v = packed.unbind(2)
    return [q[:, :7], k, v]


@pytest.fixture
def fake_xformers(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Stands in for xformers.ops: plain formulas, a log-sum-exp padded as CUTLASS's, outputs in odd strides."""

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.einsum("bnhk,bmhk->bhnm", q.float(), k.float()) / q.shape[-1] ** 0.5
        padded = torch.nn.functional.pad(scores.logsumexp(-1), (0, -q.shape[1] % 32), value=float("nan"))
        return textbook(q, k, v).to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2), padded

    def backward(grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
        scores = torch.einsum("bnhk,bmhk->bhnm", q.float(), k.float()) / q.shape[-1] ** 0.5
        share = (scores - lse[..., None]).exp()
        through = torch.einsum("bnhk,bmhk->bhnm", grad.float(), v.float())
        d_scores = share * (through - (grad.float() * out.float()).sum(-1).mT[..., None]) / q.shape[-1] ** 0.5
        grads = (
            torch.einsum("bhnm,bmhk->bnhk", d_scores, k.float()),
            torch.einsum("bhnm,bnhk->bmhk", d_scores, q.float()),
            torch.einsum("bhnm,bnhk->bmhk", share, grad.float()),
        )
        return tuple(tensor.to(q.dtype) for tensor in grads)

    ops = types.ModuleType("xformers.ops")
    ops.memory_efficient_attention_forward_requires_grad = forward
    ops.memory_efficient_attention_backward = backward
    package = types.ModuleType("xformers")
    package.__spec__ = importlib.machinery.ModuleSpec("xformers", None)
    package.ops = ops
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    monkeypatch.setattr(attention_module, "active_backend", on_any_device)
    attention_module._try_xformers.cache_clear()
    return ops


def on_any_device(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    return "xformers" if attention_module._xformers_runs(device, dtype, head_dim) else "sdpa"


def check(backend: str, dtype: torch.dtype, device: str) -> None:
    q, k, v = inputs(dtype, device)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    out = attention(q, k, v, backend=backend)
    expected = textbook(q, k, v)
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    found = torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)
    wanted = torch.autograd.grad(expected, (q, k, v), grad.double())
    for name, one, other in zip("qkv", found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"d{n}: {m}")


@pytest.mark.parametrize("backend", ["sdpa", "products", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pytorchs_are_the_textbook_formula(backend: str, dtype: torch.dtype) -> None:
    check(backend, dtype, "cpu")


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("backend", ["sdpa", "products", "auto"])
def test_gradients_survive_tokens_that_resemble_each_other(backend: str, device: str) -> None:
    """As those of a young model do; without centred keys bfloat16 loses the query's gradient."""
    generator = torch.Generator().manual_seed(0)

    def draw(common: float, own: float) -> Tensor:
        tokens = common * torch.randn(2, 1, 3, 32, generator=generator)
        tokens = tokens + own * torch.randn(2, 128, 3, 32, generator=generator)
        return tokens.to(device, torch.bfloat16).requires_grad_()

    leaves = [draw(3, 0.1) for _ in range(3)]
    upstream = draw(0, 1).detach()
    exact = torch.autograd.grad(textbook(*leaves), leaves, upstream.double())

    def errors(gradients: tuple[Tensor, ...]) -> list[float]:
        return [float((a - b).float().norm() / b.float().norm()) for a, b in zip(gradients, exact, strict=True)]

    assert max(errors(torch.autograd.grad(attention(*leaves, backend=backend), leaves, upstream))) < 0.1
    if backend != "auto" and device == "cpu":
        plain = attention(*leaves, backend=backend, center=False)
        assert max(errors(torch.autograd.grad(plain, leaves, upstream))) > 0.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_xformers_operator_returns_and_differentiates_what_xformers_computes(
    dtype: torch.dtype, fake_xformers: types.ModuleType
) -> None:
    check("xformers", dtype, "cpu")


def test_the_xformers_operator_is_well_formed(fake_xformers: types.ModuleType) -> None:
    q, k, v = (tensor.detach().requires_grad_() for tensor in inputs(torch.float32))
    torch.library.opcheck(
        torch.ops.mam2_engine.memory_efficient_attention.default,
        (q, k, v),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.parametrize("device", [CUDA])
def test_xformers_agrees_on_a_gpu(device: str) -> None:
    if active_backend(torch.device(device), torch.bfloat16, 16) != "xformers":
        pytest.skip("needs a CUDA GPU with an xformers operator")
    check("xformers", torch.bfloat16, device)


def test_a_cpu_runs_pytorchs_and_refuses_xformers() -> None:
    assert active_backend(torch.device("cpu"), torch.float32, 64) == "sdpa"
    assert active_backend(torch.device("cpu"), torch.bfloat16, 64) == "products"
    with pytest.raises(ValueError, match="no operator"):
        attention(*inputs(torch.float32), backend="xformers")


def test_missing_xformers_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(attention_module, "active_backend", on_any_device)
    attention_module._try_xformers.cache_clear()
    check("auto", torch.float32, "cpu")


def test_xformers_without_an_operator_is_not_taken(fake_xformers: types.ModuleType) -> None:
    def refuse(*_: Tensor) -> None:
        raise NotImplementedError("No operator found")

    fake_xformers.memory_efficient_attention_forward_requires_grad = refuse
    check("auto", torch.float32, "cpu")
    with pytest.raises(ValueError, match="no operator"):
        attention(*inputs(torch.float32), backend="xformers")


@pytest.mark.parametrize("has_operator", [True, False])
def test_the_choice_and_the_operator_compile_as_one_graph(fake_xformers: types.ModuleType, has_operator: bool) -> None:
    calls = []
    forward = fake_xformers.memory_efficient_attention_forward_requires_grad

    def counted(*args: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(args)
        if not has_operator:
            raise NotImplementedError("No operator found")
        return forward(*args)

    fake_xformers.memory_efficient_attention_forward_requires_grad = counted
    q, k, v = inputs(torch.float32)
    torch._dynamo.reset()  # the choice is a constant of the compiled function
    out = torch.compile(attention, fullgraph=True, backend="aot_eager")(q, k, v)
    assert len(calls) == 1 + has_operator, "the trial, and the call itself where xformers runs"
    torch.testing.assert_close(out.double(), textbook(q, k, v), rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(out.square().sum(), (q, k, v), retain_graph=True)
    wanted = torch.autograd.grad(textbook(q, k, v).square().sum(), (q, k, v))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_wrong_inputs_are_named() -> None:
    q, k, v = inputs(torch.float32)
    with pytest.raises(ValueError, match="backend"):
        attention(q, k, v, backend="fastest")
    with pytest.raises(ValueError, match=r"\(2, 11, 3, 8\)"):
        attention(q, k[..., :8], v, backend="sdpa")
