"""Loader benchmark: clips/s by decoder, codec, key-frame distance and threads, recorded clips, a step's wait for clips.

It also times decoders alone, without crop and resize: PyAV in its simplest use, and decord2 and torchcodec if they are
installed. A decoder whose frames differ from PyAV's gets no number. On a CPU, rates are relative to PyAV alone on the
same files, measured in turns within one run.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.loader_settings import CODES, SETTINGS, TOLERANCE, Row, Settings, Unmeasured, write_files
from benchmarks.recorded_clips import recorded_rows
from benchmarks.timing import percentile
from mam2.kernels import tube_mask

Decode = Callable[[str, Sequence[int]], np.ndarray]


ALONE = "PyAV alone"
CLIP_TOLERANCE = 8.0
"""As `TOLERANCE`, for cropped and resized clips: decoders interpolate colors differently. The next frame differs by
27."""
ENOUGH = 0.02
"""Share of a step spent waiting for clips below which the loader does not limit training."""


def rows(device: torch.device, deadline: float, settings: Settings | None = None) -> Iterator[Row]:
    """Yields a row per decoder for the first kind of files in `settings.loaders`, then rows of a training step.

    A row is yielded as soon as it is measured; one that cannot be measured has a "reason". Without DALI, its decoders
    are skipped, and PyTorch crops PyAV's frames.
    """
    if missing := _missing():
        yield missing
        return
    settings = settings or SETTINGS[device.type]
    with tempfile.TemporaryDirectory() as folder:
        kind = kinds_of(settings)[0]
        manifest = write_files(Path(folder), *kind, settings)
        yield from decoding_rows({kind: manifest}, settings, device, deadline)
        yield from step_rows(kind, manifest, settings, device, deadline)


def file_rows(device: torch.device, deadline: float, settings: Settings | None = None) -> Iterator[Row]:
    """Yields the rows of the decoders for the other kinds of files, then those of recorded clips, as `rows` does.

    The first kind comes again in `settings.odd_width` with the first loader, for which DALI makes a decoder per clip.
    """
    if missing := _missing():
        yield missing
        return
    settings = settings or SETTINGS[device.type]
    with tempfile.TemporaryDirectory() as folder:
        odd = dataclasses.replace(settings, width=settings.odd_width, loaders=settings.loaders[:1])
        sized = [(odd, kind, f" {odd.width}x{odd.height}") for kind in kinds_of(odd) if odd.width]
        for used, kind, size in [*sized, *((settings, kind, "") for kind in kinds_of(settings)[1:])]:
            files = {"files": kind[0] + size}
            if time.monotonic() > deadline:
                yield {"decoder": "all", "gop": kind[1], "verdict": "skipped", "reason": "out of time"} | files
                continue
            for row in decoding_rows({kind: write_files(Path(folder), *kind, used)}, used, device, deadline):
                yield row | files
        yield from recorded_rows(Path(folder), settings, device, deadline)


def kinds_of(settings: Settings) -> list[tuple[str, int]]:
    """Returns codec and key-frame distance of the files that the loaders read, in their order."""
    return list(dict.fromkeys((codec, gop) for _, codec, gop, _ in settings.loaders))


def _missing() -> Row | None:
    """Returns the row that says which package the measurement lacks."""
    for package in ("av", "tqdm"):
        if not _installed(package):
            return {"decoder": "all", "verdict": "skipped", "reason": f"{package} is not installed"}
    return None


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the parent package of a dotted name is missing
        return False


def decoding_rows(manifests: Any, settings: Settings, device: torch.device, deadline: float) -> Iterator[Row]:
    """Yields a row per decoder and kind of files, in the last of the `settings.turns` in which they are measured."""
    from mam2.engine.config.recipe import load_recipe

    data = dataclasses.replace(load_recipe("mam2-fast").data, **settings.data)
    labels: list[Row] = []
    turns: list[Callable[[], float]] = []
    for kind, manifest in manifests.items():
        label: Row = {"files": kind[0], "gop": kind[1]}
        for name, decode in decoders().items():
            labels.append({"decoder": name, "provider": name, **label, "threads": 1})
            turns.append(functools.partial(decoder_rate, decode, manifest, data, settings))
        for decoder, codec, gop, threads in settings.loaders:
            if (codec, gop) == kind:
                labels.append({"decoder": decoder, **label, "threads": threads or "one per core"})
                turns.append(functools.partial(_loader_turn, decoder, threads, manifest, data, settings, device))
    rates: list[list[float]] = [[] for _ in turns]
    problems: list[Row] = [{} for _ in turns]
    base: dict[tuple[str, int], float] = {}
    for number in range(settings.turns):
        for place, (row, turn) in enumerate(zip(labels, turns, strict=True)):
            if not problems[place]:
                rate, problems[place] = _measured(turn, deadline)
                rates[place] += [rate] if rate else []
            if number + 1 < settings.turns:
                continue
            if problems[place]:
                yield row | problems[place]
                continue
            rate = percentile(rates[place], 50)
            if row["decoder"] == ALONE:
                base[row["files"], row["gop"]] = rate
            reference = base.get((row["files"], row["gop"]))
            rated = {"clips_per_s": rate, "frames_per_s": rate * data.frames} if device.type == "cuda" else {}
            yield row | rated | {"ratio_to_pyav_alone": rate / reference if reference else None}


def _measured(turn: Callable[[], float], deadline: float) -> tuple[float, Row]:
    """Returns the rate of a turn, or 0 with the verdict and the reason why there is none."""
    if time.monotonic() > deadline:
        return 0.0, {"verdict": "skipped", "reason": "out of time"}
    try:
        return turn(), {}
    except Unmeasured as problem:
        return 0.0, {"verdict": problem.args[0], "reason": problem.args[1]}
    except Exception as problem:
        return 0.0, {"verdict": "skipped", "reason": str(problem)[:300]}


def _loader_turn(
    decoder: str, threads: int, manifest: Any, data: Any, settings: Settings, device: torch.device
) -> float:
    return loader_rate(manifest, options_of(decoder, threads, manifest, data, device), settings, device)


def options_of(decoder: str, threads: int, manifest: Any, data: Any, device: torch.device) -> Any:
    """Returns the config of a loader; "shared" measures the rates of NVDEC and PyAV and divides the videos by them."""
    from mam2.engine.data.decoder_share import measure_rates

    if decoder != "shared":
        return dataclasses.replace(data, decoder=decoder, threads=threads)
    options = dataclasses.replace(data, decoder="auto", threads=threads)
    share = measure_rates(manifest, list(range(len(manifest.videos))), options, device).share
    return dataclasses.replace(options, nvdec_share=share)


def first_clips(manifest: Any, data: Any, settings: Settings, device: torch.device) -> torch.Tensor:
    """Returns the first batch of a loader, cropped and resized, uint8 on the CPU."""
    from mam2.engine.data.loader import ClipLoader

    begun = time.perf_counter()
    with ClipLoader(manifest, data, batch=settings.batch, device=device, seed=0) as loader:
        opened = time.perf_counter()
        clips = next(loader.stream()).clip.cpu()
        decoded = time.perf_counter()
        if loader.skipped:
            raise Unmeasured("failed", f"unusable: {loader.skipped[0]}")
    note(data, opened=opened - begun, first_batch=decoded - opened, closed=time.perf_counter() - decoded)
    return clips


def note(data: Any, **seconds: float) -> None:
    """Writes to standard error how long the parts of a measurement took: a section that is cut off logs it."""
    parts = ", ".join(f"{name.replace('_', ' ')} {value:.2f} s" for name, value in seconds.items())
    print(f"loader  {data.decoder}: {parts}", file=sys.stderr, flush=True)


def check_frames(manifest: Any, data: Any, settings: Settings, device: torch.device) -> None:
    """Raises Unmeasured if a decoder's clips differ from PyAV's by more than rounding, as those of other frames do."""
    if data.decoder == "pyav":
        return
    found = first_clips(manifest, data, settings, device)
    expected = first_clips(manifest, dataclasses.replace(data, decoder="pyav"), settings, device)
    if found.shape != expected.shape:
        raise Unmeasured("wrong", f"its clips are {list(found.shape)}, PyAV's {list(expected.shape)}")
    difference = float((found.float() - expected.float()).abs().mean())
    if not difference <= CLIP_TOLERANCE:
        raise Unmeasured("wrong", f"its clips differ from PyAV's by {difference:.1f} gray levels on average")


def loader_rate(manifest: Any, data: Any, settings: Settings, device: torch.device) -> float:
    """Returns clips per second after the prefetched batches are used up; first checks the clips against PyAV's."""
    from mam2.engine.data.loader import ClipLoader

    check_frames(manifest, data, settings, device)
    with ClipLoader(manifest, data, batch=settings.batch, device=device, seed=0) as loader:
        stream, opened = loader.stream(), time.perf_counter()
        for _ in range(data.prefetch + 2):
            next(stream)
        note(data, prefetched_batches=time.perf_counter() - opened)
        start, batches = time.perf_counter(), 0
        while time.perf_counter() - start < settings.seconds:
            next(stream)
            batches += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        if loader.skipped:
            raise Unmeasured("failed", f"unusable: {loader.skipped[0]}")
    return batches * settings.batch / seconds


def decoder_rate(decode: Decode, manifest: Any, data: Any, settings: Settings) -> float:
    """Returns clips per second of a decoder alone, on one thread and on the clips that the loader would draw."""
    from mam2.engine.data.decoding import decode_frames
    from mam2.engine.data.sampling import draw_clip, sample_at

    def requests() -> Iterator[tuple[str, tuple[int, ...]]]:
        for counter in itertools.count():
            epoch, video = sample_at(counter, len(manifest.videos), 0)
            yield manifest.videos[video].path, draw_clip(video, manifest.videos[video], epoch, data, 0).frames

    first = next(requests())
    found, expected = decode(*first).astype(np.float32), decode_frames(*first)
    if found.shape != expected.shape:
        raise Unmeasured("wrong", f"its frames are {found.shape}, expected {expected.shape}")
    difference = np.abs(found - expected).mean()
    if difference > TOLERANCE:
        raise Unmeasured("wrong", f"its frames differ from PyAV's by {difference:.1f} gray levels on average")
    drawn, clips = requests(), 0
    start = time.perf_counter()
    while time.perf_counter() - start < settings.seconds:
        decode(*next(drawn))
        clips += 1
    return clips / (time.perf_counter() - start)


def decoders() -> dict[str, Decode]:
    """Returns the decoders by name; one that is not installed raises Unmeasured when it is called."""

    def pyav(path: str, frames: Sequence[int]) -> np.ndarray:
        import av

        wanted, images = set(frames), []
        with av.open(path) as container:
            container.streams.video[0].thread_count = 1
            for number, frame in enumerate(container.decode(video=0)):
                if number in wanted:
                    images.append(frame.to_ndarray(format="rgb24"))
                if number == frames[-1]:
                    break
        return np.stack(images)

    def decord(path: str, frames: Sequence[int]) -> np.ndarray:
        return _peer("decord").VideoReader(path, num_threads=1).get_batch(list(frames)).asnumpy()

    def torchcodec(path: str, frames: Sequence[int]) -> np.ndarray:
        decoder = _peer("torchcodec.decoders").VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1)
        return decoder.get_frames_at(indices=list(frames)).data.numpy()

    return {ALONE: pyav, "decord2": decord, "torchcodec": torchcodec}


def _peer(name: str) -> Any:
    if not _installed(name.partition(".")[0]):
        raise Unmeasured("skipped", "not installed")
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as problem:
        raise Unmeasured("skipped", f"installed, but fails to load: {str(problem).splitlines()[0]}") from problem


def step_rows(
    kind: tuple[str, int], manifest: Any, settings: Settings, device: torch.device, deadline: float
) -> Iterator[Row]:
    """Times uncompiled training steps on clips from the loader, with random codes; a row per number of views.

    Stops once the loader is no limit.
    """
    from mam2.engine.data.loader import ClipLoader

    for views in settings.views:
        row: Row = {"decoder": "auto, in a step of mam2-fast", "files": kind[0], "gop": kind[1], "views": views}
        row |= {"batch": settings.batch} if device.type == "cuda" else {}
        if time.monotonic() > deadline:
            yield row | {"verdict": "skipped", "reason": "out of time"}
            return
        config = tailored(settings, views)
        step = training_step(config, settings.batch, device)
        with ClipLoader(manifest, config.data, batch=settings.batch, device=device, seed=0) as loader:
            stream = loader.stream()
            for _ in range(config.data.prefetch + 2):
                step(next(stream))
            waited, start = loader.wait_s, time.perf_counter()
            for _ in range(settings.steps):
                step(next(stream))
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            share = (loader.wait_s - waited) / seconds
        rate = {"clips_per_s": settings.steps * settings.batch / seconds} if device.type == "cuda" else {}
        yield row | rate | {"data_wait_percent": 100 * share, "limit": "step" if share < ENOUGH else "loader"}
        if share < ENOUGH:
            return


def tailored(settings: Settings, views: int) -> Any:
    from mam2.engine.config.recipe import load_recipe

    config = load_recipe("mam2-fast")
    part = {key: value for key, value in settings.model.items() if key != "patch"}
    model = dataclasses.replace(
        config.model,
        **settings.model,
        regressor=dataclasses.replace(config.model.regressor, **part),
        decoder=dataclasses.replace(config.model.decoder, **part),
    )
    return dataclasses.replace(config, model=model, data=dataclasses.replace(config.data, views=views, **settings.data))


def training_step(config: Any, batch: int, device: torch.device) -> Callable[[Any], None]:
    """Returns a step of forward, backward and AdamW; it waits for the device, so that the host does not run ahead."""
    from mam2.engine.model.build import build_model
    from mam2.engine.runtime.device import autocast
    from mam2.engine.train.objective import build_objective
    from mam2.engine.train.optimizer import build_optimizer

    model = build_model(config, CODES).to(device)
    objective, optimizer = build_objective(model, config, lambda part: part), build_optimizer(model, config.optim)
    tokens = config.grid[0] * config.grid[1] * config.grid[2]
    codes = torch.randint(CODES, (batch, tokens), device=device)

    def step(clips: Any) -> None:
        mask = tube_mask(batch, config.grid, config.mask.ratio, seed=0, step=clips.step, device=device)
        with autocast(config.run, device):
            loss = objective(clips.video, mask, codes)[0]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step
