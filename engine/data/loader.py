"""Loads batches of clips from a manifest to the device, in threads that run ahead of the step.

Batch k of rank r is a pure function of (seed, k, r, ranks): a run may stop and continue at any step, with any number of
threads, and sees the same bits. There are two exceptions. If NVDEC fails on a file, PyAV decodes it, but a restarted
run tries NVDEC again; if only some frames are damaged, the others may then differ by a few gray levels. And a file
whose decoding takes about `data.timeout_s` may exceed it, twice, in one run and not in another.
"""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator

import torch
from tqdm import tqdm

from mam2.engine.config.training import DataConfig, check_data
from mam2.engine.data.assigned_decoders import AssignedDecoders
from mam2.engine.data.batch import Batch
from mam2.engine.data.batch_plan import (
    BatchPlan,
    Chunk,
    DrawRules,
    PlannedSample,
    for_all_views,
    in_batches,
    order_of,
)
from mam2.engine.data.manifest import Manifest
from mam2.engine.data.prefetch import Prefetcher
from mam2.engine.data.renderer import ClipSource, Renderer
from mam2.engine.data.sampling import ClipRequest, draw_clip
from mam2.engine.data.unusable import UnusableVideos
from mam2.engine.data.values import PixelValues
from mam2.engine.data.video import Skipped, Video
from mam2.engine.errors import UserError

CHUNK_BYTES = 2**29
"""Decoded frames are held in at most two chunks of this size; a batch of large videos is processed in parts."""
MOST_ATTEMPTS = 100


CodesOf = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""From index in manifest.videos, recorded augmentation and view, int64 [B] on the CPU, to codes int64 [B, N, …]."""


class ClipLoader:
    """Endless batches of random clips (`stream`), or one pass over the middle clips (`evaluate`).

    A video that cannot be decoded is replaced by another one drawn from (seed, epoch, video, attempt); evaluation
    leaves it out. In both cases it is reported once through `on_skip`, from a loader thread, and listed in `skipped`.
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
        """batch: clips per step of this rank, including all views.

        available(index in manifest.videos, recorded augmentation) returns False for clips without codes in a cache;
        `stream` then replaces the clip as if it could not be decoded. info: receives lines for the log, also from
        loader threads. Raises UserError if config values contradict each other, or too many videos cannot be used.
        """
        self._views = config.views if train else 1
        _check(config, batch, self._views)
        self.wait_s = 0.0
        """Seconds that the consumer waited for batches."""
        self.decoded_frames = 0
        """Frames decoded into clips."""
        self._manifest, self._config = manifest, config
        self._batch, self._train = batch, train
        self._seed, self._rank, self._world = seed, rank, world
        self._unusable = UnusableVideos(manifest, config.max_unusable, on_skip)
        self._available, self._info = available, info
        self._codes: CodesOf | None = None
        self._reads_clips = False
        self._decoded_any = False
        self._decoders = AssignedDecoders(manifest, config, torch.device(device), info=info, refuse=self._skip)
        self._check_share()
        self._usable = self._decoders.usable
        self.order = order_of(manifest, self._usable, config.weights if train else (), seed)
        """The order of the samples in `stream`."""
        paths = [video.path for video in manifest.videos]
        values = PixelValues.of(config, (manifest.videos[index] for index in self._usable))
        self._renderer = Renderer(
            config, samples=batch, device=torch.device(device), info=info, paths=paths, values=values
        )
        self._streams: weakref.WeakSet[Prefetcher[Batch]] = weakref.WeakSet()

    @property
    def decoders(self) -> dict[str, int]:
        """Returns the number of videos per decoder."""
        return self._decoders.count()

    def videos_of(self, decoder: str) -> list[int]:
        """Returns the indices in the manifest of a decoder's videos, ascending."""
        return self._decoders.videos_of(decoder)

    def give_to_pyav(self, share: float) -> None:
        """Leaves NVDEC this share of its videos, 0 to 1, and gives the others to PyAV, for batches that follow."""
        self._decoders.give_to_pyav(share)

    @property
    def skipped(self) -> list[Skipped]:
        """Videos that turned out to be unusable after the manifest was made."""
        return self._unusable.found

    @property
    def cropper(self) -> str:
        """Returns the name of the library that crops, mirrors and resizes, for the log."""
        return self._renderer.cropper

    def fetch_codes(self, codes: CodesOf) -> None:
        """Makes a loader thread add the codes of recorded clips to the batches of streams opened after this call."""
        self._codes = codes

    def fetch_clips(self, source: ClipSource) -> None:
        """Makes streams opened after this call read recorded clips instead of decoding videos."""
        self._renderer.read_clips(source)
        self._reads_clips = True

    @property
    def dtype(self) -> torch.dtype:
        """Type of the clips: uint8, or float32; see `Batch.clip`."""
        return self._renderer.dtype

    @property
    def steps_per_epoch(self) -> float:
        """Returns the steps in which all ranks together see as many samples as there are usable videos, in all their
        views: with one data set, or without weights, every video once."""
        return len(self._usable) * self._views / (self._batch * self._world)

    def stream(self, first_step: int = 0) -> Prefetcher[Batch]:
        """Returns the endless batches first_step, first_step + 1, …; their preparation starts immediately."""
        samples = self._batch // self._views

        def plans() -> Iterator[BatchPlan]:
            for step in itertools.count(first_step):
                first = (step * self._world + self._rank) * samples
                counters = range(first, first + samples)
                yield step, [self.order.at(counter) for counter in counters]

        rules = self._training if self._train else dataclasses.replace(self._middle, replace=True)
        return self._prefetch(self._produce(plans(), rules))

    @property
    def evaluated_batches(self) -> int:
        """Batches of `evaluate`."""
        return -(-len(self._usable) // self._batch)

    def evaluate(self) -> Prefetcher[Batch]:
        """Yields the center square of every usable video's middle clip, once and in order; the last batch may be
        short."""
        plans = (
            (step, [(0, place) for place in range(first, min(first + self._batch, len(self._usable)))])
            for step, first in enumerate(range(0, len(self._usable), self._batch))
        )
        return self._prefetch(self._produce(plans, self._middle))

    def recorded(self, clips: Iterable[tuple[int, int]]) -> Prefetcher[Batch]:
        """Yields selected clips as `stream` does, in order; each is (recorded augmentation, index in manifest.videos).

        A clip that cannot be decoded is left out; the last batch may be short.
        """
        places = {video: place for place, video in enumerate(self._usable)}
        known = ((augmentation, places[video]) for augmentation, video in clips if video in places)
        rules = dataclasses.replace(self._training, replace=False)
        return self._prefetch(self._produce(in_batches(known, self._batch // self._views), rules))

    def chosen(
        self, clips: Iterable[tuple[int, int]], draw: Callable[[int, Video, int], ClipRequest], views: int
    ) -> Prefetcher[Batch]:
        """Yields clips selected by the caller, in order; each is (index in manifest.videos, number).

        draw(index, video, number) returns the frames and `views` crops of a clip; a batch contains all views of a clip.
        A clip that cannot be decoded is left out; the last batch may be short. `Batch.augmentation` is the number.
        """
        if self._batch < views:
            raise UserError(f"expected a batch of at least {views} clips, the views of one video; found {self._batch}")
        places = {video: place for place, video in enumerate(self._usable)}
        known = ((number, places[video]) for video, number in clips if video in places)
        rules = DrawRules(lambda index, video, number, _: draw(index, video, number), views, replace=False)
        return self._prefetch(self._produce(in_batches(known, self._batch // views), rules))

    @property
    def manifest(self) -> Manifest:
        """The manifest of the loader's videos."""
        return self._manifest

    def close(self) -> None:
        """Ends all threads; open streams stop."""
        for stream in list(self._streams):
            stream.close()
        self._renderer.close()

    def __enter__(self) -> ClipLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _training(self) -> DrawRules:
        config, seed = self._config, self._seed

        def draw(index: int, video: Video, epoch: int, attempt: int) -> ClipRequest:
            return draw_clip(index, video, epoch, config, seed, attempt=attempt)

        return DrawRules(draw, self._views, replace=True, period=config.recorded)

    @property
    def _middle(self) -> DrawRules:
        config, seed = self._config, self._seed

        def draw(index: int, video: Video, epoch: int, attempt: int) -> ClipRequest:
            return draw_clip(index, video, epoch, config, seed, train=False)

        return DrawRules(draw, 1, replace=False)

    def _prefetch(self, batches: Generator[Batch, None, None]) -> Prefetcher[Batch]:
        stream = Prefetcher(batches, self._config.prefetch, self._taken)
        self._streams.add(stream)
        return stream

    def _taken(self, batch: Batch, waited_s: float) -> None:
        self.wait_s += waited_s
        self._renderer.hand_over(batch.clip, *([] if batch.codes is None else [batch.codes]))

    def _produce(self, plans: Iterable[BatchPlan], rules: DrawRules) -> Generator[Batch, None, None]:
        """Yields the planned batches. While one chunk is resized, the next is being decoded."""
        ahead: Chunk | None = None
        for chunk in self._decoding(plans, rules):
            if ahead:
                yield from self._finished(ahead, rules)
            ahead = chunk
        if ahead:
            yield from self._finished(ahead, rules)

    def _decoding(self, plans: Iterable[BatchPlan], rules: DrawRules) -> Iterator[Chunk]:
        """Yields the planned batches in chunks; each request starts the decoding of the next chunk."""
        for step, planned in plans:
            clip = self._renderer.empty(len(planned), rules.views)
            shown: list[PlannedSample | None] = [None] * len(planned)
            for rows in self._split(planned):
                samples = [self._sample(row, *planned[row], rules) for row in rows]
                yield Chunk(step, clip, shown, samples, last=rows[-1] == len(planned) - 1)

    def _split(self, planned: list[tuple[int, int]]) -> Iterator[list[int]]:
        """Splits a batch into chunks of at least one row whose decoded frames fit into CHUNK_BYTES."""
        rows: list[int] = []
        size = 0
        for row, (_, place) in enumerate(planned):
            video = self._manifest.videos[self._usable[place]]
            needed = video.frame_bytes * self._config.frames
            if rows and size + needed > CHUNK_BYTES:
                yield rows
                rows, size = [], 0
            rows.append(row)
            size += needed
        yield rows

    def _sample(self, row: int, epoch: int, place: int, rules: DrawRules, attempt: int = 0) -> PlannedSample:
        shown = self.order.replacement(place, epoch, attempt) if attempt else place
        index = self._usable[shown]
        if rules.period and self._available and not self._available(index, epoch % rules.period):
            self._skip(index, "no codes in the cache")
            self._check_share()
            return self._sample(row, epoch, place, rules, self._next_attempt(attempt, index))
        video = self._manifest.videos[index]
        request = rules.draw(index, video, epoch, attempt)
        if rules.period and self._reads_clips:
            job = self._renderer.start_recorded(row, request, epoch % rules.period)
            return PlannedSample(epoch, place, attempt, job)
        job = self._renderer.start(row, video.path, request, self._decoders[index], video.seek_points)
        return PlannedSample(epoch, place, attempt, job)

    def _finished(self, chunk: Chunk, rules: DrawRules) -> Iterator[Batch]:
        """Finishes the samples of a chunk and retries failed ones; yields the batch after its last chunk."""
        samples = chunk.samples
        while samples:
            reasons = self._renderer.finish([sample.job for sample in samples], chunk.clip)
            again = []
            for sample, reason in zip(samples, reasons, strict=True):
                self._decoders.record(sample.job.decoder, reason)
                self._decoded_any |= reason is None
                if reason is None:
                    chunk.shown[sample.job.row] = sample
                else:
                    again += self._try_again(sample, reason, rules)
            samples = again
            if self._renderer.hangs:
                self._decoders.switch_nvdec_off(self._renderer.hangs)
        if chunk.last:
            yield from self._batch_of(chunk, rules)

    def _try_again(self, sample: PlannedSample, reason: str, rules: DrawRules) -> list[PlannedSample]:
        """Retries a sample with PyAV, then replaces it by another video; returns an empty list if it leaves it out."""
        job = sample.job
        video = self._manifest.videos[job.request.video]
        if self._decoders.fall_back(job.request.video, job.decoder):
            job = self._renderer.start(job.row, video.path, job.request, "pyav", video.seek_points)
            return [dataclasses.replace(sample, job=job)]
        self._skip(job.request.video, reason)
        if not self._decoded_any and (problem := self._unusable.all_alike()):
            raise UserError(problem)
        self._check_share()
        if not rules.replace:
            return []
        attempt = self._next_attempt(sample.attempt, job.request.video)
        return [self._sample(job.row, sample.epoch, sample.place, rules, attempt)]

    def _next_attempt(self, attempt: int, video: int) -> int:
        if attempt == MOST_ATTEMPTS:
            path = self._manifest.videos[video].path
            raise UserError(f"{MOST_ATTEMPTS} videos drawn in a row cannot be used; the last is {path}")
        return attempt + 1

    def _batch_of(self, chunk: Chunk, rules: DrawRules) -> Iterator[Batch]:
        """Returns the finished batch; None if every sample was left out."""
        samples = [sample for sample in chunk.shown if sample is not None]
        if not samples:
            return
        complete = len(samples) == len(chunk.shown)
        clip = chunk.clip if complete else self._renderer.keep_rows(chunk.clip, [sample.job.row for sample in samples])
        self.decoded_frames += len(samples) * self._config.frames
        requests = [sample.job.request for sample in samples]
        period, views = rules.period, clip.shape[1]
        index = for_all_views([request.video for request in requests], views)
        augmentation = for_all_views([sample.epoch % period if period else sample.epoch for sample in samples], views)
        view = torch.arange(views).repeat(len(samples))
        yield Batch(
            clip=clip.flatten(0, 1),
            index=index,
            label=for_all_views([self._manifest.videos[request.video].label for request in requests], views),
            augmentation=augmentation,
            view=view,
            box=torch.tensor([view[:4] for request in requests for view in request.views], dtype=torch.float32),
            flip=torch.tensor([view.flip for request in requests for view in request.views]),
            step=chunk.step,
            codes=self._renderer.upload(self._codes(index, augmentation, view)) if self._codes and period else None,
        )

    def _skip(self, video: int, reason: str) -> None:
        self._unusable.add(Skipped(self._manifest.videos[video].path, reason))

    def _check_share(self) -> None:
        if problem := self._unusable.too_many():
            raise UserError(problem)


def _check(config: DataConfig, batch: int, views: int) -> None:
    """Raises UserError for values that are out of range or contradict each other."""
    check_data(config)
    if batch < 1 or batch % views:
        raise UserError(f"data.views: expected a divisor of the batch of {batch}; found {views}")
