"""`random` as a checkpoint: an encoder with the weights that training would start from, the baseline of every score."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from mam2.engine.checkpoints.classifiers import build_classifier
from mam2.engine.checkpoints.frozen import FrozenEncoder, clips_for, digest, load_frozen
from mam2.engine.config.finetune import FinetuneConfig
from mam2.engine.config.pretrain import DataConfig, check
from mam2.engine.config.recipe import load_recipe
from mam2.engine.errors import UserError
from mam2.engine.model.blocks import Block
from mam2.engine.model.classifier import Classifier
from mam2.engine.model.encoder import Encoder

RANDOM = Path("random")
SEED = 0
LAYER_SCALE = 0.1
"""First value of LayerScale, CAE's, of an encoder like one that has it."""


def is_random(path: str | Path) -> bool:
    """Whether a path is the word `random`. Raises UserError where that is also the name of a file or folder here."""
    if Path(path) != RANDOM:
        return False
    if RANDOM.exists():
        raise UserError(
            f"{RANDOM}: stands for random weights, and {RANDOM.absolute()} exists; name that by its absolute path, "
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
    """`load_frozen` for each path, of which one may be `random`.

    recipe: the model and the clips of `random`; empty: those of the first other path.

    Raises UserError where there is neither, and as `load_frozen`.
    """
    known = {
        path: load_frozen(path, device, stride=stride, frames=frames, size=size, heads=heads)
        for path in paths
        if not is_random(path)
    }
    if recipe and len(known) == len(set(paths)):
        raise UserError(f"--recipe {recipe}: says the model of the checkpoint `random`, which is not named")
    if len(known) < len(set(paths)):
        if recipe:
            known[RANDOM] = _from_recipe(recipe, device, stride, frames, size)
        elif known:
            known[RANDOM] = _like(next(iter(known.values())))
        else:
            raise UserError(_which_model("mam2-fast"))
    return [known[path] for path in paths]


def random_classifier(
    recipe: str, classes: Sequence[str], *, frames: int | None = None, size: int | None = None
) -> tuple[Classifier, FinetuneConfig]:
    """A classifier as fine-tuning with `--scratch` starts from, on the CPU, in evaluation.

    Raises UserError without a recipe that fine-tunes, or for clips that its patches do not divide.
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
    """Random weights in an encoder of the same size, positions and clips."""
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
        )
    encoder.positions, encoder.trained_grid = other.positions.cpu(), other.trained_grid
    return _frozen(encoder, frozen.data, other.positions.device)


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
