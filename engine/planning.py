"""Plans a run before it starts: computes parameters, FLOPs, bytes and memory from the config; estimates its speed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TypeVar

import torch

from mam2.engine import costs
from mam2.engine.config.pretrain import PretrainConfig, check
from mam2.engine.config.training import micro_batches_per_step
from mam2.engine.data.sample_order import SampleOrder
from mam2.engine.errors import UserError
from mam2.engine.layer_costs import SINGLE, PartCost
from mam2.engine.machines import machine_rates
from mam2.engine.tokenizer.files import load_vqgan
from mam2.engine.tokenizer.prepare import check_fits, codes_of, own_architecture
from mam2.engine.tokenizer.vqgan import VQGANConfig
from mam2.engine.units import binary_bytes, counted, duration, plain_number, with_prefix

SomePlan = TypeVar("SomePlan", bound="Plan")
IMAGES_PER_PASS = 64
"""Frames per pass of the tokenizer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    config: PretrainConfig
    parts: dict[str, PartCost]
    dtype: torch.dtype
    machine: str
    """Name of the machine, and the source of its rates."""
    peak_flops: float
    """FLOP/s of products in `dtype`."""
    bytes_per_s: float
    """Memory bandwidth; infinite if unknown."""
    memory_gib: float
    """Memory of one device; infinite if unknown."""
    utilization: float
    gpus: int
    source: str
    """Source of the tokenizer's size."""
    cuda: bool
    """Whether the devices are GPUs."""
    automatic: bool = False
    """Whether the run chooses the size of its passes; on a GPU `config` has the estimated one."""

    @property
    def clips_per_pass(self) -> int:
        """Returns the clips per pass on one device."""
        return self.config.optim.batch // (self.gpus * micro_batches_per_step(self.config, self.gpus))

    @property
    def parameters(self) -> int:
        """Returns the number of trained parameters."""
        return sum(cost.parameters for name, cost in self.parts.items() if name not in costs.FROZEN)

    @property
    def memory(self) -> dict[str, float]:
        """Returns the bytes held at the peak of a step on one device.

        On a GPU the tokenizer's activations are held in addition to the others, because it processes the next batch
        during the step, in separate memory. On a CPU they are held before the others.
        """
        clips, item = self.clips_per_pass, self.dtype.itemsize
        data = self.config.data
        held = sum(cost.held_bytes for name, cost in self.parts.items() if name != "tokenizer") * clips
        frames = min(IMAGES_PER_PASS, clips * self.config.tokenized_frames)
        tokenizer = self.parts.get("tokenizer", PartCost())
        value = SINGLE if data.value_range else 1
        batches = (data.prefetch + 1) * clips * data.frames * data.size**2 * data.channels * value
        shards = self.gpus if self.config.run.sharding == "fsdp" else 1
        state = self.parameters * SINGLE / shards
        teacher = self.parts.get("teacher", PartCost()).parameters * SINGLE / shards
        tokenizing = tokenizer.held_bytes * frames / self.config.tokenized_frames
        return {
            "weights": state + tokenizer.parameters * SINGLE + teacher,
            "gradients": self._gradients_at_peak(state, held),
            "moments": costs.state_bytes(self.config, self.parameters) / shards,
            **({"weights cast": self.parameters * float(item)} if item < SINGLE else {}),
            "activations": held + tokenizing if self.cuda else max(held, tokenizing),
            "clips": float(batches),
        }

    def _gradients_at_peak(self, gradients: float, activations: float) -> float:
        """Returns the bytes of gradients at the peak of a step, in addition to all activations.

        In the backward pass activations go as gradients come, and a process alone releases the gradients after each
        update. They stay in the buckets or shards of several processes, and between the passes of a step.
        """
        kept = self.gpus > 1 or micro_batches_per_step(self.config, self.gpus) > 1
        return gradients if kept else max(gradients - activations, 0.0)

    @property
    def checkpoint_bytes(self) -> float:
        """Returns the bytes of a checkpoint: weights and optimizer state. Rank 0 keeps them in host memory on a GPU."""
        return self.parameters * SINGLE + costs.state_bytes(self.config, self.parameters)

    @property
    def fits(self) -> bool:
        """Returns whether a step fits into nine tenths of a device's memory."""
        return sum(self.memory.values()) < 0.9 * self.memory_gib * 2**30

    def remedy(self) -> str:
        """Returns a remedy for a plan that does not fit.

        The largest `optim.micro_batch` that fits, or other settings.
        """
        config, smaller = self.config, _with_largest_pass(self)
        if smaller:
            return f"--optim.micro-batch {smaller.clips_per_pass} fits"
        ways = [] if config.run.recompute else ["--run.recompute"]
        ways += ["--run.sharding fsdp"] if self.gpus > 1 and config.run.sharding != "fsdp" else []
        return f"no optim.micro_batch fits; try {', '.join([*ways, 'a smaller --size or --data.size'])}"

    @property
    def pass_note(self) -> str:
        """Returns a remark on the size of the passes, for the report."""
        return " (optim.micro_batch auto: estimated here, tried by the run)" * self.automatic

    @property
    def clips_per_s(self) -> float:
        """Returns the clips per second of all devices.

        Limited by arithmetic at the assumed utilization, or by memory.
        """
        return self.gpus / max(self._seconds_of_arithmetic, self._seconds_of_memory)

    @property
    def _seconds_of_arithmetic(self) -> float:
        step = costs.muon(self.config, self.dtype.itemsize).flops * self.gpus / self.config.optim.batch
        return (sum(cost.flops for cost in self.parts.values()) + step) / (self.utilization * self.peak_flops)

    @property
    def _seconds_of_memory(self) -> float:
        step = costs.step_bytes(self.config, self.parameters, self.dtype.itemsize) * self.gpus / self.config.optim.batch
        return (sum(cost.bytes_moved for cost in self.parts.values()) + step) / self.bytes_per_s

    def hours(self, videos: int) -> float:
        """Returns the hours of training on `videos` videos."""
        clips = videos * self.config.optim.epochs * self.config.data.views
        return clips / self.clips_per_s / 3600

    def report(self, videos: int | Sequence[int] = 0) -> str:
        """Returns the text that `mam2 plan` prints. videos: their number, or that of each data set; 0: unknown."""
        config = self.config
        counts = [videos] if isinstance(videos, int) else list(videos)
        sets = _mixture(config, counts)
        data = config.data
        dtype = str(self.dtype).removeprefix("torch.")
        passes = micro_batches_per_step(config, self.gpus)
        lines = [
            f"clip     {config.clip_sizes}",
            f"step     {counted(config.optim.batch, 'clip')}: {counted(passes, 'pass')} of "
            f"{counted(self.clips_per_pass, 'clip')} "
            f"on {counted(self.gpus, 'device')}, {dtype}{', recomputed' if config.run.recompute else ''}"
            f"{self.pass_note}",
        ]
        if config.needs_codes:
            lines.append(f"codes    {self.source}")
        lines += [
            "",
            "per clip                parameters  forward FLOP  backward FLOP  memory traffic  activations held",
        ]
        lines += [cost_row(name, cost) for name, cost in self.parts.items()]
        totals = sum((dataclasses.replace(cost, parameters=0) for cost in self.parts.values()), PartCost())
        held = sum(cost.held_bytes for name, cost in self.parts.items() if name != "tokenizer")
        lines.append(cost_row("all", dataclasses.replace(totals, parameters=self.parameters, held_bytes=held)))
        step = costs.step_bytes(self.config, self.parameters, self.dtype.itemsize)
        muon = costs.muon(config, self.dtype.itemsize)
        by_muon = f"; Muon on {with_prefix(muon.parameters)}parameters, {with_prefix(muon.flops)}FLOP per step" * bool(
            muon.flops
        )
        memory = self.memory
        total = sum(memory.values())
        parts = ", ".join(f"{name} {binary_bytes(value)}" for name, value in memory.items())
        limit = f" of {self.memory_gib:.0f} GiB" if math.isfinite(self.memory_gib) else ""
        fits = "" if self.fits else f"  DOES NOT FIT: {self.remedy()}"
        bound = "arithmetic" if self._seconds_of_arithmetic > self._seconds_of_memory else "memory bandwidth"
        bandwidth = f", {self.bytes_per_s / 1e9:.0f} GB/s" if math.isfinite(self.bytes_per_s) else ""
        if config.needs_teacher:
            lines.append("(the teacher is not trained but averaged from the encoder: all parameters exclude it)")
        else:
            lines.append(
                "(the tokenizer is frozen: all parameters exclude it; its activations are held "
                f"{'in addition to' if self.cuda else 'before'} the others)"
            )
        lines += [
            f"update   {binary_bytes(step)} of memory traffic per step, weights and gradients included{by_muon}",
            "",
            f"memory   {binary_bytes(total)}{limit} per device (estimated): {parts}{fits}",
            f"saving   {binary_bytes(self.checkpoint_bytes)} per checkpoint"
            f"{', and as much pinned memory of the host, kept while it trains' * self.cuda}",
            f"machine  {self.machine}: {with_prefix(self.peak_flops)}FLOP/s {dtype}{bandwidth}",
            f"speed    {plain_number(self.clips_per_s)} clips/s (estimated: {100 * self.utilization:.0f} % of that "
            f"peak is assumed, not measured; bound by {bound}; loading not counted)",
        ]
        if count := sum(counts):
            lines.append(
                f"time     {duration(self.hours(count))} (estimated) for {counted(config.optim.epochs, 'epoch')} of "
                f"{counted(count, 'video', ',')}{f' in {data.views} views' if data.views > 1 else ''}"
            )
        lines += sets
        return "\n".join(lines)


def plan(config: PretrainConfig, *, gpu: str = "", gpus: int = 1, utilization: float = 0.0) -> Plan:
    """Returns the plan of a run.

    Args:
        config: a run's config.
        gpu: a name of `GPUS` in any spelling ("RTX 4090", "H100-PCIe"), or empty for this machine, whose rate of
            matrix products is then measured.
        gpus: number of devices of the run.
        utilization: share of the peak that the step reaches, 0 to 1; 0 assumes `UTILIZATION`.

    Raises:
        UserError: a value is invalid, or the batch cannot be divided among the devices.
    """
    check(config)
    machine = machine_rates(config, gpu, gpus, utilization)
    tokenizer, source = None, ""
    if config.needs_codes:
        tokenizer, source = _tokenizer(config)
    in_step = None if config.tokenizer.cache else tokenizer
    parts = costs.part_costs(config, tokenizer.codes if tokenizer else 0, in_step, item_bytes=machine["dtype"].itemsize)
    found = Plan(
        config=config,
        parts=parts,
        source=source
        + (", one of each frame" if config.tokenizer.frames == "all" else "")
        + (", read from tokenizer.cache" if config.tokenizer.cache else ""),
        **machine,
    )
    return with_automatic_passes(found)


def with_automatic_passes(found: SomePlan) -> SomePlan:
    """Returns the plan with the passes that `optim.micro_batch auto` is expected to find; any other plan unchanged."""
    return (_with_largest_pass(found) or found) if found.automatic and found.cuda else found


def _with_largest_pass(found: SomePlan) -> SomePlan | None:
    """Returns the plan with the largest `optim.micro_batch` that fits, or None if none does."""
    config = found.config
    for clips in range(found.clips_per_pass, config.clips_per_group - 1, -1):
        optim = dataclasses.replace(config.optim, micro_batch=clips)
        smaller = dataclasses.replace(found, config=dataclasses.replace(config, optim=optim))
        if smaller.clips_per_pass == clips and smaller.fits:
            return smaller
    return None


def _mixture(config: PretrainConfig, counts: Sequence[int]) -> list[str]:
    """Returns a line per data set; none for a single one. Raises UserError if the number of weights differs."""
    weights = config.data.weights
    if weights and any(counts) and len(weights) != len(counts):
        raise UserError(
            f"data.weights: expected one number per data set of --videos, {len(counts)}; found {len(weights)}"
        )
    if len(counts) < 2:
        return []
    if 0 in counts:
        raise UserError(f"--videos {' '.join(map(str, counts))}: expected at least one video per data set")
    shares = SampleOrder(counts, weights, config.run.seed).shares
    return [
        f"set {number}    {counted(count, 'video', ',')}, {share:.2%} of clips: "
        f"{share * sum(counts) / count:.3g} passes per epoch"
        for number, (count, share) in enumerate(zip(counts, shares, strict=True), 1)
    ]


def _tokenizer(config: PretrainConfig) -> tuple[VQGANConfig, str]:
    options = config.tokenizer
    if options.path:
        found = load_vqgan(options.path).config
        check_fits(found, config)
        return found, f"{codes_of(found)} of {options.path}"
    own = own_architecture(config)
    return own, f"{codes_of(own)} of a small VQ model that is first trained on the data (its training is not counted)"


def cost_row(name: str, cost: PartCost) -> str:
    flops = (
        f"{with_prefix(cost.forward_flops):>12}  {with_prefix(cost.backward_flops) if cost.backward_flops else '-':>13}"
    )
    moved, held = binary_bytes(cost.bytes_moved), binary_bytes(cost.held_bytes)
    return f"  {name:<21} {with_prefix(cost.parameters):>10}  {flops}  {moved:>14}  {held:>16}"
