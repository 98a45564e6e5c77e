"""Numbers with units, as the tables and reports of `mam2 plan` show them."""

from __future__ import annotations

import math


def plain_number(value: float) -> str:
    """Formats three digits without an exponent: 0.0123, 1.23, 1,230."""
    if value < 1:
        return f"{value:.3g}"
    rounded = round(value, 2 - math.floor(math.log10(value)))
    return f"{rounded:,.{max(2 - math.floor(math.log10(rounded)), 0)}f}"


def with_prefix(value: float) -> str:
    """Formats a number with a prefix: 86.2 M, 117 G."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{plain_number(value / factor)} {prefix}"
    return f"{plain_number(value)} "


def binary_bytes(value: float) -> str:
    """Formats bytes in MiB or GiB."""
    return f"{plain_number(value / 2**30)} GiB" if value >= 2**30 else f"{plain_number(value / 2**20)} MiB"


def duration(hours: float) -> str:
    """Formats a duration in seconds, minutes, hours or days, whichever suits."""
    for least, unit, name in ((100, 24, "days"), (1, 1, "hours"), (1 / 30, 1 / 60, "minutes")):
        if hours >= least:
            return f"{plain_number(hours / unit)} {name}"
    return f"{plain_number(3600 * hours)} seconds"


def decimal_bytes(value: float) -> str:
    """Formats bytes in kB, MB or GB, as file systems and shells count the sizes of files."""
    return f"{with_prefix(value)}B"


def counted(count: float, noun: str, form: str = "", *, plural: str = "") -> str:
    """Formats a number with its noun in the singular or plural: 1 video, 2 videos, 0 passes.

    noun: the singular. form: the format of the number. plural: default: the noun with s, or with es after s or x.
    """
    several = plural or noun + ("es" if noun.endswith(("s", "x")) else "s")
    return f"{count:{form or ('g' if isinstance(count, float) else 'd')}} {noun if count == 1 else several}"
