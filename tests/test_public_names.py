"""A public name of the two packages means one thing: no two modules define it."""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DESCRIBE_OPERATORS = ("kernels/costs.py", "kernels/reference.py", "kernels/reference_masks.py")
DESCRIBE_OPERATORS += ("engine/costs.py", "engine/layer_costs.py")
"""Modules whose functions are named after the operator whose cost or definition they return."""


def definitions(path):
    """(name, kind) of what a module defines for others: functions, classes and aliases of types, and constants."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, "code"
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            if isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "TypeVar":
                continue
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [leaf.id for target in targets for leaf in ast.walk(target) if isinstance(leaf, ast.Name)]
            yield from ((name, "constant" if name.isupper() else "code") for name in names)


def clashes(root):
    """Public names that several modules define; a constant is public where another module imports it."""
    files = {
        path.relative_to(root).as_posix(): path for top in ("engine", "kernels") for path in root.glob(f"{top}/**/*.py")
    }
    imported = set()
    for path in files.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mam2."):
                module = node.module.removeprefix("mam2.").replace(".", "/") + ".py"
                imported |= {(module, alias.name) for alias in node.names}
    places = defaultdict(set)
    for file, path in files.items():
        for name, kind in definitions(path):
            verb = name == "run" and file.startswith("engine/commands/")  # always called with its module's name
            if name.startswith("_") or verb or (kind == "constant" and (file, name) not in imported):
                continue
            if not (kind == "code" and file in DESCRIBE_OPERATORS):
                places[name].add(file)
    return {name: sorted(where) for name, where in places.items() if len(where) > 1}


def test_a_public_name_has_one_meaning():
    assert clashes(ROOT) == {}


def test_a_new_clash_is_found(tmp_path):
    for file, text in {
        "engine/a.py": "X = 1\nShape = tuple[int]\ndef f(): ...\n",
        "engine/data/b.py": "from mam2.engine.a import X\nX = 2\nclass Shape: ...\ndef _f(): ...\n",
        "kernels/costs.py": "def f(): ...\n",
        "kernels/c.py": "from mam2.engine.data.b import X\nfrom typing import TypeVar\nT = TypeVar('T')\n",
        "kernels/d.py": "T = TypeVar('T')\nLOCAL = 1\n",
        "engine/e.py": "LOCAL = 2\n",
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    assert clashes(tmp_path) == {"X": ["engine/a.py", "engine/data/b.py"], "Shape": ["engine/a.py", "engine/data/b.py"]}
