"""From a manifest to batches of clips on the device, prepared ahead of the step by threads of their own.

Batch k of rank r is a pure function of (seed, k, r, ranks): a run may stop and go on at any step, with any number of
threads, and sees the same bits. One exception: after NVDEC failed on a file PyAV decodes it, and a restarted run asks
NVDEC again; where the damage lies in some frames only, the others may then differ by a few grey levels.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mam2.engine.config import DataConfig, UserError
from mam2.engine.data.decoding import DecodeError, available_cores, choose_front_end, decode_frames
from mam2.engine.data.graph import ClipGraph, import_dali
from mam2.engine.data.manifest import Manifest, Skipped
from mam2.engine.data.prefetch import Prefetcher
from mam2.engine.data.sampling import ClipRequest, draw_clip, replacement, sample_at

CHUNK_BYTES = 2**29
"""Decoded frames are held in at most two chunks of this size: a batch of large videos is worked off in parts."""
MOST_ATTEMPTS = 100


class Batch(NamedTuple):
    """B clips; the views of one decoded clip lie next to each other."""

    clip: torch.Tensor
    """uint8 [B, T, H, W, C], RGB, contiguous, on the loader's device."""
    video: torch.Tensor
    """int64 [B] on the CPU, places in `manifest.videos`."""
    label: torch.Tensor
    """int64 [B] on the CPU, -1 where a video has none."""
    step: int
    """Number of the batch, from 0."""


Plan = tuple[int, list[tuple[int, int]]]
"""A step and its samples: epoch and place among the usable videos."""


@dataclass
class _Sample:
    """A clip in the making."""

    row: int
    """Its place in the batch."""
    epoch: int
    place: int
    """Among the usable videos, as the order of the epoch has it; a replacement does not change it."""
    request: ClipRequest
    front_end: str
    payload: Future[NDArray[np.uint8]]
    attempt: int = 0


@dataclass
class _Chunk:
    """Samples of one batch that are decoded and resized together."""

    step: int
    clip: torch.Tensor
    """The batch, uint8 [S, R, T, H, W, C] of S samples and R views; its chunks share it."""
    video: list[int]
    """Of each sample of the batch, filled as samples are finished; -1 for one left out."""
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
    ):
        """batch: clips a step of this rank, all views counted. train=False: `stream` gives middle clips in one view.

        Raises UserError if the config does not fit together, DALI is absent, or too many videos cannot be used.
        """
        _check(config, batch, config.views if train else 1)
        import_dali()
        self.skipped: list[Skipped] = []
        """Videos that turned out to be unusable after the manifest was made."""
        self.wait_s = 0.0
        """Seconds in which a consumer waited for a batch."""
        self.decoded_frames = 0
        """Frames decoded into clips."""
        self._manifest, self._config = manifest, config
        self._batch, self._train = batch, train
        self._views = config.views if train else 1
        self._seed, self._rank, self._world = seed, rank, world
        self._device = torch.device(device)
        self._on_skip = on_skip
        self._front_end_of: dict[int, str] = {}
        self._choose_front_ends()
        self._usable = sorted(self._front_end_of)
        self._threads = config.threads or available_cores()
        self._pool = ThreadPoolExecutor(self._threads, "decode")
        self._graphs: dict[tuple[str, int], ClipGraph] = {}
        self._graph_lock = threading.Lock()  # two open streams share the graphs
        self._copies = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._streams: weakref.WeakSet[Prefetcher[Batch]] = weakref.WeakSet()

    @property
    def front_ends(self) -> dict[str, int]:
        """Number of videos that each front end decodes."""
        return dict(Counter(self._front_end_of.values()))

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which all ranks together see every usable video once, in all its views."""
        return len(self._usable) * self._views / (self._batch * self._world)

    def stream(self, first_step: int = 0) -> Prefetcher[Batch]:
        """Batches first_step, first_step + 1, … without end. Preparation starts at once."""
        samples = self._batch // self._views

        def plans() -> Iterator[Plan]:
            for step in itertools.count(first_step):
                counters = ((step * samples + row) * self._world + self._rank for row in range(samples))
                yield step, [sample_at(counter, len(self._usable), self._seed) for counter in counters]

        return self._prefetch(self._produce(plans(), train=self._train, replace=True))

    def evaluate(self) -> Prefetcher[Batch]:
        """Every usable video once and in order, the centre square of its middle clip; the last batch may be short."""
        plans = (
            (step, [(0, place) for place in range(first, min(first + self._batch, len(self._usable)))])
            for step, first in enumerate(range(0, len(self._usable), self._batch))
        )
        return self._prefetch(self._produce(plans, train=False, replace=False))

    def close(self) -> None:
        """End all threads; open streams stop."""
        for stream in list(self._streams):
            stream.close()
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> ClipLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prefetch(self, batches: Generator[Batch, None, None]) -> Prefetcher[Batch]:
        stream = Prefetcher(batches, self._config.prefetch, self._taken)
        self._streams.add(stream)
        return stream

    def _taken(self, batch: Batch, waited_s: float) -> None:
        self.wait_s += waited_s
        if self._copies:
            # Its memory belongs to the copying stream, which must not reuse it before the consumer's stream is done.
            batch.clip.record_stream(torch.cuda.current_stream(self._device))

    def _choose_front_ends(self) -> None:
        refusal = UserError("the manifest holds no videos")
        for index, video in enumerate(self._manifest.videos):
            try:
                self._front_end_of[index] = choose_front_end(
                    video.codec,
                    self._device,
                    self._config.front_end,
                    pixel_format=video.pixel_format,
                    rotation=video.rotation,
                )
            except UserError as error:
                refusal = error
                self._skip(index, str(error))
        if not self._front_end_of:
            raise refusal
        self._check_share()

    def _produce(self, plans: Iterable[Plan], *, train: bool, replace: bool) -> Generator[Batch, None, None]:
        """The planned batches. While one chunk is resized, the next is being decoded."""
        ahead: _Chunk | None = None
        for chunk in self._decoding(plans, train):
            if ahead:
                yield from self._finished(ahead, train, replace)
            ahead = chunk
        if ahead:
            yield from self._finished(ahead, train, replace)

    def _decoding(self, plans: Iterable[Plan], train: bool) -> Iterator[_Chunk]:
        """The planned batches in chunks, each submitted to the decoding threads when it is asked for."""
        config = self._config
        for step, planned in plans:
            shape = (len(planned), config.views if train else 1, config.frames, config.size, config.size, 3)
            with self._on_copies():
                clip = torch.empty(shape, dtype=torch.uint8, device=self._device)
            video = [-1] * len(planned)
            for rows in self._split(planned):
                samples = [self._sample(row, *planned[row], train) for row in rows]
                yield _Chunk(step, clip, video, samples, last=rows[-1] == len(planned) - 1)

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

    def _sample(self, row: int, epoch: int, place: int, train: bool, attempt: int = 0) -> _Sample:
        shown = replacement(place, len(self._usable), epoch, self._seed, attempt) if attempt else place
        index = self._usable[shown]
        video = self._manifest.videos[index]
        request = draw_clip(index, video, epoch, self._config, self._seed, train=train, attempt=attempt)
        front_end = self._front_end_of[index]
        return _Sample(row, epoch, place, request, front_end, self._submit(request, front_end), attempt)

    def _submit(self, request: ClipRequest, front_end: str) -> Future[NDArray[np.uint8]]:
        path = self._manifest.videos[request.video].path
        if front_end == "pyav":
            return self._pool.submit(_decode, path, request.start, self._config.frames, request.stride)
        return self._pool.submit(_read, path)

    def _finished(self, chunk: _Chunk, train: bool, replace: bool) -> Iterator[Batch]:
        """Wait for a chunk's decoders, resize into the batch, try again what failed; the batch after its last chunk."""
        samples = chunk.samples
        while samples:
            failures = self._resize(chunk, samples)
            samples = [
                again
                for sample, reason in failures
                if (again := self._try_again(sample, reason, train, replace)) is not None
            ]
        if chunk.last:
            rows = [row for row, video in enumerate(chunk.video) if video >= 0]
            self.decoded_frames += len(rows) * self._config.frames
            clip = chunk.clip
            if len(rows) < len(chunk.video):
                with self._on_copies():
                    clip = clip[rows]
            videos = [chunk.video[row] for row in rows]
            labels = [self._manifest.videos[video].label for video in videos]
            views = clip.shape[1]
            if rows:
                yield Batch(
                    clip.flatten(0, 1),
                    torch.tensor(videos).repeat_interleave(views),
                    torch.tensor(labels).repeat_interleave(views),
                    chunk.step,
                )

    def _resize(self, chunk: _Chunk, samples: list[_Sample]) -> list[tuple[_Sample, str]]:
        """Run samples through the graphs of their front ends into the batch; those that failed, with the reason."""
        failures: list[tuple[_Sample, str]] = []
        groups: dict[str, list[_Sample]] = {}
        for sample in samples:
            try:
                sample.payload.result()
                groups.setdefault(sample.front_end, []).append(sample)
            except DecodeError as error:
                failures.append((sample, str(error)))
        for front_end, group in groups.items():
            failures += self._run(self._graph(front_end, chunk.clip.shape[1]), chunk, group)
        return failures

    def _run(self, graph: ClipGraph, chunk: _Chunk, group: list[_Sample]) -> list[tuple[_Sample, str]]:
        payloads = [sample.payload.result() for sample in group]
        try:
            with self._graph_lock, self._on_copies():
                starts = [sample.request.start for sample in group]
                views = graph.run(payloads, starts, [sample.request.views for sample in group])
                for place, sample in enumerate(group):
                    for number, clips in enumerate(views):
                        chunk.clip[sample.row, number].copy_(clips[place], non_blocking=True)
                if self._copies:
                    self._copies.synchronize()  # the graph's next run overwrites what is being copied
        except DecodeError as error:
            if len(group) == 1:
                return [(group[0], str(error))]
            # DALI does not say which one it was.
            return [failure for sample in group for failure in self._run(graph, chunk, [sample])]
        for sample in group:
            chunk.video[sample.row] = sample.request.video
        return []

    def _try_again(self, sample: _Sample, reason: str, train: bool, replace: bool) -> _Sample | None:
        """The sample with PyAV, then another video in its place; None if it is to be left out."""
        video = sample.request.video
        if sample.front_end != "pyav" and self._config.front_end == "auto":
            if sample.front_end == "nvdec":
                self._front_end_of[video] = "pyav"  # building its graph anew for every visit would starve the step
            sample.front_end = "pyav"
            sample.payload = self._submit(sample.request, "pyav")
            return sample
        self._skip(video, reason)
        self._check_share()
        if not replace:
            return None
        if sample.attempt == MOST_ATTEMPTS:
            raise UserError(f"{MOST_ATTEMPTS} videos drawn one after the other cannot be decoded; the last: {reason}")
        return self._sample(sample.row, sample.epoch, sample.place, train, sample.attempt + 1)

    def _skip(self, video: int, reason: str) -> None:
        path = self._manifest.videos[video].path
        if all(entry.path != path for entry in self.skipped):
            self.skipped.append(Skipped(path, reason))
            if self._on_skip:
                self._on_skip(self.skipped[-1])

    def _check_share(self) -> None:
        unusable = [*self._manifest.skipped, *self.skipped]
        total = len(self._manifest.videos) + len(self._manifest.skipped)
        if len(unusable) > self._config.max_unusable * total:
            raise UserError(
                f"{len(unusable)} of {total} videos cannot be used, more than data.max_unusable="
                f"{self._config.max_unusable:g} allows; the last is {unusable[-1].path}: {unusable[-1].reason}"
            )

    def _graph(self, front_end: str, views: int) -> ClipGraph:
        key = front_end, views
        if key not in self._graphs:
            self._graphs[key] = ClipGraph(
                front_end, self._config, views=views, samples=self._batch, threads=self._threads, device=self._device
            )
        return self._graphs[key]

    def _on_copies(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._copies) if self._copies else nullcontext()


def _decode(path: str, start: int, frames: int, stride: int) -> NDArray[np.uint8]:
    try:
        return decode_frames(path, start, frames, stride)
    except DecodeError:
        raise
    except Exception as error:  # one strange file must not end a run of days; it is named, counted and left out
        raise DecodeError(f"{type(error).__name__}: {error}") from error


def _read(path: str) -> NDArray[np.uint8]:
    try:
        return np.fromfile(path, np.uint8)
    except OSError as error:
        raise DecodeError(error.strerror or str(error)) from error


def _check(config: DataConfig, batch: int, views: int) -> None:
    """UserError for values that do not fit together."""
    expectations = {
        f"data.frames, data.stride and data.size are at least 1; found {config.frames}, {config.stride}, {config.size}": (
            min(config.frames, config.stride, config.size) >= 1
        ),
        f"0 < data.min_area <= data.max_area <= 1; found {config.min_area} and {config.max_area}": (
            0 < config.min_area <= config.max_area <= 1
        ),
        f"data.max_aspect is at least 1; found {config.max_aspect}": config.max_aspect >= 1,
        f"data.prefetch is at least 1 and data.threads at least 0; found {config.prefetch} and {config.threads}": (
            config.prefetch >= 1 and config.threads >= 0
        ),
        f"data.views divides the batch of {batch} clips; found {views}": views >= 1 and batch >= 1 and batch % views == 0,
    }
    for expectation, met in expectations.items():
        if not met:
            raise UserError(f"expected: {expectation}")
