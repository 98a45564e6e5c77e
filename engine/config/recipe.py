"""Recipes: configs as TOML files, shipped in `recipes/` or written by a user; every key is checked while reading.

Every table and key must exist; the error for an unknown one names the nearest. The resolved config is written into
every run folder and checkpoint, and can be used as a recipe.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints, overload

from mam2.engine.config.limits import renamed_keys, with_present_names
from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.errors import UserError

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef]

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
FINETUNE = "finetune"
"""File name of the shipped recipes for fine-tuning; all others are for pre-training."""

_PATHS = {"data": ("sets",), "tokenizer": ("path", "cache"), "head": ("text_embeddings", "text_encoder")}
"""Keys whose values are paths of the machine that trained."""

Config = TypeVar("Config")


def recipe_names(kind: type = PretrainConfig) -> list[str]:
    """Returns the names of the shipped recipes for a kind of config.

    For pre-training a method (`mam2-fast`) or a method on a data set (`ssv2/mam2-fast`), else `ssv2/finetune` and so
    on.
    """
    finetune = kind is not PretrainConfig
    return sorted(
        name
        for name, path in _shipped().items()
        if not path.stem.startswith("_") and (path.stem == FINETUNE) == finetune
    )


@overload
def load_recipe(
    name: str | Path, /, *, size: str = "", preset: str = "", **values: Mapping[str, Any]
) -> PretrainConfig: ...
@overload
def load_recipe(
    name: str | Path, kind: type[Config], /, *, size: str = "", preset: str = "", **values: Mapping[str, Any]
) -> Config: ...
def load_recipe(
    name: str | Path, kind: type = PretrainConfig, /, *, size: str = "", preset: str = "", **values: Mapping[str, Any]
) -> Any:
    """Loads the config of a shipped recipe (`demo`, `mam2-fast`, `ssv2/mam2-fast`, …), a TOML file or a config.json.

        load_recipe("mam2-fast", size="large", optim={"epochs": 100.0}, data={"frames": 8})
        load_recipe("kinetics400/finetune", FinetuneConfig, optim={"batch": 64})

    `extends = ["mam2-fast", …]` in a recipe lists its base recipes: shipped recipes, or files in the same folder. Later
    ones override earlier ones, and the recipe itself overrides all.

    Args:
        name: name of a shipped recipe, or a path.
        kind: class of the config: `PretrainConfig`, or `FinetuneConfig` for a recipe that fine-tunes.
        size: tiny, small, base, large or huge: size of the encoder; other parts are scaled with it (pre-training).
        preset: fast or cae: regressor and decoders of that preset (pre-training).
        values: tables with values that override the recipe's, after `size` and `preset`.

    Raises:
        UserError: an unknown recipe, a file that cannot be parsed, unknown or ill-typed keys, size or preset.
    """
    config = from_dict(kind, _read_recipe(kind, str(name), Path(), ()), where=f"recipe {name}")
    if size or preset:
        config = _resized(name, config, size, preset)
    return from_dict(kind, _merged(to_dict(config), dict(values)), where=f"recipe {name}") if values else config


def _resized(name: str | Path, config: Any, size: str, preset: str) -> PretrainConfig:
    from mam2.engine.config.sizes import PRESETS, SIZES, resized, with_preset  # imports torch, which takes seconds

    if not isinstance(config, PretrainConfig):
        raise UserError(f"recipe {name}: size and preset are for recipes that pre-train")
    for argument, value, known in (("size", size, SIZES), ("preset", preset, PRESETS)):
        if value and value not in known:
            raise UserError(f"{argument} {value!r}: expected one of {', '.join(known)}")
    model = resized(config.model, size) if size else config.model
    return dataclasses.replace(config, model=with_preset(model, preset) if preset else model)


def recipe_head(name: str) -> str:
    """Returns the first line of a shipped recipe's file, its description."""
    return _shipped()[name].read_text(encoding="utf-8").partition("\n")[0].lstrip("# ").rstrip(".")


def _shipped() -> dict[str, Path]:
    return {path.relative_to(RECIPES).with_suffix("").as_posix(): path for path in RECIPES.rglob("*.toml")}


def _read_recipe(kind: type, name: str, folder: Path, within: tuple[Path, ...]) -> dict[str, Any]:
    """Returns the tables of a recipe, merged with those of its base recipes.

    `within` are the recipes that extend it.
    """
    path = _shipped().get(name) or folder / name
    if not path.is_file():
        near = difflib.get_close_matches(name, recipe_names(kind), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"recipe {name!r}: neither a file nor one of {', '.join(recipe_names(kind))}{hint}")
    if path.resolve() in within:
        raise UserError(f"recipe {path}: extends itself")
    parse = json.loads if path.suffix == ".json" else tomllib.loads
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except ValueError as error:  # from both parsers, and for text that is not UTF-8
        raise UserError(f"recipe {path}: not a {path.suffix.lstrip('.').upper() or 'TOML'} file: {error}") from None
    extended = values.pop("extends", [])
    if not isinstance(extended, list) or not all(isinstance(other, str) for other in extended):
        raise UserError(f"recipe {path.name}: 'extends' expects a list of recipes, found {extended!r}")
    for earlier, now in renamed_keys(kind).items():
        table, _, key = earlier.partition(".")
        if isinstance(values.get(table), dict) and key in values[table]:
            logging.getLogger("mam2").warning("recipe %s: the key %s is now called %s", path.name, earlier, now)
    values = with_present_names(kind, values)
    from_dict(kind, values, where=f"recipe {path.name}")  # here, so that an error names the file with the wrong key
    merged: dict[str, Any] = {}
    for other in extended:
        merged = _merged(merged, _read_recipe(kind, other, path.parent, (*within, path.resolve())))
    return _merged(merged, values)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Returns the tables of `below`, overridden by those of `above`."""
    joined = below | above
    return joined | {
        key: _merged(below[key], value) for key, value in above.items() if isinstance(value, dict) and key in below
    }


def from_dict(cls: type, values: dict[str, Any], *, where: str = "config") -> Any:
    """Builds a config dataclass from nested dicts; the UserError for an unknown key names the nearest key."""
    fields = [f.name for f in dataclasses.fields(cls)]
    hints = get_type_hints(cls)
    built: dict[str, Any] = {}
    for key, value in with_present_names(cls, values).items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(fields)}"
            raise UserError(f"{where}: unknown key {key!r}; {hint}")
        default = getattr(cls(), key)
        if dataclasses.is_dataclass(default):
            if not isinstance(value, dict):
                raise UserError(f"{where}: {key!r} is a table of keys, found {value!r}")
            built[key] = from_dict(type(default), value, where=f"{where}, [{key}]")
            continue
        if get_origin(hints[key]) is tuple:
            built[key] = _sequence(value, get_args(hints[key])[0], f"{where}: {key!r}")
            continue
        kinds, allowed = alternatives(hints[key])
        number = float in kinds and isinstance(value, int | float) and not isinstance(value, bool)
        if not (number or value in allowed or type(value) in kinds):
            expected = " or ".join([*(kind.__name__ for kind in kinds), *map(repr, allowed)])
            raise UserError(f"{where}: {key!r} expects {expected}, found {value!r}")
        built[key] = float(value) if number else value
    return cls(**built)


def alternatives(hint: Any) -> tuple[tuple[type, ...], tuple[str, ...]]:
    """Returns the types of a key's values, and the strings of a Literal."""
    parts = get_args(hint) if isinstance(hint, types.UnionType) or get_origin(hint) is Union else (hint,)
    words = tuple(word for part in parts if get_origin(part) is Literal for word in get_args(part))
    return tuple(part for part in parts if get_origin(part) is not Literal), words


def _sequence(value: Any, kind: type, where: str) -> tuple[Any, ...]:
    """Returns a list of a recipe as a tuple. kind: type of its elements, str or float. Raises UserError."""
    accepted = (int, float) if kind is float else (kind,)
    if not isinstance(value, list | tuple) or not all(type(element) in accepted for element in value):
        raise UserError(f"{where} expects a list of {kind.__name__}, found {value!r}")
    return tuple(map(kind, value))


def to_dict(config: Any) -> dict[str, Any]:
    """Returns nested plain values as JSON has them, lists for tuples; the inverse of `from_dict`."""
    return {item.name: _plain(getattr(config, item.name)) for item in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    return list(value) if isinstance(value, tuple) else value


def shareable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config without the paths of the training machine."""
    return {
        table: {
            key: type(value)() if key in _PATHS.get(table, ()) else value  # "" or []
            for key, value in values.items()
        }
        for table, values in config.items()
    }
