"""Scaled dot-product attention: one function, several implementations.

Shapes: B clips, N queries, M keys, H heads, K values per head. softmax(q kᵀ / √K) v, no mask, no dropout.
A model holds the choices that attention_tuning.py measured for it (`VideoTransformer.set_attention`): for their shapes
the fastest implementation runs, one of PyTorch's kernels, or xformers or FlashAttention 4 if they are installed. For
other shapes PyTorch's `scaled_dot_product_attention` chooses its kernel (on Hopper cuDNN's); on a CPU in bfloat16 it is
two matrix products around a softmax (`products`).

In 16 bits the keys are centered first. Early in training the tokens are similar, and the gradient of the scores is a
small difference of large numbers. Its rounding errors (in flash attention those of the row sums of gradient times
output) are the same for all keys, so that the error of the query's gradient can exceed its size (see arXiv 2510.04212).
The common part of the keys cancels in the softmax: without it the result is the same, and the common errors cancel too.
`products` rounds the large numbers themselves, gradient times values, and therefore also centers the values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mam2.engine.model.attention_packages import OPERATORS, why_not

Backend = Literal["auto", "xformers", "flash4", "products", "sdpa", "flash", "efficient", "cudnn"]
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
"""Kernels of PyTorch's function, each forced; `sdpa` leaves the choice to PyTorch."""

Key = tuple[str, torch.dtype, int, int, int, int]
"""Device type, dtype, queries, keys, heads and values per head."""
Choices = Mapping[Key, Backend]
"""Implementations by shape."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    backend: Backend = "auto",
    choices: Choices | None = None,
    center: bool = True,
) -> Tensor:
    """Computes attention of every query over all keys.

    Args:
        q: queries [B, N, H, K], float, any strides with the last dimension dense.
        k, v: keys and values [B, M, H, K], of the dtype and device of `q`.
        backend: `auto` uses the choice for the shape, else that of `active_backend`; the others force one. `products`
            stores B·H·N·M scores.
        choices: implementations for `auto`.
        center: center keys (and values) in bfloat16 or float16, as above; False is for comparisons.

    Returns:
        [B, N, H, K], the dtype of `q`, differentiable in all three; works under `torch.compile(fullgraph=True)`.

    Raises:
        ValueError: an unknown backend, inconsistent shapes, or a forced package that does not run here.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend: expected one of {', '.join(get_args(Backend))}, found {backend!r}")
    if q.ndim != 4 or k.shape != v.shape or k.ndim != 4 or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(
            "q, k, v: expected [B, N, H, K], [B, M, H, K] and [B, M, H, K], "
            f"found {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if backend == "auto" and choices:
        backend = choices.get((q.device.type, q.dtype, q.shape[1], k.shape[1], q.shape[2], q.shape[3]), "auto")
    if backend == "auto":
        backend = active_backend(q.device, q.dtype)
    if backend in OPERATORS and (reason := why_not(backend, q.device, q.dtype, q.shape[-1])):  # type: ignore[arg-type]
        raise ValueError(
            f"backend: {backend} does not run for {q.dtype}, {q.device} and {q.shape[-1]} values per head ({reason}); "
            "use 'auto' or 'sdpa'"
        )
    center = center and q.dtype in (torch.bfloat16, torch.float16)
    if center:
        k = k - k.detach().mean(1, keepdim=True)  # detached: the result does not depend on the mean
    if backend == "xformers":
        return torch.ops.mam2_engine.memory_efficient_attention(q, k, v)[0]
    if backend == "flash4":
        return torch.ops.mam2_engine.flash_attention_4(q, k, v)[0]
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


def active_backend(device: torch.device, dtype: torch.dtype) -> Literal["products", "sdpa"]:
    """Returns the implementation that `attention(backend="auto")` runs for shapes without a choice."""
    # On a CPU, the fused kernel's backward pass is slower in bfloat16 than in float32.
    return "products" if device.type == "cpu" and dtype == torch.bfloat16 else "sdpa"
