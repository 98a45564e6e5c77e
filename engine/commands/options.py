"""Options that several verbs share: the recipe as first argument, `--size` and `--preset`."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar, get_type_hints

import tyro

from mam2.engine.commands.flags import ClassifierFlags, EncoderFlags, TokenizerFlags
from mam2.engine.config.describe import field_texts
from mam2.engine.config.finetune import FinetuneConfig
from mam2.engine.config.limits import renamed_keys
from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.config.recipe import load_recipe, recipe_names
from mam2.engine.config.sizes import PRESETS, SIZES, resized, with_preset
from mam2.engine.errors import UserError

Config = TypeVar("Config", PretrainConfig, FinetuneConfig)

DOES = {PretrainConfig: "pre-trains", FinetuneConfig: "fine-tunes"}
USED = {PretrainConfig: "mam2 pretrain", FinetuneConfig: "mam2 finetune"}
SEVERAL_SETS = ("pretrain", "tokenize")
"""Verbs that take several data sets."""
SPELLINGS = {"--data-weights": "--data.weights", "--data_weights": "--data.weights"}
"""Other spellings of flags."""
RENAMED = {"--utilisation": "--utilization"}
"""Earlier names of flags that are not config keys."""
SHOWN = {PretrainConfig: "mam2-fast", FinetuneConfig: "kinetics400/finetune"}
"""The recipe whose values the help shows if the user names none."""


def run_verb(function: Callable[..., int], arguments: Sequence[str], verb: str) -> int:
    """Calls a verb's function, whose parameters are the flags, with a command line's arguments; returns its result."""
    if {"-h", "--help"} & set(arguments):
        function.__doc__ = unwrapped(function.__doc__ or "")
        for cls in _tables(PretrainConfig, FinetuneConfig, EncoderFlags, ClassifierFlags, TokenizerFlags):
            texts = field_texts(cls)
            for field in dataclasses.fields(cls):
                if text := texts.get(field.name):
                    field.metadata = {**field.metadata, "help": " ".join(text.split())}  # type: ignore[assignment]
    return tyro.cli(function, args=list(arguments), prog=f"mam2 {verb}")


def unwrapped(doc: str) -> str:
    """Returns a docstring with each paragraph and each argument in one line, which tyro wraps to the terminal."""
    lines: list[str] = []
    arguments = False
    for line in inspect.cleandoc(doc).split("\n"):
        depth = len(line) - len(line.lstrip())
        arguments = arguments or line == "Args:"
        continued = depth > 4 if arguments else bool(lines and lines[-1])
        if line and continued:
            lines[-1] += f" {line.strip()}"
        else:
            lines.append(line)
    return "\n".join(lines)


def _tables(*classes: type) -> Iterator[type]:
    """Yields dataclasses and the dataclasses of their fields."""
    for cls in classes:
        yield cls
        types = get_type_hints(cls)
        yield from _tables(*(kind for kind in types.values() if dataclasses.is_dataclass(kind)))  # type: ignore[arg-type]


def named_recipe(arguments: list[str], usage: str, kind: type[Config]) -> Config:
    """Returns the config of the recipe in the first argument.

    arguments: those of the verb, without its name; with --help the recipe may be missing.
    Raises UserError, with `usage`, if the first argument is not a recipe, or a recipe of the other kind.
    """
    name = arguments[0] if arguments else ""
    if not name or name.startswith("-"):
        if not {"-h", "--help"} & set(arguments):
            found = f", found {name!r}" if name else ""
            raise UserError(f"expected a recipe as first argument{found}: {usage}")
        name = SHOWN[kind]
    other = FinetuneConfig if kind is PretrainConfig else PretrainConfig
    try:
        return load_recipe(name, kind)
    except UserError:
        if not is_recipe(other, name):
            raise
        names = ", ".join(recipe_names(kind))
        raise UserError(
            f"recipe {name} {DOES[other]} ({USED[other]}); choose one that {DOES[kind]}: {names}, or a file"
        ) from None


def named_pretraining(arguments: list[str], usage: str) -> PretrainConfig:
    """Does the same as `named_recipe` for a pre-training recipe, and applies `--size` and `--preset`."""
    recipe = named_recipe(arguments, usage, PretrainConfig)
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags.add_argument("--size", choices=SIZES)
    flags.add_argument("--preset", choices=PRESETS)
    known, _ = flags.parse_known_args([argument for argument in arguments if argument not in ("-h", "--help")])
    if known.size:
        recipe = dataclasses.replace(recipe, model=resized(recipe.model, known.size))
    if known.preset:
        recipe = dataclasses.replace(recipe, model=with_preset(recipe.model, known.preset))
    return recipe


def with_present_flags(arguments: list[str]) -> list[str]:
    """Returns the arguments of a verb with renamed flags replaced by their present names, with a warning for each."""
    flags = dict(RENAMED)
    for kind in (PretrainConfig, FinetuneConfig):
        for earlier, now in renamed_keys(kind).items():
            flags |= {f"--{earlier}": f"--{now}", f"--{earlier}".replace("_", "-"): f"--{now}"}
    present = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        flag = SPELLINGS.get(flag, flag)
        if flag in flags:
            logging.getLogger("mam2").warning("the flag %s is now called %s", flag, flags[flag])
        present.append(f"{flags.get(flag, flag)}{equals}{value}")
    return present


def check_single_data(verb: str, arguments: list[str]) -> None:
    """Raises UserError if a verb that reads one data set is called with several; the last would hide the others."""
    given = Counter(argument.partition("=")[0] for argument in arguments)
    for flag in ("--data", "--val"):
        if given[flag] > 1 and verb not in SEVERAL_SETS:
            raise UserError(
                f"{flag}: expected one data set for mam2 {verb}, found {given[flag]}; join them in one annotation list"
            )


def read_class_names(file: Path | None) -> tuple[str, ...]:
    """Reads a text file of class names, one per line; empty without a file. Raises UserError if it cannot be read."""
    try:
        return tuple(line for line in file.read_text(encoding="utf-8").splitlines() if line) if file else ()
    except (OSError, UnicodeError) as error:
        raise UserError(f"--classes {file}: cannot be read: {error}") from None


def is_recipe(kind: type, name: str) -> bool:
    """Returns whether `name` is a recipe of `kind`."""
    try:
        load_recipe(name, kind)
    except UserError:
        return False
    return True
