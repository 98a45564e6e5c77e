"""`mam2 recipes`: lists the shipped recipes, prints all values of one, or writes them to a file for editing."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Annotated

import tyro

from mam2.engine.commands.options import run_verb
from mam2.engine.config.describe import as_toml
from mam2.engine.config.finetune import FinetuneConfig
from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.config.recipe import load_recipe, recipe_head, recipe_names
from mam2.engine.errors import UserError
from mam2.engine.files import write_whole


def run(arguments: list[str]) -> int:
    return run_verb(recipes, arguments, "recipes")


def recipes(
    name: tyro.conf.Positional[str] = "",
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
) -> int:
    """List the shipped recipes, print all values of one, or write them to a file for editing.

    Args:
        name: a shipped recipe or a file; default: list the shipped recipes.
        out: new TOML file with every key of the recipe, its value and its meaning. The file is a recipe: `mam2 pretrain
            FILE --data …`.
    """
    if not name:
        if out:
            raise UserError("--out: expected the name of a recipe before it; `mam2 recipes` lists them")
        print(listing(), end="")
        return 0
    config = load_any(name)
    if out is None:
        print(f"# {name}: all values, including those of its base recipes.\n")
        print(as_toml(config), end="")
        return 0
    if out.suffix != ".toml":
        raise UserError(f"--out {out}: expected a name that ends in .toml")
    if os.path.lexists(out):
        raise UserError(f"--out {out}: already exists; choose a new file")
    verb = "pretrain" if isinstance(config, PretrainConfig) else "finetune"
    head = f"# Written by `mam2 recipes {name}`; it contains every key; a deleted key gets its default.\n"
    head += f"#   mam2 {verb} {out} …\n\n"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, (head + as_toml(config, explained=True)).encode())
    print(f"{out}: {sum(1 for line in as_toml(config).splitlines() if ' = ' in line)} keys; mam2 {verb} {out} …")
    return 0


def load_any(name: str) -> PretrainConfig | FinetuneConfig:
    """Returns the config of a recipe of either kind, shipped or a file. Raises UserError."""
    if name in recipe_names(FinetuneConfig):
        return load_recipe(name, FinetuneConfig)
    try:
        return load_recipe(name)
    except UserError:
        with contextlib.suppress(UserError):
            return load_recipe(name, FinetuneConfig)
        raise


def listing() -> str:
    """Returns a line per shipped recipe: its most important values, and the first line of its file."""
    rows = [("recipe", "method", "model", "clip", "batch", "epochs", "what")]
    for name in [*recipe_names(), *recipe_names(FinetuneConfig)]:
        config = load_any(name)
        method = config.model.objective if isinstance(config, PretrainConfig) else "fine-tuning"
        clip = f"{config.data.frames}×{config.data.size}²"
        values = f"{config.model.width}×{config.model.depth}", clip, f"{config.optim.batch}", f"{config.optim.epochs:g}"
        rows.append((name, method, *values, recipe_head(name)))
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[6]]) for row in rows
    ]
    end = "model: width × blocks of the encoder. `mam2 recipes NAME` prints all values, with --out FILE it writes them."
    return "\n".join([*lines, "", end, ""])
