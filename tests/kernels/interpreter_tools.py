"""Makes Triton's interpreter twice as fast, and counts loads, stores and operations of kernels in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from triton.runtime import interpreter

from mam2.kernels import launch

FLOAT_OPERATIONS = ("fadd", "fsub", "fmul", "fdiv", "precise_divf", "exp", "log", "sqrt")
"""Builder methods that count one operation an element; comparisons, selections and conversions count nothing."""


@dataclass
class Launch:
    """One run of a kernel over its whole grid."""

    kernel: str
    tensors: list[torch.Tensor] = field(repr=False)
    """Its arguments, in order."""
    loads: list[tuple[NDArray[np.int64], int]] = field(default_factory=list, repr=False)
    """(addresses, bytes of an item) of every unmasked lane."""
    stores: list[tuple[NDArray[np.int64], int]] = field(default_factory=list, repr=False)
    flops: int = 0

    @property
    def requested_bytes(self) -> int:
        """Bytes of all accesses, also of those that a cache serves."""
        return sum(addresses.size * size for addresses, size in self.loads + self.stores)

    @property
    def distinct_bytes(self) -> int:
        """Bytes of all addresses, each counted once for loads and once for stores."""
        return sum(_distinct(accesses) for accesses in (self.loads, self.stores))

    def outside(self) -> int:
        """Number of accesses to addresses outside of all arguments."""
        addresses = np.concatenate([np.zeros(0, dtype=np.int64), *(found for found, _ in self.loads + self.stores)])
        inside = np.zeros(addresses.shape, dtype=bool)
        for elements in filter(len, map(_elements, self.tensors)):
            first = elements.min()
            is_element = np.zeros(elements.max() - first + 1, dtype=bool)
            is_element[elements - first] = True
            near = (addresses >= first) & (addresses < first + is_element.size)
            inside[near] |= is_element[addresses[near] - first]
        return int((~inside).sum())


def _distinct(accesses: list[tuple[NDArray[np.int64], int]]) -> int:
    sizes = {size for _, size in accesses}
    return sum(size * np.unique(np.concatenate([a for a, item in accesses if item == size])).size for size in sizes)


def _elements(tensor: torch.Tensor) -> NDArray[np.int64]:
    """Addresses of all elements."""
    offsets = np.zeros(1, dtype=np.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = (offsets[:, None] + np.arange(size) * stride).ravel()
    return tensor.data_ptr() + offsets * tensor.element_size()


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """The launches made inside, in order."""
    launches: list[Launch] = []
    builder, run = interpreter.interpreter_builder, launch.run_kernel
    load, store, total = builder.create_masked_load, builder.create_masked_store, interpreter.ReduceOps.sum

    def recorded_run(kernel: Any, programs: int, *arguments: Any, **meta: Any) -> None:
        tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
        launches.append(Launch(kernel.__name__, tensors))
        run(kernel, programs, *arguments, **meta)

    def lanes(pointers: Any, mask: Any) -> tuple[NDArray[np.int64], int]:
        return pointers.data[mask.data.astype(bool)].astype(np.int64), pointers.get_element_ty().primitive_bitwidth // 8

    def recorded_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        launches[-1].loads.append(lanes(pointers, mask))
        return load(pointers, mask, *rest)

    def recorded_store(pointers: Any, values: Any, mask: Any, *rest: Any) -> Any:
        launches[-1].stores.append(lanes(pointers, mask))
        return store(pointers, values, mask, *rest)

    def counted(operation: Any) -> Any:
        def count(*operands: Any) -> Any:
            out = operation(*operands)
            launches[-1].flops += out.data.size
            return out

        return count

    def counted_sum(self: Any, values: Any) -> Any:
        out = total(self, values)
        if values.dtype.is_floating():
            launches[-1].flops += values.handle.data.size - out.handle.data.size
        return out

    with ExitStack() as patches:
        patches.enter_context(patch.object(launch, "run_kernel", recorded_run))
        patches.enter_context(patch.object(builder, "create_masked_load", recorded_load))
        patches.enter_context(patch.object(builder, "create_masked_store", recorded_store))
        patches.enter_context(patch.object(interpreter.ReduceOps, "sum", counted_sum))
        for name in FLOAT_OPERATIONS:
            method = f"create_{name}"
            patches.enter_context(patch.object(builder, method, counted(getattr(builder, method))))
        yield launches


@contextmanager
def patched_once() -> Iterator[None]:
    """The interpreter replaces Triton's builtins at every call of a device function; once is enough."""
    patched: set[Any] = set()

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.fn not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(self.fn)
        return self.rewrite()(*arguments, **options)

    with patch.object(interpreter.InterpretedFunction, "__call__", call):
        yield


@contextmanager
def as_a_gpu_rounds() -> Iterator[None]:
    """The interpreter's arithmetic with a GPU's freedoms: a product and a sum rounded once, quotients off by one bit.

    A product that goes straight into an addition or subtraction is not rounded before it; float32 quotients other than
    0 are the next larger number.
    """
    builder = interpreter.interpreter_builder
    multiply, divide = builder.create_fmul, builder.create_fdiv

    def product(left: Any, right: Any) -> Any:
        out = multiply(left, right)
        out.set_attr("exact", np.multiply(left.data, right.data, dtype=np.longdouble))
        return out

    def fused(operation: Any) -> Any:
        def combine(left: Any, right: Any) -> Any:
            exact = [operand.attr.get("exact", operand.data) for operand in (left, right)]
            data = operation(*exact).astype(left.data.dtype)
            return interpreter.TensorHandle(data, left.dtype.scalar)

        return combine

    def quotient(left: Any, right: Any) -> Any:
        out = divide(left, right)
        if out.data.dtype == np.float32:
            out.data = np.where(out.data == 0, out.data, np.nextafter(out.data, np.float32(np.inf)))
        return out

    with ExitStack() as patches:
        for name, replaced in (
            ("fmul", product),
            ("fadd", fused(np.add)),
            ("fsub", fused(np.subtract)),
            ("fdiv", quotient),
        ):
            patches.enter_context(patch.object(builder, f"create_{name}", replaced))
        yield
