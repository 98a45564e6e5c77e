"""`embed`: computes feature vectors of videos, one per middle clip, or one per window of a long video.

Shapes: n features, R groups of tokens (pools.py), D the encoder's width.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from itertools import starmap
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from mam2.engine.checkpoints.frozen import FrozenEncoder
from mam2.engine.checkpoints.untrained import load_all_frozen
from mam2.engine.config.limits import BATCH, COUNT, COUNT_OR_NONE, check_flags
from mam2.engine.config.training import DataConfig, RunConfig
from mam2.engine.data.batch import channels_first
from mam2.engine.data.decoding import FILE_ERRORS, DecodeError, available_cores
from mam2.engine.data.manifest import Manifest, read_manifest
from mam2.engine.data.prefetch import Prefetcher
from mam2.engine.data.unusable import none_decoded
from mam2.engine.data.values import PixelValues
from mam2.engine.data.video import Skipped
from mam2.engine.data.windows import Span, Window, parse_span, sliding_windows
from mam2.engine.errors import UserError
from mam2.engine.evaluation.embedding_files import check_embedding_file, write_embedding
from mam2.engine.evaluation.feature_files import FeatureSpec, write_features
from mam2.engine.evaluation.features import clip_features
from mam2.engine.evaluation.pools import Pool
from mam2.engine.files import check_apart, check_folder, writing
from mam2.engine.runtime.device import matmul_dtype, pick_device
from mam2.engine.runtime.progress import Progress

BATCHES_AHEAD = 2
"""Batches of windows that are decoded ahead of the encoder."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Embedding:
    """Features with the origin of each row."""

    features: NDArray[np.float32]
    """[n, R·D]; for windows a memory map of an unnamed file, so that many hours of video fit."""
    paths: tuple[str, ...]
    """The video of each row; the windows of a video are adjacent."""
    labels: NDArray[np.int64]
    """[n], the class of the row's video, -1 without a label."""
    start_s: NDArray[np.float64] | None = None
    """[n], start of the window in seconds from the video's first frame; None if the rows are whole videos."""
    end_s: NDArray[np.float64] | None = None
    """[n], end of the window in seconds."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Paths of videos without features, or with missing windows at the end, and the reasons."""
    about: dict[str, Any] = field(default_factory=dict)
    """Checkpoint, layer, pool, precision, window and hop, classes, as plain JSON values."""


def embed(
    checkpoint: str | Path,
    data: str | Path,
    out: str | Path | None = None,
    *,
    window: str | int | None = None,
    hop: str | int | None = None,
    layer: int = 0,
    recipe: str = "",
    pool: Pool = "mean",
    stride: int = 0,
    frames: int | None = None,
    size: int | None = None,
    heads: int | None = None,
    batch: int = 32,
    device: Literal["auto", "cuda", "cpu"] = "auto",
    precision: Literal["auto", "bfloat16", "float32"] = "auto",
    progress: bool = True,
) -> Embedding:
    """Computes features of the videos of a folder or list: of the middle clips, or with `window` or `hop` of all parts.

    With windows a file is read and decoded once from start to end; the memory holds only the frames of incomplete
    windows and a few batches.

    Args:
        checkpoint: a run, a checkpoint, or weights of VideoMAE or Hugging Face; `random` is the encoder of `recipe`
            with random weights.
        data: a folder of videos, an annotation list, or a video.
        out: output file: .npy (with a .json file next to it), .npz, .safetensors or .parquet, which needs pyarrow; for
            windows also a .csv table next to it that describes each row. None writes nothing.
        window: length of a window: a number of frames of the file (16), or seconds ("2s"). The encoder's frames are
            evenly spaced in it. None with a hop: the length of the checkpoint's training clips.
        hop: distance of the starts of two windows, in frames of the file or seconds; None: the window's length.
        layer: encoder block whose tokens are averaged, from 1; 0 is the last.
        recipe: pre-training recipe with the model and clips of the checkpoint `random`.
        pool: groups of tokens to average, see `mam2.engine.evaluation.pools`.
        stride: distance of two sampled frames; 0: the checkpoint's. Not with a window, which determines it.
        frames, size, heads: for a checkpoint that does not state them, see `load_encoder`.
        batch: clips per forward pass.
        device: auto uses a GPU if there is one.
        precision: auto is bfloat16 autocast on a GPU and on x86 CPUs with bfloat16 instructions, else float32.
        progress: draw a progress bar (only on a terminal).

    Raises:
        UserError: checkpoint, data or file cannot be used. A single video that cannot be decoded does not raise; it is
            listed in `skipped`.
    """
    check_flags(
        layer=(layer, COUNT_OR_NONE),
        stride=(stride, COUNT_OR_NONE),
        frames=(frames, COUNT),
        size=(size, COUNT),
        heads=(heads, COUNT),
        batch=(batch, BATCH),
    )
    spans = {
        name: None if value is None else parse_span(value, f"--{name}")
        for name, value in {"window": window, "hop": hop}.items()
    }
    if window is not None and stride:
        raise UserError(f"--stride {stride}: a window of {window} determines the distance of its frames; pass only one")
    target = Path(out) if out is not None else None
    if target:
        check_embedding_file(target)
        check_apart(data, target)
        with writing(target):
            check_folder(target.absolute().parent)
    run = RunConfig(device=device, precision=precision)
    where = pick_device(run)
    (frozen,) = load_all_frozen(
        [Path(checkpoint)], where, recipe=recipe, stride=stride, frames=frames, size=size, heads=heads
    )
    if not 0 <= layer <= frozen.depth:
        raise UserError(f"--layer {layer}: {checkpoint} has layers 1 to {frozen.depth}; 0 is the last")
    spec = FeatureSpec(frozen, layer or frozen.depth, pool)
    manifest = read_manifest(data, progress=progress)
    about = {
        "checkpoint": str(checkpoint),
        "weights": str(frozen.weights),
        "sha256": frozen.digest,
        "layer": spec.layer,
        "pool": pool,
        "precision": str(matmul_dtype(run, where)).removeprefix("torch."),
        "classes": list(manifest.classes),
    }
    scratch = target.absolute().parent if target else Path(tempfile.gettempdir())
    with writing(target or scratch):
        if spans["window"] or spans["hop"]:
            length = spans["window"] or _trained_span(frozen.data)
            about |= {"window": str(length), "hop": str(spans["hop"] or length)}
            hop_span = spans["hop"] or length
            found = _of_windows(manifest, spec, pool, length, hop_span, batch, run, scratch, about, progress)
        else:
            found = _of_videos(manifest, spec, batch, run, scratch, about, progress)
        found.about["shape"] = [found.features.shape[1] // frozen.encoder.width, frozen.encoder.width]
        if target:
            write_embedding(target, found)
    return found


def _trained_span(data: DataConfig) -> Span:
    """Returns the duration of a checkpoint's training clips."""
    return Span(data.frames / data.fps, True) if data.fps else Span(data.frames * data.stride, False)


def _of_videos(
    manifest: Manifest,
    spec: FeatureSpec,
    batch: int,
    run: RunConfig,
    scratch: Path,
    about: dict[str, Any],
    progress: bool,
) -> Embedding:
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".part-embed-") as folder:
        rows = Path(folder) / "rows.npy"
        skipped = write_features(manifest, {spec: rows}, batch=batch, run=run, progress=progress)
        features = np.load(rows)
    there = ~np.isnan(features[:, 0])
    videos = [video for video, whole in zip(manifest.videos, there, strict=True) if whole]
    return Embedding(
        features=features[there],
        paths=tuple(video.path for video in videos),
        labels=np.array([video.label for video in videos], np.int64),
        skipped=skipped | {video.path: video.reason for video in manifest.skipped},
        about=about,
    )


def _of_windows(
    manifest: Manifest,
    spec: FeatureSpec,
    pool: Pool,
    window: Span,
    hop: Span,
    batch: int,
    run: RunConfig,
    scratch: Path,
    about: dict[str, Any],
    progress: bool,
) -> Embedding:
    encoder = spec.frozen.encoder
    device = encoder.positions.device
    skipped = {video.path: video.reason for video in manifest.skipped}
    paths: list[str] = []
    labels: list[int] = []
    times: list[tuple[float, float]] = []
    width = 0
    with (
        tempfile.TemporaryFile(dir=scratch) as spool,
        Progress(total=len(manifest.videos), desc="windows", unit="video", shown=progress) as bar,
    ):
        batches = Prefetcher(
            _window_batches(manifest, spec.frozen, window, hop, batch, skipped, bar.update), BATCHES_AHEAD, _nothing
        )
        try:
            for numbers, windows in batches:
                clips = channels_first(torch.stack([one.clip for one in windows]).to(device))
                features = clip_features(encoder, clips, [(spec.layer, pool)], run=run)[spec.layer, pool].numpy()
                spool.write(features.tobytes())
                width = features.shape[1]
                paths += [manifest.videos[number].path for number in numbers]
                labels += [manifest.videos[number].label for number in numbers]
                times += [(one.start_s, one.end_s) for one in windows]
        finally:
            batches.close()
        if not paths:
            raise UserError(none_decoded("--data", list(starmap(Skipped, skipped.items()))))
        spool.flush()
        features = np.memmap(spool, np.float32, "r", shape=(len(paths), width))
    start_s, end_s = (np.array(column, np.float64) for column in zip(*times, strict=True))
    return Embedding(
        features=features,
        paths=tuple(paths),
        labels=np.array(labels, np.int64),
        start_s=start_s,
        end_s=end_s,
        skipped=skipped,
        about=about,
    )


def _window_batches(
    manifest: Manifest,
    frozen: FrozenEncoder,
    window: Span,
    hop: Span,
    batch: int,
    skipped: dict[str, str],
    done: Callable[[], object],
) -> Generator[tuple[list[int], list[Window]], None, None]:
    """Yields batches of the windows of all videos in order: the indices of their videos, and the windows.

    skipped: receives the reason for every video that cannot be decoded to its end. done: called after every video.
    """
    numbers: list[int] = []
    windows: list[Window] = []
    threads = min(available_cores(), 8)
    values = PixelValues.of(frozen.data, manifest.videos)
    for number, video in enumerate(manifest.videos):
        try:
            for one in sliding_windows(
                video,
                frames=frozen.data.frames,
                size=frozen.data.size,
                window=window.frames(video),
                hop=hop.frames(video),
                values=values,
                threads=threads,
                timeout_s=frozen.data.timeout_s,
            ):
                numbers.append(number)
                windows.append(one)
                if len(windows) == batch:
                    yield numbers, windows
                    numbers, windows = [], []
        except UserError as error:
            skipped[video.path] = str(error)
        except (DecodeError, *FILE_ERRORS) as error:
            skipped[video.path] = str(error) if isinstance(error, DecodeError) else f"{type(error).__name__}: {error}"
        done()
    if windows:
        yield numbers, windows


def _nothing(_item: object, _waited_s: float) -> None:
    pass
