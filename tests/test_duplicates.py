"""No code stands twice: no identical run of more than ten lines, other than the parameters of kernels."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

from tests.helpers.paths import ROOT

MOST = 10
"""Maximum number of successive lines that may stand in two places."""
FOLDERS = ("benchmarks", "docs", "engine", "examples", "kernels", "tests")
THIN = re.compile(r"#.*|\W*|(?:from \S+ )?import .*")
"""Lines that do not count: comments, punctuation, imports."""


def parameter_lines(text: str) -> set[int]:
    """The numbers of the lines that declare parameters of functions."""
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    return {number for node in functions for number in range(node.lineno, node.body[0].lineno)}


def code_lines(path: Path, root: Path) -> list[tuple[str, str]]:
    """(place, line) of the lines of a module that count. A Triton kernel has to repeat its parameters."""
    text = path.read_text(encoding="utf-8")
    name = path.relative_to(root)
    left_out = parameter_lines(text) if name.parts[0] == "kernels" else set()
    lines = enumerate((" ".join(line.split()) for line in text.splitlines()), 1)
    return [(f"{name}:{number}", line) for number, line in lines if number not in left_out and not THIN.fullmatch(line)]


def duplicates(paths: list[Path], root: Path) -> list[str]:
    """The beginnings of runs of more than `MOST` lines that stand in several places."""
    places: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for path in paths:
        lines = code_lines(path, root)
        for first in range(len(lines) - MOST):
            places[tuple(line for _, line in lines[first : first + MOST + 1])].append(lines[first][0])
    return [" = ".join(found) for found in places.values() if len(found) > 1]


def test_no_code_stands_twice() -> None:
    paths = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    assert duplicates(paths, ROOT) == []


def test_a_duplicate_is_found(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    run = "".join(f"x{number} = {number}\n" for number in range(MOST + 1))
    (tmp_path / "engine" / "one.py").write_text(f"import os\n\n{run}")
    (tmp_path / "engine" / "two.py").write_text(f"# other\nother = 1\n{run}")
    paths = sorted((tmp_path / "engine").iterdir())
    assert duplicates(paths, tmp_path) == ["engine/one.py:3 = engine/two.py:3"]


def test_parameters_of_kernels_may_repeat(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    parameters = "".join(f"    x{number},\n" for number in range(MOST + 1))
    for name in ("one", "two"):
        (tmp_path / "kernels" / f"{name}.py").write_text(f"def {name}(\n{parameters}):\n    return x0\n")
    assert duplicates(sorted((tmp_path / "kernels").iterdir()), tmp_path) == []
