"""Plans a fine-tuning run before it starts, as planning.py does for pre-training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from mam2.engine import planning
from mam2.engine.config.finetune import FinetuneConfig
from mam2.engine.config.training import micro_batches_per_step
from mam2.engine.finetune_costs import ADAPTERS, finetune_costs, trained_matrices, trained_parameters
from mam2.engine.layer_costs import SINGLE, PartCost, muon_update
from mam2.engine.machines import machine_rates
from mam2.engine.planning import cost_row
from mam2.engine.units import binary_bytes, counted, duration, plain_number, with_prefix


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetunePlan(planning.Plan):
    """A plan whose parts contain frozen parameters."""

    config: FinetuneConfig  # type: ignore[assignment]

    @property
    def parameters(self) -> int:
        """Returns the number of trained parameters."""
        return trained_parameters(self.config)

    @property
    def all_parameters(self) -> int:
        """Returns the number of parameters, frozen ones included."""
        return sum(cost.parameters for cost in self.parts.values())

    @property
    def memory(self) -> dict[str, float]:
        """Returns the bytes held at the peak of a step on one device.

        Validation has a copy of weights that adapters are merged into, or that are sharded. Under autocast the backward
        pass holds the weights in 16 bits, also the frozen ones of blocks with adapters.
        """
        config, item, trained = self.config, self.dtype.itemsize, self.parameters
        data, clips = config.data, self.clips_per_pass
        shards = self.gpus if config.run.sharding == "fsdp" else 1
        cast = self.all_parameters if config.adapters.rank else trained
        own_copy = config.adapters.rank or shards > 1
        held = float(sum(cost.held_bytes for cost in self.parts.values()) * clips)
        return {
            "weights": self.all_parameters * SINGLE / shards,
            **({"validation": float(self.all_parameters * SINGLE)} if own_copy else {}),
            **({"average": trained * SINGLE / shards} if config.optim.ema else {}),
            "gradients": self._gradients_at_peak(trained * SINGLE / shards, held),
            "moments": self._moments / shards,
            **({"weights cast": float(cast * item)} if item < SINGLE else {}),
            "activations": held,
            "clips": float((data.prefetch + 1) * clips * data.frames * data.size**2 * data.channels),
        }

    @property
    def checkpoint_bytes(self) -> float:
        """Returns the bytes of a checkpoint: all weights, optimizer state, and their moving average if there is one."""
        averaged = self.parameters * bool(self.config.optim.ema)
        return (self.all_parameters + averaged) * SINGLE + self._moments

    @property
    def _moments(self) -> int:
        return SINGLE * (2 * self.parameters - self._muon.parameters)

    @property
    def _muon(self) -> PartCost:
        if self.config.optim.name != "muon":
            return PartCost()
        return muon_update(trained_matrices(self.config), self.dtype.itemsize)

    @property
    def _update_bytes(self) -> int:
        """Returns the memory traffic of a step that does not depend on clips: weights, gradients, optimizer."""
        item, trained, muon = self.dtype.itemsize, self.parameters, self._muon
        cast = SINGLE + item if item != SINGLE else 0
        read = self.all_parameters * (cast + 2 * item)
        return read + trained * SINGLE + 7 * SINGLE * (trained - muon.parameters) + muon.bytes_moved

    @property
    def _seconds_of_arithmetic(self) -> float:
        step = self._muon.flops * self.gpus / self.config.optim.batch
        return (sum(cost.flops for cost in self.parts.values()) + step) / (self.utilization * self.peak_flops)

    @property
    def _seconds_of_memory(self) -> float:
        step = self._update_bytes * self.gpus / self.config.optim.batch
        return (sum(cost.bytes_moved for cost in self.parts.values()) + step) / self.bytes_per_s

    def report(self, videos: int | Sequence[int] = 0) -> str:
        """Returns the text that `mam2 plan` prints. videos: their number, 0: unknown; of a sequence, the sum."""
        videos = videos if isinstance(videos, int) else sum(videos)
        config, data = self.config, self.config.data
        dtype = str(self.dtype).removeprefix("torch.")
        count = micro_batches_per_step(config, self.gpus)
        total = sum(self.parts.values(), PartCost())
        memory = self.memory
        parts = ", ".join(f"{name} {binary_bytes(value)}" for name, value in memory.items())
        limit = f" of {self.memory_gib:.0f} GiB" if math.isfinite(self.memory_gib) else ""
        bound = "arithmetic" if self._seconds_of_arithmetic > self._seconds_of_memory else "memory bandwidth"
        lines = [
            f"clip     {data.frames} frames of {data.size}²: {math.prod(config.grid)} tokens",
            f"step     {counted(config.optim.batch, 'clip')}: {counted(count, 'pass')} of "
            f"{counted(self.clips_per_pass, 'clip')} on "
            f"{counted(self.gpus, 'device')}, {dtype}{', recomputed' if config.run.recompute else ''}"
            f"{self.pass_note}",
            f"trained  {with_prefix(self.parameters).strip()} of {with_prefix(self.all_parameters).strip()} parameters"
            f"{self._frozen()}",
            "",
            "per clip                parameters  forward FLOP  backward FLOP  memory traffic  activations held",
            *(cost_row(name, cost) for name, cost in {**self.parts, "all": total}.items()),
            f"update   {binary_bytes(self._update_bytes)} of memory traffic per step",
            "",
            f"memory   {binary_bytes(sum(memory.values()))}{limit} per device (estimated): {parts}"
            f"{'' if self.fits else f'  DOES NOT FIT: {self.remedy()}'}",
            f"saving   {binary_bytes(self.checkpoint_bytes)} per checkpoint"
            f"{', and as much pinned memory of the host, kept while it trains' * self.cuda}",
            f"machine  {self.machine}: {with_prefix(self.peak_flops)}FLOP/s {dtype}",
            f"speed    {plain_number(self.clips_per_s)} clips/s (estimated: {100 * self.utilization:.0f} % of "
            f"that peak is assumed, not measured; bound by {bound}; loading and validation not counted)",
        ]
        if videos:
            lines.append(
                f"time     {duration(self.hours(videos))} (estimated) for {counted(config.optim.epochs, 'epoch')} "
                f"of {counted(videos, 'video', ',')}{f' in {data.views} views' if data.views > 1 else ''}"
            )
        return "\n".join(lines)

    def _frozen(self) -> str:
        if ADAPTERS in self.parts:
            return f": adapters of rank {self.config.adapters.rank} and the head"
        last = self.config.optim.train_last
        if last < 0:
            return ""
        return f": the last {last} blocks and the head" if last else ": the head"


def plan_finetuning(config: FinetuneConfig, *, gpu: str = "", gpus: int = 1, utilization: float = 0.0) -> FinetunePlan:
    """Returns the plan of a fine-tuning run of the encoder that `config.model` describes; see `planning.plan`."""
    config.check()
    machine = machine_rates(config, gpu, gpus, utilization)
    parts = finetune_costs(config, machine["dtype"].itemsize)
    return planning.with_automatic_passes(FinetunePlan(config=config, parts=parts, source="", **machine))
