"""The source of a step's codes: a tokenizer that runs during training, or a cache; both have the same interface."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.data.batch import Batch
from mam2.engine.data.loader import ClipLoader
from mam2.engine.data.manifest import Manifest
from mam2.engine.data.side_stream import on_side_stream
from mam2.engine.errors import UserError
from mam2.engine.runtime.distributed import World
from mam2.engine.tokenizer.cache import CodeCache
from mam2.engine.tokenizer.compiled import compiled_network
from mam2.engine.tokenizer.files import fingerprint, load_vqgan
from mam2.engine.tokenizer.prepare import FILE, Info, build_tokenizer, load_for_run, prepare_tokenizer
from mam2.engine.tokenizer.tokenizer import Tokenizer
from mam2.engine.tokenizer.vqgan import VQGAN, VQGANConfig
from mam2.engine.units import counted, decimal_bytes

MEASURED_CLIPS = 8
"""Clips of the first batch that are compared with float32."""


@dataclass(frozen=True)
class CodeSource:
    codebook_size: int
    """V: codes are 0 to V - 1."""
    codes: Callable[[Batch], Tensor]
    """Returns the codes of a batch, on its device: int64 [B, N] or [B, N, F], see `Tokenizer`."""
    tokenizer: VQGANConfig | None = None
    """Config of the network that runs in a step; None with a cache."""


def open_cache(config: PretrainConfig, manifest: Manifest, world: World, *, progress: bool = True) -> CodeCache | None:
    """Opens the cache `config.tokenizer.cache`; returns None without one, or in a run without codes if it has no clips.

    Raises UserError if the cache does not match this run.
    """
    options = config.tokenizer
    if not options.cache:
        return None
    if not config.needs_codes and world.broadcast(lambda: CodeCache(options.cache, verify=False).clips is None):
        return None
    path = options.path if config.needs_codes else ""

    def check() -> None:
        cache = CodeCache(options.cache, progress=progress)
        cache.check(manifest, config, fingerprint(load_vqgan(path)) if path else cache.tokenizer)

    world.broadcast(check)  # only one rank reads all of it
    return CodeCache(options.cache, verify=False)


def prepare_codes(
    config: PretrainConfig,
    loader: ClipLoader,
    cache: CodeCache | None,
    run: Path,
    device: torch.device,
    world: World,
    info: Info,
    *,
    named: VQGAN | None = None,
    progress: bool = True,
) -> CodeSource:
    """Returns the source of a run's codes; stores its tokenizer in RUN/tokenizer.safetensors, also with a cache.

    cache: from `open_cache`; the loader must then have the cache's `has` as `available`, and fetches its codes.
    named: see `prepare_tokenizer`.
    """
    if cache is None:
        vqgan = world.broadcast(
            lambda: prepare_tokenizer(config, loader, run, device, info, named=named, progress=progress)
        )
        return online(
            build_tokenizer(vqgan, config, device, lambda codes: compiled_network(codes, config.run, device, info)),
            info,
        )
    world.broadcast(lambda: _keep_tokenizer(cache, run))
    info(
        f"codes   {cache.codebook_size} codes from the cache {cache.folder}: "
        f"{counted(config.data.recorded, 'augmentation')} of "
        f"each video, {decimal_bytes(cache.bytes)}, computed in {cache.precision}; "
        f"{counted(cache.count_absent(), 'clip')} absent"
    )
    loader.fetch_codes(cache.codes)
    return CodeSource(cache.codebook_size, _fetched)


def use_recorded_clips(loader: ClipLoader, cache: CodeCache | None, info: Info) -> None:
    """Makes the loader read the clips of a cache, if it has some; the loader must have its `has` as `available`."""
    if cache and (clips := cache.clips):
        info(
            f"clips   from the cache {cache.folder}, {decimal_bytes(clips.bytes)} as {clips.form.coding}; "
            "no video is decoded for training"
        )
        loader.fetch_clips(clips)


def _fetched(batch: Batch) -> Tensor:
    assert batch.codes is not None
    return batch.codes


def _keep_tokenizer(cache: CodeCache, run: Path) -> None:
    if fingerprint(load_for_run(cache.folder / FILE, run)) != cache.tokenizer:
        raise UserError(
            f"{cache.folder / FILE}: not the tokenizer of the codes in this folder; run mam2 tokenize again"
        )


def online(tokenizer: Tokenizer, info: Info) -> CodeSource:
    """Returns codes from a tokenizer. Logs the share that bfloat16 changes, measured on the first batch."""
    measured = tokenizer.precision == "float32"

    def codes(batch: Batch) -> Tensor:
        nonlocal measured
        video = batch.video
        if not measured:
            measured = True
            some = video[:MEASURED_CLIPS]
            share = tokenizer.changed_share(some)
            info(
                f"codes   {tokenizer.precision} changes {share:.2%} of them against float32 "
                f"({counted(len(some), 'clip')})"
            )
        return tokenizer.codes(video)

    return CodeSource(tokenizer.codebook_size, codes, tokenizer.vqgan.config)


def with_codes(
    batches: Iterator[Batch],
    source: CodeSource | None,
    device: torch.device,
    timer: AbstractContextManager[None] | None = None,
) -> Iterator[tuple[Batch, Tensor | None]]:
    """Yields batches with their codes, or with None if there is no source; on a GPU computed on a side stream.

    timer: the context in which the codes of a batch are computed.
    """

    def codes(batch: Batch) -> Tensor | None:
        with timer or nullcontext():
            return source.codes(batch) if source else None

    pairs = ((batch, codes(batch)) for batch in batches)
    return on_side_stream(pairs, device) if source else pairs
