"""A device for tests without a GPU: its tensors are in the CPU's memory, but must not meet CPU tensors.

An operation on tensors of both devices raises; so does one that PyTorch refuses on a GPU while only deterministic
algorithms are allowed. PyTorch's dispatcher calls it, which leaves out no operation of the thread that opened it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "elsewhere"
INDEXED = ("aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_", "aten::_unsafe_index")
"""Operators whose indices may be on the CPU."""
_made = torch.tensor
REFUSED = (
    *("histc", "median", "kthvalue", "put_", "nll_loss2d_forward", "grid_sampler_2d_backward", "avg_pool3d_backward"),
    *("upsample_bilinear2d_backward", "_upsample_bilinear2d_aa_backward", "upsample_trilinear3d_backward"),
    *("upsample_bicubic2d_backward", "_upsample_bicubic2d_aa_backward", "_adaptive_avg_pool2d_backward"),
    *("reflection_pad2d_backward", "adaptive_max_pool2d_backward"),
)
"""Operators that `torch.use_deterministic_algorithms` refuses on a GPU, besides `cumsum` of floats."""
COPIES = ("aten::copy_", "aten::_to_copy")


class _There(Tensor):
    """A tensor of the device; `held` is the CPU tensor with its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "_There":
        options: dict[str, Any] = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=device(), **options)
        made.held = held
        return made

    def tolist(self) -> Any:
        return self.held.tolist()  # PyTorch's refuses subclasses

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        return _run(operator, arguments, options or {})


class _Mode(TorchDispatchMode):
    """Sees the operators that make tensors, which have none as argument."""

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        return _run(operator, arguments, options or {})


def _run(operator: Any, arguments: Any, options: dict[str, Any]) -> Any:
    given = [leaf for leaf in tree_leaves((arguments, options)) if isinstance(leaf, Tensor)]
    there = any(isinstance(tensor, _There) for tensor in given)
    name = operator._schema.name
    strangers = [tensor for tensor in given if not isinstance(tensor, _There) and tensor.dim()]
    if name in INDEXED and isinstance(arguments[0], _There):
        strangers = [tensor for tensor in strangers if tensor.dtype not in (torch.int64, torch.bool)]
    if there and strangers and name not in COPIES:
        raise RuntimeError(f"{name}: expected all tensors on the same device, found {NAME} and cpu")
    floats = bool(given) and given[0].is_floating_point()
    refused = name.removeprefix("aten::") in REFUSED or (name.startswith("aten::cumsum") and floats)
    if there and refused and torch.are_deterministic_algorithms_enabled():
        raise RuntimeError(f"{name} has no deterministic algorithm")
    wanted = options.get("device")
    to_there = there if wanted is None else torch.device(wanted).type == NAME
    if name == "aten::copy_":
        to_there = isinstance(arguments[0], _There)
    if wanted is not None and torch.device(wanted).type == NAME:
        options = options | {"device": torch.device("cpu")}
    if name == "aten::_to_copy" and wanted is not None:
        options = options | {"non_blocking": False}
    held = tree_map(lambda leaf: leaf.held if isinstance(leaf, _There) else leaf, (arguments, options))
    found = operator(*held[0], **held[1])
    by_held = {id(tensor.held): tensor for tensor in given if isinstance(tensor, _There)}

    def made(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not to_there:
            return leaf
        same = by_held.get(id(leaf))  # an operator in place returns its argument
        return _There(leaf) if same is None else same

    return tree_map(made, found)


def device() -> torch.device:
    return torch.device(NAME, 0)


def _register() -> None:
    class Module:
        is_available = staticmethod(lambda: True)
        device_count = staticmethod(lambda: 1)
        current_device = staticmethod(lambda: 0)
        is_initialized = staticmethod(lambda: True)
        _is_in_bad_fork = staticmethod(lambda: False)
        manual_seed_all = staticmethod(lambda seed: None)
        get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])

    backend_registration._setup_privateuseone_for_python_backend(NAME, Module)


@contextmanager
def other_device() -> Iterator[torch.device]:
    """Yields the device; inside, tensors can be made on it and moved to it."""
    if not hasattr(torch, NAME):
        _register()
    with _Mode(), mock.patch.object(torch, "tensor", _tensor), mock.patch.object(torch, "as_tensor", _tensor):
        yield device()


def _tensor(values: Any, *, device: torch.device | str | None = None, **options: Any) -> Tensor:
    """`torch.tensor`, which copies to a device without the dispatcher."""
    made = _made(values, **options)
    return made if device is None else made.to(device)
