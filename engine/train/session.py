"""What every training run has around its loop: its folder and log, what it resumes from, its videos and the bad ones.

RUN/config.json  manifest.jsonl  skipped.tsv  log.jsonl  log.txt  tensorboard/
    nonfinite.tsv  checkpoints/latest  checkpoints/step-…/  lock
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, TypeVar

import torch
from tqdm import tqdm

from mam2.engine.checkpoints import run as checkpoint
from mam2.engine.checkpoints.lock import RunLock
from mam2.engine.config.pretrain import TrainConfig, micro_batches_per_step
from mam2.engine.config.recipe import to_dict
from mam2.engine.data.decoding import available_cores
from mam2.engine.data.loader import ClipLoader
from mam2.engine.data.manifest import Manifest, read_manifest, read_saved_manifest, write_manifest
from mam2.engine.data.moved import follow
from mam2.engine.data.video import Skipped
from mam2.engine.errors import UserError
from mam2.engine.files import append_rows, write_whole
from mam2.engine.runtime.device import determinism, pick_device
from mam2.engine.runtime.distributed import World, join
from mam2.engine.runtime.log import Log, RunLog, SilentLog
from mam2.engine.runtime.signals import StopSignal

MANIFEST, SKIPPED = "manifest.jsonl", "skipped.tsv"
FREE = {
    "run": {
        "log_every",
        "save_every",
        "keep",
        "keep_every",
        "compile",
        "graph",
        "device",
        "sharding",
        "recompute",
        "max_nonfinite",
        "profile",
        "tracker",
    },
    "data": {"threads", "nvdec_threads", "prefetch", "max_unusable", "timeout_s", "wait_s"},
    "optim": {"micro_batch"},
    "tokenizer": {"cache"},
    "test": {"temporal", "spatial", "batch"},
}
"""What a resumed run may have other values of than the run it goes on with."""

Config = TypeVar("Config", bound=TrainConfig)


class Session(Generic[Config]):
    """A run that has begun, seen from one of its processes."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        device: torch.device,
        world: World,
        log: Log,
        stop: StopSignal,
        lock: RunLock | None = None,
        *,
        resume: bool,
        progress: bool,
        derived_tables: Collection[str],
    ) -> None:
        """lock: of the process that writes. See `open_session` for the rest."""
        self.lock = lock
        self.config, self.folder, self.device, self.world = config, folder, device, world
        self.log, self.stop, self.progress = log, stop, progress
        self.unusable: dict[str, str] = {}
        """Path of each video that cannot be used, and why."""
        self.manifest = Manifest(())
        """Of the videos trained on, once `read_videos` has run."""
        self.saved = world.broadcast(lambda: checkpoint.newest_whole(folder, log.info) if resume else None)
        """The checkpoint that the run goes on from, None for a new run."""
        if self.saved:
            self._check_continues(self.saved, derived_tables)
        else:
            log.begin_anew()
        ranks = f", {world.size} processes" if world.size > 1 else ""
        log.info(f"run     {folder} on {_machine(device)}{ranks}")
        if self.saved:
            log.info(f"resume  from {self.saved}")
        elif resume:
            log.info(f"resume  {folder} holds no whole checkpoint: the run begins anew")

    def read_videos(self, data: Path) -> Manifest:
        """Scans the data. A run that is resumed keeps its own list, whose order decides the clips, also where `data`
        has the same videos at another place now."""
        self.manifest = self.world.broadcast(lambda: self._manifest(data))
        if self.world.main:  # begun anew also when a run is resumed: what can be read again is no longer in it
            (self.folder / SKIPPED).unlink(missing_ok=True)
        self.note(self.manifest.skipped)
        return self.manifest

    def _manifest(self, data: Path) -> Manifest:
        path = self.folder / MANIFEST
        if self.saved and path.is_file():
            config = self.config.data
            saved = read_saved_manifest(path)
            manifest, found = follow(
                saved, data, threads=config.threads, progress=self.progress, max_missing=config.max_unusable
            )
            self.log.info(f"resume  with the run's own list of videos ({path})")
            if found:
                self.log.info(f"resume  {found}")
                write_manifest(manifest, path)
            return manifest
        if self.saved:
            self.log.info(
                f"resume  {path} is gone: the videos are those of {data} now, and the clips of a step may be others"
            )
        manifest = read_manifest(data, threads=self.config.data.threads, progress=self.progress)
        write_manifest(manifest, path)
        return manifest

    def open_loader(self, available: Callable[[int, int], bool] | None = None) -> ClipLoader:
        """Clips of the videos read, a pass of this process in each batch. available: see `ClipLoader`."""
        world, config = self.world, self.config
        loader = ClipLoader(
            self.manifest,
            config.data,
            batch=config.optim.batch // (world.size * micro_batches_per_step(config, world.size)),
            device=self.device,
            seed=config.run.seed,
            rank=world.rank,
            world=world.size,
            # several processes tell each other when the log is written, so that each file is named once
            on_skip=(lambda skipped: self.note([skipped])) if world.size == 1 else None,
            available=available,
            info=self.log.info if world.main else lambda line: tqdm.write(f"rank {world.rank}: {line}"),
        )
        self.exchange_skips(loader)
        front_ends = ", ".join(f"{count} by {name}" for name, count in loader.front_ends.items())
        used = sum(loader.front_ends.values())
        self.log.info(
            f"data    {used} videos, decoded {front_ends}, cropped by {loader.cropper}; {len(self.unusable)} unusable"
        )
        return loader

    def exchange_skips(self, loader: ClipLoader) -> None:
        """Every rank learns of the files that the others found unusable; too many of them end the run everywhere."""
        for found in self.world.all_gather(list(loader.skipped)):
            self.note(found)
        total = len(self.manifest.videos) + len(self.manifest.skipped)
        if len(self.unusable) > self.config.data.max_unusable * total:
            path, reason = list(self.unusable.items())[-1]
            raise self.world.error(
                f"{len(self.unusable)} of {total} videos cannot be used, more than data.max_unusable="
                f"{self.config.data.max_unusable:g} allows; the last is {path}: {reason}"
            )

    def note(self, found: Iterable[Skipped]) -> None:
        """Names files that cannot be used, once, in the log and in skipped.tsv."""
        for skipped in found:
            if skipped.path in self.unusable:
                continue
            self.unusable[skipped.path] = skipped.reason
            self.log.info(f"unusable: {skipped.path}: {skipped.reason}")
            if self.world.main:
                try:
                    append_rows(self.folder / SKIPPED, [(skipped.path, skipped.reason)])
                except OSError as error:
                    self.log.info(f"log     {self.folder / SKIPPED} cannot be written: {error.strerror}")

    def write_config(self) -> None:
        """The config as it is now, into RUN/config.json."""
        if self.world.main:
            write_whole(self.folder / "config.json", json.dumps(to_dict(self.config), indent=1) + "\n")

    def _check_continues(self, saved: Path, derived_tables: Collection[str]) -> None:
        """Raises UserError where a resumed run would not continue the saved one; says what may change its bits."""
        state, now = checkpoint.read_state(saved), to_dict(self.config)
        foreign = [table for table in state["config"] if table not in now]
        if foreign:
            raise self.world.error(f"{self.folder} holds a run of another kind: its config has [{foreign[0]}]")
        defaults = to_dict(type(self.config)())  # a key that came later had its default
        for table, values in state["config"].items():
            for key, old in (defaults[table] | values).items():
                compared = table not in derived_tables and key not in FREE.get(table, ()) and key in now[table]
                if compared and old != now[table][key]:
                    raise self.world.error(
                        f"{saved} was written with {table}.{key} = {old!r}, this call says {now[table][key]!r}: "
                        f"use the saved values ({self.folder / 'config.json'}) or start a new run"
                    )
        for name, mine in (("code", checkpoint.code_version()), ("torch", torch.__version__)):
            if state.get(name, mine) != mine:
                self.log.info(f"resume  written by {name} {state[name]}, this is {mine}: the bits may differ from here")


@contextmanager
def open_session(
    config: Config, out: str | Path, *, resume: bool, progress: bool, derived_tables: Collection[str] = ()
) -> Iterator[Session[Config]]:
    """Begins a run in the folder `out` on every process that torchrun started; it ends with the block.

    resume: go on from the newest whole checkpoint in `out`, if there is one. derived_tables: tables of the config
    whose values come from data and checkpoints, so that a resumed run need not name them.
    Raises UserError where the folder holds a run and resume is not asked for, cannot be written, or belongs to a run
    with other values.
    """
    folder = Path(out)
    if checkpoint.newest(folder) and not resume:
        raise UserError(f"{folder} holds a run: add --resume to go on with it, or name another folder with --out")
    device = pick_device(config.run)
    with StopSignal() as stop, join(device) as world, determinism(config.run), _opened(folder, config, world) as opened:
        micro_batches_per_step(config, world.size)
        log, lock = opened
        try:
            yield Session(
                config,
                folder,
                device,
                world,
                log,
                stop,
                lock,
                resume=resume,
                progress=progress and world.main,
                derived_tables=derived_tables,
            )
        except BaseException as error:
            log.note(f"ended   {type(error).__name__}: {error}")
            raise


@contextmanager
def _opened(folder: Path, config: TrainConfig, world: World) -> Iterator[tuple[Log, RunLock | None]]:
    """The run folder's log and lock on rank 0, for as long as the block lasts; nothing on the others.

    Raises UserError where the folder cannot be written or another process writes it.
    """
    held: list[RunLock] = []
    logs: list[RunLog] = []

    def open_here() -> None:
        lock = RunLock(folder)
        told: list[str] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(told.append)
            held.append(lock)
            logs.append(RunLog(folder, config.run.tracker))
        except OSError as error:
            raise UserError(f"--out {folder}: cannot be written: {error.strerror}; name another folder") from None
        for line in told:
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
