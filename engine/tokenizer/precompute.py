"""Tokenizes a data set once: writes the codes of every recorded augmentation of every video to a code cache."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from mam2.engine.config.pretrain import PretrainConfig, check
from mam2.engine.config.training import micro_batches_per_step
from mam2.engine.data.batch import Batch
from mam2.engine.data.loader import ClipLoader
from mam2.engine.data.manifest import MANIFEST, Skipped, write_manifest
from mam2.engine.data.renderer import threads_of_a_process
from mam2.engine.data.sets import Sources, check_sources, read_sets, training_sources
from mam2.engine.errors import UserError
from mam2.engine.files import append_rows, make_folder, one_line, writing
from mam2.engine.runtime.device import compiler, pick_device
from mam2.engine.runtime.progress import Progress
from mam2.engine.tokenizer.cache import CodeCache, CodeCacheWriter
from mam2.engine.tokenizer.clip_files import ClipFormat
from mam2.engine.tokenizer.files import fingerprint, load_vqgan
from mam2.engine.tokenizer.prepare import build_tokenizer, prepare_tokenizer
from mam2.engine.tokenizer.source import CodeSource, online, with_codes
from mam2.engine.tokenizer.vqgan import VQGAN
from mam2.engine.units import counted, decimal_bytes

Clips = Literal["none", "jpeg", "raw"]


@dataclass(frozen=True, kw_only=True)
class TokenizeResult:
    clips: int
    """Clips (not counting views) tokenized by this call."""
    seconds: float
    """Duration of this call."""
    cache: CodeCache


def tokenize(
    config: PretrainConfig, data: Sources, out: str | Path, *, clips: Clips = "none", progress: bool = True
) -> TokenizeResult:
    """Writes the codes of all recorded augmentations to the folder `out`, or those that are still missing there.

    Args:
        config: config of the pre-training that will use them; its tables data, model, tokenizer and run matter.
        data: a folder or an annotation list, or several in the order of the pre-training; empty: those of
            `config.data.sets`. The weights of the sets have no effect on the codes.
        out: folder of the cache; see `mam2.engine.tokenizer.cache`.
        clips: also write the clips, so that the pre-training decodes no video: as `jpeg`, or as `raw` values.
        progress: draw a progress bar (only on a terminal).

    Raises:
        UserError: the config has no codes or no recorded augmentations, the folder contains other codes, or the clips
            need more space than is free.
    """
    check(config)
    if not config.needs_codes:
        objective = config.model.objective
        which = f"loss.appearance_target {config.loss.appearance_target!r}"
        if objective != "mam2":
            which = f"model.objective {objective!r}"
        raise UserError(f"{which} has no codes to predict: nothing to tokenize")
    if not config.data.recorded:
        raise UserError("data.recorded is 0: set it to the number of augmentations per video to tokenize")
    if config.tokenizer.cache:
        raise UserError("tokenizer.cache is the cache to read; set the cache to write with --out")
    out, device = Path(out), pick_device(config.run)
    sources = training_sources(config.data, data)
    check_sources(sources, out)
    make_folder(out)
    named = load_vqgan(config.tokenizer.path) if config.tokenizer.path else None
    with writing(out):
        return _tokenize(config, sources, out, device, named, clips, progress)


def _tokenize(
    config: PretrainConfig,
    sources: Sequence[Path],
    out: Path,
    device: torch.device,
    named: VQGAN | None,
    clips: Clips,
    progress: bool,
) -> TokenizeResult:
    manifest = read_sets(sources, threads=config.data.threads, progress=progress)
    (out / "skipped.tsv").unlink(missing_ok=True)

    def skip(skipped: Skipped) -> None:
        tqdm.write(one_line(f"unusable: {skipped.path}: {skipped.reason}"))
        append_rows(out / "skipped.tsv", [(skipped.path, skipped.reason)])

    for skipped in manifest.skipped:
        skip(skipped)
    batch = config.optim.batch // micro_batches_per_step(config, 1)
    with ClipLoader(manifest, config.data, batch=batch, device=device, seed=config.run.seed, on_skip=skip) as loader:
        form = None
        if clips != "none":
            side, dtype = config.data.size, str(loader.dtype).removeprefix("torch.")
            form = ClipFormat(clips, (config.data.frames, side, side, config.data.channels), dtype)
            form.check()
        if config.run.compile:
            torch.compiler.reset()  # as in `Step`
        vqgan = prepare_tokenizer(config, loader, out, device, tqdm.write, named=named, progress=progress)
        tokenizer = build_tokenizer(vqgan, config, device, compiler(config.run, device)[0])
        with CodeCacheWriter(
            out,
            manifest,
            config,
            tokenizer=fingerprint(vqgan),
            codebook_size=tokenizer.codebook_size,
            precision=tokenizer.precision,
            clips=form,
            progress=progress,
        ) as writer:
            write_manifest(manifest, out / MANIFEST)
            start = time.perf_counter()
            with _ClipStore(form, config, out, sum(1 for _ in writer.missing())) if form else nullcontext() as store:
                count = _fill(writer, loader, online(tokenizer, tqdm.write), store, device, progress)
    return TokenizeResult(clips=count, seconds=time.perf_counter() - start, cache=CodeCache(out, progress=progress))


class _ClipStore:
    """Encodes the clips of batches in threads; the first batch shows how much space all of them will take."""

    def __init__(self, form: ClipFormat, config: PretrainConfig, out: Path, missing: int) -> None:
        """missing: number of clips that the cache still lacks, not counting views."""
        self._form, self._out = form, out
        self._left = missing * config.data.views
        self._pool = ThreadPoolExecutor(config.data.threads or threads_of_a_process(), "encode")
        self._measured = False

    def encode(self, batch: Batch) -> list[list[bytes]]:
        """Returns the frames of each clip of a batch as stored. Raises UserError if the space will not suffice."""
        images = list(self._pool.map(self._form.encode, batch.clip.cpu().numpy()))
        if not self._measured:
            self._measured = True
            self._predict(float(np.mean([sum(map(len, frames)) for frames in images])), len(images))
        return images

    def _predict(self, clip_bytes: float, measured: int) -> None:
        needed, free = self._left * clip_bytes, shutil.disk_usage(self._out).free
        tqdm.write(
            f"clips   {decimal_bytes(needed)} as {self._form.coding} in {self._out}: {counted(self._left, 'clip')} of "
            f"{clip_bytes / 1e3:.0f} kB, the mean of the first {measured}; {decimal_bytes(free)} are free"
        )
        if needed > free:
            smaller = ", --clips jpeg" if self._form.coding == "raw" else ""
            raise UserError(
                f"--out {self._out}: the clips need about {decimal_bytes(needed)}, {decimal_bytes(free)} are free; "
                f"use another drive, a smaller data.recorded{smaller} or no --clips"
            )

    def __enter__(self) -> _ClipStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def _fill(
    writer: CodeCacheWriter,
    loader: ClipLoader,
    source: CodeSource,
    store: _ClipStore | None,
    device: torch.device,
    progress: bool,
) -> int:
    """Writes all missing codes and clips. Returns the number of clips."""
    clips = 0
    done = writer.total - sum(1 for _ in writer.missing())
    with Progress(desc="tokenizing", total=writer.total, initial=done, unit="clip", shown=progress) as bar:
        for batch, codes in with_codes(loader.recorded(writer.missing()), source, device):
            assert codes is not None
            images = store.encode(batch) if store else None
            writer.add(batch.index, batch.augmentation, batch.view, codes.cpu(), images)
            new = int((batch.view == 0).sum())
            clips += new
            bar.update(new)
    writer.finish()
    return clips
