"""One optimiser step: masks, forward and backward passes, clipping, AdamW. Nothing in it waits for the device."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from mam2.engine.config import PretrainConfig, UserError, passes
from mam2.engine.model.blocks import Block, RegressorBlock
from mam2.engine.model.mam2 import MAM2
from mam2.engine.model.videomae import VideoMAE
from mam2.engine.train.distributed import World
from mam2.engine.train.objective import build_objective
from mam2.engine.train.optimizer import build_optimizer
from mam2.engine.train.runtime import autocast, compiler
from mam2.kernels import tube_mask


class TrainStep:
    """The model of a run, spread over its processes and compiled as its config says, with its optimiser.

    Ranks take neighbouring parts of each pass, and a mask belongs to a clip's place among all: so any number of ranks
    and passes sees the same clips under the same masks.
    """

    def __init__(self, config: PretrainConfig, model: MAM2 | VideoMAE, device: torch.device, world: World) -> None:
        self.config, self.model, self.device, self.world = config, model.to(device), device, world
        self.passes = passes(config, world.size)
        compiled, self.compiled = compiler(config.run, device)
        blocks = [module for module in model.modules() if isinstance(module, Block | RegressorBlock)]
        if config.run.recompute:
            for block in blocks:
                again = functools.partial(checkpoint, block.forward, use_reentrant=False)
                block.forward = again  # type: ignore[method-assign]
        sharded = config.run.sharding == "fsdp" and world.size > 1
        if sharded:  # FSDP's hooks sit between the blocks and cannot be in a graph
            for block in blocks:
                block.forward = compiled(block.forward)  # type: ignore[method-assign]
            compiled, self.compiled = (lambda part: part), f"{self.compiled}, block by block"
        self.objective = build_objective(model, config, compiled)
        self.forward: nn.Module = self.objective
        if sharded:
            for block in blocks:
                fully_shard(block)
            fully_shard(self.objective)
        elif world.size > 1:
            # positions and masks are the same everywhere: there are no buffers to keep equal
            self.forward = DistributedDataParallel(
                self.objective, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        self.optimizer = build_optimizer(model, config.optim)
        self._sharded = sharded

    def __call__(
        self, step: int, micro_batches: Sequence[tuple[Tensor, Tensor | None]], rate: float, *, inspect: bool
    ) -> dict[str, Tensor]:
        """Takes step `step` on pairs of a video [B, C, T, H, W] uint8 and its codes [B, N], one for each pass.

        Returns 0-d tensors on the device; `bad` is 1 where loss or gradient was not finite on any rank: nothing was
        changed then. inspect: with the objective's costlier figures. Raises UserError when GPU memory runs out.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        try:
            return self._gradients(step, micro_batches, inspect) | self._update()
        except torch.OutOfMemoryError as error:
            raise _out_of_memory(self.config, len(micro_batches[0][0]), error) from error

    def _gradients(
        self, step: int, micro_batches: Sequence[tuple[Tensor, Tensor | None]], inspect: bool
    ) -> dict[str, Tensor]:
        """Adds up the gradients of the passes; returns the means of what they log."""
        values: dict[str, Tensor] = {}
        for index, (video, codes) in enumerate(micro_batches):
            last = index + 1 == len(micro_batches)
            first_sample = (index * self.world.size + self.world.rank) * len(video)
            mask = tube_mask(
                len(video),
                self.config.grid,
                self.config.mask.ratio,
                seed=self.config.run.seed,
                step=step,
                first_sample=first_sample,
                device=self.device,
            )
            self._exchange_gradients(last)
            with autocast(self.config.run, self.device):
                total, losses, figures = self.forward(video, mask, codes, inspect=inspect and index == 0)
                # A loss that is not finite makes the gradient so, and with it that of every rank.
                scale = torch.where(total.detach().isfinite(), 1 / len(micro_batches), torch.nan)
                (total * scale).backward()
            shares = {
                name: loss / len(micro_batches) for name, loss in losses.items()
            } | self.objective.gradient_norms()
            values |= figures | {
                name: values[name] + share if name in values else share for name, share in shares.items()
            }
        return values

    def _exchange_gradients(self, now: bool) -> None:
        """Ranks add their gradients up in the last pass of a step only."""
        if isinstance(self.forward, DistributedDataParallel):
            self.forward.require_backward_grad_sync = now
        elif self._sharded:
            self.objective.set_requires_gradient_sync(now)  # type: ignore[operator]

    def _update(self) -> dict[str, Tensor]:
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if self.config.optim.clip_norm:
            nn.utils.clip_grads_with_norm_(parameters, self.config.optim.clip_norm, norm, foreach=True)
        bad = (~norm.isfinite()).float()
        # AdamW's fused kernel reads this flag on the device and leaves weights and moments as they are.
        self.optimizer.found_inf = bad  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"gradient/norm": norm, "bad": bad}


def _out_of_memory(config: PretrainConfig, clips: int, error: torch.OutOfMemoryError) -> UserError:
    """What to change when a step does not fit into the GPU's memory."""
    remedies = [f"optim.micro_batch below {clips} (the result stays that of optim.batch {config.optim.batch})"]
    if not config.run.recompute:
        remedies.append("run.recompute true")
    if config.run.sharding == "ddp":
        remedies.append("with several GPUs run.sharding fsdp")
    if config.run.precision == "float32":
        remedies.append("run.precision bfloat16")
    first = str(error).splitlines()[0]
    return UserError(f"out of GPU memory with {clips} clips a pass: {first} Set {', or '.join(remedies)}")
