"""Configs as text: the meaning of each key, and a recipe as a TOML file for editing."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap
from typing import Any


def field_texts(cls: type) -> dict[str, str]:
    """Returns the docstring under each field of a dataclass, base classes included, by the field's name."""
    found: dict[str, str] = {}
    for base in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for field, text in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                assert isinstance(field.target, ast.Name)
                found[field.target.id] = str(text.value.value)
    return found


def as_toml(config: Any, *, explained: bool = False) -> str:
    """Returns a config as TOML with every key; `load_recipe` reads it back.

    explained: add the meaning of each key as a comment above it.
    """
    return "\n".join(_table(config, "", explained)).strip() + "\n"


def _table(config: Any, name: str, explained: bool) -> list[str]:
    texts = field_texts(type(config)) if explained else {}
    keys, tables = [], []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            tables += _table(value, f"{name}.{field.name}".lstrip("."), explained)
            continue
        text = " ".join(texts.get(field.name, "").split())
        keys += [f"# {line}" for line in textwrap.wrap(text, 100)]
        keys.append(f"{field.name} = {json.dumps(value)}")
    return [*([f"[{name}]"] if name and keys else []), *keys, "", *tables]
