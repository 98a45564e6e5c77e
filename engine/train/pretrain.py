"""Pre-training: video files → clips → codes → MAM2 (or VideoMAE) → checkpoints.

    RUN/config.json  manifest.jsonl  skipped.tsv  tokenizer.safetensors  log.jsonl  log.txt  tensorboard/
        checkpoints/step-…/

The clips and masks of a step are a pure function of (seed, step), and nothing else in the step is random. So a
run goes on from a checkpoint as if it had never stopped, and only the step number has to be remembered.
"""

from __future__ import annotations

import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mam2.engine.config import PretrainConfig, UserError, check, to_dict
from mam2.engine.data.decoding import available_cores
from mam2.engine.data.loader import Batch, ClipLoader
from mam2.engine.data.manifest import Manifest, Skipped, read_manifest, read_saved_manifest, write_manifest
from mam2.engine.model.attention import active_backend
from mam2.engine.model.mam2 import MAM2
from mam2.engine.model.presets import parameters_by_part
from mam2.engine.model.videomae import VideoMAE
from mam2.engine.train import checkpoint
from mam2.engine.train.metrics import RunLog
from mam2.engine.train.objective import Objective, build_objective
from mam2.engine.train.optimizer import build_optimizer, learning_rate
from mam2.engine.train.runtime import StopSignal, autocast, compiler, matmul_dtype, pick_device
from mam2.engine.train.tokenizer import prepare_tokenizer
from mam2.kernels import active_path, tube_mask

MANIFEST = "manifest.jsonl"
NONFINITE_LIMIT = 20
"""Consecutive steps with a gradient that is not finite after which a run stops."""


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
        out: the run folder; made if missing. One that holds a checkpoint is only touched with `resume`.
        resume: go on from the newest checkpoint in `out`, if there is one.
        progress: draw a progress bar (only on a terminal).

    Raises:
        UserError: for data, configs and checkpoints that cannot be used.
    """
    check(config)
    run = Path(out)
    if checkpoint.newest(run) and not resume:
        raise UserError(f"{run} holds a run: add --resume to go on with it, or name another folder with --out")
    device = pick_device(config.run)
    try:
        run.mkdir(parents=True, exist_ok=True)
        log = RunLog(run)
    except OSError as error:
        raise UserError(f"--out {run}: cannot be written: {error.strerror}; name another folder") from None
    try:
        with StopSignal() as stop:
            return _Run(config, Path(data), run, device, log, stop, resume, progress).train()
    finally:
        log.close()


class _Run:
    """One call of `pretrain`: sets up in its constructor, loops in `train`."""

    def __init__(
        self,
        config: PretrainConfig,
        data: Path,
        run: Path,
        device: torch.device,
        log: RunLog,
        stop: StopSignal,
        resume: bool,
        progress: bool,
    ) -> None:
        self.config, self.run, self.device, self.log, self.stop, self.progress = (
            config,
            run,
            device,
            log,
            stop,
            progress,
        )
        optim = config.optim
        folder = checkpoint.newest(run)
        if folder:
            _same_run(config, folder)
        log.say(f"run     {run} on {_machine(device)}")

        if folder:
            log.say(f"resume  from {folder}, with its own list of videos ({run / MANIFEST})")
        self.manifest = _manifest(data, run, config, saved=folder is not None, progress=progress)
        for skipped in self.manifest.skipped:
            self._skip(skipped)
        self.loader = ClipLoader(
            self.manifest,
            config.data,
            batch=optim.batch // optim.accumulate,
            device=device,
            seed=config.run.seed,
            on_skip=self._skip,
        )
        front_ends = ", ".join(f"{count} by {name}" for name, count in self.loader.front_ends.items())
        unusable = len(self.manifest.skipped) + len(self.loader.skipped)
        log.say(f"data    {sum(self.loader.front_ends.values())} videos, decoded {front_ends}; {unusable} unusable")

        tokenizer = None
        if config.model.objective == "mam2":
            tokenizer = prepare_tokenizer(config, self.loader, run, device, log, progress=progress)
        # Weights are drawn after the tokenizer's training, which uses the generator as well.
        torch.manual_seed(config.run.seed)
        self.model: nn.Module = MAM2(config, tokenizer.codebook_size) if tokenizer else VideoMAE(config)
        self.model.to(device)
        self.optimizer = build_optimizer(self.model, optim)
        self.first = checkpoint.restore(folder, self.model, self.optimizer) if folder else 0
        compiled, how = compiler(config.run, device)
        self.objective: Objective = build_objective(self.model, tokenizer, config, compiled)  # type: ignore[arg-type]

        self.steps_per_epoch = self.loader.steps_per_epoch / optim.accumulate
        self.steps = max(round(optim.epochs * self.steps_per_epoch), 1)
        parts = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in parameters_by_part(self.model).items())
        log.say(f"model   {config.model.objective}: {parts} parameters")
        dtype = matmul_dtype(config.run, device)
        head = config.model.width // config.model.heads
        log.say(
            f"paths   kernels: {active_path(device)}; attention: {active_backend(device, dtype, head)}; "
            f"step: {how}; {str(dtype).removeprefix('torch.')}"
        )
        log.say(f"steps   {self.first} done of {self.steps}: {optim.epochs:g} epochs, {optim.batch} clips a step")
        (run / "config.json").write_text(json.dumps(to_dict(config), indent=1) + "\n", encoding="utf-8")

    def train(self) -> PretrainResult:
        config, optim = self.config, self.config.optim
        try:
            stream = self.loader.stream(first_step=self.first * optim.accumulate)
            bar = tqdm(
                total=self.steps,
                initial=self.first,
                desc="pre-training",
                unit="step",
                disable=None if self.progress else True,
                smoothing=0.05,
            )
            step = self.first
            window = _Window(self.loader)
            nonfinite = torch.zeros(2, device=self.device)  # consecutive, in this window
            with bar:
                self.stop.in_loop = True
                while step < self.steps and not self.stop.received:
                    logged = (step + 1) % config.run.log_every == 0 or step + 1 == self.steps
                    values = self._step(step, [next(stream) for _ in range(optim.accumulate)], nonfinite, logged)
                    step += 1
                    bar.update()
                    if logged:
                        numbers = self._read(values, nonfinite, window, step)
                        self.log.write(step, numbers)
                        bar.set_postfix_str(_postfix(numbers), refresh=False)
                    if step % config.run.save_every == 0 and step < self.steps:
                        self._save(step)
            folder = self._save(step)
        finally:
            self.stop.in_loop = False
            self.loader.close()
        skipped = len(self.manifest.skipped) + len(self.loader.skipped)
        used = len(self.manifest.videos) - len(self.loader.skipped)
        where = f" (named in {self.run / 'skipped.tsv'})" if skipped else ""
        received = self.stop.received
        how = f"stopped by {received.name} after step {step}; --resume goes on" if received else f"done: {step} steps"
        self.log.say(f"{how}; {used} videos used, {skipped} unusable{where}; checkpoint {folder}")
        return PretrainResult(
            step=step, steps=self.steps, checkpoint=folder, used=used, skipped=skipped, signal=int(received or 0)
        )

    def _step(self, step: int, batches: list[Batch], nonfinite: Tensor, logged: bool) -> dict[str, Tensor]:
        """One optimiser step. Nothing is read back from the device; a gradient that is not finite changes no weight."""
        config, optim = self.config, self.config.optim
        rate = learning_rate(step, self.steps, self.steps_per_epoch, optim, global_batch=optim.batch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        values: dict[str, Tensor] = {}
        for index, batch in enumerate(batches):
            video = batch.clip.permute(0, 4, 1, 2, 3)
            mask = tube_mask(
                len(video),
                config.grid,
                config.mask.ratio,
                seed=config.run.seed,
                step=step,
                first_sample=index * len(video),
                device=self.device,
            )
            with autocast(config.run, self.device):
                losses = self.objective.backward(video, mask, 1 / optim.accumulate)
                for name, value in losses.items():
                    values[name] = values.get(name, 0) + value / optim.accumulate
                if logged and index == 0:
                    values |= self.objective.inspect(video, mask)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if optim.clip_norm:
            nn.utils.clip_grads_with_norm_(parameters, optim.clip_norm, norm)
        bad = (~torch.isfinite(norm)).float()
        # AdamW's fused kernel reads this flag on the device and leaves weights and moments as they are.
        self.optimizer.found_inf = bad  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()
        nonfinite[0] = (nonfinite[0] + 1) * bad
        nonfinite[1] += bad
        return {**values, "gradient/norm": norm, "learning_rate": torch.tensor(rate)}

    def _read(self, values: dict[str, Tensor], nonfinite: Tensor, window: _Window, step: int) -> dict[str, float]:
        """The numbers of a log line: the one place where the loop waits for the device."""
        names = list(values)
        packed = torch.stack([values[name].float().to(self.device) for name in names] + list(nonfinite))
        *read, consecutive, in_window = packed.tolist()
        nonfinite[1] = 0
        numbers = dict(zip(names, read, strict=True)) | window.close(step, self.config.optim.batch)
        numbers["epoch"] = step / self.steps_per_epoch
        if in_window:
            numbers["skipped_steps"] = in_window
            self.log.say(f"step {step}: {in_window:.0f} steps with a gradient that is not finite were left out")
        if consecutive >= NONFINITE_LIMIT:
            raise UserError(
                f"{consecutive:.0f} steps in a row had a gradient that is not finite; the last checkpoint of "
                f"{self.run} is sound. Lower optim.base_lr, set optim.clip_norm, or use run.precision=float32"
            )
        if self.device.type == "cuda":
            numbers["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return numbers

    def _save(self, step: int) -> Path:
        try:
            return checkpoint.save(self.run, step, self.model, self.optimizer, self.config, keep=self.config.run.keep)
        except OSError as error:
            last = checkpoint.newest(self.run)
            raise UserError(
                f"checkpoint of step {step} cannot be written: {error}; the last whole one is {last}"
            ) from None

    def _skip(self, skipped: Skipped) -> None:
        """Names a file that cannot be used, once, in the log and in skipped.tsv."""
        self.log.say(f"unusable: {skipped.path}: {skipped.reason}")
        with (self.run / "skipped.tsv").open("a", encoding="utf-8", errors="surrogateescape") as file:
            file.write(f"{skipped.path}\t{skipped.reason}\n")


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


def _same_run(config: PretrainConfig, folder: Path) -> None:
    """Raises UserError where a resumed run would not continue the saved one."""
    before, now = checkpoint.read_state(folder)["config"], to_dict(config)
    free = {
        "run": {"log_every", "save_every", "keep", "compile", "device"},
        "data": {"threads", "prefetch", "max_unusable"},
    }
    for table, values in now.items():
        for key, value in values.items():
            old = before.get(table, {}).get(key)
            if key not in free.get(table, ()) and old != value:
                raise UserError(
                    f"{folder} was written with {table}.{key} = {old!r}, this call says {value!r}: "
                    f"use the saved values ({folder.parent.parent / 'config.json'}) or start a new run"
                )


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{available_cores()} CPU cores ({platform.machine()}), torch {torch.__version__}"
