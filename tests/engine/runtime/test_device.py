"""The dtype of a run: bfloat16 only if the device multiplies it faster than float32."""

from __future__ import annotations

from types import MappingProxyType

import pytest
import torch

from mam2.engine.config.training import RunConfig
from mam2.engine.runtime.device import matmul_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_f": True, "avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_f": True, "avx512_bf16": False}, torch.float32),
        ({"architecture": "arm64", "bf16": True}, torch.float32),
    ],
)
def test_auto_is_bfloat16_where_the_cpu_has_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, object], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: MappingProxyType(capabilities), raising=False)
    assert matmul_dtype(RunConfig(), CPU) == expected
    assert matmul_dtype(RunConfig(), GPU) == torch.bfloat16
    assert matmul_dtype(RunConfig(precision="float32"), GPU) == torch.float32
    assert matmul_dtype(RunConfig(precision="bfloat16"), CPU) == torch.bfloat16


@pytest.mark.parametrize(
    ("capability", "hip", "expected"),
    [
        ((7, 5), None, torch.float32),
        ((8, 0), None, torch.bfloat16),
        ((12, 0), None, torch.bfloat16),
        ((7, 5), "6.4", torch.bfloat16),
    ],
)
def test_auto_is_bfloat16_where_the_gpu_has_units_for_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None, expected: torch.dtype
) -> None:
    """Before Ampere it is emulated."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert matmul_dtype(RunConfig(), GPU) == expected


def test_a_torch_that_does_not_tell_means_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert matmul_dtype(RunConfig(), CPU) == torch.float32
