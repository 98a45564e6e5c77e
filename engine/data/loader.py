"""From a manifest to batches of clips on the device, prepared ahead of the step by threads of their own.

Batch k of rank r is a pure function of (seed, k, r, ranks): a run may stop and go on at any step, with any number of
threads, and sees the same bits. Two exceptions: after NVDEC failed on a file PyAV decodes it, and a restarted run asks
NVDEC again; where the damage lies in some frames only, the others may then differ by a few grey levels. And a file that
comes close to `data.timeout_s` may pass it in one run and not in another.
"""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass

import torch
from tqdm import tqdm

from mam2.engine.config.pretrain import DataConfig, check_data
from mam2.engine.data.batch import Batch
from mam2.engine.data.dali import dali_version
from mam2.engine.data.front_ends import NVDEC_SIZES, choose_front_end
from mam2.engine.data.manifest import Manifest, Skipped
from mam2.engine.data.nvdec import MOST_FAILURES, Record, broken_codecs
from mam2.engine.data.prefetch import Prefetcher
from mam2.engine.data.renderer import Job, Renderer
from mam2.engine.data.sampling import ClipRequest, draw_clip, frame_step, replacement, sample_at
from mam2.engine.data.video import Video
from mam2.engine.errors import UserError

CHUNK_BYTES = 2**29
"""Decoded frames are held in at most two chunks of this size: a batch of large videos is worked off in parts."""
MOST_ATTEMPTS = 100
FIRST_FILES = 16
"""So many files that fail for one reason before any file is decoded end the run."""


CodesOf = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""From place in manifest.videos, recorded augmentation and view, int64 [B] on the CPU, to codes int64 [B, N, …]."""
Plan = tuple[int, list[tuple[int, int]]]
"""A step and its samples: epoch and place among the usable videos."""


@dataclass(frozen=True)
class _Way:
    """How planned samples become clips."""

    draw: Callable[[int, Video, int, int], ClipRequest]
    """From the place in the manifest, its video, epoch and attempt."""
    views: int
    replace: bool
    """Show another video for one that cannot be decoded, instead of none."""
    period: int = 0
    """Number of recorded augmentations; 0 for epochs without end."""


@dataclass(frozen=True)
class _Sample:
    """A clip in the making."""

    epoch: int
    place: int
    """Among the usable videos, as the order of the epoch has it; a replacement does not change it."""
    attempt: int
    job: Job


@dataclass(frozen=True)
class _Chunk:
    """Samples of one batch that are decoded and resized together."""

    step: int
    clip: torch.Tensor
    """The batch, uint8 [S, R, T, H, W, C] of S samples and R views; its chunks share it."""
    shown: list[_Sample | None]
    """Of each sample of the batch the one that was decoded in the end; None for one left out."""
    samples: list[_Sample]
    last: bool


class ClipLoader:
    """Endless batches of random clips (`stream`), or one pass over the middle clips (`evaluate`).

    A video that cannot be decoded is replaced by another one drawn from (seed, epoch, video, attempt); evaluation
    leaves it out. Either way it is reported once through `on_skip`, from a loader thread, and listed in `skipped`.
    """

    def __init__(
        self,
        manifest: Manifest,
        config: DataConfig,
        *,
        batch: int,
        device: torch.device | str,
        seed: int,
        rank: int = 0,
        world: int = 1,
        train: bool = True,
        on_skip: Callable[[Skipped], None] | None = None,
        available: Callable[[int, int], bool] | None = None,
        info: Callable[[str], None] = tqdm.write,
    ):
        """batch: clips a step of this rank, all views counted. train=False: `stream` gives middle clips in one view.

        available(place in manifest.videos, recorded augmentation): False has `stream` replace the clip as if it could
        not be decoded; for clips without codes in a cache. info: gets lines for the log, also from loader threads.
        Raises UserError if the config does not fit together, or too many videos cannot be used.
        """
        self._views = config.views if train else 1
        _check(config, batch, self._views)
        self.skipped: list[Skipped] = []
        """Videos that turned out to be unusable after the manifest was made."""
        self._told: set[str] = set()
        self.wait_s = 0.0
        """Seconds in which a consumer waited for a batch."""
        self.decoded_frames = 0
        """Frames decoded into clips."""
        self._manifest, self._config = manifest, config
        self._batch, self._train = batch, train
        self._seed, self._rank, self._world = seed, rank, world
        self._on_skip, self._available, self._info = on_skip, available, info
        self._codes: CodesOf | None = None
        self._record = Record()
        self._decoded_any = False
        self._front_end_of = self._choose_front_ends(torch.device(device))
        self._usable = sorted(self._front_end_of)
        paths = [video.path for video in manifest.videos]
        self._renderer = Renderer(config, samples=batch, device=torch.device(device), info=info, paths=paths)
        self._streams: weakref.WeakSet[Prefetcher[Batch]] = weakref.WeakSet()

    @property
    def front_ends(self) -> dict[str, int]:
        """Number of videos that each front end decodes."""
        return dict(Counter(self._front_end_of.values()))

    @property
    def cropper(self) -> str:
        """What crops, mirrors and resizes, for the log."""
        return self._renderer.cropper

    def fetch_codes(self, codes: CodesOf) -> None:
        """Has a loader thread put the codes of recorded clips into the batches of streams opened from now on."""
        self._codes = codes

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which all ranks together see every usable video once, in all its views."""
        return len(self._usable) * self._views / (self._batch * self._world)

    def stream(self, first_step: int = 0) -> Prefetcher[Batch]:
        """Batches first_step, first_step + 1, … without end. Preparation starts at once."""
        samples = self._batch // self._views

        def plans() -> Iterator[Plan]:
            for step in itertools.count(first_step):
                first = (step * self._world + self._rank) * samples
                counters = range(first, first + samples)
                yield step, [sample_at(counter, len(self._usable), self._seed) for counter in counters]

        way = self._training if self._train else dataclasses.replace(self._middle, replace=True)
        return self._prefetch(self._produce(plans(), way))

    def evaluate(self) -> Prefetcher[Batch]:
        """Every usable video once and in order, the centre square of its middle clip; the last batch may be short."""
        plans = (
            (step, [(0, place) for place in range(first, min(first + self._batch, len(self._usable)))])
            for step, first in enumerate(range(0, len(self._usable), self._batch))
        )
        return self._prefetch(self._produce(plans, self._middle))

    def recorded(self, clips: Iterable[tuple[int, int]]) -> Prefetcher[Batch]:
        """Chosen clips as `stream` shows them, in order: each a recorded augmentation and a place in manifest.videos.

        One that cannot be decoded is left out; the last batch may be short.
        """
        places = {video: place for place, video in enumerate(self._usable)}
        known = ((augmentation, places[video]) for augmentation, video in clips if video in places)
        way = dataclasses.replace(self._training, replace=False)
        return self._prefetch(self._produce(_in_batches(known, self._batch // self._views), way))

    def chosen(
        self, clips: Iterable[tuple[int, int]], draw: Callable[[int, Video, int], ClipRequest], views: int
    ) -> Prefetcher[Batch]:
        """Clips of the caller's choice, in order: each a place in manifest.videos and a number.

        draw: what a clip shows, from place, video and number, in `views` crops, of which a batch holds all. A clip that
        cannot be decoded is left out; the last batch may be short. `Batch.augmentation` is the number.
        """
        if self._batch < views:
            raise UserError(f"expected a batch of at least {views} clips, the views of one; found {self._batch}")
        places = {video: place for place, video in enumerate(self._usable)}
        known = ((number, places[video]) for video, number in clips if video in places)
        way = _Way(lambda index, video, number, _: draw(index, video, number), views, replace=False)
        return self._prefetch(self._produce(_in_batches(known, self._batch // views), way))

    @property
    def manifest(self) -> Manifest:
        """Of the videos that the clips are taken from."""
        return self._manifest

    def close(self) -> None:
        """End all threads; open streams stop."""
        for stream in list(self._streams):
            stream.close()
        self._renderer.close()

    def __enter__(self) -> ClipLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _training(self) -> _Way:
        config, seed = self._config, self._seed

        def draw(index: int, video: Video, epoch: int, attempt: int) -> ClipRequest:
            return draw_clip(index, video, epoch, config, seed, attempt=attempt)

        return _Way(draw, self._views, replace=True, period=config.recorded)

    @property
    def _middle(self) -> _Way:
        config, seed = self._config, self._seed

        def draw(index: int, video: Video, epoch: int, attempt: int) -> ClipRequest:
            return draw_clip(index, video, epoch, config, seed, train=False)

        return _Way(draw, 1, replace=False)

    def _prefetch(self, batches: Generator[Batch, None, None]) -> Prefetcher[Batch]:
        stream = Prefetcher(batches, self._config.prefetch, self._taken)
        self._streams.add(stream)
        return stream

    def _taken(self, batch: Batch, waited_s: float) -> None:
        self.wait_s += waited_s
        self._renderer.hand_over(batch.clip, *([] if batch.codes is None else [batch.codes]))

    def _choose_front_ends(self, device: torch.device) -> dict[int, str]:
        dali, broken = bool(dali_version()), {}
        if device.type == "cuda" and dali and self._config.front_end in ("auto", "nvdec"):
            there = {video.codec for video in self._manifest.videos}
            broken = broken_codecs(there.intersection(NVDEC_SIZES), device, self._config)
            for codec, problem in broken.items():
                self._info(f"data    NVDEC does not decode {codec} here ({problem}): PyAV takes it")
        chosen: dict[int, str] = {}
        refusal = UserError("the manifest holds no videos")
        for index, video in enumerate(self._manifest.videos):
            try:
                if self._config.sampling == "dense":
                    frame_step(video, self._config)  # which needs a frame rate for data.fps
                chosen[index] = choose_front_end(
                    video.codec,
                    device,
                    self._config.front_end,
                    dali=dali,
                    broken=broken,
                    **video.traits,
                )
            except UserError as error:
                refusal = error
                self._skip(index, str(error))
        if not chosen:
            raise refusal
        self._check_share()
        return chosen

    def _produce(self, plans: Iterable[Plan], way: _Way) -> Generator[Batch, None, None]:
        """The planned batches. While one chunk is resized, the next is being decoded."""
        ahead: _Chunk | None = None
        for chunk in self._decoding(plans, way):
            if ahead:
                yield from self._finished(ahead, way)
            ahead = chunk
        if ahead:
            yield from self._finished(ahead, way)

    def _decoding(self, plans: Iterable[Plan], way: _Way) -> Iterator[_Chunk]:
        """The planned batches in chunks; asking for one sets the decoding threads to work on it."""
        for step, planned in plans:
            clip = self._renderer.empty(len(planned), way.views)
            shown: list[_Sample | None] = [None] * len(planned)
            for rows in self._split(planned):
                samples = [self._sample(row, *planned[row], way) for row in rows]
                yield _Chunk(step, clip, shown, samples, last=rows[-1] == len(planned) - 1)

    def _split(self, planned: list[tuple[int, int]]) -> Iterator[list[int]]:
        """Rows of a batch in runs whose decoded frames fit into CHUNK_BYTES, at least one a run."""
        rows: list[int] = []
        size = 0
        for row, (_, place) in enumerate(planned):
            video = self._manifest.videos[self._usable[place]]
            needed = video.width * video.height * 3 * self._config.frames
            if rows and size + needed > CHUNK_BYTES:
                yield rows
                rows, size = [], 0
            rows.append(row)
            size += needed
        yield rows

    def _sample(self, row: int, epoch: int, place: int, way: _Way, attempt: int = 0) -> _Sample:
        shown = replacement(place, len(self._usable), epoch, self._seed, attempt) if attempt else place
        index = self._usable[shown]
        if way.period and self._available and not self._available(index, epoch % way.period):
            self._skip(index, "no codes in the cache")
            self._check_share()
            return self._sample(row, epoch, place, way, self._next_attempt(attempt, index))
        video = self._manifest.videos[index]
        request = way.draw(index, video, epoch, attempt)
        job = self._renderer.start(row, video.path, request, self._front_end_of[index], video.seek_points)
        return _Sample(epoch, place, attempt, job)

    def _finished(self, chunk: _Chunk, way: _Way) -> Iterator[Batch]:
        """Finish the samples of a chunk, trying again what failed; the batch after its last chunk."""
        samples = chunk.samples
        while samples:
            reasons = self._renderer.finish([sample.job for sample in samples], chunk.clip)
            again = []
            for sample, reason in zip(samples, reasons, strict=True):
                if sample.job.front_end == "nvdec" and self._record.note(reason is None):
                    self._give_nvdec_up(f"it failed on {MOST_FAILURES} files one after the other, last: {reason}")
                self._decoded_any |= reason is None
                if reason is None:
                    chunk.shown[sample.job.row] = sample
                else:
                    again += self._try_again(sample, reason, way)
            samples = again
            if self._renderer.hangs:
                self._give_nvdec_up(self._renderer.hangs)
        if chunk.last:
            yield from self._batch_of(chunk, way)

    def _try_again(self, sample: _Sample, reason: str, way: _Way) -> list[_Sample]:
        """The sample with PyAV, then another video in its place; nothing if it is to be left out."""
        job = sample.job
        video = self._manifest.videos[job.request.video]
        if job.front_end != "pyav" and self._config.front_end == "auto":
            if job.front_end == "nvdec":
                # Building its graph anew at every visit would starve the step.
                self._front_end_of[job.request.video] = "pyav"
            job = self._renderer.start(job.row, video.path, job.request, "pyav", video.seek_points)
            return [dataclasses.replace(sample, job=job)]
        self._skip(job.request.video, reason)
        self._check_first()
        self._check_share()
        if not way.replace:
            return []
        attempt = self._next_attempt(sample.attempt, job.request.video)
        return [self._sample(job.row, sample.epoch, sample.place, way, attempt)]

    def _give_nvdec_up(self, why: str) -> None:
        """PyAV decodes everything from now on."""
        given = [index for index, front_end in self._front_end_of.items() if front_end == "nvdec"]
        if given and self._config.front_end == "auto":
            self._front_end_of.update(dict.fromkeys(given, "pyav"))
            self._info(
                f"data    NVDEC is given up for this run: {why}. PyAV decodes all videos; mam2 doctor tries NVDEC"
            )

    def _next_attempt(self, attempt: int, video: int) -> int:
        if attempt == MOST_ATTEMPTS:
            path = self._manifest.videos[video].path
            raise UserError(f"{MOST_ATTEMPTS} videos drawn one after the other cannot be used; the last is {path}")
        return attempt + 1

    def _batch_of(self, chunk: _Chunk, way: _Way) -> Iterator[Batch]:
        """The finished batch; none if every sample was left out."""
        samples = [sample for sample in chunk.shown if sample is not None]
        if not samples:
            return
        complete = len(samples) == len(chunk.shown)
        clip = chunk.clip if complete else self._renderer.keep_rows(chunk.clip, [sample.job.row for sample in samples])
        self.decoded_frames += len(samples) * self._config.frames
        requests = [sample.job.request for sample in samples]
        period, views = way.period, clip.shape[1]
        index = _each([request.video for request in requests], views)
        augmentation = _each([sample.epoch % period if period else sample.epoch for sample in samples], views)
        view = torch.arange(views).repeat(len(samples))
        yield Batch(
            clip=clip.flatten(0, 1),
            index=index,
            label=_each([self._manifest.videos[request.video].label for request in requests], views),
            augmentation=augmentation,
            view=view,
            box=torch.tensor([view[:4] for request in requests for view in request.views], dtype=torch.float32),
            flip=torch.tensor([view.flip for request in requests for view in request.views]),
            step=chunk.step,
            codes=self._renderer.upload(self._codes(index, augmentation, view)) if self._codes and period else None,
        )

    def _skip(self, video: int, reason: str) -> None:
        path = self._manifest.videos[video].path
        if path not in self._told:
            self._told.add(path)
            self.skipped.append(Skipped(path, reason))
            if self._on_skip:
                self._on_skip(self.skipped[-1])

    def _check_first(self) -> None:
        """UserError where the first files all fail for one reason: that is no matter of single files."""
        reasons = {entry.reason for entry in self.skipped}
        if self._decoded_any or self._config.max_unusable >= 1 or len(self.skipped) < FIRST_FILES or len(reasons) > 1:
            return
        raise UserError(
            f"no video can be decoded: the first {len(self.skipped)} that were tried all failed for one reason, "
            f"{reasons.pop()}; the last is {self.skipped[-1].path}. mam2 doctor decodes clips of its own"
        )

    def _check_share(self) -> None:
        unusable = [*self._manifest.skipped, *self.skipped]
        total = len(self._manifest.videos) + len(self._manifest.skipped)
        if len(unusable) > self._config.max_unusable * total:
            raise UserError(
                f"{len(unusable)} of {total} videos cannot be used, more than data.max_unusable="
                f"{self._config.max_unusable:g} allows; the last is {unusable[-1].path}: {unusable[-1].reason}"
            )


def _in_batches(samples: Iterator[tuple[int, int]], size: int) -> Iterator[Plan]:
    return enumerate(iter(lambda: list(itertools.islice(samples, size)), []))


def _each(values: list[int], views: int) -> torch.Tensor:
    """int64 [S * views], each value for all views of its sample."""
    return torch.tensor(values).repeat_interleave(views)


def _check(config: DataConfig, batch: int, views: int) -> None:
    """Raises UserError for values out of range, or that do not fit together."""
    check_data(config)
    if batch < 1 or batch % views:
        raise UserError(f"expected data.views that divides the batch of {batch}; found {views}")
