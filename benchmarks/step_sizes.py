"""The configs of a measured step: a recipe, with one change or none, in its own size or in smaller ones for a CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.config.recipe import load_recipe


def _wide_heads(config: PretrainConfig) -> PretrainConfig:
    """Returns the config with heads of 128 in regressor and decoders, or one head where they are narrower."""
    parts = {
        name: dataclasses.replace(part, heads=max(part.width // 128, 1))
        for name, part in (("regressor", config.model.regressor), ("decoder", config.model.decoder))
    }
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **parts))


CHANGES: dict[str, Callable[[PretrainConfig], PretrainConfig]] = {
    "half decoded": lambda config: dataclasses.replace(config, mask=dataclasses.replace(config.mask, decoded=0.5)),
    "bfloat16 residual": lambda config: dataclasses.replace(
        config, model=dataclasses.replace(config.model, residual="bfloat16")
    ),
    "heads of 128": _wide_heads,
}
"""What the end of an objective's name changes in its recipe, after the recipe has been reduced."""
OBJECTIVES = (
    "mam2-fast",
    "mam2-fast half decoded",
    "videomae",
    "mam2-cae",
    "mam2-fast bfloat16 residual",
    "mam2-fast heads of 128",
)
"""Recipes, some with one of CHANGES."""
SMALL = (
    {"data": {"size": 112}, "model": {"width": 384, "depth": 12, "heads": 6}},
    {"depth": 4, "width": 192, "heads": 3},
)
TINY = (
    {"data": {"frames": 4, "size": 32}, "model": {"patch": 8, "width": 48, "depth": 2, "heads": 3}},
    {"depth": 1, "width": 48, "heads": 3},
)
"""Changed values of the config's tables, then of the regressor and the decoder: ViT-S, and one for tests."""


def sized(name: str, sizes: tuple[dict[str, dict[str, Any]], dict[str, int]] | None, precision: str) -> PretrainConfig:
    """Returns a recipe with a precision, reduced to `sizes` (None: unchanged)."""
    recipe, _, change = name.partition(" ")
    config = load_recipe(recipe)
    if sizes:
        tables, part = sizes
        config = dataclasses.replace(
            config, **{table: dataclasses.replace(getattr(config, table), **values) for table, values in tables.items()}
        )
        smaller = {part_name: dataclasses.replace(getattr(config.model, part_name), **part)
                   for part_name in ("regressor", "decoder")}  # fmt: skip
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, **smaller))
    config = CHANGES[change](config) if change else config
    return dataclasses.replace(config, run=dataclasses.replace(config.run, precision=precision))
