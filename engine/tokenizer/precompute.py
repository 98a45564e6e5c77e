"""Tokenizes a data set once: writes the codes of every recorded augmentation of every video to a code cache."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from mam2.engine.config.pretrain import PretrainConfig, check
from mam2.engine.config.training import micro_batches_per_step
from mam2.engine.data.loader import ClipLoader
from mam2.engine.data.manifest import MANIFEST, Skipped, write_manifest
from mam2.engine.data.sets import Sources, check_sources, read_sets, training_sources
from mam2.engine.errors import UserError
from mam2.engine.files import append_rows, make_folder, one_line, writing
from mam2.engine.runtime.device import compiler, pick_device
from mam2.engine.runtime.progress import Progress
from mam2.engine.tokenizer.cache import CodeCache, CodeCacheWriter
from mam2.engine.tokenizer.files import fingerprint, load_vqgan
from mam2.engine.tokenizer.prepare import build_tokenizer, prepare_tokenizer
from mam2.engine.tokenizer.source import CodeSource, online, with_codes
from mam2.engine.tokenizer.vqgan import VQGAN


@dataclass(frozen=True, kw_only=True)
class TokenizeResult:
    clips: int
    """Clips (not counting views) tokenized by this call."""
    seconds: float
    """Duration of this call."""
    cache: CodeCache


def tokenize(config: PretrainConfig, data: Sources, out: str | Path, *, progress: bool = True) -> TokenizeResult:
    """Writes the codes of all recorded augmentations to the folder `out`, or those that are still missing there.

    Args:
        config: config of the pre-training that will use them; its tables data, model, tokenizer and run matter.
        data: a folder or an annotation list, or several in the order of the pre-training; empty: those of
            `config.data.sets`. The weights of the sets have no effect on the codes.
        out: folder of the cache; see `mam2.engine.tokenizer.cache`.
        progress: draw a progress bar (only on a terminal).

    Raises:
        UserError: the config has no codes or no recorded augmentations, or the folder contains other codes.
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
        return _tokenize(config, sources, out, device, named, progress)


def _tokenize(
    config: PretrainConfig,
    sources: Sequence[Path],
    out: Path,
    device: torch.device,
    named: VQGAN | None,
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
        if config.run.compile:
            torch.compiler.reset()  # as in `Step`
        vqgan = prepare_tokenizer(config, loader, out, device, tqdm.write, named=named, progress=progress)
        tokenizer = build_tokenizer(vqgan, config, device, compiler(config.run, device)[0])
        writer = CodeCacheWriter(
            out,
            manifest,
            config,
            tokenizer=fingerprint(vqgan),
            codebook_size=tokenizer.codebook_size,
            precision=tokenizer.precision,
            progress=progress,
        )
        write_manifest(manifest, out / MANIFEST)
        start = time.perf_counter()
        clips = _fill(writer, loader, online(tokenizer, tqdm.write), device, progress)
    return TokenizeResult(clips=clips, seconds=time.perf_counter() - start, cache=CodeCache(out, progress=progress))


def _fill(writer: CodeCacheWriter, loader: ClipLoader, source: CodeSource, device: torch.device, progress: bool) -> int:
    """Writes all missing codes. Returns the number of clips."""
    clips = 0
    done = writer.total - sum(1 for _ in writer.missing())
    with Progress(desc="tokenizing", total=writer.total, initial=done, unit="clip", shown=progress) as bar:
        for batch, codes in with_codes(loader.recorded(writer.missing()), source, device):
            assert codes is not None
            writer.add(batch.index, batch.augmentation, batch.view, codes.cpu())
            new = int((batch.view == 0).sum())
            clips += new
            bar.update(new)
    writer.finish()
    return clips
