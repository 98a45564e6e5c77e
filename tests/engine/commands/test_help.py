"""Help texts are wrapped to the terminal, not at the line ends of the source."""

from __future__ import annotations

import re

import pytest

from mam2.engine.commands import VERBS
from mam2.engine.commands.options import unwrapped
from tests.helpers.commands import outcome


def test_paragraphs_and_arguments_become_single_lines():
    doc = """Does one thing.

    A paragraph that
    --continues.

    Args:
        a: a text over
            two lines
        b: another.
    """
    lines = ["Does one thing.", "", "A paragraph that --continues.", "", "Args:", "    a: a text over two lines"]
    assert unwrapped(doc).splitlines() == [*lines, "    b: another."]


@pytest.mark.parametrize("verb", VERBS)
def test_a_short_line_of_help_ends_a_text(verb, capsys, monkeypatch):
    """A line that has room for the first word of the next one would show a line end of the source."""
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = outcome(capsys, verb, "--help")
    assert status == 0
    rows = [row.strip("│").rstrip() for row in out.splitlines()]
    assert any("--help" in row for row in rows)
    indents = [len(row) - len(row.lstrip()) for row in rows]
    early = [
        (row, after)
        for row, after, indent, same in zip(rows, rows[1:], indents, indents[1:], strict=False)
        if indent == same >= 7
        and len(row) + len(after.split()[0]) + 1 < 76
        and not re.search(r"\(default: |\(required", row)
    ]
    assert not early, early
