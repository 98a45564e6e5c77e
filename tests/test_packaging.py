"""The package as users install it: contents of the wheel, imported code, messages about missing dependencies."""

import importlib.metadata
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import mam2
from mam2.engine import cli

ROOT = Path(__file__).resolve().parents[1]
DISTRIBUTIONS = {"PIL": "pillow", "cv2": "opencv-python-headless"}
"""Packages whose installed name differs from the imported one."""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the files that `pip install .` writes."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", folder, ROOT]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_one_top_level_package_with_recipes_and_launch_table(installed):
    assert sorted(path.name for path in installed.iterdir()) == ["mam2", f"mam2-{mam2.__version__}.dist-info"]
    names = {path.relative_to(installed / "mam2").as_posix() for path in (installed / "mam2").rglob("*")}
    recipes = {f"engine/recipes/{path.relative_to(ROOT / 'engine/recipes')}" for path in ROOT.glob("engine/**/*.toml")}
    modules = {
        str(path.relative_to(ROOT)) for folder in ("engine", "kernels") for path in (ROOT / folder).rglob("*.py")
    }
    data = {"kernels/launch_table.json", "kernels/py.typed", "engine/py.typed"}
    assert recipes | modules | data | {"__init__.py"} <= names
    assert len(recipes) > 20


def test_a_checkout_named_mam2_next_to_a_program_does_not_hide_the_package(installed, tmp_path):
    (tmp_path / "mam2" / "engine").mkdir(parents=True)
    (tmp_path / "mam2" / "engine" / "__init__.py").write_text("raise RuntimeError('the checkout was imported')\n")
    (tmp_path / "program.py").write_text("import mam2.engine; print(mam2.engine.__file__)\n")
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, env={"PYTHONPATH": str(installed)}, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(installed / "mam2" / "engine" / "__init__.py"), done.stderr


@pytest.mark.parametrize("flag", ["--version", "-V", "version"])
def test_the_version_is_that_of_the_package(capsys, flag):
    with pytest.raises(SystemExit) as stop:
        cli.main([flag])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"mam2 {mam2.__version__}, Python ")
    assert importlib.metadata.version("mam2") == mam2.__version__


@pytest.mark.parametrize(("module", "extra"), [("tyro", "engine"), ("av", "engine"), ("safetensors", "engine")])
def test_a_verb_without_its_dependencies_names_the_extra_to_install(capsys, monkeypatch, module, extra):
    for name in [name for name in sys.modules if name.startswith("mam2.engine.commands")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(cli.importlib, "import_module", lambda _: __import__(module))
    with pytest.raises(SystemExit) as stop:
        cli.main(["pretrain", "demo"])
    assert stop.value.code == 2
    written = capsys.readouterr().err
    assert f"pretrain needs {module}, which is not installed: pip install 'mam2[{extra}]'" in written
    assert written.count("\n") == 1


def test_a_missing_module_of_our_own_is_no_missing_dependency(monkeypatch):
    monkeypatch.setattr(cli.importlib, "import_module", lambda _: __import__("mam2.engine.nowhere"))
    with pytest.raises(ModuleNotFoundError, match=r"mam2\.engine\.nowhere"):
        cli.main(["pretrain", "demo"])


def test_the_command_line_knows_what_each_extra_installs():
    requirements = importlib.metadata.requires("mam2")
    for extra, modules in cli.EXTRAS.items():
        installs = {
            re.split(r"[^\w-]", line)[0] for line in requirements if re.search(rf"extra == ['\"]{extra}['\"]", line)
        }
        assert installs == {DISTRIBUTIONS.get(module, module) for module in modules}


def test_every_requirement_of_a_user_has_bounds():
    """pip installs the newest admitted version: untested major versions must be excluded."""
    for line in importlib.metadata.requires("mam2"):
        if "extra == 'dev'" in line or 'extra == "dev"' in line or line.startswith(("tomli", "pillow")):
            continue
        assert ">=" in line, line
        assert "<" in line.replace("python_version <", ""), line
