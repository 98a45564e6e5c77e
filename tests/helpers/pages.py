"""The pages of the repository, their fenced blocks and the commands in them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from tests.helpers.paths import ROOT

PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "kernels/*.md", "benchmarks/**/*.md", "tests/**/*.md")
    for path in ROOT.glob(pattern)
)


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def fences(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text(page), re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """The words of every command in the fenced shell blocks of a page."""
    lines = "\n".join(fences(page, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def verb_of(words: list[str]) -> list[str]:
    """The verb of a mam2 command and its arguments; an empty list for other commands."""
    if Path(words[0]).name == "mam2":
        return words[1:]
    if words[0] == "torchrun" and "mam2.engine" in words:
        return words[words.index("mam2.engine") + 1 :]
    return []
