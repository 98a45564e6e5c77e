"""Everything around the training loop: run folder, log, resume state, manifest, loaders, unusable videos.

RUN/config.json  manifest.jsonl  skipped.tsv  log.jsonl  log.txt  tensorboard/
    nonfinite.tsv  checkpoints/latest  checkpoints/step-…/  lock
"""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from tqdm import tqdm

from mam2.engine.checkpoints import checkpoint
from mam2.engine.checkpoints.lock import RunLock
from mam2.engine.config.limits import resumable_keys, with_present_names
from mam2.engine.config.recipe import to_dict
from mam2.engine.config.training import TrainConfig, micro_batches_per_step
from mam2.engine.data.decoder_share import divide
from mam2.engine.data.decoding import available_cores
from mam2.engine.data.loader import ClipLoader
from mam2.engine.data.manifest import MANIFEST, Manifest, read_saved_manifest, write_manifest
from mam2.engine.data.moved import follow_sets
from mam2.engine.data.sets import Sources, describe_seen, describe_sets, read_sets, set_numbers, sources_of
from mam2.engine.data.unusable import UnusableVideos
from mam2.engine.data.video import Skipped
from mam2.engine.errors import UserError
from mam2.engine.files import append_rows, write_whole
from mam2.engine.runtime.device import determinism, pick_device
from mam2.engine.runtime.distributed import World, join
from mam2.engine.runtime.log import Log, RunLog, SilentLog
from mam2.engine.runtime.signals import StopSignal
from mam2.engine.units import counted

SKIPPED = "skipped.tsv"
EXTENDABLE = {"optim.epochs", "optim.decay_share"}
"""Keys whose values may change while the learning rate of `warmup-stable-decay` is still constant."""
MOST_UNTRIED = 64
"""Maximum clips of a forward pass without gradients whose memory nothing has tried."""
OF_MUON = {"optim.muon_rate", "optim.momentum"}
"""Keys that AdamW does not read."""

Config = TypeVar("Config", bound=TrainConfig)
Available = Callable[[int, int], bool]
"""Whether a clip can be used: index in manifest.videos, recorded augmentation."""


@dataclass(frozen=True, kw_only=True)
class RunContext(Generic[Config]):
    """An open run, from the view of one of its processes; its videos may not be read yet."""

    config: Config
    folder: Path
    device: torch.device
    world: World
    log: Log
    stop: StopSignal
    lock: RunLock | None
    """Held by rank 0."""
    saved: Path | None
    """The checkpoint that the run continues from; None for a new run."""
    progress: bool
    """Whether to draw progress bars."""

    @property
    def clips_per_micro_batch(self) -> int:
        """Clips of one forward pass of one process."""
        return self.config.optim.batch // (self.world.size * self.micro_batches)

    @property
    def clips_without_gradients(self) -> int:
        """Clips of one forward pass without gradients. With `optim.micro_batch auto` the loader yields a process's
        whole share of the batch, which may not fit into a GPU's memory at once."""
        auto = self.config.optim.micro_batch == "auto"
        return min(self.clips_per_micro_batch, MOST_UNTRIED) if auto else self.clips_per_micro_batch

    @property
    def micro_batches(self) -> int:
        """Forward passes of each process per optimizer step."""
        return micro_batches_per_step(self.config, self.world.size)


@dataclass(frozen=True, kw_only=True)
class Session(RunContext[Config]):
    """A run whose videos are read and whose training loader is open. It closes all its loaders at its end."""

    manifest: Manifest
    """The training videos."""
    loader: ClipLoader
    """Training clips: each batch is one micro-batch of this process."""
    unusable: UnusableVideos
    """Unusable videos of `manifest` that all ranks know; see `exchange_skips`."""
    resources: ExitStack

    @property
    def steps_per_epoch(self) -> float:
        """Returns the optimizer steps in which all ranks together see as many samples as there are usable videos."""
        return self.loader.steps_per_epoch / self.micro_batches

    def set_numbers(self, step: int) -> dict[str, float]:
        """Returns clips seen and passes of each data set after `step` steps; none for a single data set."""
        views = self.config.data.views
        return set_numbers(self.manifest, self.loader.order, step * self.config.optim.batch // views, views)

    def describe_seen(self, step: int) -> str:
        """Returns a line about each data set after `step` steps; empty for a single data set."""
        return describe_seen(self.manifest, self.unusable, self.set_numbers(step)) if self.manifest.sets else ""

    def own(self, loader: ClipLoader) -> ClipLoader:
        """Closes a further loader, for validation, together with the session."""
        return self.resources.enter_context(loader)

    def exchange_skips(self) -> None:
        """Exchanges the unusable files of all ranks. Raises on all ranks if there are too many."""
        for found in self.world.all_gather(list(self.loader.skipped)):
            for skipped in found:
                self.unusable.add(skipped)
        if problem := self.unusable.too_many():
            raise self.world.error(problem)

    def write_config(self) -> None:
        """Writes the config into RUN/config.json."""
        if self.world.main:
            write_whole(self.folder / "config.json", json.dumps(to_dict(self.config), indent=1) + "\n")


class Setup(Generic[Config]):
    """Hooks of a kind of training while its session opens. Every rank calls the methods in this order."""

    def check(self, run: RunContext[Config]) -> None:
        """Checks inputs before the videos are opened, which can take hours. Raises UserError."""

    def complete(self, run: RunContext[Config], manifest: Manifest) -> tuple[Config, Manifest]:
        """Returns the config and the manifest, completed from the data and other files."""
        return run.config, manifest

    def available(self, run: RunContext[Config], manifest: Manifest) -> Available | None:
        """Returns a function that tells which clips can be used; None: all."""
        return None

    @property
    def decodes(self) -> bool:
        """Whether training clips are decoded from the videos."""
        return True


@contextmanager
def open_session(
    config: Config,
    data: Sources,
    out: str | Path,
    *,
    setup: Setup[Config] | None = None,
    resume: bool,
    progress: bool,
) -> Iterator[Session[Config]]:
    """Opens a run in the folder `out` on every process that torchrun started; it ends with the block.

    Args:
        config: the user's config; `setup` may complete it.
        data: the data sets of the training videos. A resumed run keeps its list, whose order determines the clips,
            also if the videos have moved to `data`.
        out: the run folder.
        setup: the hooks of the kind of training.
        resume: continue from the newest complete checkpoint in `out`, if there is one.
        progress: draw progress bars.

    Raises:
        UserError: the folder contains a run and `resume` is not set, cannot be written, or belongs to a run with other
            values; or the videos cannot be used.
    """
    setup = setup or Setup()
    with _open_run(config, Path(out), resume=resume, progress=progress) as run, ExitStack() as resources:
        setup.check(run)
        manifest = run.world.broadcast(lambda: _read_manifest(run, sources_of(data)))
        if run.world.main:  # also emptied for a resumed run, because files may have become readable
            (run.folder / SKIPPED).unlink(missing_ok=True)
        for skipped in manifest.skipped:
            _report(run, skipped)
        config, manifest = setup.complete(run, manifest)
        unusable = UnusableVideos(manifest, config.data.max_unusable, lambda skipped: _report(run, skipped))
        run = dataclasses.replace(run, config=config)
        loader = resources.enter_context(_open_loader(run, manifest, unusable, setup.available(run, manifest)))
        parts = vars(run) | {"config": config}
        session = Session(**parts, manifest=manifest, loader=loader, unusable=unusable, resources=resources)
        session.exchange_skips()
        if setup.decodes and (
            line := divide(loader, config.data, run.device, run.folder, broadcast=run.world.broadcast)
        ):
            run.log.info(f"data    {line}")
        decoders = ", ".join(f"{count} by {name}" for name, count in loader.decoders.items())
        run.log.info(
            f"data    {counted(sum(loader.decoders.values()), 'video')}, decoded {decoders}, cropped by "
            f"{loader.cropper}; "
            f"{len(unusable)} unusable"
        )
        for line in describe_sets(manifest, loader.order, bool(config.data.weights)):
            run.log.info(line)
        yield session


@contextmanager
def _open_run(config: Config, folder: Path, *, resume: bool, progress: bool) -> Iterator[RunContext[Config]]:
    """Opens the run without its videos. Raises UserError if the folder cannot be used."""
    if checkpoint.newest(folder) and not resume:
        raise UserError(f"{folder} contains a run: pass --resume to continue it, or another folder with --out")
    device = pick_device(config.run)
    with StopSignal() as stop, join(device) as world, determinism(config.run), _opened(folder, config, world) as opened:
        micro_batches_per_step(config, world.size)
        log, lock = opened
        try:
            saved = world.broadcast(lambda: checkpoint.newest_whole(folder, log.info) if resume else None)
            run = RunContext(
                config=_as_saved(config, saved) if saved else config,
                folder=folder,
                device=device,
                world=world,
                log=log,
                stop=stop,
                lock=lock,
                saved=saved,
                progress=progress and world.main,
            )
            if saved:
                _check_continues(run, saved)
            else:
                log.start_new()
            ranks = f", {world.size} processes" if world.size > 1 else ""
            log.info(f"run     {folder} on {_machine(device)}{ranks}")
            if saved:
                log.info(f"resume  from {saved}")
            elif resume:
                log.info(f"resume  {folder} contains no complete checkpoint: the run starts from the beginning")
            yield run
        except BaseException as error:
            log.note(f"ended   {type(error).__name__}: {error}")
            raise


def _read_manifest(run: RunContext[Config], data: Sequence[Path]) -> Manifest:
    """Returns the saved list of a resumed run, else a new list of the sets `data`, written to the run folder."""
    path, config = run.folder / MANIFEST, run.config.data
    if run.saved and path.is_file():
        saved = read_saved_manifest(path)
        manifest, found = follow_sets(
            saved, data, threads=config.threads, progress=run.progress, max_missing=config.max_unusable
        )
        run.log.info(f"resume  with the run's list of videos ({path})")
        if found:
            run.log.info(f"resume  {found}")
            write_manifest(manifest, path)
        return manifest
    if run.saved:
        run.log.info(f"resume  {path} is missing: using the videos of --data; the clips of a step may differ")
    manifest = read_sets(data, threads=config.threads, progress=run.progress)
    write_manifest(manifest, path)
    return manifest


def _open_loader(
    run: RunContext[Config], manifest: Manifest, unusable: UnusableVideos, available: Available | None
) -> ClipLoader:
    config, world = run.config, run.world
    return ClipLoader(
        manifest,
        config.data,
        batch=run.clips_per_micro_batch,
        device=run.device,
        seed=config.run.seed,
        rank=world.rank,
        world=world.size,
        # with several processes, exchanged when the log is written, so that each file is reported once
        on_skip=unusable.add if world.size == 1 else None,
        available=available,
        info=run.log.info if world.main else lambda line: tqdm.write(f"rank {world.rank}: {line}"),
    )


def _report(run: RunContext[Config], skipped: Skipped) -> None:
    """Reports an unusable file in the log and in skipped.tsv."""
    run.log.info(f"unusable: {skipped.path}: {skipped.reason}")
    if run.world.main:
        try:
            append_rows(run.folder / SKIPPED, [(skipped.path, skipped.reason)])
        except OSError as error:
            run.log.info(f"log     {run.folder / SKIPPED} cannot be written: {error.strerror}")


def _as_saved(config: Config, saved: Path) -> Config:
    """Returns the config of a resumed run with the lists below as they were saved, if they are empty in it."""
    before = checkpoint.read_state(saved)["config"]["data"]
    lists = {name: tuple(before.get(name, ())) for name in ("value_range", "mean", "std")}
    kept: dict[str, Any] = {name: value for name, value in lists.items() if not getattr(config.data, name)}
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **kept))  # type: ignore[type-var]


def _check_continues(run: RunContext[Config], saved: Path) -> None:
    """Raises UserError if a resumed run would not continue the saved one; logs differences that may change bits."""
    state, now = checkpoint.read_state(saved), to_dict(run.config)
    foreign = [table for table in state["config"] if table not in now]
    if foreign:
        raise run.world.error(f"{run.folder} contains a run of another kind: its config has [{foreign[0]}]")
    free = resumable_keys(type(run.config))
    loss = now.get("loss", {})
    # the momentum of a teacher may follow the length of the run
    steady = not getattr(run.config, "needs_teacher", False) or loss["teacher_momentum"] == loss["teacher_momentum_end"]
    if steady and state["config"]["optim"].get("schedule") == now["optim"]["schedule"] == "warmup-stable-decay":
        free |= EXTENDABLE  # the loop checks that no done step had another learning rate
    if now["optim"]["name"] != "muon":  # with another optimizer than the saved one the run is refused below
        free |= OF_MUON
    defaults = to_dict(type(run.config)())  # a key newer than the checkpoint had its default
    for table, values in with_present_names(type(run.config), state["config"]).items():
        for key, old in (defaults[table] | values).items():
            if f"{table}.{key}" not in free and key in now[table] and old != now[table][key]:
                raise run.world.error(
                    f"{saved} was written with {table}.{key} = {old!r}, now it is {now[table][key]!r}: "
                    f"use the saved values ({run.folder / 'config.json'}) or start a new run; "
                    f"--checkpoint {run.folder} starts it from these weights"
                )
    for name, mine in (("code", checkpoint.code_version()), ("torch", torch.__version__)):
        if state.get(name, mine) != mine:
            run.log.info(
                f"resume  written by {name} {state[name]}, this is {mine}: results may differ in bits from here on"
            )


@contextmanager
def _opened(folder: Path, config: TrainConfig, world: World) -> Iterator[tuple[Log, RunLock | None]]:
    """Yields the run folder's log and lock on rank 0, and silent ones on other ranks.

    Raises UserError if the folder cannot be written or another process writes it.
    """
    held: list[RunLock] = []
    logs: list[RunLog] = []

    def open_here() -> None:
        lock = RunLock(folder)
        messages: list[str] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(messages.append)
            held.append(lock)
            logs.append(RunLog(folder, config.run.tracker))
        except OSError as error:
            raise UserError(f"--out {folder}: cannot be written: {error.strerror}; choose another folder") from None
        for line in messages:
            logs[0].info(line)

    try:
        world.broadcast(open_here)
        yield (logs[0], held[0]) if world.main else (SilentLog(), None)
    finally:
        for log in logs:
            log.close()
        for lock in held:
            lock.release()


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{available_cores()} CPU cores ({platform.machine()}), torch {torch.__version__}"
