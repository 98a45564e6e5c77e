"""The command line: `mam2 pretrain`, `mam2 demo`, `mam2 doctor`.

Recipes carry the values, flags change single ones (`--optim.batch 128`). A user's mistake ends in one line and
exit status 2; a run that a signal ended exits with 128 + its number, as a shell expects.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro

from mam2.engine.config import RECIPES, PretrainConfig, UserError, check, load_recipe

USAGE = """usage: mam2 VERB …

  pretrain RECIPE --data PATH --out RUN   pre-train on a folder or a list of videos
  demo                                    make clips, pre-train on them, measure, draw a report
  doctor                                  which path each part takes on this machine

`mam2 VERB --help` lists the options; recipes: {recipes}.
"""


def main(arguments: list[str] | None = None) -> None:
    """Runs the verb of a command line (default: this program's) and exits."""
    # OpenMP's threads spin for milliseconds while they wait, which slows a step badly as soon as anything else wants
    # the core, the decoders of this very process included; without any spinning, waking them up costs too much.
    # Read when torch is first imported, which no import above does.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    arguments = sys.argv[1:] if arguments is None else arguments
    verbs: dict[str, Callable[[list[str]], int]] = {"pretrain": _pretrain, "demo": _demo, "doctor": _doctor}
    recipes = ", ".join(sorted(path.stem for path in RECIPES.glob("*.toml")))
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE.format(recipes=recipes), end="")
        sys.exit(0 if arguments else 2)
    try:
        verb = verbs.get(arguments[0])
        if verb is None:
            raise UserError(f"unknown verb {arguments[0]!r}; expected one of {', '.join(verbs)}")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(
                "WORLD_SIZE is above 1: this version trains in one process, on one GPU; start it without torchrun"
            )
        status = verb(arguments[1:])
    except UserError as error:
        print(f"mam2: error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print(
            "mam2: stopped; what was saved is whole. The same command goes on, with --resume if it saved a checkpoint",
            file=sys.stderr,
        )
        status = 130
    sys.exit(status)


def _pretrain(arguments: list[str]) -> int:
    from mam2.engine.model.presets import PRESETS, SIZES

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("recipe", nargs="?")
    first.add_argument("--size", choices=SIZES)
    first.add_argument("--preset", choices=PRESETS)
    known, _ = first.parse_known_args([a for a in arguments if a not in ("-h", "--help")])
    if known.recipe is None or known.recipe.startswith("-"):
        if not {"-h", "--help"} & set(arguments):
            raise UserError("pretrain: name a recipe first: mam2 pretrain RECIPE --data PATH --out RUN")
        known.recipe = "mam2-fast"
    recipe = load_recipe(known.recipe)
    if known.size:
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, **SIZES[known.size]._asdict()))
    if known.preset:
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, **PRESETS[known.preset]._asdict()))

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
            size: encoder size instead of the recipe's: tiny, small, base, large, huge.
            preset: regressor and decoders instead of the recipe's: fast, cae.
        """
        check(config)
        from mam2.engine.train.pretrain import pretrain

        result = pretrain(config, data, out, resume=resume)
        return 128 + result.signal if result.signal else 0

    return tyro.cli(pretrain, args=arguments, prog="mam2 pretrain")


def _demo(arguments: list[str]) -> int:
    def demo(out: Path = Path("runs/demo")) -> int:
        """Make synthetic clips, pre-train on them, measure on clips not seen, and draw a report.

        Args:
            out: folder for clips, run and report; an interrupted demo goes on from there.
        """
        from mam2.engine.demo import demo

        trained, result = demo(out)
        if result is None:
            return 128 + trained.signal
        return 0 if all(result.verdicts().values()) else 1

    return tyro.cli(demo, args=arguments, prog="mam2 demo")


def _doctor(arguments: list[str]) -> int:
    def doctor() -> int:
        """Print machine, versions, the path that each part takes, and what to install for a faster one."""
        from mam2.engine.doctor import report

        print(report())
        return 0

    return tyro.cli(doctor, args=arguments, prog="mam2 doctor")
