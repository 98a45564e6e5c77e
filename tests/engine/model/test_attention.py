"""Attention: both implementations against the textbook formula in float64, forward and backward."""

from __future__ import annotations

import importlib.machinery
import sys
import types

import pytest
import torch
from torch import Tensor

from mam2.engine.model import attention_packages as packages
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
    """Replaces xformers.ops: plain formulas, a log-sum-exp padded like CUTLASS's, outputs with unusual strides."""

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
    cute = types.ModuleType("flash_attn.cute.interface")
    cute._flash_attn_fwd = lambda q, k, v, *, softmax_scale, return_lse: (*forward(q, k, v), None)
    cute._flash_attn_bwd = lambda q, k, v, out, grad, lse, *, softmax_scale, deterministic: backward(
        grad, out, lse, q, k, v
    )
    flash = types.ModuleType("flash_attn")
    flash.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    monkeypatch.setitem(sys.modules, "flash_attn", flash)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", types.ModuleType("flash_attn.cute"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", cute)
    monkeypatch.setattr(packages, "_try", packages.trial)  # on a CPU too
    return ops


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
    """Keys with a large mean, as early in training: without centering, bfloat16 loses the query's gradient."""
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


@pytest.mark.parametrize("package", ["xformers", "flash4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packages_operator_returns_and_differentiates_what_it_computes(
    dtype: torch.dtype, package: str, fake_xformers: types.ModuleType
) -> None:
    check(package, dtype, "cpu")


@pytest.mark.parametrize("package", ["xformers", "flash4"])
def test_a_packages_operator_is_well_formed(package: str, fake_xformers: types.ModuleType) -> None:
    q, k, v = (tensor.detach().requires_grad_() for tensor in inputs(torch.float32))
    torch.library.opcheck(
        packages.OPERATORS[package][0],
        (q, k, v),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("package", ["xformers", "flash4"])
def test_a_package_agrees_on_a_gpu(package: str, device: str) -> None:
    if reason := packages.why_not(package, torch.device(device), torch.bfloat16, 16):
        pytest.skip(reason)
    check(package, torch.bfloat16, device)


def test_shapes_that_were_not_measured_take_pytorchs_on_any_gpu(fake_xformers: types.ModuleType) -> None:
    assert active_backend(torch.device("cpu"), torch.float32) == "sdpa"
    assert active_backend(torch.device("cpu"), torch.bfloat16) == "products"
    assert active_backend(torch.device("cuda"), torch.bfloat16) == "sdpa"
    assert active_backend(torch.device("cuda"), torch.float32) == "sdpa"


def test_a_package_that_is_missing_or_has_no_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    packages._try.cache_clear()
    with pytest.raises(ValueError, match=r"flash4 does not run .*flash-attn-4 is not installed"):
        attention(*inputs(torch.float32), backend="flash4")
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: name)
    packages._try.cache_clear()
    with pytest.raises(ValueError, match="it needs a GPU"):
        attention(*inputs(torch.float32), backend="flash4")
    packages._try.cache_clear()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError("libcudart.so.12: cannot open shared object file"), "OSError: libcudart.so.12: cannot open"),
        (AttributeError("module 'cutlass' has no attribute 'cute'"), "AttributeError: module 'cutlass'"),
        (TypeError(), "TypeError: "),
        (
            NotImplementedError(
                "No operator found for `memory_efficient_attention_forward` with inputs:\n     p : 0.0\n"
                "`fa2F@2.5.7-pt` is not supported because:\n    xFormers wasn't build with CUDA support\n"
                "`cutlassF-pt` is not supported because:\n    requires device with capability"
            ),
            "fa2F@2.5.7-pt: xFormers wasn't build with CUDA support; cutlassF-pt: requires",
        ),
    ],
)
def test_why_a_package_does_not_run_is_told(error: Exception, message: str, fake_xformers: types.ModuleType) -> None:
    """A wheel for another CUDA version, or a package whose import fails, returns a reason and does not crash."""

    def refuse(*_: Tensor) -> None:
        raise error

    fake_xformers.memory_efficient_attention_forward_requires_grad = refuse
    assert packages.why_not("xformers", torch.device("cpu"), torch.float32, 16).startswith(message)
    check("auto", torch.float32, "cpu")
    with pytest.raises(ValueError, match="xformers does not run"):
        attention(*inputs(torch.float32), backend="xformers")


def test_a_packages_operator_compiles_as_one_graph(fake_xformers: types.ModuleType) -> None:
    calls = []
    forward = fake_xformers.memory_efficient_attention_forward_requires_grad
    fake_xformers.memory_efficient_attention_forward_requires_grad = lambda *args: calls.append(args) or forward(*args)
    q, k, v = inputs(torch.float32)
    torch._dynamo.reset()  # the choice is a constant of the compiled function
    compiled = torch.compile(lambda *given: attention(*given, backend="xformers"), fullgraph=True, backend="aot_eager")
    out = compiled(q, k, v)
    assert len(calls) == 2, "the trial, and the call itself"
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
