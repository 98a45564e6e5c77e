"""Loader benchmark: clips/s by decoder, codec, key-frame distance and threads, recorded clips, a step's wait for clips.

It also times decoders alone, without crop and resize: PyAV in its simplest use, and decord2 and torchcodec if they are
installed. A decoder whose frames differ from PyAV's gets no number. On a CPU, rates are relative to PyAV alone on the
same files, measured in turns within one run.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import itertools
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
    """Yields a row per decoder and number of views; a row that cannot be measured has a "reason".

    Without DALI, its decoders are skipped, and PyTorch crops PyAV's frames.
    """
    for package in ("av", "tqdm"):
        if not _installed(package):
            yield {"decoder": "all", "verdict": "skipped", "reason": f"{package} is not installed"}
            return
    settings = settings or SETTINGS[device.type]
    with tempfile.TemporaryDirectory() as folder:
        kinds = sorted({(codec, gop) for _, codec, gop, _ in settings.loaders})
        manifests = {kind: write_files(Path(folder), *kind, settings) for kind in kinds}
        yield from step_rows(manifests["h264", 30], settings, device, deadline)
        yield from decoding_rows(manifests, settings, device, deadline)
        yield from recorded_rows(Path(folder), settings, device, deadline)


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the parent package of a dotted name is missing
        return False


def decoding_rows(manifests: Any, settings: Settings, device: torch.device, deadline: float) -> Iterator[Row]:
    from mam2.engine.config.recipe import load_recipe

    data = dataclasses.replace(load_recipe("mam2-fast").data, **settings.data)
    labels: list[Row] = []
    turns: list[Callable[[], float]] = []
    for codec, gop in sorted(manifests):
        for name, decode in decoders().items():
            labels.append({"decoder": name, "provider": name, "files": codec, "gop": gop, "threads": 1})
            turns.append(lambda decode=decode, kind=(codec, gop): decoder_rate(decode, manifests[kind], data, settings))
    for decoder, codec, gop, threads in settings.loaders:
        labels.append({"decoder": decoder, "files": codec, "gop": gop, "threads": threads or "one per core"})

        def turn(decoder: str = decoder, threads: int = threads, kind: tuple[str, int] = (codec, gop)) -> float:
            options = options_of(decoder, threads, manifests[kind], data, device)
            return loader_rate(manifests[kind], options, settings, device)

        turns.append(turn)
    rates: list[list[float]] = [[] for _ in turns]
    problems: list[Row] = [{} for _ in turns]
    for _ in range(settings.turns):
        for place, turn in enumerate(turns):
            if problems[place]:
                continue
            if time.monotonic() > deadline:
                problems[place] = {"verdict": "skipped", "reason": "out of time"}
                continue
            try:
                rates[place].append(turn())
            except Unmeasured as problem:
                problems[place] = {"verdict": problem.args[0], "reason": problem.args[1]}
            except Exception as problem:
                problems[place] = {"verdict": "skipped", "reason": str(problem)[:300]}
    medians = [percentile(found, 50) if found else None for found in rates]
    pairs = list(zip(labels, medians, strict=True))
    base = {(row["files"], row["gop"]): rate for row, rate in pairs if row["decoder"] == ALONE}
    for row, rate, problem in zip(labels, medians, problems, strict=True):
        if problem or rate is None:
            yield row | problem
            continue
        reference = base[row["files"], row["gop"]]
        rated = {"clips_per_s": rate, "frames_per_s": rate * data.frames} if device.type == "cuda" else {}
        yield row | rated | {"ratio_to_pyav_alone": rate / reference if reference else None}


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

    with ClipLoader(manifest, data, batch=settings.batch, device=device, seed=0) as loader:
        clips = next(loader.stream()).clip.cpu()
        if loader.skipped:
            raise Unmeasured("failed", f"unusable: {loader.skipped[0]}")
    return clips


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
        stream = loader.stream()
        for _ in range(data.prefetch + 2):
            next(stream)
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


def step_rows(manifest: Any, settings: Settings, device: torch.device, deadline: float) -> Iterator[Row]:
    """Times uncompiled training steps on clips from the loader, with random codes.

    Stops once the loader is no limit.
    """
    from mam2.engine.data.loader import ClipLoader

    for views in settings.views:
        row: Row = {"decoder": "auto, in a step of mam2-fast", "files": "h264", "gop": 30, "views": views}
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
