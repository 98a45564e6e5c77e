"""Times a training step and its parts: forward, backward and AdamW on random clips, with random codes for MAM2.

    python -m benchmarks.bench_step [--compile] [--objective NAME …] [--batch N …] [--videomae CLONE]

Every objective runs eager, compiled, and with each kind of block compiled once ("compiled blocks"), each also as one
captured CUDA graph; `step_plan` has their order. `first s` are the seconds of the first step with its compilation,
which is short if the code is in the cache; `benchmarks.first_step --here` fills the cache. VideoMAE is also compared
with its authors' code and with Hugging Face's VideoMAEForPreTraining, with the same sizes, weights and mask. A variant
whose loss is not that of our eager step is not timed. Each variant is first timed alone and gets a row; then the
variants of one objective are timed in turns, round by round.
The model is ViT-B on 16 frames of 224² on a GPU; on a CPU it is ViT-S on 16 frames of 112², and only ratios are
meaningful. MFU is the rate of FLOPs that `mam2.engine.costs` declares, divided by the rate of a large matrix product of
the same type measured in the same run: the share of a step that is needed even if nothing but products took time.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks import hugging_face, official_videomae
from benchmarks.launches import counted, fallback
from benchmarks.report import table
from benchmarks.step_parts import part_rows
from benchmarks.step_plan import PARTS, PEERS, STAGES, WAYS, Way, stages
from benchmarks.step_sizes import OBJECTIVES, SMALL, TINY, sized
from benchmarks.timing import Timing, elapsed_ms, peak_mib, summary
from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.costs import step_flops
from mam2.engine.errors import UserError
from mam2.engine.model.attention import Choices
from mam2.engine.model.attention_tuning import shapes_of, tune_attention
from mam2.engine.model.blocks import Block, RegressorBlock
from mam2.engine.model.build import build_model
from mam2.engine.model.mam2 import MAM2
from mam2.engine.model.masking import keep_decoded
from mam2.engine.model.videomae import VideoMAE
from mam2.engine.runtime.cuda import CudaRecorder
from mam2.engine.runtime.device import autocast, compile_each, matmul_dtype, why_not_compile
from mam2.engine.runtime.peak import measured_peak_flops
from mam2.engine.train.objective import build_objective
from mam2.engine.train.optimizer import build_optimizer
from mam2.kernels import TubeMask, tube_mask

if TYPE_CHECKING:
    from benchmarks.sections import Selection

Row = dict[str, Any]
BATCHES = {"cuda": (64, 8, 128), "cpu": (16,)}
"""The usual batch first, because a time limit cuts off the end; then that of one of several small GPUs."""
CODES = 8192
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
"""Largest relative difference at which the two losses count as equal."""
COLUMNS = (
    *("objective", "batch", "precision", "provider", "step", "timed", "verdict", "loss", "median_ms", "p20_ms"),
    "p80_ms",
    *("first_s", "clips_per_s", "mfu_percent", "ratio", "ratio_to_best", "peak_gib", "reason"),
)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One variant of a step. Its inputs stay the same, so that it can be captured."""

    provider: str
    step: str
    loss: Callable[[], Tensor]
    optimizer: torch.optim.Optimizer
    config: PretrainConfig
    device: torch.device

    def forward(self) -> Tensor:
        """Returns the loss."""
        with autocast(self.config.run, self.device):
            return self.loss()

    def __call__(self) -> Tensor:
        loss = self.forward()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    @property
    def state_bytes(self) -> int:
        """Returns the bytes of weights, gradients and optimizer moments."""
        return sum(4 * p.nbytes for group in self.optimizer.param_groups for p in group["params"])


def seeded_model(config: PretrainConfig, device: torch.device, choices: Choices | None = None) -> MAM2 | VideoMAE:
    """Builds the model with the same weights at every call. choices: its attention implementations."""
    torch.manual_seed(0)
    model = build_model(config, CODES)
    model.set_attention(choices or {})
    return model.to(device)


def inputs_of(config: PretrainConfig, batch: int, device: torch.device) -> tuple[Tensor, TubeMask, Tensor]:
    """Returns random clips [B, 3, T, H, W] uint8, a mask, and codes [B, N]."""
    torch.manual_seed(1)
    extent = (batch, config.data.frames, config.data.size, config.data.size, 3)
    video = torch.randint(0, 256, extent, dtype=torch.uint8, device=device).permute(0, 4, 1, 2, 3)
    mask = tube_mask(batch, config.grid, config.mask.ratio, seed=0, device=device)
    codes = torch.randint(CODES, (batch, math.prod(config.grid)), device=device)
    return video, keep_decoded(mask, config, step=0), codes


def ours(
    config: PretrainConfig, batch: int, device: torch.device, step: str, choices: Choices | None = None
) -> Candidate:
    compiled = (lambda f: torch.compile(f, fullgraph=True, dynamic=False)) if "compiled" in step else (lambda f: f)
    model = seeded_model(config, device, choices)
    if step.startswith("compiled blocks"):
        compile_each([part for part in model.modules() if isinstance(part, Block | RegressorBlock)], compiled)
        compiled = lambda part: part  # noqa: E731
    objective = build_objective(model, config, compiled)
    inputs = inputs_of(config, batch, device)
    return Candidate("ours", step, lambda: objective(*inputs)[0], optimizer_of(model, config), config, device)


def theirs(config: PretrainConfig, batch: int, device: torch.device, step: str, provider: str) -> Candidate:
    peer: Any = hugging_face if provider == "hugging_face" else official_videomae
    model = peer.build(config, seeded_model(config, device)).to(device)
    loss = peer.loss_of(model, config.patch_size)
    loss = torch.compile(loss, dynamic=False) if "compiled" in step else loss
    video, mask, _ = inputs_of(config, batch, device)
    pixels, hidden = peer.pixels(video), mask.as_bool()
    return Candidate(provider, step, lambda: loss(pixels, hidden), optimizer_of(model, config), config, device)


def optimizer_of(model: torch.nn.Module, config: PretrainConfig) -> torch.optim.Optimizer:
    optimizer = build_optimizer(model, config.optim)
    for group in optimizer.param_groups:
        group |= {"lr": 1e-5, "capturable": next(model.parameters()).is_cuda}
    return optimizer


def captured(candidate: Candidate, recorder: CudaRecorder) -> Callable[[], Tensor]:
    """Captures the whole step as a CUDA graph; the returned function replays it."""
    recorder.warm_up(candidate)
    replay, values = recorder.record(lambda: {"loss": candidate()})

    def replayed() -> Tensor:
        replay()
        return values["loss"]

    return replayed


def compare(
    name: str,
    config: PretrainConfig,
    batch: int,
    device: torch.device,
    *,
    compiled: bool,
    rounds: int,
    deadline: float = math.inf,
    takes: Callable[[str], bool] = lambda way: True,
    choices: Choices | None = None,
    ways: Sequence[Way] = WAYS,
) -> Iterator[Row]:
    """Yields rows for the variants of one objective's step at one batch: first each timed alone, then all in turns.

    A variant that does not start before `deadline` (time.monotonic) gets a row with the reason. `takes` selects steps
    and providers of `ways`. choices: the attention implementations of our model. The loss of each variant must be that
    of our eager step.
    """
    dtype = matmul_dtype(config.run, device)
    head = {"objective": name, "batch": batch, "precision": str(dtype).removeprefix("torch.")}
    runs: dict[tuple[str, str], tuple[Callable[[], Tensor], Row]] = {}
    expected = None
    peak = measured_peak_flops(device, dtype)
    recorder: CudaRecorder | None = None
    for step, provider in ways:
        if (provider in PEERS and name != "videomae") or not (takes(step) and takes(provider)):
            continue
        row = head | {"provider": provider, "step": step}
        reason = why_not(provider, step, config, device, compiled) or (
            "out of time" if time.monotonic() > deadline else None
        )
        if reason:
            yield row | {"verdict": "skipped", "reason": reason}
            continue
        try:
            setup = config, batch, device, step
            if expected is None and (step, provider) != ("eager", "ours"):
                expected = ours(config, batch, device, "eager", choices).forward().item()
            candidate = ours(*setup, choices) if provider == "ours" else theirs(*setup, provider)
            began = time.monotonic()
            with counted() as counter:
                loss = candidate().item()
            row["first_s"] = time.monotonic() - began
            expected = loss if expected is None else expected
            row |= {"verdict": "right" if agrees(loss, expected, dtype) else "wrong", "loss": loss}
            if row["verdict"] == "wrong":
                yield row | {"reason": f"loss {loss:.6g}, that of the eager step {expected:.6g}"}
                continue
            if provider == "ours":
                row["launches"] = len(counter.names)
                if reason := fallback(device, counter):
                    yield row | {"verdict": "failed", "reason": reason}
                    continue
            run: Callable[[], Tensor] = candidate
            if step.endswith("graph"):
                recorder = recorder or CudaRecorder()  # one for all: its graphs share the memory of their activations
                run = captured(candidate, recorder)
            else:
                run()
                row["peak_gib"] = candidate.state_bytes / 2**30 + peak_mib(run, device) / 2**10
            runs[provider, step] = run, row
            alone = summary([_milliseconds(run, device) for _ in range(2)])
            yield row | {"timed": "alone"} | rates(alone, config, batch, peak)
        except Exception as problem:  # a variant that does not fit into memory must not end the others
            yield row | {"verdict": "failed", "reason": f"{type(problem).__name__}: {problem}"[:300]}
    yield from timed(runs, config, batch, device, rounds, peak)


def why_not(provider: str, step: str, config: PretrainConfig, device: torch.device, compiled: bool) -> str | None:
    """Returns why a variant cannot run here, or None."""
    if provider == "official" and (reason := official_videomae.why_not(config)):
        return reason
    if provider == "hugging_face" and importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    if step.endswith("graph") and device.type != "cuda":
        return "CUDA graphs need a GPU"
    if "compiled" not in step:
        return None
    return why_not_compile(device) if compiled else "compilation not requested"


def agrees(loss: float, expected: float, dtype: torch.dtype) -> bool:
    return abs(loss - expected) <= TOLERANCE[dtype] * abs(expected)


def timed(
    runs: dict[tuple[str, str], tuple[Callable[[], Tensor], Row]],
    config: PretrainConfig,
    batch: int,
    device: torch.device,
    rounds: int,
    peak: float,
) -> Iterator[Row]:
    """Adds times to the rows, and the speed relative to the fastest peer in the same variant and in any."""
    samples: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for _ in range(rounds):
        for key, (run, _) in runs.items():
            samples[key].append(_milliseconds(run, device))
    timings = {key: summary(times) for key, times in samples.items()}
    peers: dict[str, float] = {}
    for (provider, step), timing in timings.items():
        if provider in PEERS:
            peers[step] = min(timing.median_ms, peers.get(step, math.inf))
    for (provider, step), timing in timings.items():
        row = runs[provider, step][1] | {"timed": "in turns"} | rates(timing, config, batch, peak)
        if provider == "ours" and peers:
            row["ratio"] = peers[step] / timing.median_ms if step in peers else None
            row["ratio_to_best"] = min(peers.values()) / timing.median_ms
        yield row


def rates(timing: Timing, config: PretrainConfig, batch: int, peak: float) -> Row:
    """Returns rates and MFU from the time of a step; `peak` is the FLOP/s of a large matrix product."""
    flops = sum(step_flops(config, CODES).values())
    row: Row = {"median_ms": timing.median_ms, "p20_ms": timing.p20_ms, "p80_ms": timing.p80_ms}
    row |= {"clips_per_s": 1000 * batch / timing.median_ms, "gflop_per_clip": flops / 1e9}
    return row | {"mfu_percent": 100 * flops * row["clips_per_s"] / peak}


def _milliseconds(run: Callable[[], Tensor], device: torch.device) -> float:
    """Returns milliseconds per step; on a GPU over five steps in a row, where the host runs ahead as in training."""
    group = 5 if device.type == "cuda" else 1
    return elapsed_ms(lambda: [run() for _ in range(group)], device) / group


def choose_attention(
    config: PretrainConfig, batch: int, device: torch.device, known: Choices | None = None
) -> tuple[Choices, list[str]]:
    """Returns the attention implementations that a run on this device would choose, and lines about the choice.

    known: earlier choices on this device, whose shapes are not measured again and get no line.
    """
    dtype = matmul_dtype(config.run, device)
    shapes = shapes_of(config, batch)
    new = {part: shape for part, shape in shapes.items() if (device.type, dtype, *shape[1:]) not in (known or {})}
    choices, lines = tune_attention(new, device, dtype)
    return {**(known or {}), **choices}, lines


def rows(
    device: torch.device, deadline: float, wanted: Selection, *, objectives: Sequence[str] = OBJECTIVES
) -> Iterator[Row]:
    """Yields rows for every batch and objective, in the stages of `step_plan`, until `deadline` (time.monotonic).

    The parts are timed at the first batch only. Tiny models on a CPU.
    """
    cuda = device.type == "cuda"
    precision = "bfloat16" if cuda else "float32"
    if cuda:
        yield {"objective": "ceiling", "matmul_tflop_per_s": measured_peak_flops(device, torch.bfloat16) / 1e12}
    batches = BATCHES["cuda"] if cuda else (2,)
    for batch in batches:
        configs = {name: sized(name, None if cuda else TINY, precision) for name in objectives}
        plans = {name: list(_stages(name, config, device, wanted)) for name, config in configs.items()}
        tuned: dict[str, Choices] = {}
        known: Choices = {}
        late: set[str] = set()
        for stage, (name, config) in itertools.product(range(len(STAGES)), configs.items()):
            ways = plans[name][stage]
            if not ways or (ways == PARTS and batch != batches[0]) or name in late:
                continue
            if time.monotonic() > deadline:
                late.add(name)
                yield {"objective": name, "batch": batch, "verdict": "skipped", "reason": "out of time"}
                continue
            if name not in tuned:
                tuned[name], lines = choose_attention(config, batch, device, known)
                known = {**known, **tuned[name]}
                if lines:
                    yield {"objective": name, "batch": batch, "attention": "; ".join(lines)}
            if isinstance(ways, str):
                model = seeded_model(config, device, tuned[name])
                yield from part_rows(name, model, config, inputs_of(config, batch, device), CODES, device)
                del model
            else:
                options = {"choices": tuned[name], "compiled": wanted.compiled, "deadline": deadline, "ways": ways}
                yield from compare(name, config, batch, device, rounds=5 if cuda else 3, **options)
                torch.compiler.reset()
            if cuda:
                torch.cuda.empty_cache()


def _stages(
    name: str, config: PretrainConfig, device: torch.device, wanted: Selection
) -> Iterator[tuple[Way, ...] | str]:
    return stages(
        lambda text: wanted.takes("ways", text),
        lambda way: why_not(way[1], way[0], config, device, wanted.compiled),
        peers=name == "videomae",
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_step", description=__doc__.splitlines()[0])
    parser.add_argument("--compile", action="store_true", help="also time compiled steps (takes minutes on a CPU)")
    parser.add_argument("--objective", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--batch", type=int, nargs="+", help="clips per step; default: 64 on a GPU, 16 on a CPU")
    parser.add_argument("--precision", nargs="+", choices=("float32", "bfloat16"), help="default: both on a CPU")
    parser.add_argument(
        "--videomae", help=f"clone of github.com/MCG-NJU/VideoMAE; default: ${official_videomae.VARIABLE}"
    )
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    if options.videomae:
        try:
            os.environ[official_videomae.VARIABLE] = str(official_videomae.check_clone(options.videomae))
        except UserError as error:
            parser.error(str(error))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    found: list[Row] = []
    batches = options.batch or BATCHES[device.type][:1]
    precisions = options.precision or (("bfloat16",) if cuda else ("float32", "bfloat16"))
    for name, batch, precision in itertools.product(options.objective, batches, precisions):
        config = sized(name, None if cuda else SMALL, precision)
        ways = compare(name, config, batch, device, compiled=options.compile, rounds=options.rounds)
        found += [row for row in ways if row.get("timed") != "alone"]
        inputs = inputs_of(config, batch, device)
        found += part_rows(name, seeded_model(config, device), config, inputs, CODES, device)
        torch.compiler.reset()
    note = "" if cuda else " (a CPU: only ratios are meaningful)"
    print(f"steps{note}", table([row for row in found if "part" not in row], COLUMNS), sep="\n")
    parts = ("objective", "batch", "precision", "part", "forward_ms", "backward_ms", "percent", "percent_of_flops")
    parts += ("median_ms",)
    print("\nparts", table([row for row in found if "part" in row], parts), sep="\n")
    return int(any(row.get("verdict") in ("wrong", "failed") for row in found))


if __name__ == "__main__":
    sys.exit(main())
