"""Prepares the tokenizer of a run: reads a VQGAN from a file, or trains a small one on the run's clips."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mam2.engine.checkpoints import checkpoint
from mam2.engine.config.limits import resumable_fields
from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.config.recipe import to_dict
from mam2.engine.data.loader import ClipLoader
from mam2.engine.data.manifest import Manifest
from mam2.engine.errors import UserError
from mam2.engine.files import write_whole
from mam2.engine.runtime.device import matmul_dtype
from mam2.engine.runtime.progress import Progress
from mam2.engine.tokenizer.cache import SHARDS
from mam2.engine.tokenizer.files import fingerprint, load_vqgan, save_vqgan
from mam2.engine.tokenizer.tokenizer import Tokenizer
from mam2.engine.tokenizer.training import Trained, train_vqgan
from mam2.engine.tokenizer.vqgan import VQGAN, VQGANConfig, small

FILE = "tokenizer.safetensors"
TRAINING = "tokenizer.json"
"""File with the settings and videos of a tokenizer that the run trained."""

OWN_TRAINING = ("codes", "codes_per_patch", "channels", "steps", "batch")
"""Fields of `TokenizerConfig` that decide the tokenizer that a run trains."""

Info = Callable[[str], None]
"""Writes a line to the log."""


def prepare_tokenizer(
    config: PretrainConfig,
    loader: ClipLoader,
    run: Path,
    device: torch.device,
    info: Info,
    *,
    named: VQGAN | None = None,
    progress: bool = True,
) -> VQGAN:
    """Returns the VQGAN of `config.tokenizer`, on the CPU.

    It is stored in RUN/tokenizer.safetensors and belongs to the run's checkpoints. One left there by an attempt without
    a checkpoint is used only if RUN/tokenizer.json records the same training on the same videos.
    named: the VQGAN of `config.tokenizer.path`, if it is already loaded; without a path, one to use instead of
    training.
    """
    options = config.tokenizer
    own = run / FILE
    training = _training(config, loader.manifest)
    if options.path:
        vqgan, source = load_for_run(Path(options.path), run, named), options.path
    elif named is not None and not _begun(run):
        (run / TRAINING).unlink(missing_ok=True)
        save_vqgan(named, own)
        vqgan, source = named, str(own)
    elif own.is_file() and (_begun(run) or _read_training(run) == training):
        vqgan, source = load_vqgan(own), str(own)
    else:
        if own.is_file():
            info(f"codes   {own} is from other data or settings: training a new one")
        architecture = own_architecture(config)
        info(f"codes   tokenizer.path is empty: training a VQ model of {codes_of(architecture)} on the data")
        frames = clip_frames(loader, options.batch)
        trained, reports = train_with_progress(
            frames, architecture, options.steps, device, seed=config.run.seed, progress=progress
        )
        vqgan, last = trained.vqgan, reports[-1]
        info(
            f"codes   trained: they explain {trained.found.explained:.1%} of the variance within frames set aside, "
            f"k-means of patches {trained.start.explained:.1%}; {kept_state(trained, options.steps)}; "
            f"{last['codes_used']:.0f} of {all_codes(architecture)} codes in use, perplexity {last['perplexity']:.0f}"
        )
        (run / TRAINING).unlink(missing_ok=True)
        save_vqgan(vqgan, own)
        write_whole(run / TRAINING, json.dumps(training, indent=1) + "\n")
        source = str(own)
    info(f"codes   {codes_of(vqgan.config)} from {source}")
    return vqgan


def load_for_run(path: Path, run: Path, loaded: VQGAN | None = None) -> VQGAN:
    """Copies a VQGAN from a file to RUN/tokenizer.safetensors.

    Raises UserError if the run's checkpoints need another.
    """
    vqgan, own = loaded or load_vqgan(path), run / FILE
    if not own.is_file() or (not _begun(run) and path.resolve() != own.resolve()):
        (run / TRAINING).unlink(missing_ok=True)
        save_vqgan(vqgan, own)
    elif path.resolve() != own.resolve() and fingerprint(load_vqgan(own)) != fingerprint(vqgan):
        raise UserError(f"{own}: the run's tokenizer differs from {path}; start a new run, or pass the original one")
    return vqgan


def _begun(run: Path) -> bool:
    """Returns whether a folder contains checkpoints or codes that belong to its tokenizer."""
    return checkpoint.newest(run) is not None or (run / SHARDS).is_file()


def _training(config: PretrainConfig, manifest: Manifest) -> dict[str, Any]:
    """Returns the settings that determine the trained tokenizer, as plain JSON values."""
    ignored = resumable_fields(type(config.data))
    data = {name: value for name, value in to_dict(config.data).items() if name not in ignored}
    videos = hashlib.sha256()
    for video in manifest.videos:
        videos.update(f"{video.content} {video.frames}\n".encode())
    options = config.tokenizer
    return {
        "videos": videos.hexdigest(),
        "data": data,
        "seed": config.run.seed,
        "tokenizer": {name: getattr(options, name) for name in OWN_TRAINING},
        "pixels per code": code_factor(config),
    }


def _read_training(run: Path) -> Any:
    try:
        return json.loads((run / TRAINING).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def build_tokenizer(
    vqgan: VQGAN,
    config: PretrainConfig,
    device: torch.device,
    compiled: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
) -> Tokenizer:
    """Returns a Tokenizer for a run's token grid and precision. Raises UserError, see `check_fits`."""
    check_fits(vqgan.config, config)
    rounded = matmul_dtype(config.run, device) == torch.bfloat16
    precision: Literal["bfloat16", "float32"] = "bfloat16" if rounded else "float32"
    return Tokenizer(vqgan.to(device), config.grid, precision, frames=config.tokenizer.frames, compiled=compiled)


def check_fits(tokenizer: VQGANConfig, config: PretrainConfig) -> None:
    """Raises UserError if a tokenizer has another number of channels or of codes per patch than the run's config."""
    takes, given = tokenizer.image_channels, config.data.channels
    if takes != given:
        raise UserError(
            f"the tokenizer takes {takes} channels, data.channels is {given}; leave tokenizer.path empty, or pass one "
            f"of mam2 train-tokenizer --image-channels {given}"
        )
    has, asked = tokenizer.codes_per_patch, config.tokenizer.codes_per_patch
    if has != asked:
        raise UserError(
            f"the tokenizer has {has} codes per patch, tokenizer.codes_per_patch is {asked}; set it to {has}, or pass "
            f"one of mam2 train-tokenizer --codes-per-patch {asked}"
        )


def own_architecture(config: PretrainConfig) -> VQGANConfig:
    """Returns the architecture of the tokenizer that a run without `tokenizer.path` trains."""
    options = config.tokenizer
    return small(
        options.channels,
        options.codes,
        code_factor(config),
        config.data.channels,
        codes_per_patch=options.codes_per_patch,
    )


def all_codes(tokenizer: VQGANConfig) -> int:
    """Returns the number of codes in all codebooks."""
    return tokenizer.codes * tokenizer.codes_per_patch


def codes_of(tokenizer: VQGANConfig) -> str:
    """Describes the codebooks: "512 codes", or with several codes per patch "4 × 512 codes"."""
    return f"{tokenizer.codes_per_patch} × {tokenizer.codes} codes".removeprefix("1 × ")


def train_with_progress(
    frames: Iterable[Tensor],
    architecture: VQGANConfig,
    steps: int,
    device: torch.device,
    *,
    seed: int,
    gradient_weight: float = 0.0,
    held_out: Sequence[Tensor] = (),
    progress: bool = True,
) -> tuple[Trained, list[dict[str, float]]]:
    """Runs `train_vqgan` with a progress bar; returns its result, on the CPU, and its reports with their steps."""
    reports: list[dict[str, float]] = []
    with Progress(total=steps, desc="tokenizer", unit="step", shown=progress) as bar:

        def report(step: int, numbers: dict[str, float]) -> None:
            reports.append({"step": step, **numbers})
            bar.update(step - bar.n)
            bar.set_postfix_str(f"explained {numbers['explained']:.1%}, {numbers['codes_used']:.0f} codes in use")

        trained = train_vqgan(
            frames,
            architecture,
            steps,
            device,
            report,
            gradient_weight=gradient_weight,
            seed=seed,
            held_out=held_out,
        )
    return trained._replace(vqgan=trained.vqgan.cpu(), centers=trained.centers.cpu()), reports


def kept_state(trained: Trained, steps: int) -> str:
    """Says which state of a training of `steps` steps is kept."""
    return f"kept: step {trained.kept} of {steps}" if trained.kept else "kept: the start, k-means of patches"


def clip_frames(loader: ClipLoader, batch: int) -> Iterator[Tensor]:
    """Yields endless batches uint8 [batch, H, W, C] of frames: two per clip, so that few clips need decoding."""
    held: list[Tensor] = []
    for clips in loader.stream():
        frames = clips.clip[:, :: max(clips.clip.shape[1] // 2, 1)].flatten(0, 1)
        held.append(frames)
        while sum(map(len, held)) >= batch:
            joined = torch.cat(held)
            yield joined[:batch]
            held = [joined[batch:]]


def code_factor(config: PretrainConfig) -> int:
    """Returns the pixels per code: the largest power of two up to the patch size that divides the clip's size."""
    powers = (2**exponent for exponent in range(1, 11))
    factors = [power for power in powers if power <= config.model.patch and config.data.size % power == 0]
    if not factors:
        raise UserError(
            f"model.patch {config.model.patch} and data.size {config.data.size}: a VQ model trained on the data needs "
            "a patch of at least 2 and an even size; change them, or set tokenizer.path"
        )
    return factors[-1]
