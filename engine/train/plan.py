"""What a run takes, before it runs: parameters, FLOPs, bytes and memory from the config; speed and hours estimated."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch

from mam2.engine.config import PretrainConfig, UserError, passes
from mam2.engine.model import costs
from mam2.engine.model.encoder import CHANNELS
from mam2.engine.model.vqgan import VQGANConfig, small
from mam2.engine.model.vqgan_files import load_vqgan
from mam2.engine.train.peak import measured_peak_flops
from mam2.engine.train.runtime import matmul_dtype, pick_device
from mam2.engine.train.tokenizer import code_factor


class GPU(NamedTuple):
    """Of one GPU, by its maker's data sheet."""

    name: str
    bf16_tflop_per_s: float
    """Dense bfloat16 products, without sparsity."""
    gb_per_s: float
    memory_gb: float


GPUS = {
    "b200": GPU("NVIDIA B200", 2250, 8000, 180),
    "h200": GPU("NVIDIA H200 SXM", 989, 4800, 141),
    "h100": GPU("NVIDIA H100 SXM", 989, 3350, 80),
    "a100": GPU("NVIDIA A100 SXM 80 GB", 312, 2039, 80),
    "l40s": GPU("NVIDIA L40S", 362, 864, 48),
    "l4": GPU("NVIDIA L4", 121, 300, 24),
    "a10": GPU("NVIDIA A10", 125, 600, 24),
    "rtx4090": GPU("NVIDIA GeForce RTX 4090", 165, 1008, 24),
    "mi300x": GPU("AMD Instinct MI300X", 1307, 5300, 192),
}
"""NVIDIA's and AMD's data sheets; the RTX 4090's rate is that of its Ada white paper with float32 accumulation."""
UTILISATION = {"cuda": 0.4, "cpu": 0.5}
"""Share of the peak that a step is assumed to reach where nothing else is said; not measured."""
IMAGES_PER_PASS = 64
"""Frames that the tokenizer takes at once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    config: PretrainConfig
    parts: dict[str, costs.Cost]
    dtype: torch.dtype
    machine: str
    """Its name and where its rates come from."""
    peak_flops: float
    """FLOP/s of products in `dtype`."""
    bytes_per_s: float
    """Of memory; infinite where it is not known."""
    memory_gib: float
    """Of one device; infinite where it is not known."""
    utilisation: float
    gpus: int
    source: str
    """Where the tokenizer's size comes from."""
    cuda: bool
    """Whether the devices are GPUs."""

    @property
    def clips_a_pass(self) -> int:
        """Clips that one device takes at once."""
        return self.config.optim.batch // (self.gpus * passes(self.config, self.gpus))

    @property
    def parameters(self) -> int:
        """That are trained."""
        return sum(cost.parameters for name, cost in self.parts.items() if name != "tokenizer")

    @property
    def memory(self) -> dict[str, float]:
        """Bytes held at the peak of a step on one device.

        The tokenizer's activations are held beside the others on a GPU, where it works on the next batch during the
        step, in memory of its own; before them on a CPU.
        """
        clips, item = self.clips_a_pass, self.dtype.itemsize
        data = self.config.data
        held = sum(cost.held_bytes for name, cost in self.parts.items() if name != "tokenizer") * clips
        frames = min(IMAGES_PER_PASS, clips * self.config.tokenized_frames)
        tokenizer = self.parts.get("tokenizer", costs.Cost())
        batches = (data.prefetch + 1) * clips * data.frames * data.size**2 * CHANNELS
        shards = self.gpus if self.config.run.sharding == "fsdp" else 1
        state = self.parameters * costs.SINGLE / shards
        tokenizing = tokenizer.held_bytes * frames / self.config.tokenized_frames
        return {
            "weights": state + tokenizer.parameters * costs.SINGLE,
            "gradients": state,
            "AdamW's moments": 2 * state,
            **({"weights cast": self.parameters * float(item)} if item < costs.SINGLE else {}),
            "activations": held + tokenizing if self.cuda else max(held, tokenizing),
            "clips": float(batches),
        }

    @property
    def clips_per_s(self) -> float:
        """Of all devices: bound by arithmetic at the assumed utilisation, or by memory."""
        return self.gpus / max(self._seconds_of_arithmetic, self._seconds_of_memory)

    @property
    def _seconds_of_arithmetic(self) -> float:
        return sum(cost.flops for cost in self.parts.values()) / (self.utilisation * self.peak_flops)

    @property
    def _seconds_of_memory(self) -> float:
        step = costs.step_bytes(self.parameters, self.dtype.itemsize) * self.gpus / self.config.optim.batch
        return (sum(cost.bytes_moved for cost in self.parts.values()) + step) / self.bytes_per_s

    def hours(self, videos: int) -> float:
        """Of training on so many videos."""
        clips = videos * self.config.optim.epochs * self.config.data.views
        return clips / self.clips_per_s / 3600

    def report(self, videos: int = 0) -> str:
        """The lines that `mam2 plan` prints."""
        config = self.config
        data, grid = config.data, config.grid
        tokens = math.prod(grid)
        masked = config.masked_tokens
        dtype = str(self.dtype).removeprefix("torch.")
        lines = [
            f"clip     {data.frames} frames of {data.size}²: {tokens} tokens, {tokens - masked} visible",
            f"step     {config.optim.batch} clips: {self.clips_a_pass} a pass, {passes(config, self.gpus)} passes on "
            f"{self.gpus} device{'s' * (self.gpus > 1)}, {dtype}{', recomputed' if config.run.recompute else ''}",
        ]
        if config.needs_codes:
            lines.append(f"codes    {self.source}")
        lines += ["", "a clip                  parameters    forward   backward   memory traffic   activations held"]
        lines += [_row(name, cost) for name, cost in self.parts.items()]
        totals = sum((dataclasses.replace(cost, parameters=0) for cost in self.parts.values()), costs.Cost())
        held = sum(cost.held_bytes for name, cost in self.parts.items() if name != "tokenizer")
        lines.append(_row("all", dataclasses.replace(totals, parameters=self.parameters, held_bytes=held)))
        step = costs.step_bytes(self.parameters, self.dtype.itemsize)
        memory = self.memory
        total = sum(memory.values())
        parts = " + ".join(f"{name} {value / 2**30:.2f}" for name, value in memory.items())
        fits = "" if total < 0.9 * self.memory_gib * 2**30 else "  DOES NOT FIT: lower optim.micro_batch"
        bound = "arithmetic" if self._seconds_of_arithmetic > self._seconds_of_memory else "memory bandwidth"
        bandwidth = f", {self.bytes_per_s / 1e9:.0f} GB/s" if math.isfinite(self.bytes_per_s) else ""
        lines += [
            "(the tokenizer is frozen: it is not among all parameters; its activations are held "
            f"{'beside' if self.cuda else 'before'} the others)",
            f"AdamW    {step / 1e9:.2f} GB of memory traffic a step, weights and gradients included",
            "",
            f"memory   {total / 2**30:.1f} GiB a device (estimated): {parts}{fits}",
            f"machine  {self.machine}: {self.peak_flops / 1e12:.3g} TFLOP/s {dtype}{bandwidth}",
            f"speed    {self.clips_per_s:.3g} clips/s (estimated: {100 * self.utilisation:.0f} % of that peak is "
            f"assumed, not measured; bound by {bound}; loading not counted)",
        ]
        if videos:
            lines.append(
                f"time     {self.hours(videos):.3g} hours (estimated) for {config.optim.epochs:g} epochs of {videos} "
                f"videos{f' in {data.views} views' if data.views > 1 else ''}"
            )
        return "\n".join(lines)


def make_plan(config: PretrainConfig, *, gpu: str = "", gpus: int = 1, utilisation: float = 0.0) -> Plan:
    """The plan of a run.

    Args:
        config: a run's config.
        gpu: a name of `GPUS`, or empty for this machine, whose products are then measured.
        gpus: devices of one run.
        utilisation: share of the peak that the step reaches, 0 to 1; 0 assumes `UTILISATION`.

    Raises:
        UserError: for values that cannot be used, and a batch that cannot be shared out.
    """
    if not 0 <= utilisation <= 1:
        raise UserError(f"--utilisation is a share from 0 to 1, found {utilisation:g}")
    if gpu and gpu not in GPUS:
        raise UserError(f"--gpu {gpu}: expected one of {', '.join(GPUS)}, or nothing for this machine")
    passes(config, gpus)
    device = torch.device("cuda") if gpu else pick_device(config.run)
    dtype = matmul_dtype(config.run, device)
    if gpu:
        name, tflop_per_s, gb_per_s, memory_gb = GPUS[gpu]
        if dtype == torch.float32:
            raise UserError("--gpu: its rate is known for bfloat16 only; leave run.precision at auto")
        peak, rate, memory = tflop_per_s * 1e12, gb_per_s * 1e9, memory_gb * 1e9 / 2**30
        machine = f"{name} (data sheet)"
    else:
        peak, rate, memory = measured_peak_flops(device, dtype), math.inf, math.inf
        machine = "this machine's CPU (measured product)"
        if device.type == "cuda":
            machine = f"{torch.cuda.get_device_name(device)} (measured product)"
            memory = torch.cuda.get_device_properties(device).total_memory / 2**30
    tokenizer, source = None, ""
    if config.needs_codes:
        tokenizer, source = _tokenizer(config)
    in_step = None if config.tokenizer.cache else tokenizer
    return Plan(
        config=config,
        parts=costs.part_costs(config, tokenizer.codes if tokenizer else 0, in_step, item_bytes=dtype.itemsize),
        dtype=dtype,
        machine=machine,
        peak_flops=peak,
        bytes_per_s=rate,
        memory_gib=memory,
        utilisation=utilisation or UTILISATION[device.type],
        gpus=gpus,
        cuda=device.type == "cuda",
        source=source
        + (", one of each frame" if config.tokenizer.frames == "all" else "")
        + (", read from tokenizer.cache" if config.tokenizer.cache else ""),
    )


def _tokenizer(config: PretrainConfig) -> tuple[VQGANConfig, str]:
    options = config.tokenizer
    if options.path:
        found = load_vqgan(options.path).config
        return found, f"{found.codes} codes of {options.path}"
    own = small(options.channels, options.codes, code_factor(config))
    return own, f"{own.codes} codes of a small VQ model that is trained on the data first (its training not counted)"


def _row(name: str, cost: costs.Cost) -> str:
    flops = f"{cost.forward_flops / 1e9:>8.3g} G {cost.backward_flops / 1e9:>8.3g} G"
    moved, held = cost.bytes_moved / 2**20, cost.held_bytes / 2**20
    return f"  {name:<21} {cost.parameters / 1e6:>8.2f} M {flops} {moved:>12.1f} MiB {held:>14.1f} MiB"
