"""Writes docs/configuration.md from the config classes: `python docs/generate_configuration.py`.

Keys, types and defaults come from the dataclasses, the meaning from the docstring under each field, the limits from
`limited(...)`. tests/test_docs.py fails while the page differs from what this script writes.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from mam2.engine.config.describe import field_texts
from mam2.engine.config.finetune import FinetuneConfig
from mam2.engine.config.limits import Limits, declared
from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.config.recipe import alternatives, recipe_names
from mam2.engine.config.sizes import PRESETS, SIZES

PAGE = Path(__file__).with_name("configuration.md")

HEAD = """# Configuration

<!-- Written by docs/generate_configuration.py: do not edit. -->

A *recipe* is a TOML file with one table per section below. The values of a run come from four places; a later one
overrides an earlier one:

1. the defaults on this page;
2. the recipes that a recipe extends, in their order: `extends = ["mam2-fast", "my-data.toml"]`;
3. the recipe itself: the first argument of `mam2 pretrain`, `mam2 tokenize`, `mam2 plan` or `mam2 finetune`;
4. flags on the command line: `--optim.batch 128`, `--loss.motion-eps 0.1`, `--data.no-flip`.

In flags, `_` may be written as `-`. A switch is set with `--data.flip` and cleared with `--data.no-flip`. An unknown
key, a value of another type, a number outside its limits, and values that do not fit together end the command with one
line that names the key. Every run writes its values to `RUN/config.json`, which is a recipe too.

## Recipes that come with MAM2

Pre-training: {pretrain}.

Fine-tuning: {finetune}.

The comment at the head of each file in `engine/recipes/` names the hardware, the expected time and score, and says
whether anybody has measured them yet. A name without a data set is the method alone.

`--size` and `--preset` set several keys of `[model]` at once:

| `--size` | width | blocks | heads |
|---|---|---|---|
{sizes}

The regressor and the decoders scale with the encoder. No learning rate changes with the size.

| `--preset` | regressor | decoders |
|---|---|---|
{presets}

Preset widths are those for an encoder of width 768; they scale with the encoder. `cae` also sets `model.layer_scale` to
0.1 and `model.projection_norm` to true.
"""


def page() -> str:
    """The whole page as Markdown."""
    sizes = "\n".join(f"| `{name}` | {size.width} | {size.depth} | {size.heads} |" for name, size in SIZES.items())
    presets = "\n".join(
        f"| `{name}` | {after.depth} blocks of width {after.width}, keys `{after.keys}` "
        f"| {decoder.depth} blocks of width {decoder.width} |"
        for name, (after, decoder, *_) in PRESETS.items()
    )
    head = HEAD.format(
        pretrain=_names(recipe_names()), finetune=_names(recipe_names(FinetuneConfig)), sizes=sizes, presets=presets
    )
    shared = {f.name: _class(PretrainConfig, f.name) for f in dataclasses.fields(PretrainConfig)}
    parts = [head, "## Keys for pre-training\n", *_tables(PretrainConfig, "pre-training")]
    parts.append("## Keys for fine-tuning\n")
    for field in dataclasses.fields(FinetuneConfig):
        if shared.get(field.name) is _class(FinetuneConfig, field.name):
            parts.append(f"`[{field.name}]` has the same keys as for [pre-training](#pre-training-{field.name}).\n")
    parts += _tables(FinetuneConfig, "fine-tuning", skip=shared)
    return "\n".join(parts)


def _names(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _class(owner: type, field: str) -> type:
    return get_type_hints(owner)[field]


def _tables(owner: type, kind: str, *, skip: dict[str, type] | None = None, prefix: str = "") -> list[str]:
    """One heading and table per section of a config; `skip`: sections whose class is described elsewhere."""
    parts: list[str] = []
    for field in dataclasses.fields(owner):
        cls = _class(owner, field.name)
        if not dataclasses.is_dataclass(cls) or (skip or {}).get(field.name) is cls:
            continue
        name = f"{prefix}{field.name}"
        parts += [f"### {kind.capitalize()}: {name.replace('.', ' ')}\n", *_intro(owner, cls, field.name)]
        rows = [_row(cls, each, name) for each in dataclasses.fields(cls) if not _nested(cls, each.name)]
        parts += ["| key | values | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"]
        parts += _tables(cls, kind, prefix=f"{name}.")
    return parts


def _intro(owner: type, cls: type, field: str) -> list[str]:
    own = inspect.getdoc(cls) or ""
    texts = [
        text for text in (field_texts(owner).get(field), "" if own.startswith(f"{cls.__name__}(") else own) if text
    ]
    return [f"{_one_line(text)}\n" for text in texts]


def _nested(cls: type, field: str) -> bool:
    return dataclasses.is_dataclass(_class(cls, field))


def _row(cls: type, field: dataclasses.Field[Any], table: str) -> str:
    kind, limits = _class(cls, field.name), declared(cls, field.name)
    if get_origin(kind) is tuple:
        words = {str: "list of texts", float: "list of numbers"}[get_args(kind)[0]]
        values = f"{words}, {limits}" if limits != Limits() else words
    else:
        kinds, choices = alternatives(kind)
        words = {bool: "true or false", int: "whole number", float: "number", str: "text"}
        numbers = [f"{words[each]}, {limits}" if limits != Limits() else words[each] for each in kinds]
        values = "; ".join([*numbers, ", ".join(f"`{choice}`" for choice in choices)]).removesuffix("; ")
    text = field_texts(cls)[field.name].replace("|", "\\|")
    return f"| `{table}.{field.name}` | {values} | `{json.dumps(field.default)}` | {_one_line(text)} |"


def _one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
