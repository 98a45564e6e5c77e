"""Wraps the attention of xformers and FlashAttention 4 as custom operators for torch.compile and autograd.

Shapes: B clips, N queries, M keys, H heads, K values per head; q [B, N, H, K], k and v [B, M, H, K].
Dynamo cannot trace the packages' dispatch. The custom operators therefore call the packages' forward pass (with the
log-sum-exp) and backward pass directly. Outputs are made contiguous, as the fake implementations declare.

A package is tried once to find out whether it runs: a wheel for another torch or CUDA, or a broken dependency, fails in
many ways.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Package = Literal["xformers", "flash4"]
MODULES = {"xformers": "xformers.ops", "flash4": "flash_attn.cute.interface"}
DISTRIBUTIONS = {"xformers": "xformers", "flash4": "flash-attn-4"}
FAILURES = (ImportError, OSError, AttributeError, TypeError, ValueError, AssertionError, RuntimeError)
"""Exceptions of packages that lack an operator for some inputs, or were built for another torch or CUDA."""

Halves = tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., tuple[Tensor, Tensor, Tensor]]]


def _register(name: str, run: Callable[..., tuple[Tensor, ...]], run_back: Callable[..., tuple[Tensor, ...]]) -> Halves:
    """Registers the operator `mam2_engine::name` and its backward operator.

    run: q, k, v -> output and log-sum-exp. run_back: gradient, output, log-sum-exp, q, k, v -> their three gradients.
    """

    @torch.library.custom_op(f"mam2_engine::{name}", mutates_args=())
    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, log_sum_exp, *_ = run(q, k, v)
        return out.contiguous(), log_sum_exp[..., : q.shape[1]].contiguous()  # CUTLASS pads to a multiple of 32

    @forward.register_fake
    def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        batch, queries, heads, _ = q.shape
        return q.new_empty(q.shape), q.new_empty((batch, heads, queries), dtype=torch.float32)

    @torch.library.custom_op(f"mam2_engine::{name}_backward", mutates_args=())
    def backward(
        grad: Tensor, out: Tensor, log_sum_exp: Tensor, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads = run_back(grad.contiguous(), out, log_sum_exp, q, k, v)
        return grads[0].contiguous(), grads[1].contiguous(), grads[2].contiguous()

    @backward.register_fake
    def _(
        grad: Tensor, out: Tensor, log_sum_exp: Tensor, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    def save(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output, *inputs)

    def differentiate(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return backward(grad, *ctx.saved_tensors)

    forward.register_autograd(differentiate, setup_context=save)
    return forward, backward


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    from xformers.ops import memory_efficient_attention_forward_requires_grad

    return memory_efficient_attention_forward_requires_grad(q, k, v)


def _xformers_backward(
    grad: Tensor, out: Tensor, log_sum_exp: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, ...]:
    from xformers.ops import memory_efficient_attention_backward

    return memory_efficient_attention_backward(grad, out, log_sum_exp, q, k, v)


def _flash4(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    from flash_attn.cute.interface import _flash_attn_fwd  # the functions that PyTorch's `_fa4` also calls

    return _flash_attn_fwd(q, k, v, softmax_scale=q.shape[-1] ** -0.5, return_lse=True)


def _flash4_backward(
    grad: Tensor, out: Tensor, log_sum_exp: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, ...]:
    from flash_attn.cute.interface import _flash_attn_bwd

    deterministic = torch.are_deterministic_algorithms_enabled()
    scale = q.shape[-1] ** -0.5
    return _flash_attn_bwd(q, k, v, out, grad, log_sum_exp, softmax_scale=scale, deterministic=deterministic)


OPERATORS: dict[str, Halves] = {
    "xformers": _register("memory_efficient_attention", _xformers, _xformers_backward),
    "flash4": _register("flash_attention_4", _flash4, _flash4_backward),
}
"""Forward and backward operator by package."""


# Dynamo must treat the result as a constant: a traced trial would use fake tensors, which never fail. Dynamo ignores a
# cache and traces the function below it, so that the two decorators need separate functions.
@torch.compiler.assume_constant_result
def why_not(package: Package, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Returns why a package cannot run forward and backward for such inputs; "" if it can."""
    return _try(package, device, dtype, head_dim)


@functools.cache
def _try(package: Package, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    module = MODULES[package]
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return f"{DISTRIBUTIONS[package]} is not installed"
    if device.type != "cuda":
        return "it needs a GPU"
    return trial(package, device, dtype, head_dim)


def trial(package: Package, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Runs both operators on a few zeros; returns what went wrong in one line, or ""."""
    q, k, v, grad = (torch.zeros(1, 8, 1, head_dim, device=device, dtype=dtype) for _ in range(4))
    forward, backward = OPERATORS[package]
    try:
        backward(grad, *forward(q, k, v), q, k, v)
    except FAILURES as error:
        return _reason(error)
    return ""


def operator_name(package: Package, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Returns the name that the package gives the operator that runs for such inputs."""
    if package == "flash4":
        return "flash_attn.cute"
    q, k, v = (torch.zeros(1, 8, 1, head_dim, device=device, dtype=dtype) for _ in range(3))
    try:
        fmha = importlib.import_module("xformers.ops.fmha")
        return str(fmha._dispatch_fw(fmha.Inputs(query=q, key=k, value=v), True).NAME)
    except FAILURES as error:  # not a public function
        return f"an operator of unknown name ({type(error).__name__})"


def _reason(error: Exception) -> str:
    """Returns xformers' reason for each of its operators, else the first line of a message."""
    refused = re.findall(r"`(\S+)` is not supported because:\n\s*(.+)", str(error))
    if refused:
        return "; ".join(f"{name}: {why}" for name, why in refused)
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
