"""The tokenizer of a run: a VQGAN read from a file, or a small one trained on the run's own clips."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from mam2.engine.config import PretrainConfig, UserError
from mam2.engine.data.loader import ClipLoader
from mam2.engine.model.tokenizer import Tokenizer
from mam2.engine.model.tokenizer_training import train_vqgan
from mam2.engine.model.vqgan import VQGAN, small
from mam2.engine.model.vqgan_files import load_vqgan, save_vqgan
from mam2.engine.train.metrics import RunLog

FILE = "tokenizer.safetensors"


def prepare_tokenizer(
    config: PretrainConfig, loader: ClipLoader, run: Path, device: torch.device, log: RunLog, *, progress: bool = True
) -> Tokenizer:
    """The frozen tokenizer that `config.tokenizer` asks for.

    One trained here is kept in RUN/tokenizer.safetensors and taken from there when the run is resumed.
    """
    options = config.tokenizer
    own = run / FILE
    if options.path:
        vqgan, source = _load(Path(options.path)), options.path
    elif own.is_file():
        vqgan, source = _load(own), str(own)
    else:
        log.say(f"codes   tokenizer.path is empty: training a VQ model of {options.codes} codes on the data")
        vqgan = _train(config, loader, device, log, progress)
        save_vqgan(vqgan, own)
        source = str(own)
    log.say(f"codes   {vqgan.config.codes} codes from {source}")
    return build_tokenizer(vqgan, config, device)


def build_tokenizer(vqgan: VQGAN, config: PretrainConfig, device: torch.device) -> Tokenizer:
    """A VQGAN laid over a run's token grid: bfloat16 convolutions on a GPU, float32 on a CPU."""
    return Tokenizer(vqgan.to(device), config.grid, "bfloat16" if device.type == "cuda" else "float32")


def _train(config: PretrainConfig, loader: ClipLoader, device: torch.device, log: RunLog, progress: bool) -> VQGAN:
    options = config.tokenizer
    usage = {}
    with tqdm(total=options.steps, desc="tokenizer", unit="step", disable=None if progress else True) as bar:

        def report(step: int, numbers: dict[str, float]) -> None:
            usage.update(numbers)
            bar.update(step - bar.n)
            bar.set_postfix_str(f"loss {numbers['loss']:.3f}, {numbers['codes_used']:.0f} codes in use")

        frames = _frames(loader, options.batch)
        architecture = small(options.channels, options.codes, _factor(config))
        vqgan = train_vqgan(frames, architecture, options.steps, device, report, seed=config.run.seed)
    log.say(
        f"codes   trained: loss {usage['loss']:.3f}, {usage['codes_used']:.0f} of {options.codes} codes in use, "
        f"perplexity {usage['perplexity']:.0f}"
    )
    return vqgan


def _load(path: Path) -> VQGAN:
    try:
        return load_vqgan(path)
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer.path: {error}") from None


def _factor(config: PretrainConfig) -> int:
    """Pixels a code: the largest power of two up to the patch that the clip's size is a multiple of."""
    powers = (2**exponent for exponent in range(1, 11))
    factors = [power for power in powers if power <= config.model.patch and config.data.size % power == 0]
    if not factors:
        raise UserError(
            f"model.patch {config.model.patch} and data.size {config.data.size}: a VQ model trained on the data needs "
            "a patch of at least 2 and an even size; change them, or give tokenizer.path"
        )
    return factors[-1]


def _frames(loader: ClipLoader, batch: int) -> Iterator[Tensor]:
    """Endless batches uint8 [batch, H, W, C] of frames: two of every clip, so that few clips need decoding."""
    held: list[Tensor] = []
    for clips in loader.stream():
        frames = clips.clip[:, :: max(clips.clip.shape[1] // 2, 1)].flatten(0, 1)
        held.append(frames)
        while sum(map(len, held)) >= batch:
            joined = torch.cat(held)
            yield joined[:batch]
            held = [joined[batch:]]
