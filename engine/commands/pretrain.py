"""`mam2 pretrain`: a recipe, videos, and a run folder."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from mam2.engine.config import PretrainConfig, UserError, check
from mam2.engine.finetune_config import FinetuneConfig
from mam2.engine.model.presets import PRESETS, SIZES, resized, with_preset
from mam2.engine.recipe import load_recipe, recipe_names


def named_recipe(arguments: list[str], usage: str) -> PretrainConfig:
    """The recipe that the first argument names, with `--size` and `--preset`; UserError with `usage` where none is."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("recipe", nargs="?")
    first.add_argument("--size", choices=SIZES)
    first.add_argument("--preset", choices=PRESETS)
    known, _ = first.parse_known_args([a for a in arguments if a not in ("-h", "--help")])
    if known.recipe is None or known.recipe.startswith("-"):
        if not {"-h", "--help"} & set(arguments):
            raise UserError(f"name a recipe first: {usage}")
        known.recipe = "mam2-fast"
    if known.recipe in recipe_names(FinetuneConfig):
        raise UserError(f"recipe {known.recipe} fine-tunes; name one that pre-trains: {', '.join(recipe_names())}")
    recipe = load_recipe(known.recipe)
    if known.size:
        recipe = dataclasses.replace(recipe, model=resized(recipe.model, known.size))
    if known.preset:
        recipe = dataclasses.replace(recipe, model=with_preset(recipe.model, known.preset))
    return recipe


def run(arguments: list[str]) -> int:
    recipe = named_recipe(arguments, "mam2 pretrain RECIPE --data PATH --out RUN")

    def pretrain(
        recipe: tyro.conf.Positional[str],
        data: Path,
        out: Path,
        config: Annotated[PretrainConfig, tyro.conf.arg(name="")] = recipe,
        resume: bool = False,
        size: str | None = None,
        preset: str | None = None,
    ) -> int:
        """Pre-train an encoder on videos.

        Args:
            recipe: name of a shipped recipe, or a TOML file (or a run's config.json).
            data: folder of videos, with or without class folders, or an annotation list.
            out: run folder for checkpoints and logs.
            config: values of the recipe.
            resume: go on from the newest checkpoint in the run folder.
            size: tiny, small, base, large or huge instead of the recipe's: the encoder, and the rest in proportion.
            preset: regressor and decoders instead of the recipe's: fast (half as wide as the encoder), cae (as wide).
        """
        check(config)
        from mam2.engine.train.pretrain import pretrain

        result = pretrain(config, data, out, resume=resume)
        return 128 + result.signal if result.signal else 0

    return tyro.cli(pretrain, args=arguments, prog="mam2 pretrain")
