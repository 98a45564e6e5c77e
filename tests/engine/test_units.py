"""Numbers with units."""

from __future__ import annotations

import pytest

from mam2.engine.units import counted, decimal_bytes


@pytest.mark.parametrize(
    ("number", "noun", "form", "text"),
    [
        (1, "video", "", "1 video"),
        (0, "video", "", "0 videos"),
        (2, "pass", "", "2 passes"),
        (1, "class", "", "1 class"),
        (1234567, "clip", "", "1234567 clips"),
        (1234567, "clip", ",", "1,234,567 clips"),
        (1.0, "epoch", "", "1 epoch"),
        (0.5, "epoch", "", "0.5 epochs"),
    ],
)
def test_a_noun_agrees_with_its_number(number: float, noun: str, form: str, text: str) -> None:
    assert counted(number, noun, form) == text


def test_an_irregular_plural_is_given() -> None:
    assert counted(2, "copy", plural="copies") == "2 copies"
    assert counted(1, "copy", plural="copies") == "1 copy"


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (83_456, "83.5 kB"), (3_100_000_000, "3.10 GB")])
def test_the_size_of_a_small_file_is_not_zero(size: int, text: str) -> None:
    assert decimal_bytes(size) == text
