"""Imports run one way: packages of the engine import only what stands below them; the kernels nothing of the engine."""

import ast
import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAYERS = (
    ("errors", "units"),
    ("files",),
    ("config",),
    ("runtime", "data"),
    ("model",),
    ("checkpoints",),
    ("tokenizer",),
    ("layer_costs", "machines"),
    ("costs",),
    ("finetune_costs",),
    ("planning",),
    ("finetune_planning",),
    ("evaluation",),
    ("train",),
    ("demo", "doctor"),
    ("commands",),
    ("cli",),
    ("__init__", "__main__"),
)
"""From the lowest to the highest; those of one line do not import each other, except that data may import runtime."""
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
ALLOWED = {("data", "runtime")}


def imported_names(path):
    """(line, dotted name) of everything that a module imports, inside of functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def arrows_back(root):
    """Imports of the engine that run to a package at the importer's level or above, as lines to read."""
    wrong = []
    for path in sorted((root / "engine").rglob("*.py")):
        package = path.relative_to(root / "engine").with_suffix("").parts[0]
        for line, name in imported_names(path):
            other = name.removeprefix("mam2.engine.").split(".")[0]
            if not name.startswith("mam2.engine.") or other == package or (package, other) in ALLOWED:
                continue
            if other not in LEVEL:  # `from mam2.engine import load_encoder`: the public names stand above everything
                other = "__init__"
            if LEVEL[other] >= LEVEL[package]:
                wrong.append(f"{path.relative_to(root)}:{line} imports {name}")
    return wrong


def test_every_package_has_a_layer():
    entries = list((ROOT / "engine").iterdir())
    top = {path.stem for path in entries if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert top == set(LEVEL)


def test_packages_import_only_what_stands_below_them():
    assert arrows_back(ROOT) == []


def test_the_kernels_import_nothing_of_the_engine():
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not [name for _, name in imported_names(path) if name.startswith("mam2.engine")], path


def test_an_arrow_back_is_found(tmp_path):
    (tmp_path / "engine" / "data").mkdir(parents=True)
    (tmp_path / "engine" / "data" / "wrong.py").write_text("def f():\n    from mam2.engine.train import loop\n")
    assert arrows_back(tmp_path) == ["engine/data/wrong.py:2 imports mam2.engine.train.loop"]


def test_every_package_lists_its_modules():
    missing = []
    for path in (path for package in ("engine", "benchmarks") for path in (ROOT / package).rglob("__init__.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert text, path
        if path.parent.name not in ("engine", "commands"):  # docs/design.md; one module per verb
            files = [file for file in path.parent.glob("[!_]*.py") if not file.name.startswith("bench_")]  # by operator
            missing += [str(file) for file in files if file.name not in text]
    assert missing == []


def test_the_design_page_names_every_layer():
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8").partition("## Layers")[2].partition("```\n\n")[0]
    assert [name for name in LEVEL if "__" not in name and not re.search(rf"\b{name}\b", page)] == []


def test_the_tests_mirror_the_packages():
    """tests/engine/data/ tests engine/data/; tests of the whole repository are at the top."""
    folders = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    assert {folder.parts[0] for folder in folders if folder.parts} == {"benchmarks", "engine", "kernels"}
    assert [folder for folder in folders if not (ROOT / folder).is_dir()] == []
    modules = {path.stem for package in ("benchmarks", "engine", "kernels") for path in (ROOT / package).rglob("*.py")}
    whole = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    assert whole & modules == set()


def attributes_of_modules(path, starts):
    """(line, dotted name) of every attribute of our modules that a file reads, where a name is always the module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules, others = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if name.startswith(starts) and importlib.util.find_spec(node.module) and is_module(name):
                    modules[alias.asname or alias.name] = name
        elif isinstance(node, ast.arg):
            others.add(node.arg)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            others.add(node.id)
    known = modules.keys() - others
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known:
            yield node.lineno, f"{modules[node.value.id]}.{node.attr}"


def is_module(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is no package
        return False


def missing_names(paths, starts):
    """What is imported or read of modules whose names start so, and does not exist, as lines to read."""
    missing = []
    for path in paths:
        for line, name in [*imported_names(path), *attributes_of_modules(path, starts)]:
            if not name.startswith(starts):
                continue
            module, _, attribute = name.rpartition(".")
            if not hasattr(importlib.import_module(module), attribute) and not is_module(name):
                missing.append(f"{path.name}:{line} uses {name}")
    return missing


def test_every_name_of_our_modules_that_programs_use_exists():
    """Otherwise benchmarks, examples and programs that no test runs could keep the old name of something that moved."""
    paths = sorted(path for folder in ("benchmarks", "examples", "tests") for path in (ROOT / folder).rglob("*.py"))
    # test_api.py imports a name that does not exist
    assert missing_names([path for path in paths if path.name != "test_api.py"], ("mam2.", "benchmarks.")) == []


def test_a_name_that_moved_is_found(tmp_path):
    (tmp_path / "program.py").write_text(
        "from mam2.engine import files\nfrom mam2.engine.files import nothing\n\n\n"
        "def f():\n    from benchmarks import report\n\n    return files.moved, report.table, report.gone\n"
    )
    assert missing_names([tmp_path / "program.py"], ("mam2.", "benchmarks.")) == [
        "program.py:2 uses mam2.engine.files.nothing",
        "program.py:8 uses mam2.engine.files.moved",
        "program.py:8 uses benchmarks.report.gone",
    ]
