"""`mam2 plan`: estimates the cost of a recipe without running it."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from mam2.engine.commands.options import is_recipe, named_pretraining, named_recipe, run_verb
from mam2.engine.config.finetune import FinetuneConfig
from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.config.sizes import SIZES
from mam2.engine.errors import UserError

USAGE = "mam2 plan RECIPE"


def run(arguments: list[str]) -> int:
    if arguments and not arguments[0].startswith("-") and is_recipe(FinetuneConfig, arguments[0]):
        return _finetuning(arguments)
    values = named_pretraining(arguments, USAGE)

    def plan(
        recipe: tyro.conf.Positional[str],
        config: Annotated[PretrainConfig, tyro.conf.arg(name="")] = values,
        gpu: str = "",
        gpus: int = 1,
        videos: tuple[str, ...] = (),
        utilization: float = 0.0,
        size: str | None = None,
        preset: str | None = None,
    ) -> int:
        """Print parameters, FLOPs, bytes and memory of a recipe, and estimate clips/s and hours.

        Args:
            recipe: name of a shipped recipe, or a TOML file (or a run's config.json).
            config: values that override the recipe.
            gpu: name of a GPU in any spelling (h200, "RTX 4090", 3090); an unknown name lists all. Default: this
                machine, which is measured.
            gpus: number of devices of the run.
            videos: number of videos, or an index of `mam2 index` or of a run; needed to estimate the hours. Several,
                one per data set, with --data.weights for their shares.
            utilization: share of the peak that the step reaches, 0 to 1; 0 uses a default, which is printed.
            size: tiny, small, base, large or huge: size of the encoder; the other parts are scaled with it.
            preset: regressor and decoders: fast (half the encoder's width) or cae (its full width).
        """
        from mam2.engine.planning import plan

        counts = [count for each in videos for count in _counts(each)]
        print(f"plan     {recipe}: {config.model.objective}")
        print(plan(config, gpu=gpu, gpus=gpus, utilization=utilization).report(counts))
        return 0

    return run_verb(plan, arguments, "plan")


def _finetuning(arguments: list[str]) -> int:
    values = named_recipe(arguments, USAGE, FinetuneConfig)
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags.add_argument("--size", choices=SIZES)
    known, _ = flags.parse_known_args([argument for argument in arguments if argument not in ("-h", "--help")])
    if known.size:
        size = SIZES[known.size]._asdict()
        values = dataclasses.replace(values, model=dataclasses.replace(values.model, **size))

    def plan(
        recipe: tyro.conf.Positional[str],
        config: Annotated[FinetuneConfig, tyro.conf.arg(name="")] = values,
        gpu: str = "",
        gpus: int = 1,
        videos: tuple[str, ...] = (),
        utilization: float = 0.0,
        size: str | None = None,
    ) -> int:
        """Print parameters, FLOPs, bytes and memory of a fine-tuning recipe, and estimate clips/s and hours.

        Args:
            recipe: name of a shipped recipe, or a TOML file (or a run's config.json).
            config: values that override the recipe; `model` describes the encoder.
            gpu: name of a GPU in any spelling (h200, "RTX 4090", 3090); an unknown name lists all. Default: this
                machine, which is measured.
            gpus: number of devices of the run.
            videos: number of videos, or an index of `mam2 index` or of a run; needed to estimate the hours.
            utilization: share of the peak that the step reaches, 0 to 1; 0 uses a default, which is printed.
            size: tiny, small, base, large or huge: size of the encoder.
        """
        from mam2.engine.finetune_planning import plan_finetuning

        print(f"plan     {recipe}: fine-tuning")
        counts = [count for each in videos for count in _counts(each)]
        print(plan_finetuning(config, gpu=gpu, gpus=gpus, utilization=utilization).report(counts))
        return 0

    return run_verb(plan, arguments, "plan")


def _counts(videos: str) -> list[int]:
    """Returns the number of videos of each data set: a number, that of an index, or those of a run's manifest."""
    if videos.isdecimal():
        return [int(videos)]
    from mam2.engine.data.manifest import read_saved_manifest

    if not Path(videos).is_file():
        raise UserError(f"--videos {videos}: expected a number, or an index that `mam2 index` wrote")
    manifest = read_saved_manifest(videos)
    return [each.videos for each in manifest.sets] or [len(manifest.videos)]
