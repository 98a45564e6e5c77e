"""Frozen features as .npy files, written while the videos are decoded, and a folder that caches them.

Shapes: D an encoder's width, n videos of a manifest, R groups of tokens (pools.py), K cells (features.py).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mam2.engine.checkpoints.frozen import FrozenEncoder
from mam2.engine.config.recipe import to_dict
from mam2.engine.config.training import DataConfig, RunConfig
from mam2.engine.data.loader import ClipLoader
from mam2.engine.data.manifest import Manifest
from mam2.engine.errors import UserError
from mam2.engine.evaluation.features import CELLS, FeatureKind, cell_grid, clip_features
from mam2.engine.evaluation.pools import token_groups
from mam2.engine.files import written_aside
from mam2.engine.runtime.device import matmul_dtype
from mam2.engine.runtime.progress import Progress


class FeatureSpec(NamedTuple):
    """Features of one layer of one encoder.

    Pooled tokens, float32 [n, R·D]; cells, float16 [n, K, D]; all N tokens, float16 [n, N·D].
    """

    frozen: FrozenEncoder
    layer: int
    """Number of the layer, from 1; the tokens of the last include the encoder's final LayerNorm."""
    kind: FeatureKind


class FeatureCache:
    """A folder of features; a file's name is the hash of encoder, videos, sampling, precision, layer and kind.

    run: contains the precision of the encoders.
    """

    def __init__(self, folder: Path, run: RunConfig | None = None) -> None:
        self._folder, self._run = folder, run or RunConfig()

    def get(
        self, manifest: Manifest, wanted: Iterable[FeatureSpec], *, batch: int, progress: bool = True
    ) -> dict[FeatureSpec, NDArray[np.floating]]:
        """Returns memory-mapped features of all videos of a manifest, in its order; computes missing ones first.

        A video that cannot be decoded has a row of NaN. batch: clips per forward pass.
        """
        paths = {want: self._folder / f"{_key(manifest, want, self._run)}.npy" for want in wanted}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            # two paths can name the same encoder: a run and its best checkpoint
            missing = {path: want for want, path in paths.items() if not path.is_file()}
            wanted_once = {want: path for path, want in missing.items()}
            write_features(manifest, wanted_once, batch=batch, run=self._run, progress=progress)
        except OSError as error:
            raise UserError(f"--cache {self._folder}: cannot be written: {error.strerror}") from None
        return {want: np.load(path, mmap_mode="r") for want, path in paths.items()}


def write_features(
    manifest: Manifest, wanted: Mapping[FeatureSpec, Path], *, batch: int, run: RunConfig, progress: bool = True
) -> dict[str, str]:
    """Writes features of the middle clip of every video to .npy files; see `FeatureCache.get` for what they hold.

    Encoders with the same clips share one decoding; each runs once for all its layers. A file appears when it is
    complete. `run` contains the precision. Returns the paths of videos that could not be decoded, with the reasons.
    """
    skipped: dict[str, str] = {}
    by_clips: dict[str, list[FeatureSpec]] = {}
    for want in wanted:
        by_clips.setdefault(json.dumps(_clips(want)), []).append(want)
    for group in by_clips.values():
        encoders = list(dict.fromkeys(want.frozen for want in group))
        device = _device(encoders[0])
        with (
            ExitStack() as files,
            ClipLoader(manifest, group[0].frozen.data, batch=batch, device=device, seed=0, train=False) as loader,
        ):
            # other processes may write the same features
            asides = {want: files.enter_context(written_aside(wanted[want], unique=True)) for want in group}
            rows = {want: _new_rows(path, manifest, want) for want, path in asides.items()}
            bar = Progress(loader.evaluate(), "features", loader.evaluated_batches, unit="batch", shown=progress)
            for clips in bar:
                video = clips.video.to(device)
                for frozen in encoders:
                    own = [want for want in group if want.frozen is frozen]
                    wanted_here = [(want.layer, want.kind) for want in own]
                    found = clip_features(frozen.encoder, video, wanted_here, run=run)
                    for want in own:
                        rows[want][clips.index.numpy()] = found[want.layer, want.kind].numpy()
            skipped |= {video.path: video.reason for video in loader.skipped}
            for written in rows.values():
                written.flush()
    return skipped


def _new_rows(path: Path, manifest: Manifest, want: FeatureSpec) -> np.memmap:
    """Creates a .npy file filled with NaN. Raises OSError if the disk has no space for it."""
    width = want.frozen.encoder.width
    if want.kind == "cells":
        shape = [math.prod(cell_grid(want.frozen.encoder.grid)), width]
    elif want.kind == "tokens":
        shape = [math.prod(want.frozen.encoder.grid) * width]
    else:
        shape = [len(token_groups(want.frozen.encoder.grid, want.kind)) * width]
    dtype = np.dtype("float16" if want.kind in ("cells", "tokens") else "float32")
    rows = np.lib.format.open_memmap(path, "w+", dtype, (len(manifest.videos), *shape))
    with path.open("rb+") as file:  # a full disk under a memory map ends the process with SIGBUS
        os.posix_fallocate(file.fileno(), 0, max(os.fstat(file.fileno()).st_size, 1))
    rows[:] = np.nan
    return rows


def _clips(want: FeatureSpec) -> dict[str, object]:
    """Returns the config values that determine the pixels that an encoder sees."""
    fields = to_dict(want.frozen.data)
    found = {name: fields[name] for name in ("frames", "stride", "fps", "sampling", "size")}
    others = {name: fields[name] for name in ("channels", "value_range")}
    default = to_dict(DataConfig())
    return found | {name: value for name, value in others.items() if value != default[name]}


def _device(frozen: FrozenEncoder) -> torch.device:
    return frozen.encoder.positions.device


def _key(manifest: Manifest, want: FeatureSpec, run: RunConfig) -> str:
    dtype = str(matmul_dtype(run, _device(want.frozen)))
    videos = [(video.path, video.bytes, video.mtime_ns, video.content) for video in manifest.videos]
    groups: int | list[list[int]]
    if want.kind == "cells":
        groups = CELLS
    elif want.kind == "tokens":
        groups = math.prod(want.frozen.encoder.grid)
    else:
        groups = token_groups(want.frozen.encoder.grid, want.kind).int().tolist()
    described = json.dumps([want.frozen.digest, _clips(want), dtype, want.layer, want.kind, groups, videos])
    return hashlib.sha256(described.encode()).hexdigest()[:32]
