"""Pre-training: video files → clips → codes → MAM2 (or VideoMAE) → checkpoints.

    RUN/config.json  manifest.jsonl  skipped.tsv  tokenizer.safetensors  log.jsonl  log.txt  tensorboard/
        nonfinite.tsv  checkpoints/latest  checkpoints/step-…/

The clips and masks of a step are a pure function of (seed, step), and nothing else in the step is random. So a
run goes on from a checkpoint as if it had never stopped, and only the step number has to be remembered. Started by
torchrun, every process works on its part of each batch; rank 0 writes the run folder.
"""

from __future__ import annotations

import json
import platform
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mam2.engine.config import PretrainConfig, UserError, check, passes, to_dict
from mam2.engine.data.decoding import available_cores
from mam2.engine.data.loader import ClipLoader
from mam2.engine.data.manifest import Manifest, read_manifest, read_saved_manifest, write_manifest
from mam2.engine.model.attention import active_backend
from mam2.engine.model.costs import step_flops
from mam2.engine.model.mam2 import MAM2
from mam2.engine.model.presets import parameters_by_part
from mam2.engine.model.videomae import VideoMAE
from mam2.engine.train import checkpoint
from mam2.engine.train.codes import open_cache, prepare_codes, with_codes
from mam2.engine.train.distributed import Vote, World, join
from mam2.engine.train.metrics import Log, Readout, RunLog, SilentLog
from mam2.engine.train.optimizer import learning_rate
from mam2.engine.train.peak import measured_peak_flops
from mam2.engine.train.runtime import Interrupted, StopSignal, matmul_dtype, paused_gc, pick_device
from mam2.engine.train.step import TrainStep
from mam2.kernels import active_path

MANIFEST = "manifest.jsonl"


@dataclass(frozen=True, kw_only=True)
class PretrainResult:
    step: int
    """Optimiser steps done in all."""
    steps: int
    """Optimiser steps the recipe asks for."""
    checkpoint: Path
    """Folder of the last checkpoint."""
    used: int
    """Videos that were usable."""
    skipped: int
    """Videos that were not."""
    signal: int
    """Number of the signal that ended the run early, or 0."""


def pretrain(
    config: PretrainConfig, data: str | Path, out: str | Path, *, resume: bool = False, progress: bool = True
) -> PretrainResult:
    """Pre-trains an encoder on the videos of a folder or list and leaves checkpoints and logs in `out`.

    Args:
        config: a recipe's values; see `mam2.engine.config`.
        data: a folder (with or without class folders) or an annotation list.
        out: the run folder; made if missing. One that holds a checkpoint is only touched with `resume`. Several
            machines must share it.
        resume: go on from the newest whole checkpoint in `out`, if there is one.
        progress: draw a progress bar (only on a terminal).

    Raises:
        UserError: for data, configs and checkpoints that cannot be used.
        PeerFailed: another process of the run has failed, and says why.
    """
    check(config)
    run = Path(out)
    if checkpoint.newest(run) and not resume:
        raise UserError(f"{run} holds a run: add --resume to go on with it, or name another folder with --out")
    device = pick_device(config.run)
    with StopSignal() as stop, join(device) as world:
        passes(config, world.size)
        log = _open_log(run) if world.main else SilentLog()
        try:
            return _Run(config, Path(data), run, device, world, log, stop, resume, progress and world.main).train()
        finally:
            log.close()


def _open_log(run: Path) -> RunLog:
    try:
        run.mkdir(parents=True, exist_ok=True)
        return RunLog(run)
    except OSError as error:
        raise UserError(f"--out {run}: cannot be written: {error.strerror}; name another folder") from None


class _Run:
    """One call of `pretrain`: sets up in its constructor, loops in `train`."""

    def __init__(
        self,
        config: PretrainConfig,
        data: Path,
        run: Path,
        device: torch.device,
        world: World,
        log: Log,
        stop: StopSignal,
        resume: bool,
        progress: bool,
    ) -> None:
        self.config, self.run, self.device, self.world = config, run, device, world
        self.log, self.stop, self.progress = log, stop, progress
        optim = config.optim
        folder = world.share(lambda: checkpoint.newest_whole(run, log.say) if resume else None)
        if folder:
            self._continue(folder)
        ranks = f", {world.size} processes" if world.size > 1 else ""
        log.say(f"run     {run} on {_machine(device)}{ranks}")
        if folder:
            log.say(f"resume  from {folder}, with its own list of videos ({run / MANIFEST})")

        self.manifest = world.share(lambda: _manifest(data, run, config, saved=folder is not None, progress=progress))
        self._unusable: dict[str, str] = {}
        self._note(self.manifest.skipped)
        count = passes(config, world.size)
        cache = open_cache(config, self.manifest, world, progress=progress)
        self.loader = ClipLoader(
            self.manifest,
            config.data,
            batch=optim.batch // (world.size * count),
            device=device,
            seed=config.run.seed,
            rank=world.rank,
            world=world.size,
            # several processes tell each other when the log is written, so that each file is named once
            on_skip=(lambda skipped: self._note([skipped])) if world.size == 1 else None,
            available=cache.has if cache else None,
        )
        self._exchange_skips()
        front_ends = ", ".join(f"{count} by {name}" for name, count in self.loader.front_ends.items())
        used = sum(self.loader.front_ends.values())
        log.say(f"data    {used} videos, decoded {front_ends}; {len(self._unusable)} unusable")

        self.codes = None
        if config.model.objective == "mam2":
            self.codes = prepare_codes(config, self.loader, cache, run, device, world, log.say, progress=progress)
        dtype = matmul_dtype(config.run, device)
        peak = measured_peak_flops(device, dtype)
        source = (self.codes.codebook_size, self.codes.tokenizer) if self.codes else ()
        self.full_clips_per_s = peak * world.size / sum(step_flops(config, *source).values())
        # Weights are drawn after the tokenizer's training and the measurement, which use the generator as well.
        torch.manual_seed(config.run.seed)
        model = MAM2(config, self.codes.codebook_size) if self.codes else VideoMAE(config)
        self.take = TrainStep(config, model, device, world)
        self.first = checkpoint.restore(folder, model, self.take.optimizer) if folder else 0
        self.saver = checkpoint.Saver(run, config, main=world.main)

        self.steps_per_epoch = self.loader.steps_per_epoch / count
        self.steps = max(round(optim.epochs * self.steps_per_epoch), 1)
        parts = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in parameters_by_part(model).items())
        log.say(f"model   {config.model.objective}: {parts} parameters")
        head = config.model.width // config.model.heads
        log.say(
            f"paths   kernels: {active_path(device)}; attention: {active_backend(device, dtype, head)}; "
            f"step: {self.take.compiled}; {str(dtype).removeprefix('torch.')}, matrices at {peak / 1e12:.3g} TFLOP/s"
        )
        shared = "" if count == world.size == 1 else f" ({world.size} processes in {count} passes)"
        log.say(
            f"steps   {self.first} done of {self.steps}: {optim.epochs:g} epochs, {optim.batch} clips a step{shared}"
        )
        if world.main:
            (run / "config.json").write_text(json.dumps(to_dict(config), indent=1) + "\n", encoding="utf-8")

    def train(self) -> PretrainResult:
        config = self.config
        step, ended = self.first, 0
        window = _Window(self.loader)
        vote = Vote(self.world)
        self.readout = Readout(self.device)
        self.in_a_row = 0
        shown: list[Tensor] = []
        flags: list[Tensor] = []
        try:
            stream = with_codes(self.loader.stream(first_step=self.first * self.take.passes), self.codes, self.device)
            bar = tqdm(
                total=self.steps,
                initial=self.first,
                desc="pre-training",
                unit="step",
                disable=None if self.progress else True,
                smoothing=0.05,
            )
            with bar, paused_gc(), self.stop.looping():
                while step < self.steps and not ended:
                    try:
                        with self.stop.interruptible(self.world.size == 1):
                            batches = [next(stream) for _ in range(self.take.passes)]
                    except Interrupted:  # a loader that hangs must not keep what is done from being saved
                        ended = int(self.stop.received or 0)
                        break
                    logged = (step + 1) % config.run.log_every == 0 or step + 1 == self.steps
                    rate = learning_rate(
                        step, self.steps, self.steps_per_epoch, config.optim, global_batch=config.optim.batch
                    )
                    clips = [(batch.clip.permute(0, 4, 1, 2, 3), codes) for batch, codes in batches]
                    values = self.take(step, clips, rate, inspect=logged)
                    step += 1
                    bar.update()
                    flags.append(values.pop("bad"))
                    shown.append(torch.stack([batch.video for batch, _ in batches]))
                    self._write(bar)
                    if logged:
                        self._exchange_skips()
                        numbers = window.close(step, config.optim.batch)
                        if "clips_per_s" in numbers:
                            numbers["mfu"] = numbers["clips_per_s"] / self.full_clips_per_s
                        numbers |= {"learning_rate": rate, "epoch": step / self.steps_per_epoch}
                        self.readout.put(step, values, torch.stack(flags), numbers, shown, self.world)
                        flags, shown = [], []
                    if step % config.run.save_every == 0 and step < self.steps:
                        self._save(step)
                    ended = vote(int(self.stop.received or 0))
                self._write(bar, wait=True)
                self._save(step, last=True)
        finally:
            self.loader.close()
        self._exchange_skips()
        unusable = len(self._unusable)
        used = len(self.manifest.videos) + len(self.manifest.skipped) - unusable
        where = f" (named in {self.run / 'skipped.tsv'})" if unusable else ""
        name = signal.Signals(ended).name if ended else ""
        how = f"stopped by {name} after step {step}; --resume goes on" if ended else f"done: {step} steps"
        folder = checkpoint.folder_of(self.run, step)
        self.log.say(f"{how}; {used} videos used, {unusable} unusable{where}; checkpoint {folder}")
        return PretrainResult(step=step, steps=self.steps, checkpoint=folder, used=used, skipped=unusable, signal=ended)

    def _write(self, bar: Any, *, wait: bool = False) -> None:
        """Writes the log line whose numbers have come from the device, if there is one."""
        for line in self.readout.take(wait=wait):
            bad = [step for step, flag in zip(line.steps, line.bad, strict=True) if flag]
            numbers = line.numbers
            if bad:
                numbers["skipped_steps"] = len(bad)
                self._name_clips(bad, line.videos)
            for flag in line.bad:
                self.in_a_row = self.in_a_row + 1 if flag else 0
            if self.device.type == "cuda":
                numbers["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            self.log.write(line.steps[-1], numbers)
            bar.set_postfix_str(_postfix(numbers), refresh=False)
            if self.in_a_row >= self.config.run.max_nonfinite:
                raise self.world.error(
                    f"{self.in_a_row} steps in a row had a loss or gradient that is not finite; the last checkpoint of "
                    f"{self.run} is sound. Lower optim.base_lr, set optim.clip_norm, or use run.precision=float32"
                )

    def _name_clips(self, bad: list[int], videos: dict[int, list[int]]) -> None:
        """Lists the clips of steps that were left out in nonfinite.tsv."""
        mine = [(step, self.manifest.videos[place].path) for step in bad for place in sorted(set(videos[step]))]
        rows = [row for part in self.world.gather(mine) for row in part]
        file = self.run / "nonfinite.tsv"
        numbers = ", ".join(map(str, bad))
        self.log.say(f"step {numbers}: loss or gradient not finite, left out; the clips are named in {file}")
        if self.world.main:
            with file.open("a", encoding="utf-8", errors="surrogateescape") as stream:
                stream.writelines(f"{step}\t{path}\n" for step, path in sorted(rows))

    def _save(self, step: int, *, last: bool = False) -> None:
        """Starts a checkpoint; the last one is waited for, and only then a full disk is an error."""
        problem = self.saver.save(step, self.take.model, self.take.optimizer)
        if last:
            problem = self.saver.wait()
        if problem is None:
            return
        whole = checkpoint.newest(self.run)
        message = f"a checkpoint cannot be written: {problem}; the last whole one is {whole}"
        if last:
            raise UserError(f"step {step}: {message}")
        self.log.say(f"step {step}: {message}. The run goes on, the next attempt is at the next checkpoint")

    def _exchange_skips(self) -> None:
        """Every rank learns of the files that the others found unusable; too many of them end the run everywhere."""
        for found in self.world.gather(list(self.loader.skipped)):
            self._note(found)
        total = len(self.manifest.videos) + len(self.manifest.skipped)
        if len(self._unusable) > self.config.data.max_unusable * total:
            path, reason = list(self._unusable.items())[-1]
            raise self.world.error(
                f"{len(self._unusable)} of {total} videos cannot be used, more than data.max_unusable="
                f"{self.config.data.max_unusable:g} allows; the last is {path}: {reason}"
            )

    def _note(self, found: Any) -> None:
        """Names files that cannot be used, once, in the log and in skipped.tsv."""
        for skipped in found:
            if skipped.path in self._unusable:
                continue
            self._unusable[skipped.path] = skipped.reason
            self.log.say(f"unusable: {skipped.path}: {skipped.reason}")
            if self.world.main:
                with (self.run / "skipped.tsv").open("a", encoding="utf-8", errors="surrogateescape") as file:
                    file.write(f"{skipped.path}\t{skipped.reason}\n")

    def _continue(self, folder: Path) -> None:
        """Raises UserError where a resumed run would not continue the saved one; says what may change its bits."""
        state, now = checkpoint.read_state(folder), to_dict(self.config)
        free = {
            "run": {
                "log_every",
                "save_every",
                "keep",
                "keep_every",
                "compile",
                "device",
                "sharding",
                "recompute",
                "max_nonfinite",
            },
            "data": {"threads", "prefetch", "max_unusable", "timeout_s"},
            "optim": {"micro_batch"},
            "tokenizer": {"cache"},
        }
        for table, values in state["config"].items():
            for key, old in values.items():
                if key not in free.get(table, ()) and key in now[table] and old != now[table][key]:
                    raise self.world.error(
                        f"{folder} was written with {table}.{key} = {old!r}, this call says {now[table][key]!r}: "
                        f"use the saved values ({self.run / 'config.json'}) or start a new run"
                    )
        for name, mine in (("code", checkpoint.code_version()), ("torch", torch.__version__)):
            if state.get(name, mine) != mine:
                self.log.say(f"resume  written by {name} {state[name]}, this is {mine}: the bits may differ from here")


class _Window:
    """Rates since the last log line."""

    def __init__(self, loader: ClipLoader) -> None:
        self._loader = loader
        self._restart(None)

    def _restart(self, step: int | None) -> None:
        self._start, self._step = time.perf_counter(), step
        self._waited, self._decoded = self._loader.wait_s, self._loader.decoded_frames

    def close(self, step: int, batch: int) -> dict[str, float]:
        seconds = time.perf_counter() - self._start
        rates = {
            "data_wait": (self._loader.wait_s - self._waited) / seconds,
            "decoded_frames_per_s": (self._loader.decoded_frames - self._decoded) / seconds,
        }
        if self._step is not None:  # the first window also holds the compilation
            rates["clips_per_s"] = (step - self._step) * batch / seconds
            rates["step_ms"] = 1000 * seconds / (step - self._step)
        self._restart(step)
        return rates


def _postfix(numbers: dict[str, Any]) -> str:
    shown = {
        "loss/appearance": "codes {:.2f}",
        "loss/motion": "motion {:.4g}",
        "loss/motion_relative": "({:.0%} of still)",
        "loss/pixels": "pixels {:.3f}",
        "accuracy/codes": "right codes {:.0%}",
        "clips_per_s": "{:.0f} clips/s",
        "data_wait": "data wait {:.0%}",
    }
    return " ".join(form.format(numbers[name]) for name, form in shown.items() if name in numbers)


def _manifest(data: Path, run: Path, config: PretrainConfig, *, saved: bool, progress: bool) -> Manifest:
    """Scans the data, or takes the scan of the run that is resumed: the order of clips depends on it."""
    path = run / MANIFEST
    if saved and path.is_file():
        return read_saved_manifest(path)
    manifest = read_manifest(data, threads=config.data.threads, progress=progress)
    write_manifest(manifest, path)
    (run / "skipped.tsv").unlink(missing_ok=True)
    return manifest


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{available_cores()} CPU cores ({platform.machine()}), torch {torch.__version__}"
