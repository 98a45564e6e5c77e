"""The loop of every training run: batches, steps, log lines, checkpoints, and an end that loses nothing.

What a step sees is a pure function of (seed, step), and nothing else in it is random. So a run goes on from a
checkpoint as if it had never stopped, and only the step number has to be remembered.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from mam2.engine.config import UserError
from mam2.engine.data.batch import Batch
from mam2.engine.data.loader import ClipLoader
from mam2.engine.model.attention import active_backend
from mam2.engine.model.presets import parameters_by_part
from mam2.engine.train import checkpoint
from mam2.engine.train.distributed import Vote
from mam2.engine.train.metrics import Readout
from mam2.engine.train.optimizer import learning_rate
from mam2.engine.train.peak import measured_peak_flops, used_gib
from mam2.engine.train.runtime import Interrupted, matmul_dtype, paused_gc, profiled
from mam2.engine.train.session import Session
from mam2.engine.train.step import Step
from mam2.kernels import active_path


@dataclass(frozen=True, kw_only=True)
class TrainResult:
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


class Task(Protocol):
    """What a loop trains."""

    @property
    def title(self) -> str:
        """Of the progress bar."""

    @property
    def take(self) -> Step: ...

    @property
    def loader(self) -> ClipLoader: ...

    @property
    def flops(self) -> float:
        """FLOPs of a clip in a step."""

    @property
    def shown(self) -> Mapping[str, str]:
        """Numbers of a log line that the progress bar shows, and how: the format of each."""

    @property
    def notes(self) -> Mapping[str, str]:
        """Further metadata of its checkpoints."""

    def batches(self, first_pass: int) -> Iterator[tuple[Batch, Any]]:
        """What the passes from `first_pass` on see: batches, and what goes with each into the step."""

    def between(self, step: int, steps: int) -> None:
        """Called after each of the `steps` steps, before its checkpoint, and where a resumed run begins, with the steps
        done. Work for which it is not to wait for is done in `session.stop.interruptible`."""


SHOWN = {"clips_per_s": "{:.0f} clips/s", "data_wait": "data wait {:.0%}"}


class Loop:
    """One call of `train`, set up by the constructor."""

    def __init__(self, session: Session[Any], task: Task) -> None:
        self.session, self.task, self.take = session, task, task.take
        config, world, take = session.config, session.world, task.take
        self.first = 0
        if session.saved:
            self.first = checkpoint.restore(session.saved, take.model, take.optimizer, take.extra_state())
        self.saver = checkpoint.Saver(session.folder, config, main=world.main, notes=task.notes)
        self.steps_per_epoch = task.loader.steps_per_epoch / take.passes
        self.steps = max(round(config.optim.epochs * self.steps_per_epoch), 1)
        dtype = matmul_dtype(config.run, session.device)
        devices = [session.device] if session.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # the measurement draws numbers, and checkpoints hold the generators
            peak = measured_peak_flops(session.device, dtype)
        self.full_clips_per_s = peak * world.size / task.flops
        parts = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in parameters_by_part(take.model).items())
        say = session.log.say
        say(f"model   {task.title}: {parts} parameters")
        say(
            f"paths   kernels: {active_path(session.device)}; "
            f"attention: {active_backend(session.device, dtype)}{' where not measured' * bool(devices)}; "
            f"step: {take.compiled}; {str(dtype).removeprefix('torch.')}, matrices at {peak / 1e12:.3g} TFLOP/s"
        )
        shared = "" if take.passes == world.size == 1 else f" ({world.size} processes in {take.passes} passes)"
        say(
            f"steps   {self.first} done of {self.steps}: {config.optim.epochs:g} epochs, "
            f"{config.optim.batch} clips a step{shared}"
        )
        session.write_config()

    def train(self) -> TrainResult:
        """Runs the steps that are left, or as many as a signal allows."""
        session, task = self.session, self.task
        config, stop = session.config, session.stop
        step, ended = self.first, 0
        window = _Window(task.loader)
        vote = Vote(session.world)
        self.readout = Readout(session.device)
        self.in_a_row = 0
        self.last = ""  # numbers of the newest log line, in words
        videos: list[Tensor] = []
        flags: list[Tensor] = []
        try:
            stream = task.batches(self.first * self.take.passes)
            bar = tqdm(
                total=self.steps,
                initial=self.first,
                desc=task.title,
                unit="step",
                disable=None if session.progress else True,
                smoothing=0.05,
            )
            profiling = profiled(config.run.profile if session.world.main else 0, session.folder / "profile")
            with bar, paused_gc(), stop.looping(), profiling as profiler_step:
                ended = self._between(step, window) if step else 0
                while step < self.steps and not ended:
                    try:
                        with stop.interruptible(session.world.size == 1):
                            batches = [next(stream) for _ in range(self.take.passes)]
                    except Interrupted:  # a loader that hangs must not keep what is done from being saved
                        ended = int(stop.received or 0)
                        break
                    logged = (step + 1) % config.run.log_every == 0 or step + 1 == self.steps
                    rate = learning_rate(
                        step, self.steps, self.steps_per_epoch, config.optim, global_batch=config.optim.batch
                    )
                    clips = [(batch.clip.permute(0, 4, 1, 2, 3), beside) for batch, beside in batches]
                    if step == self.first and (found := self.take.settle(step, clips)):
                        session.log.say(f"step    {found}")
                    values = self.take(step, clips, rate, inspect=logged)
                    step += 1
                    profiler_step()
                    bar.update()
                    flags.append(values.pop("bad"))
                    videos.append(torch.stack([batch.video for batch, _ in batches]))
                    self._write(bar)
                    if logged:
                        session.exchange_skips(task.loader)
                        numbers = window.close(step, config.optim.batch)
                        if "clips_per_s" in numbers:
                            numbers["mfu"] = numbers["clips_per_s"] / self.full_clips_per_s
                        numbers |= {"learning_rate": rate, "epoch": step / self.steps_per_epoch}
                        self.readout.put(step, values, torch.stack(flags), numbers, videos, session.world)
                        flags, videos = [], []
                    ended = self._between(step, window)
                    if step % config.run.save_every == 0 and step < self.steps:
                        self._write(bar, wait=True)  # a run that goes on from here does not log these steps again
                        self._save(step)
                    ended = ended or vote(int(stop.received or 0))
                self._write(bar, wait=True)
                self._save(step, last=True)
        finally:
            task.loader.close()
        session.exchange_skips(task.loader)
        return self._result(step, ended)

    def _between(self, step: int, window: _Window) -> int:
        """Lets the task work, which no rate counts; the signal that ended its work early, or 0."""
        start = time.perf_counter()
        try:
            self.task.between(step, self.steps)
        except Interrupted:
            return int(self.session.stop.received or 0)
        window.leave_out(time.perf_counter() - start)
        return 0

    def _write(self, bar: Any, *, wait: bool = False) -> None:
        """Writes the log line whose numbers have come from the device, if there is one."""
        session = self.session
        for line in self.readout.take(wait=wait):
            bad = [step for step, flag in zip(line.steps, line.bad, strict=True) if flag]
            numbers = line.numbers
            if bad:
                numbers["skipped_steps"] = len(bad)
                self._name_clips(bad, line.videos)
            for flag in line.bad:
                self.in_a_row = self.in_a_row + 1 if flag else 0
            if session.device.type == "cuda":
                numbers["memory_gib"] = used_gib(session.device)
            session.log.write(line.steps[-1], numbers)
            shown = {**self.task.shown, **SHOWN}
            self.last = " ".join(form.format(numbers[name]) for name, form in shown.items() if name in numbers)
            bar.set_postfix_str(self.last, refresh=False)
            if self.in_a_row >= session.config.run.max_nonfinite:
                raise session.world.error(
                    f"{self.in_a_row} steps in a row had a loss or gradient that is not finite; the last checkpoint of "
                    f"{session.folder} is sound. Lower optim.base_lr, set optim.clip_norm, or use run.precision=float32"
                )

    def _name_clips(self, bad: list[int], videos: dict[int, list[int]]) -> None:
        """Lists the clips of steps that were left out in nonfinite.tsv."""
        session = self.session
        mine = [(step, session.manifest.videos[place].path) for step in bad for place in sorted(set(videos[step]))]
        rows = [row for part in session.world.gather(mine) for row in part]
        file = session.folder / "nonfinite.tsv"
        numbers = ", ".join(map(str, bad))
        session.log.say(f"step {numbers}: loss or gradient not finite, left out; the clips are named in {file}")
        if session.world.main:
            with file.open("a", encoding="utf-8", errors="surrogateescape") as stream:
                stream.writelines(f"{step}\t{path}\n" for step, path in sorted(rows))

    def _save(self, step: int, *, last: bool = False) -> None:
        """Starts a checkpoint; the last one is waited for, and only then a full disk is an error."""
        problem = self.saver.save(step, self.take.model, self.take.optimizer, self.take.extra_state())
        if last:
            problem = self.saver.wait()
        if problem is None:
            return
        whole = checkpoint.newest(self.session.folder)
        message = f"a checkpoint cannot be written: {problem}; the last whole one is {whole}"
        if last:
            raise UserError(f"step {step}: {message}")
        self.session.log.say(f"step {step}: {message}. The run goes on, the next attempt is at the next checkpoint")

    def _result(self, step: int, ended: int) -> TrainResult:
        session = self.session
        unusable = len(session.unusable)
        used = len(session.manifest.videos) + len(session.manifest.skipped) - unusable
        where = f" (named in {session.folder / 'skipped.tsv'})" if unusable else ""
        name = signal.Signals(ended).name if ended else ""
        how = f"stopped by {name} after step {step}; --resume goes on" if ended else f"done: {step} steps"
        folder = checkpoint.folder_of(session.folder, step)
        if self.last:
            session.log.say(f"last    {self.last}")
        session.log.say(f"{how}; {used} videos used, {unusable} unusable{where}; checkpoint {folder}")
        return TrainResult(step=step, steps=self.steps, checkpoint=folder, used=used, skipped=unusable, signal=ended)


class _Window:
    """Rates since the last log line."""

    def __init__(self, loader: ClipLoader) -> None:
        self._loader = loader
        self._restart(None)

    def _restart(self, step: int | None) -> None:
        self._start, self._step = time.perf_counter(), step
        self._waited, self._decoded = self._loader.wait_s, self._loader.decoded_frames

    def leave_out(self, seconds: float) -> None:
        self._start += seconds

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
