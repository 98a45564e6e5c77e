"""Scaled dot-product attention: one function, several implementations.

Shapes: B clips, N queries, M keys, H heads, K values a head. softmax(q kᵀ / √K) v, no mask, no dropout.
Where attention_choice.py has measured a shape, its winner runs. Elsewhere `xformers.ops.memory_efficient_attention`
does where it has an operator (CUDA, FlashAttention or CUTLASS); on a CPU in bfloat16 two matrix products around a
softmax (`products`); PyTorch's `scaled_dot_product_attention` does the rest.

In 16 bits the keys are centred first. While a model is young its tokens resemble each other, and the gradient of the
scores is a small difference of large numbers, whose rounding errors (in flash attention those of the row sums of
gradient times output) hit all keys alike: the query's gradient can come out wrong by more than its own size (see arXiv
2510.04212). What all keys share cancels in the softmax; without it the function is the same, and common errors cancel
too. `products` rounds the large numbers themselves, gradient times values, so it centres the values as well.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Backend = Literal["auto", "xformers", "products", "sdpa", "flash", "efficient", "cudnn"]
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
"""Kernels of PyTorch's function, forced one by one; `sdpa` leaves the choice to it."""

CHOSEN: dict[tuple[str, torch.dtype, int, int, int], Backend] = {}
"""Device type, dtype, queries, keys and values a head -> the implementation measured to be the fastest."""


def attention(q: Tensor, k: Tensor, v: Tensor, *, backend: Backend = "auto", center: bool = True) -> Tensor:
    """Attention of every query over all keys.

    Args:
        q: queries [B, N, H, K], float, any strides with the last dimension dense.
        k, v: keys and values [B, M, H, K], of the dtype and device of `q`.
        backend: `auto` takes what was measured for the shape, else what `active_backend` names; the others force one.
            `products` holds B·H·N·M scores.
        center: where q, k, v are bfloat16 or float16, as above; False is for comparison.

    Returns:
        [B, N, H, K], the dtype of `q`, differentiable in all three; works under `torch.compile(fullgraph=True)`.

    Raises:
        ValueError: an unknown backend, shapes that do not fit together, or xformers forced where it has no operator.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend: expected one of {', '.join(get_args(Backend))}, found {backend!r}")
    if q.ndim != 4 or k.shape != v.shape or k.ndim != 4 or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(
            "q, k, v: expected [B, N, H, K], [B, M, H, K] and [B, M, H, K], "
            f"found {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if backend == "auto":
        backend = _chosen(q.device.type, q.dtype, q.shape[1], k.shape[1], q.shape[-1])
    if backend == "auto":
        backend = active_backend(q.device, q.dtype, q.shape[-1])
    elif backend == "xformers" and active_backend(q.device, q.dtype, q.shape[-1]) != "xformers":
        raise ValueError(
            f"backend: xformers has no operator for {q.dtype} on {q.device} with {q.shape[-1]} values a head; "
            "use 'auto' or 'sdpa', or install the xformers that fits this torch"
        )
    center = center and q.dtype in (torch.bfloat16, torch.float16)
    if center:
        k = k - k.detach().mean(1, keepdim=True)  # detached: the function does not depend on it
    if backend == "xformers":
        return torch.ops.mam2_engine.memory_efficient_attention(q, k, v)[0]
    if backend == "products":
        if center:
            common = v.detach().mean(1, keepdim=True)
            return _products(q, k, v - common) + common
        return _products(q, k, v)
    if backend in KERNELS:
        with sdpa_kernel(KERNELS[backend]):
            return _sdpa(q, k, v)
    return _sdpa(q, k, v)


def _products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5).transpose(1, 2) @ k.permute(0, 2, 3, 1)
    return (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


@torch.compiler.assume_constant_result
def _chosen(device: str, dtype: torch.dtype, queries: int, keys: int, head_dim: int) -> Backend:
    return CHOSEN.get((device, dtype, queries, keys, head_dim), "auto")


def active_backend(device: torch.device, dtype: torch.dtype, head_dim: int) -> Literal["xformers", "products", "sdpa"]:
    """The implementation that `attention(backend="auto")` runs for shapes that were not measured."""
    if device.type == "cpu":
        # The fused kernel's bfloat16 backward pass is slower than its float32 one there.
        return "products" if dtype == torch.bfloat16 else "sdpa"
    return "xformers" if device.type == "cuda" and _xformers_runs(device, dtype, head_dim) else "sdpa"


# Dynamo takes the answer as given: traced, the trial would meet fakes that never refuse. It looks through a cache
# to the function below it, so the two decorators cannot share one.
@torch.compiler.assume_constant_result
def _xformers_runs(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    return _try_xformers(device, dtype, head_dim)


@functools.cache
def _try_xformers(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether xformers is installed and runs forward and backward for such inputs, found out by trying once."""
    if importlib.util.find_spec("xformers") is None:
        return False
    q, k, v, grad = (torch.zeros(1, 8, 1, head_dim, device=device, dtype=dtype) for _ in range(4))
    try:
        out, log_sum_exp = _memory_efficient_attention(q, k, v)
        _memory_efficient_attention_backward(grad, out, log_sum_exp, q, k, v)
    except (ImportError, ValueError, RuntimeError):  # no operator for these inputs, or a wheel for another torch
        return False
    return True


# `memory_efficient_attention` is called as its two halves inside a custom operator, because Dynamo cannot trace its
# dispatch; outputs are made contiguous so that they are what the fakes promise, whichever kernel ran.
@torch.library.custom_op("mam2_engine::memory_efficient_attention", mutates_args=())
def _memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """q [B,N,H,K], k and v [B,M,H,K] -> output [B,N,H,K] and its log-sum-exp [B,H,N], float32."""
    from xformers.ops import memory_efficient_attention_forward_requires_grad

    out, log_sum_exp = memory_efficient_attention_forward_requires_grad(q, k, v)
    return out.contiguous(), log_sum_exp[..., : q.shape[1]].contiguous()  # CUTLASS pads it to a multiple of 32


@_memory_efficient_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, queries), dtype=torch.float32)


@torch.library.custom_op("mam2_engine::memory_efficient_attention_backward", mutates_args=())
def _memory_efficient_attention_backward(
    grad: Tensor, out: Tensor, log_sum_exp: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from the gradient of the output, all [B,·,H,K]."""
    from xformers.ops import memory_efficient_attention_backward

    grads = memory_efficient_attention_backward(grad.contiguous(), out, log_sum_exp, q, k, v)
    return grads[0].contiguous(), grads[1].contiguous(), grads[2].contiguous()


@_memory_efficient_attention_backward.register_fake
def _(grad: Tensor, out: Tensor, log_sum_exp: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs)


def _backward(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.mam2_engine.memory_efficient_attention_backward(grad, *ctx.saved_tensors)


_memory_efficient_attention.register_autograd(_backward, setup_context=_save_for_backward)
