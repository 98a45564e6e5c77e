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
