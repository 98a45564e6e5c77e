"""Recipes: configs as TOML files, shipped in `recipes/` or a user's own, checked key by key while they are read.

Every table and key must exist; an unknown one is an error that names the nearest. A resolved config is written beside
every run and into every checkpoint, and is a recipe itself.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.errors import UserError

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef]

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
FINETUNE = "finetune"
"""File name of the shipped recipes that fine-tune; all others pre-train."""

Config = TypeVar("Config")


def recipe_names(kind: type = PretrainConfig) -> list[str]:
    """The shipped recipes of a kind of config: a method (`mam2-fast`), or a method on a data set (`ssv2/mam2-fast`);
    or those that fine-tune (`ssv2/finetune`)."""
    finetune = kind is not PretrainConfig
    return sorted(
        name
        for name, path in _shipped().items()
        if not path.stem.startswith("_") and (path.stem == FINETUNE) == finetune
    )


def load_recipe(name: str) -> PretrainConfig:
    """The config of a shipped recipe (`demo`, `mam2-fast`, `ssv2/mam2-fast`, …), of a TOML file or of a config.json.

    `extends = ["mam2-fast", …]` at the head of a recipe names those whose values it starts from, the later ones first
    to be heard; each is a shipped recipe or a file beside it. What a recipe says itself counts more.

    Raises UserError for an unknown recipe, a file that cannot be parsed, and unknown or ill-typed keys.
    """
    return load_recipe_of(PretrainConfig, name)


def load_recipe_of(kind: type[Config], name: str) -> Config:
    """`load_recipe` for another kind of config."""
    return from_dict(kind, _read_recipe(kind, name, Path(), ()), where=f"recipe {name}")


def _shipped() -> dict[str, Path]:
    return {path.relative_to(RECIPES).with_suffix("").as_posix(): path for path in RECIPES.rglob("*.toml")}


def _read_recipe(kind: type, name: str, folder: Path, within: tuple[Path, ...]) -> dict[str, Any]:
    """The tables of a recipe, those it extends merged in; `within` are the ones that asked for it."""
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
    except ValueError as error:  # of both parsers, and of text that is not UTF-8
        raise UserError(f"recipe {path}: not a {path.suffix.lstrip('.').upper() or 'TOML'} file: {error}") from None
    extended = values.pop("extends", [])
    if not isinstance(extended, list) or not all(isinstance(other, str) for other in extended):
        raise UserError(f"recipe {path.name}: 'extends' expects a list of recipes, found {extended!r}")
    from_dict(kind, values, where=f"recipe {path.name}")  # a wrong key is named with the file it is in
    merged: dict[str, Any] = {}
    for other in extended:
        merged = _merged(merged, _read_recipe(kind, other, path.parent, (*within, path.resolve())))
    return _merged(merged, values)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Tables of `below` with the values of `above`, where both have one."""
    joined = below | above
    return joined | {
        key: _merged(below[key], value) for key, value in above.items() if isinstance(value, dict) and key in below
    }


def from_dict(cls: type, values: dict[str, Any], *, where: str = "config") -> Any:
    """Builds a config dataclass from nested dicts; raises UserError naming an unknown key's nearest neighbour."""
    fields = [f.name for f in dataclasses.fields(cls)]
    hints = get_type_hints(cls)
    built: dict[str, Any] = {}
    for key, value in values.items():
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
        allowed = get_args(hints[key])  # the strings of a Literal, else nothing
        number = hints[key] is float and isinstance(value, int | float) and not isinstance(value, bool)
        if not (number or value in allowed or (not allowed and type(value) is hints[key])):
            expected = " or ".join(map(repr, allowed)) or hints[key].__name__
            raise UserError(f"{where}: {key!r} expects {expected}, found {value!r}")
        built[key] = float(value) if number else value
    return cls(**built)


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values, the inverse of `from_dict`."""
    return dataclasses.asdict(config)
