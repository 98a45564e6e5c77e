"""Baselines as checkpoints: `random`, an encoder with the initial weights of training, and `pixels`, none at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from mam2.engine.checkpoints.classifiers import build_classifier
from mam2.engine.checkpoints.frozen import FrozenEncoder, clips_for, digest, load_frozen
from mam2.engine.config.finetune import FinetuneConfig
from mam2.engine.config.pretrain import check
from mam2.engine.config.recipe import load_recipe
from mam2.engine.config.training import DataConfig
from mam2.engine.errors import UserError
from mam2.engine.model.blocks import Block
from mam2.engine.model.classifier import Classifier
from mam2.engine.model.encoder import Encoder
from mam2.engine.model.pixel_encoder import PixelEncoder

RANDOM = Path("random")
PIXELS = Path("pixels")
SEED = 0
LAYER_SCALE = 0.1
"""Initial value of LayerScale (CAE's) for an encoder like one that has it."""


def is_random(path: str | Path) -> bool:
    """Returns whether a path is the word `random`. Raises UserError if a file or folder here has this name too."""
    return _is_word(path, RANDOM, "random weights")


def is_pixels(path: str | Path) -> bool:
    """Returns whether a path is the word `pixels`. Raises UserError if a file or folder here has this name too."""
    return _is_word(path, PIXELS, "the pixels of the clips")


def _is_word(path: str | Path, word: Path, meaning: str) -> bool:
    if Path(path) != word:
        return False
    if word.exists():
        raise UserError(
            f"{word}: means {meaning}, but {word.absolute()} exists; pass it by its absolute path, "
            "or work in another folder"
        )
    return True


def load_all_frozen(
    paths: Sequence[Path],
    device: torch.device,
    *,
    recipe: str = "",
    stride: int = 0,
    frames: int | None = None,
    size: int | None = None,
    heads: int | None = None,
) -> list[FrozenEncoder]:
    """Runs `load_frozen` for each path; `random` and `pixels` may be among them.

    recipe: recipe with the model and clips of these two; empty: those of the first other path.

    Raises UserError if there is neither, and as in `load_frozen`.
    """
    known = {
        path: load_frozen(path, device, stride=stride, frames=frames, size=size, heads=heads)
        for path in paths
        if not (is_random(path) or is_pixels(path))
    }
    baselines = set(paths) - known.keys()
    if recipe and not baselines:
        raise UserError(
            f"--recipe {recipe}: only for the checkpoints `random` and `pixels`, which are not among the checkpoints"
        )
    if baselines:
        if recipe:
            random = _from_recipe(recipe, device, stride, frames, size)
        elif known:
            random = _like(next(iter(known.values())))
        elif RANDOM in baselines:
            raise UserError(_which_model("mam2-fast"))
        else:
            raise UserError(f"{PIXELS}: pixels of which clips? Add --recipe, such as --recipe mam2-fast")
        known |= {RANDOM: random, PIXELS: _pixels_of(random)}
    return [known[path] for path in paths]


def random_classifier(
    recipe: str, classes: Sequence[str], *, frames: int | None = None, size: int | None = None
) -> tuple[Classifier, FinetuneConfig]:
    """Returns the initial classifier of fine-tuning with `--scratch`, on the CPU, in evaluation mode.

    Raises UserError without a fine-tuning recipe, or if the clips cannot be divided into its patches.
    """
    if not recipe:
        raise UserError(_which_model("kinetics400/finetune"))
    config = load_recipe(recipe, FinetuneConfig)
    config = dataclasses.replace(
        config,
        data=_sized(config.data, frames, size),
        model=dataclasses.replace(config.model, classes=len(classes), text_width=0),
    )
    config.check()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return build_classifier(config).eval(), config


def _which_model(example: str) -> str:
    return f"{RANDOM}: random weights of which model? Add --recipe, such as --recipe {example}"


def _like(frozen: FrozenEncoder) -> FrozenEncoder:
    """Returns an encoder with random weights and the same size, positions and clips."""
    other = frozen.encoder
    block = other.blocks[0]
    assert isinstance(block, Block)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        encoder = Encoder(
            other.grid,
            other.patch_size,
            width=other.width,
            depth=frozen.depth,
            heads=block.attn.heads,
            mlp_ratio=block.mlp.fc1.out_features / other.width,
            layer_scale=LAYER_SCALE if block.gamma_1 is not None else 0.0,
            channels=other.channels,
            mean=other.mean,
            std=other.std,
        )
    encoder.positions, encoder.trained_grid = other.positions.cpu(), other.trained_grid
    return _frozen(encoder, frozen.data, other.positions.device)


def _pixels_of(frozen: FrozenEncoder) -> FrozenEncoder:
    """Returns the pixels of the same clips and tokens in place of an encoder."""
    other = frozen.encoder
    encoder = PixelEncoder(other.grid, other.patch_size, channels=other.channels).to(other.positions.device)
    return FrozenEncoder(name=str(PIXELS), encoder=encoder, data=frozen.data, weights=PIXELS, digest=digest(encoder))


def _from_recipe(recipe: str, device: torch.device, stride: int, frames: int | None, size: int | None) -> FrozenEncoder:
    config = load_recipe(recipe)
    config = dataclasses.replace(config, data=_sized(config.data, frames, size))
    check(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        encoder = Encoder.from_config(config)
    return _frozen(encoder, clips_for(encoder, config.data, stride), device)


def _sized(data: DataConfig, frames: int | None, size: int | None) -> DataConfig:
    return dataclasses.replace(data, frames=frames or data.frames, size=size or data.size)


def _frozen(encoder: Encoder, data: DataConfig, device: torch.device) -> FrozenEncoder:
    return FrozenEncoder(
        name=str(RANDOM),
        encoder=encoder.eval().to(device).requires_grad_(False),
        data=data,
        weights=RANDOM,
        digest=digest(encoder),
    )
