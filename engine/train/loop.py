"""The training loop shared by pre-training and fine-tuning: batches, steps, log lines, checkpoints.

It saves at the end. The inputs of a step are pure functions of (seed, step), and nothing else in it is random. A run
therefore resumes from a checkpoint as if it had never stopped, and only the step number must be saved.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from mam2.engine.checkpoints import checkpoint
from mam2.engine.checkpoints.host_copies import HostBuffers
from mam2.engine.checkpoints.saver import Saver
from mam2.engine.config.training import equal_passes
from mam2.engine.data.batch import Batch
from mam2.engine.errors import UserError
from mam2.engine.runtime.compile_cache import keep_compiled_code
from mam2.engine.runtime.device import compile_problem, paused_gc, profiled
from mam2.engine.runtime.distributed import StopConsensus, first_line
from mam2.engine.runtime.progress import BAR, Progress
from mam2.engine.runtime.signals import Interrupted, end_soon
from mam2.engine.train.description import Description
from mam2.engine.train.optimizer import (
    describe,
    first_decay_step,
    learning_rate,
    long_warmup,
    total_steps,
    why_not_extended,
)
from mam2.engine.train.session import Session
from mam2.engine.train.step import Step, out_of_memory
from mam2.engine.train.step_log import StepLog
from mam2.engine.train.step_times import StepTimes, describe_times
from mam2.engine.units import counted

Extras = TypeVar("Extras")
CLIPS_PER_PASS = "clips_per_pass"
"""Key of a checkpoint's metadata: clips per pass that `optim.micro_batch auto` has found."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    step: int
    """Optimizer steps done in total."""
    steps: int
    """Optimizer steps of the recipe."""
    checkpoint: Path
    """Folder of the last checkpoint."""
    used: int
    """Number of usable videos."""
    skipped: int
    """Number of unusable videos."""
    signal: int
    """Number of the signal that ended the run early, or 0."""


class Task(Protocol[Extras]):
    """The task of a loop. `Extras` are further inputs of a step per batch: codes, or targets and drop factors."""

    @property
    def train_step(self) -> Step[Extras]: ...

    def batches(self, first_micro_batch: int) -> Iterator[tuple[Batch, Extras]]:
        """Yields endless batches of the session's loader with their extras, from micro-batch `first_micro_batch` on."""

    def after_step(self, step: int, steps: int) -> None:
        """Called with the number of steps done, of `steps` in all: after each step before its checkpoint is written,
        and where a resumed run begins. Wrap long work in `session.stop.interruptible()`, so that a signal can end it.
        """

    def describe(self) -> Description:
        """Returns the task's description for the log, the progress bar and the checkpoints."""


class Loop:
    """One call of `train`, set up by the constructor."""

    def __init__(self, session: Session[Any], task: Task[Any]) -> None:
        self.session, self.task, self.train_step = session, task, task.train_step
        config, world, train_step = session.config, session.world, task.train_step
        self.first = 0
        """Steps done before this call."""
        if session.saved:
            self.first = checkpoint.restore(
                session.saved, train_step.model, train_step.optimizer, train_step.extra_state()
            )
        self.description = task.describe()
        self.step, self.sound = self.first, True
        """Steps done, and whether weights and moments are those after this number of steps."""
        self.updates, self.recorded = 0, False
        """Updates reported by the optimizer; a captured step (CUDA graph) reports none."""
        train_step.optimizer.register_step_pre_hook(self._note_update)
        self.times = ""
        """Where the time of the newest log line's steps went, in words."""
        self.step_log = StepLog(session, self.description.progress_format)
        self.steps_per_epoch = session.steps_per_epoch
        self.steps = total_steps(config.optim, self.steps_per_epoch)
        if session.saved:
            before = checkpoint.read_config(session.saved, type(config)).optim
            if problem := why_not_extended(before, config.optim, self.first, self.steps_per_epoch):
                raise session.world.error(
                    f"{session.saved}: {problem}; docs/training.md, Train long, describes how to extend it"
                )
        stable = config.optim.schedule == "warmup-stable-decay"
        self.last_stable = first_decay_step(self.steps, self.steps_per_epoch, config.optim) if stable else 0
        """Steps before the learning rate decreases, whose checkpoint is kept: a longer run can start from it."""
        self.saver = Saver(
            session.folder,
            config,
            main=world.main,
            metadata=self.description.metadata,
            buffers=HostBuffers(session.device, session.log.info) if session.device.type == "cuda" else None,
            kept_step=self.last_stable,
        )
        for line in self.description.lines:
            session.log.info(line)
        shared = (
            ""
            if train_step.micro_batches == world.size == 1
            else f" ({counted(world.size, 'process')}, {counted(train_step.micro_batches, 'pass')} each)"
        )
        session.log.info(
            f"steps   {self.first} done of {self.steps}: {counted(config.optim.epochs, 'epoch')}, "
            f"{counted(config.optim.batch, 'clip')} per step{shared}, {describe(self.train_step.optimizer)}"
        )
        if problem := long_warmup(config.optim):
            session.log.info(f"warning: {problem}")
        session.write_config()

    def train(self) -> TrainResult:
        """Runs the remaining steps, or until a signal. Saves the last valid state, whatever ends the run."""
        session = self.session
        ended = 0
        try:
            with session.stop.looping():
                try:
                    ended = self._run()
                except Exception as error:
                    raised = self._rescued(error)
                    if raised is error:
                        raise
                    raise raised from error
                self._save(self.step, last=True)
                session.exchange_skips()
                return self._result(ended)
        finally:
            if ended:
                end_soon(ended)  # everything is saved, so there is no need to wait for decoding threads

    def _run(self) -> int:
        """Runs the steps; returns the signal that ended them early, or 0."""
        session, step_log = self.session, self.step_log
        config, stop, info = session.config, session.stop, session.log.info
        ended = 0
        times = StepTimes(session.loader, self.train_step.lead, self.train_step.extras_timer)
        stop_consensus = StopConsensus(session.world)
        stream = self.task.batches(self.first * self.train_step.micro_batches)
        bar = Progress(
            desc=self.description.title,
            total=self.steps,
            initial=self.first,
            unit="step",
            shown=session.progress,
            smoothing=0.05,
            bar_format=BAR,
        )
        profile_steps = config.run.profile if session.world.main else 0
        profiling = profiled(profile_steps, session.folder / "profile", info)
        with bar, paused_gc(), profiling as profiler_step:
            ended = self._after_step(times) if self.step else 0
            began = time.perf_counter()
            compiles = self.train_step.compiled.startswith("compiled") and self.step < self.steps and not ended
            if compiles:  # the tokenizer is also compiled, at the first batch
                kept = keep_compiled_code()
                less = "" if config.run.compile_blocks else "--run.compile-blocks compiles less, "
                info(
                    f"step    the first step compiles the model, which can take minutes; {less}--run.no-compile "
                    "compiles nothing. "
                    + (f"The code is kept in {kept} for later runs" if kept else "Later runs compile again")
                )
            while self.step < self.steps and not ended:
                with stop.nothing_to_save(self.step == self.first and session.world.size == 1):
                    try:
                        with times.phase("batch"), stop.interruptible(session.world.size == 1):
                            batches = [next(stream) for _ in range(self.train_step.micro_batches)]
                    except Interrupted:  # a hanging loader must not prevent the checkpoint
                        return int(stop.received or 0)
                    except torch.OutOfMemoryError as error:  # in the tokenizer or the augmentation, outside of the step
                        raise out_of_memory(config, session.clips_per_micro_batch, error) from error
                    logged = (self.step + 1) % config.run.log_every == 0 or self.step + 1 == self.steps
                    rate = learning_rate(
                        self.step, self.steps, self.steps_per_epoch, config.optim, global_batch=config.optim.batch
                    )
                    clips = [(batch.video, extras) for batch, extras in batches]
                    with times.phase("step"):
                        values = self._run_step(clips, rate, inspect=logged)
                if compiles:
                    info(f"step    the first step is done, compiled in {time.perf_counter() - began:.0f} s")
                    compiles = False
                profiler_step()
                bar.update()
                step_log.add(values, [batch for batch, _ in batches])
                step_log.write(bar)
                if logged:
                    session.exchange_skips()
                    numbers = times.close(self.step, config.optim.batch)
                    self.times = describe_times(numbers) or self.times
                    if "clips_per_s" in numbers:
                        numbers["mfu"] = numbers["clips_per_s"] / self.description.full_clips_per_s
                    numbers |= {"learning_rate": rate, "epoch": self.step / self.steps_per_epoch}
                    numbers |= session.set_numbers(self.step)
                    step_log.put(self.step, values, numbers)
                ended = self._after_step(times)
                due = self.step % config.run.save_every == 0 or self.step == self.last_stable
                if due and self.step < self.steps:
                    step_log.write(bar, wait=True)  # a run that resumes here does not log these steps again
                    self._save(self.step)
                ended = ended or stop_consensus(int(stop.received or 0))
            step_log.write(bar, wait=True)
        return ended

    def _run_step(self, clips: list[tuple[Tensor, Any]], rate: float, *, inspect: bool) -> dict[str, Tensor]:
        """Runs one step; `self.step` and `self.sound` describe the state of the weights."""
        if self.step == self.first:
            self._choose_passes(clips)
            if found := self.train_step.maybe_capture_cuda_graph(self.step, clips):
                self.session.log.info(f"step    {found}")
        updates = self.updates
        self.sound = not self.recorded  # a captured step does not report whether its update ran
        values = self.train_step(self.step, clips, rate, inspect=inspect, progress=self.step / self.steps)
        self.recorded = self.updates == updates
        self.step += 1
        self.sound = True
        return values

    def _choose_passes(self, clips: list[tuple[Tensor, Any]]) -> None:
        """Applies `optim.micro_batch auto`; a resumed run keeps the passes of its checkpoint, on which bits depend."""
        session, train_step, share = self.session, self.train_step, len(clips[0][0])
        if session.config.optim.micro_batch != "auto":
            return
        kept = int(checkpoint.read_metadata(session.saved).get(CLIPS_PER_PASS, "0")) if session.saved else 0
        if kept:
            train_step.passes = next(
                n for n in equal_passes(share, session.config.clips_per_group) if share // n <= kept
            )
            found = f"optim.micro_batch auto: {share // train_step.passes} clips per pass, as in the resumed checkpoint"
        else:
            found = train_step.choose_passes(self.step, clips) or ""
        session.log.info(f"step    {found}")
        if kept or train_step.tries_passes:
            self.saver.add_metadata(CLIPS_PER_PASS, str(share // train_step.passes))

    def _note_update(self, *_: object) -> None:
        """Called before the optimizer changes weights, which are neither old nor new until the step ends."""
        self.updates += 1
        self.sound = False

    def _rescued(self, error: Exception) -> Exception:
        """Saves the last valid state before an error ends the run; returns the error to raise, with the checkpoint."""
        problem = compile_problem(error)
        saved = ""
        if self.step > self.first:
            with contextlib.suppress(Exception):  # only log lines are lost
                self.step_log.write_lines(wait=True)
            place = self._save_before_end(error)
            self.session.log.info(f"error   {place}")
            saved = f"; {place}"
        if problem:
            return UserError(f"{problem}{saved}")
        if isinstance(error, UserError):
            error.args = (f"{error}{saved}",)
        return error

    def _save_before_end(self, error: Exception) -> str:
        """Saves the state after the last complete step if it is valid; returns a sentence about the checkpoint."""
        session, world, step = self.session, self.session.world, self.step
        # With several processes, the others may not have this error; then nothing can be saved that needs them. On a
        # GPU, a queued step may exchange gradients with processes that have ended.
        alone = world.size > 1 and not getattr(error, "everywhere", False)
        reason = "" if self.sound else "its last step is incomplete"
        if alone and (session.config.run.sharding == "fsdp" or session.device.type == "cuda"):
            reason = "saving needs the other processes"
        if not reason:
            try:
                self._save(step, last=True)
                return f"the state after step {step} is saved in {checkpoint.folder_of(session.folder, step)}"
            except Exception as failure:
                reason = first_line(failure)
        whole = checkpoint.newest(session.folder)
        where = f"the last complete checkpoint is {whole}" if whole else "there is no checkpoint"
        return f"the state after step {step} is not saved ({reason}); {where}"

    def _after_step(self, times: StepTimes) -> int:
        """Runs the task's hook, whose time no rate counts; returns the signal that ended it early, or 0."""
        start = time.perf_counter()
        try:
            self.task.after_step(self.step, self.steps)
        except Interrupted:
            return int(self.session.stop.received or 0)
        times.leave_out(time.perf_counter() - start)
        return 0

    def _save(self, step: int, *, last: bool = False) -> None:
        """Starts a checkpoint; waits for the last one of the run, where a full disk raises."""
        session = self.session
        if session.lock and session.lock.lost:
            raise UserError(f"step {step}: another process has taken over {session.folder}, so nothing is saved here")
        problem = self.saver.save(step, self.train_step.model, self.train_step.optimizer, self.train_step.extra_state())
        if last:
            problem = self.saver.wait()
        folder = checkpoint.folder_of(session.folder, step)
        if problem is None:
            if last and session.world.main and not folder.is_dir():
                raise UserError(f"step {step}: {folder} was written but has disappeared; check the disk")
            return
        whole = checkpoint.newest(session.folder)
        there = f"the last complete one is {whole}" if whole else "there is none yet"
        message = f"a checkpoint cannot be written: {problem}; {there}"
        if last:
            raise UserError(f"step {step}: {message}")
        session.log.info(f"step {step}: {message}. The run continues and tries again at the next checkpoint")

    def _result(self, ended: int) -> TrainResult:
        session, step = self.session, self.step
        unusable = len(session.unusable)
        used = session.unusable.total - unusable
        where = f" (listed in {session.folder / 'skipped.tsv'})" if unusable else ""
        name = signal.Signals(ended).name if ended else ""
        how = (
            f"stopped by {name} after step {step}; continue with --resume"
            if ended
            else f"done: {counted(step, 'step')}"
        )
        folder = checkpoint.folder_of(session.folder, step)
        if self.step_log.last:
            session.log.info(f"last    {self.step_log.last}")
        if self.times:
            session.log.info(f"time    {self.times}")
        best = session.folder / checkpoint.BEST
        if session.world.main and best.is_dir():
            found = checkpoint.read_state(best)
            measured = ", ".join(f"{name} {value:.4g}" for name, value in found.items() if isinstance(value, float))
            session.log.info(f"best    after step {found['step']}: {measured}; {best}")
        if seen := session.describe_seen(step):
            session.log.info(f"data    {seen}")
        session.log.info(f"{how}; {counted(used, 'video')} used, {unusable} unusable{where}; checkpoint {folder}")
        return TrainResult(step=step, steps=self.steps, checkpoint=folder, used=used, skipped=unusable, signal=ended)
