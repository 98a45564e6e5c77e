"""One optimizer with Muon (orthogonalized momentum) for the matrices inside a network, and AdamW for everything else.

The update is that of `torch.optim.Muon` (Jordan et al., https://kellerjordan.github.io/posts/muon/) with
`adjust_lr_fn="match_rms_adamw"` ("Muon is Scalable for LLM Training", arXiv 2502.16982). PyTorch's processes one matrix
after the other, which is slower for small matrices, and reads the learning rate on the host. Here matrices of one shape
are processed together, and nothing waits for the device: a step can be skipped or captured as a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from mam2.engine.layer_costs import MUON_ITERATIONS

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic polynomial in Jordan's code: steep at 0; singular values become about 0.7 to 1.2."""
EPS = 1e-7
"""Lower bound of the norm by which a matrix is divided."""
RMS = 0.2
"""Root mean square of an update at learning rate 1, about that of AdamW's (arXiv 2502.16982)."""
VALUES_AT_ONCE = 2**24
"""Maximum number of values processed together; limits the memory in addition to weights and momentum."""


class MuonAdamW(torch.optim.Optimizer):
    """Muon for parameter groups with `parts`, fused AdamW for the others; state, hooks and groups are those of both.

    A group's `parts` is the number of matrices that are stacked in each of its parameters [R, C]: each part [R / parts,
    C] is orthogonalized separately. Groups have `lr` (a float or a 0-d tensor on the parameters' device) and
    `weight_decay`; Muon's also `momentum`, AdamW's `betas` and `eps`.

    `found_inf` is a 0-d float tensor on the parameters' device: if it is 1, `step` does not change weights and state,
    whatever the gradients contain.

    Args:
        groups: used without a copy.
        dtype: dtype of the iteration's products; torch.optim.Muon uses bfloat16.
    """

    found_inf: Tensor | None = None

    def __init__(self, groups: list[dict[str, Any]], *, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype = dtype
        for group in groups:
            shapes = [tuple(p.shape) for p in group["params"] if "parts" in group]
            for shape in shapes:
                if len(shape) != 2 or shape[0] % group["parts"]:
                    raise ValueError(f"Muon: expected a matrix of {group['parts']} equal parts, found shape {shape}")
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
        self._adamw = torch.optim.AdamW([group for group in groups if "parts" not in group], lr=0.0, fused=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates all parameters that have a gradient."""
        self._adamw.state = self.state  # also after load_state_dict, which replaces both
        self._adamw.param_groups = [group for group in self.param_groups if "parts" not in group]
        self._adamw.found_inf = self.found_inf  # type: ignore[attr-defined]
        self._adamw.step()
        for group in self.param_groups:
            if "parts" in group:
                for parameters in _alike([p for p in group["params"] if p.grad is not None]):
                    self._update(parameters, group)

    def _update(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Updates matrices of one shape."""
        rows, columns = parameters[0].shape
        momentum = group["momentum"]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        weights = [_local(parameter.detach()) for parameter in parameters]
        buffers = [_local(self.state[parameter]["momentum_buffer"]) for parameter in parameters]
        gradient = torch.stack([_local(parameter.grad) for parameter in parameters if parameter.grad is not None])
        average = torch.stack(buffers)
        rate: float | Tensor = group["lr"]
        if self.found_inf is not None:
            gradient = torch.where(self.found_inf.bool(), average, gradient)  # the average with itself does not change
            rate = rate * (1 - self.found_inf)
        average.lerp_(gradient, 1 - momentum)
        update = _whole(gradient.lerp_(average, momentum).to(self.dtype), parameters[0])
        # torch 2.11 gathers into memory of another order, which has no view of this shape
        parts = update.reshape(-1, rows // group["parts"], columns)
        direction = orthogonal(parts).reshape(update.shape)
        adjusted = rate * (RMS * math.sqrt(max(parts.shape[1:])))
        torch._foreach_copy_(buffers, average.unbind())
        torch._foreach_mul_(weights, 1 - rate * group["weight_decay"])
        torch._foreach_sub_(weights, (_share(direction, parameters[0]).to(average.dtype) * adjusted).unbind())


def orthogonal(matrices: Tensor) -> Tensor:
    """Runs five Newton-Schulz iterations on each matrix of [n, R, C], float; returns about U Vᵀ of its SVD.

    The result has the dtype of the input, which is not changed. A matrix of zeros stays zero.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=EPS)
    for _ in range(MUON_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _alike(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Groups parameters by shape, in their order, with at most `VALUES_AT_ONCE` values per group."""
    shapes: dict[torch.Size, list[nn.Parameter]] = {}
    for parameter in parameters:
        shapes.setdefault(parameter.shape, []).append(parameter)
    for shape, found in shapes.items():
        count = max(VALUES_AT_ONCE // shape.numel(), 1)
        for first in range(0, len(found), count):
            yield found[first : first + count]


def _local(tensor: Tensor) -> Tensor:
    """Returns this process's shard of a tensor that FSDP2 has sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(stacked: Tensor, parameter: Tensor) -> Tensor:
    """Gathers a stack of whole matrices [n, R, C] from the shards of all processes."""
    if not isinstance(parameter, DTensor):
        return stacked
    shape = torch.Size((len(stacked), *parameter.shape))
    spread = DTensor.from_local(
        stacked,
        parameter.device_mesh,
        _placements(parameter),
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )
    return spread.full_tensor()


def _share(whole: Tensor, parameter: Tensor) -> Tensor:
    """Returns this process's shards of a stack of whole matrices [n, R, C], which every process has."""
    if not isinstance(parameter, DTensor):
        return whole
    placements = _placements(parameter)
    return distribute_tensor(whole, parameter.device_mesh, placements, src_data_rank=None).to_local()


def _placements(parameter: DTensor) -> list[Any]:
    """Returns the placements of a stack of tensors that are placed like `parameter`."""
    return [Shard(place.dim + 1) if isinstance(place, Shard) else place for place in parameter.placements]
