"""One optimizer step: forward and backward passes, clipping, optimizer. Nothing in it waits for the device."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.config.training import TrainConfig, equal_passes, micro_batches_per_step
from mam2.engine.errors import UserError
from mam2.engine.model.blocks import Block, RegressorBlock
from mam2.engine.model.mam2 import MAM2
from mam2.engine.model.masking import keep_decoded, sample_masks
from mam2.engine.model.motion_targets import motion_frames, motion_values_vary
from mam2.engine.model.teacher import momentum, move_teacher
from mam2.engine.model.videomae import VideoMAE
from mam2.engine.runtime import cuda
from mam2.engine.runtime.device import autocast, compile_each, compiler, matmul_dtype
from mam2.engine.runtime.distributed import World, first_line
from mam2.engine.train import cuda_graph
from mam2.engine.train.graph_parts import parts_of_ranks
from mam2.engine.train.objective import Compile, Objective, build_objective
from mam2.engine.train.optimizer import Optimizer, build_optimizer
from mam2.engine.train.pass_size import fewest_passes
from mam2.engine.units import counted

Extras = TypeVar("Extras")
"""Further inputs of a step per video: codes, or targets and drop factors."""


class Step(ABC, Generic[Extras]):
    """The model of a run, distributed over its processes and compiled according to the config, with its optimizer.

    Ranks process adjacent parts of each pass. Random draws are keyed by a clip's index in the global batch, so that the
    results do not depend on the number of ranks and passes.
    """

    def __init__(self, config: TrainConfig, model: nn.Module, device: torch.device, world: World) -> None:
        self.config, self.model, self.device, self.world = config, model.to(device), device, world
        self.micro_batches = micro_batches_per_step(config, world.size)
        """Batches of the loader per step."""
        self.passes = 1
        """Passes per batch of the loader; more than 1 only with `optim.micro_batch auto`."""
        if config.run.compile:
            torch.compiler.reset()  # torch.compile limits the compilations of a function over all models of a process
        compiled, self.compiled = compiler(config.run, device)
        blocks = [module for module in model.modules() if isinstance(module, Block | RegressorBlock)]
        if config.run.recompute:
            for block in blocks:
                # blocks draw no random numbers, and random states cannot be read while a CUDA graph is captured
                again = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
                block.forward = again  # type: ignore[method-assign]
        sharded = config.run.sharding == "fsdp" and world.size > 1
        if config.run.compile and (sharded or config.run.compile_blocks):
            # with FSDP always, because its hooks between the blocks cannot be part of a graph
            compile_each(blocks, compiled)
            compiled, self.compiled = (lambda part: part), self.compiled.replace("whole graphs", "block by block")
        self.objective = self.build_objective(compiled)
        self.forward: nn.Module = self.objective
        if sharded:
            policy = _policy(matmul_dtype(config.run, device), device)
            for block in blocks:
                fully_shard(block, mp_policy=policy)
            fully_shard(self.objective, mp_policy=policy)
        elif world.size > 1:
            self.forward = self._with_ddp()
        self.optimizer = self.build_optimizer()
        self._sharded = sharded
        self._run: cuda_graph.StepFunction = self._one_pass
        self.lead = cuda.Lead() if device.type == "cuda" else None
        self.extras_timer = cuda.DeviceTimer() if device.type == "cuda" else None
        """Times what a task computes for a batch on the device, next to the step before."""

    def _with_ddp(self) -> DistributedDataParallel:
        # positions and masks are the same on all ranks: there are no buffers to synchronize
        new = "forward_sync_buffers" in signature(DistributedDataParallel).parameters  # from torch 2.13 on
        unsynchronized: Any = {"forward_sync_buffers" if new else "broadcast_buffers": False}
        return DistributedDataParallel(self.objective, gradient_as_bucket_view=True, **unsynchronized)

    @abstractmethod
    def build_objective(self, compiled: Compile) -> Objective:
        """Builds the model with its loss; its parts are passed through `compiled`."""

    @abstractmethod
    def build_optimizer(self) -> Optimizer:
        """Builds the optimizer; a group's `scale` multiplies the step's learning rate."""

    @abstractmethod
    def arguments(self, step: int, first_sample: int, video: Tensor, extras: Extras) -> tuple[Any, ...]:
        """Returns the objective's inputs for one pass of step `step`, whose first clip has index `first_sample`."""

    @abstractmethod
    def part(self, extras: Extras, rows: slice) -> Extras:
        """Returns the extras of some clips of a batch."""

    def begin(self, progress: float) -> None:
        """Called before each step with the share of the run's steps that are done, 0 to 1."""

    def after_update(self, bad: Tensor) -> None:
        """Called after the optimizer's update, also while a CUDA graph is captured.

        bad: 0-d float, 1 if the update was skipped.
        """

    def weighted(self, passes: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """Adds to the inputs of a step's passes what depends on all passes of all ranks. Every rank must call it."""
        return passes

    def extra_state(self) -> Mapping[str, Tensor]:
        """Returns further tensors for the checkpoint, besides the model's and the optimizer's."""
        return {}

    def __call__(
        self,
        step: int,
        micro_batches: Sequence[tuple[Tensor, Extras]],
        rate: float,
        *,
        inspect: bool,
        progress: float = 0.0,
    ) -> dict[str, Tensor]:
        """Runs step `step` on pairs of a video [B, C, T, H, W] uint8 and its extras, one pair per pass.

        Returns 0-d tensors on the device; `bad` is 1 if loss or gradient was not finite on any rank; then nothing was
        changed. inspect: add the objective's costlier figures. progress: share of the run's steps that are done, 0 to
        1, for schedules other than the rate's. Raises UserError if GPU memory is exhausted.
        """
        if self.lead:
            self.lead.wait()
        cuda_graph.set_rate(self.optimizer, rate)
        self.begin(progress)
        try:
            with _whole_sums():
                values = self._step(step, micro_batches, inspect)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(self.config, len(micro_batches[0][0]) // self.passes, error) from error
        if self.lead:
            self.lead.queued()
        return values

    def _step(self, step: int, micro_batches: Sequence[tuple[Tensor, Extras]], inspect: bool) -> dict[str, Tensor]:
        passes = self._passes(step, micro_batches)
        if len(passes) == 1:
            return self._run(passes[0], inspect)
        return self._gradients(passes, len(passes), inspect) | self._update(inspect)

    def choose_passes(self, step: int, micro_batches: Sequence[tuple[Tensor, Extras]]) -> str | None:
        """With `optim.micro_batch auto`, sets `passes` to the fewest that fit into the memory of every rank's GPU.

        Call it before the first step, on every rank. Returns a line for the log, or None if there is no choice. Weights
        and moments do not change. Raises UserError if not even the smallest pass fits.
        """
        if self.config.optim.micro_batch != "auto":
            return None
        clips = len(micro_batches[0][0])
        if not self.tries_passes:
            share = counted(clips, "clip")
            return f"optim.micro_batch auto: {share} per pass, the whole share; only a GPU's memory is tried"
        possible = equal_passes(clips, self.config.clips_per_group)

        def alone(passes: int) -> None:
            self.passes = passes
            self._gradients(self._pass_arguments(step, micro_batches), passes, inspect=True)
            self._update()

        forward, self.forward = self.forward, self.objective
        try:
            with (
                cuda_graph.unchanged(self.model, self.optimizer),
                self.objective.alone(),
                torch.compiler.set_stance("force_eager"),
                _whole_sums(),
            ):
                choice = fewest_passes(possible, alone, self.device, self.world)
        finally:
            self.forward = forward
        self.passes = choice.passes or possible[-1]
        size = clips // self.passes
        if not choice.passes:
            error = out_of_memory(self.config, size, torch.OutOfMemoryError(choice.problem or "on another process."))
            raise self.world.error(str(error))
        larger = f"; {clips // possible[possible.index(self.passes) - 1]} do not fit" * (self.passes > 1)
        return f"optim.micro_batch auto: {counted(size, 'clip')} per pass, {self.passes} per step and process{larger}"

    @property
    def tries_passes(self) -> bool:
        """Whether passes can run out of memory and be tried again: only on a GPU."""
        return self.device.type == "cuda"

    def maybe_capture_cuda_graph(self, step: int, micro_batches: Sequence[tuple[Tensor, Extras]]) -> str | None:
        """Times eager launches against a CUDA graph on the first batch and keeps the faster.

        Call it before the first step. Returns the reason for the log, or None if there is no choice. Weights and
        moments do not change. Raises UserError if `run.graph` is on and the step cannot be captured.
        """
        wanted = self.config.run.graph
        if wanted == "off" or (self.device.type != "cuda" and wanted == "auto"):
            return None
        if reason := self._why_no_graph(len(micro_batches)):
            if wanted == "on":
                raise self.world.error(f"run.graph on: {reason}; set run.graph auto or off")
            return f"launched kernel by kernel: {reason}"
        return self.choose_graph(step, micro_batches, cuda.CudaRecorder())

    def _why_no_graph(self, micro_batches: int) -> str | None:
        if self.device.type != "cuda" or micro_batches * self.passes > 1 or self.config.run.deterministic:
            return "a CUDA graph needs a GPU, one pass per step and run.deterministic off"
        if self._sharded:  # between the blocks FSDP gathers weights and frees them
            return "a CUDA graph needs run.sharding ddp; FSDP2 frees and gathers weights within the step"
        return None

    def choose_graph(self, step: int, micro_batches: Sequence[tuple[Tensor, Extras]], recorder: cuda.Recorder) -> str:
        """Does the choice of `maybe_capture_cuda_graph` with `recorder`; every rank calls it."""
        parts = None
        if self.world.size > 1:
            pieces = (lambda arguments, inspect: self._gradients([arguments], 1, inspect)), self._update
            parts = parts_of_ranks(self.model, *pieces, self._distribute, self.world.size)
        try:
            with _whole_sums():
                self._run, reason = cuda_graph.choose_step(
                    self._one_pass,
                    self._passes(step, micro_batches)[0],
                    self.model,
                    self.optimizer,
                    recorder,
                    compare=self.config.run.graph != "on",
                    parts=parts,
                    everywhere=self.world.all_gather,
                )
        except UserError as error:
            raise self.world.error(str(error)) from error
        return reason

    def _distribute(self, with_ddp: bool) -> None:
        """Wraps the objective in DDP, or releases DDP; releases all gradients."""
        self.optimizer.zero_grad()
        self.forward = self._with_ddp() if with_ddp else self.objective

    def _passes(self, step: int, micro_batches: Sequence[tuple[Tensor, Extras]]) -> list[tuple[Any, ...]]:
        """Returns the objective's inputs for all passes of a step of this process."""
        return self.weighted(list(self._pass_arguments(step, micro_batches)))

    def _pass_arguments(self, step: int, micro_batches: Sequence[tuple[Tensor, Extras]]) -> Iterator[tuple[Any, ...]]:
        """Yields the inputs of `_passes` without what depends on other passes."""
        for index, (video, extras) in enumerate(micro_batches):
            first = (index * self.world.size + self.world.rank) * len(video)
            clips = len(video) // self.passes
            for start in range(0, len(video), clips):
                rows = slice(start, start + clips)
                yield self.arguments(step, first + start, video[rows], self.part(extras, rows))

    def _one_pass(self, arguments: tuple[Any, ...], inspect: bool) -> dict[str, Tensor]:
        return self._gradients([arguments], 1, inspect) | self._update(inspect)

    def _gradients(self, passes: Iterable[tuple[Any, ...]], count: int, inspect: bool) -> dict[str, Tensor]:
        """Accumulates the gradients of `count` passes; returns the means of their logged values."""
        values: dict[str, Tensor] = {}
        for index, arguments in enumerate(passes):
            self._exchange_gradients(index + 1 == count)
            with autocast(self.config.run, self.device):
                total, losses, figures = self.forward(*arguments, inspect=inspect and index == 0)
                # A loss that is not finite makes the gradient not finite, on every rank.
                scale = torch.where(total.detach().isfinite(), 1 / count, torch.nan)
                (total * scale).backward()
            shares = {name: loss / count for name, loss in losses.items()} | self.objective.gradient_norms()
            values |= figures | {
                name: values[name] + share if name in values else share for name, share in shares.items()
            }
        return values

    def _exchange_gradients(self, now: bool) -> None:
        """Makes ranks exchange gradients only in the last pass of a step."""
        if isinstance(self.forward, DistributedDataParallel):
            self.forward.require_backward_grad_sync = now
        elif self._sharded:
            self.objective.set_requires_gradient_sync(now)  # type: ignore[operator]

    def _update(self, inspect: bool = False) -> dict[str, Tensor]:
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = _gradient_norm(self.model)
        # a part that is frozen has no gradient
        parts = {
            name: part
            for name, part in (self.model.named_children() if inspect else ())
            if any(parameter.requires_grad for parameter in part.parameters())
        }
        norms = {f"gradient/{name}": _gradient_norm(part) for name, part in parts.items()}
        if self.config.optim.clip_norm:
            nn.utils.clip_grads_with_norm_(parameters, self.config.optim.clip_norm, norm, foreach=True)
        bad = (~norm.isfinite()).float()
        # The optimizer reads this flag on the device and does not change weights and moments.
        self.optimizer.found_inf = bad  # type: ignore[union-attr]
        self.optimizer.step()
        self.after_update(bad)
        self.optimizer.zero_grad()
        return {**norms, "gradient/norm": norm, "bad": bad}


class PretrainStep(Step[Tensor | None]):
    """A step of pre-training; the extras of a video are its codes [B, N]; a mask is drawn for each clip."""

    config: PretrainConfig
    model: MAM2 | VideoMAE

    def __init__(self, config: PretrainConfig, model: MAM2 | VideoMAE, device: torch.device, world: World) -> None:
        super().__init__(config, model, device, world)
        # on the device, because a CUDA graph reads it there
        self._momentum = torch.full((), config.loss.teacher_momentum, device=device) if config.needs_teacher else None

    def begin(self, progress: float) -> None:
        if self._momentum is not None:
            loss = self.config.loss
            self._momentum.fill_(momentum(loss.teacher_momentum, loss.teacher_momentum_end, progress))

    def after_update(self, bad: Tensor) -> None:
        if self._momentum is not None:
            assert isinstance(self.model, MAM2)
            assert self.model.teacher is not None
            move_teacher(self.model.teacher, self.model.encoder, (1 - self._momentum) * (1 - bad))

    def build_objective(self, compiled: Compile) -> Objective:
        return build_objective(self.model, self.config, compiled)

    def build_optimizer(self) -> Optimizer:
        return build_optimizer(self.model, self.config.optim, matmul_dtype(self.config.run, self.device))

    def part(self, extras: Tensor | None, rows: slice) -> Tensor | None:
        return None if extras is None else extras[rows]

    def arguments(self, step: int, first_sample: int, video: Tensor, extras: Tensor | None) -> tuple[Any, ...]:
        mask = sample_masks(video, self.config, step=step, first_sample=first_sample)
        return video, keep_decoded(mask, self.config, step=step, first_sample=first_sample), extras

    def weighted(self, passes: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """Adds the factor of each pass's motion loss, if the passes of a step differ in the number of motion values.

        The loss of a pass is the mean over its own values, and the passes of all ranks are averaged: without the factor
        a value would count less in a pass that has more of them.
        """
        if self.world.size * len(passes) == 1 or not motion_values_vary(self.config):
            return passes
        counts = torch.stack([motion_frames(mask, self.config) for _, mask, _ in passes])
        shares = counts * len(passes) / self.world.mean_(counts.sum())
        return [(*arguments, share) for arguments, share in zip(passes, shares.float().unbind(), strict=True)]


def _policy(dtype: torch.dtype, device: torch.device) -> MixedPrecisionPolicy:
    """Returns FSDP2's precision: weights are gathered in 16 bits, which halves the traffic; gradients sum in float32.

    Inputs of a block are not cast: the residual stream stays float32. On a CPU everything is float32, because autocast
    does not convert a LayerNorm's weights back to float32 there.
    """
    if dtype == torch.float32 or device.type == "cpu":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


@contextmanager
def _whole_sums() -> Iterator[None]:
    """Makes bfloat16 products sum only in float32: otherwise cuBLAS may add parts of a long sum in bfloat16.

    A weight's gradient is a sum over all tokens of a batch.
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before


def _gradient_norm(module: nn.Module) -> Tensor:
    """Returns the norm of all gradients of a module, 0-d, over all ranks."""
    norm = nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def out_of_memory(config: TrainConfig, clips: int, error: torch.OutOfMemoryError) -> UserError:
    """Returns an error with remedies for a pass of `clips` clips that does not fit into the GPU's memory."""
    remedies = [f"optim.micro_batch below {clips} (a step still has optim.batch {config.optim.batch} clips)"]
    if not config.run.recompute:
        remedies.append("run.recompute true")
    if config.run.sharding == "ddp":
        remedies.append("with several GPUs run.sharding fsdp")
    if config.run.precision == "float32":
        remedies.append("run.precision bfloat16")
    first = first_line(error)
    return UserError(f"out of GPU memory with {counted(clips, 'clip')} per pass: {first} Set {', or '.join(remedies)}")
