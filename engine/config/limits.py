"""Properties of config fields: limits, the earlier name, and whether a resumed run may have another value."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from mam2.engine.errors import UserError

KEY = "limits"
RESUMABLE = "resumable"
EARLIER = "earlier"


class Limits(NamedTuple):
    """An interval of numbers; None means no bound. Every value must be finite."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, int | float) or not math.isfinite(value):
            return False
        return not (
            (self.at_least is not None and value < self.at_least)
            or (self.above is not None and value <= self.above)
            or (self.at_most is not None and value > self.at_most)
            or (self.below is not None and value >= self.below)
        )

    def __str__(self) -> str:
        bounds = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        words = [f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None]
        return " and ".join(words) or "a finite number"


COUNT = Limits(at_least=1)
COUNT_OR_NONE = Limits(at_least=0)
POSITIVE = Limits(above=0)
NOT_NEGATIVE = Limits(at_least=0)
SHARE = Limits(at_least=0, at_most=1)
BELOW_ONE = Limits(at_least=0, below=1)
SEED = Limits(at_least=0, below=2**62)
"""Seeds are added to and multiplied by small numbers, and the results must stay below 2^63."""
BATCH = Limits(at_least=1, at_most=2**17)
"""Clips per step; a larger number is a typing error, whose allocation would fail."""

BATCH_OR_NONE = Limits(at_least=0, at_most=2**17)


def limited(default: Any, limits: Limits, *, resumable: bool = False) -> Any:
    """Returns a dataclass field with a default and the interval of its values.

    resumable: a resumed run may have another value, because the field does not affect the training's result.
    """
    return dataclasses.field(default=default, metadata={KEY: limits, RESUMABLE: resumable})


def resumable(default: Any) -> Any:
    """Returns a dataclass field without limits, for which a resumed run may have another value."""
    return dataclasses.field(default=default, metadata={RESUMABLE: True})


def renamed(default: Any, *, earlier: str) -> Any:
    """Returns a dataclass field without limits with the former name `earlier`, which files and flags may still use."""
    return dataclasses.field(default=default, metadata={EARLIER: earlier})


def renamed_keys(kind: type, prefix: str = "") -> dict[str, str]:
    """Returns the earlier names of a config's keys and their present names, both as in "data.decoder"."""
    keys: dict[str, str] = {}
    for item in dataclasses.fields(kind):
        value = getattr(kind(), item.name)
        if dataclasses.is_dataclass(value):
            keys |= renamed_keys(type(value), f"{prefix}{item.name}.")
        elif EARLIER in item.metadata:
            keys[f"{prefix}{item.metadata[EARLIER]}"] = f"{prefix}{item.name}"
    return keys


def with_present_names(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested values of a config of an earlier version with its keys renamed as they are called now."""
    names = {item.metadata.get(EARLIER): item.name for item in dataclasses.fields(kind)}
    present = {}
    for key, value in values.items():
        name = names.get(key, key)
        part = getattr(kind(), name, None)
        nested = dataclasses.is_dataclass(part) and isinstance(value, Mapping)
        present[name] = with_present_names(type(part), value) if nested else value
    return present


def resumable_keys(kind: type) -> set[str]:
    """Returns the keys of a config class, such as "run.device", for which a resumed run may have other values.

    A nested table is one key, for example "model.decoder". A field that a subclass declares again keeps the flag of its
    base class.
    """
    keys = set()
    for table in dataclasses.fields(kind):
        part = type(getattr(kind(), table.name))
        whole = bool(table.metadata.get(RESUMABLE))
        names = {item.name for item in dataclasses.fields(part)} if whole else resumable_fields(part)
        keys |= {f"{table.name}.{name}" for name in names}
    return keys


def resumable_fields(table: type) -> set[str]:
    """Returns the same for one table of a config, without the table's name."""
    return {item.name for item in dataclasses.fields(table) if _metadata(table, item.name, RESUMABLE)}


def check_limits(config: Any, prefix: str = "") -> None:
    """Raises UserError for the first number of a config outside its field's limits; it names key and expectation.

    Numbers of fields without declared limits must be finite. Nested dataclasses are checked under their own names.
    """
    for item in dataclasses.fields(config):
        value, name = getattr(config, item.name), f"{prefix}{item.name}"
        if dataclasses.is_dataclass(value):
            check_limits(value, f"{name}.")
            continue
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not isinstance(number, bool):
                check_value(name, number, declared(type(config), item.name))


def check_value(name: str, value: float, limits: Limits) -> None:
    """Raises UserError if `value` is outside `limits`; `name` is the user's key or flag."""
    if value not in limits:
        bounds = str(limits)
        if not math.isfinite(value) and limits != Limits():
            bounds = f"a finite number, {bounds}"
        raise UserError(f"{name} {value}: expected {bounds}")


def check_flags(**flags: tuple[float | None, Limits]) -> None:
    """Runs `check_value` for the flags of a verb, given by their Python names; None means not given."""
    for name, (value, limits) in flags.items():
        if value is not None:
            check_value(f"--{name.replace('_', '-')}", value, limits)


def declared(kind: type, name: str) -> Limits:
    """Returns the limits of a field; if a subclass only changes the default, those of the base class."""
    return _metadata(kind, name, KEY) or Limits()


def _metadata(kind: type, name: str, key: str) -> Any:
    """Returns a field's metadata for `key`, from the class or the nearest base class that has it; None if none has."""
    for cls in kind.__mro__:
        fields = cls.__dict__.get("__dataclass_fields__", {})
        if name in fields and key in fields[name].metadata:
            return fields[name].metadata[key]
    return None
