"""The engine from Python: what `mam2.engine` offers, and the example that uses it."""

from __future__ import annotations

import dataclasses
import inspect
import io
import re
import runpy
import subprocess
import sys
import typing
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from matplotlib import image

import mam2.engine
from mam2.engine import cli
from mam2.engine.commands.flags import ClassifierFlags, EncoderFlags, TokenizerFlags
from tests.helpers.paths import ROOT

EXAMPLE = ROOT / "examples" / "pretrain_probe_plot.py"


def help_of(verb: str) -> str:
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
        patch.setenv("COLUMNS", "300")
        with pytest.raises(SystemExit):
            cli.main([verb.replace("_", "-"), "--help"])
    return out.getvalue()


def test_every_name_is_there_and_says_what_it_takes() -> None:
    for name in mam2.engine.__all__:
        found = getattr(mam2.engine, name)
        assert found.__name__ == name
        assert found.__doc__, name
    assert dir(mam2.engine) == sorted(mam2.engine.__all__)


def test_a_name_that_is_not_there_is_an_error() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'load_encodre'; it has .*load_encoder"):
        mam2.engine.load_encodre  # noqa: B018
    with pytest.raises(ImportError):
        from mam2.engine import load_encodre  # noqa: F401


@pytest.mark.slow
def test_nothing_is_imported_before_it_is_used() -> None:
    code = (
        "import sys, mam2.engine; assert 'torch' not in sys.modules; "
        "from mam2.engine import load_recipe; assert 'torch' not in sys.modules; "
        "from mam2.engine import load_encoder; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_the_example_runs_and_returns_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = runpy.run_path(str(EXAMPLE))["main"](tmp_path, quick=True)
    printed = capsys.readouterr().out
    scores = cells["report"].scores
    assert [Path(score.checkpoint).name for score in scores] == ["random", "run"]
    for score in scores:
        assert f"linear probe of {Path(score.checkpoint).name}: {score.accuracy:.1%}" in printed
    assert cells["found"].features.shape == (24, 24)
    assert cells["trained"].step == cells["trained"].steps > 1
    for name in ("losses.png", "features.png"):
        picture = image.imread(tmp_path / name)
        assert min(picture.shape[:2]) > 200
        assert picture[..., :3].std() > 0.02  # something is drawn


VERBS = (
    *("embed", "evaluate", "export", "finetune", "index", "plan", "predict", "pretrain", "probe", "tokenize"),
    *("visualize", "neighbors", "plot", "train_tokenizer", "transcode"),
)
"""Verbs of the command line that are functions of `mam2.engine`."""
OTHERWISE = {
    # load_recipe
    **{
        (verb, flag): "config" for verb in ("plan", "pretrain", "tokenize") for flag in ("size", "preset")
    },  # load_recipe
    **{
        ("pretrain", f"checkpoint_{name}"): "checkpoint_options"
        for name in ("frames", "size", "heads", "decoder_heads")
    },
    ("plan", "videos"): "gpus",  # Plan.hours and Plan.report
    ("evaluate", "classes"): "names",
    ("predict", "classes"): "names",
    ("finetune", "checkpoint"): "encoder",
    ("finetune", "scratch"): "encoder",
    ("finetune", "frames"): "encoder_options",
    ("finetune", "size"): "encoder_options",
    ("finetune", "heads"): "encoder_options",
}
"""Options of a verb whose value goes into another parameter of its function."""


@pytest.mark.parametrize("verb", VERBS)
def test_a_function_takes_every_option_of_its_verb(verb: str) -> None:
    found = getattr(mam2.engine, verb)
    parameters = inspect.signature(found).parameters
    flags = {
        flag.replace("-", "_")
        for flag in re.findall(r"(?:^|  )--([a-z][a-z-]*)(?: [A-Z{\[]|, --)", help_of(verb), re.MULTILINE)
    }
    assert len(flags) > 1
    assert [flag for flag in flags if OTHERWISE.get((verb, flag), flag) not in parameters] == []
    hints = typing.get_type_hints(found)
    assert "return" in hints
    assert [name for name in parameters if name not in hints] == []
    text = inspect.getdoc(found) or ""
    assert [name for name in parameters if not re.search(rf"\b{name}\b", text)] == []


@pytest.mark.parametrize(
    ("flags", "verbs"),
    [
        (EncoderFlags, ("probe", "neighbors", "embed")),
        (ClassifierFlags, ("evaluate", "predict")),
        (TokenizerFlags, ("train_tokenizer",)),
    ],
)
def test_a_group_of_flags_has_the_defaults_of_its_functions(flags: type, verbs: tuple[str, ...]) -> None:
    for verb in verbs:
        parameters = inspect.signature(getattr(mam2.engine, verb)).parameters
        values = {OTHERWISE.get((verb, field.name), field.name): field.default for field in dataclasses.fields(flags)}
        values |= {"names": ()} if "names" in values else {}
        assert values == {name: parameters[name].default for name in values}


def test_the_page_names_every_function() -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    assert [name for name in mam2.engine.__all__ if name.islower() and f"`{name}(" not in page] == []


def test_names_of_functions_are_not_those_of_modules() -> None:
    """Importing a module would put it in the place of the function."""
    folder = Path(mam2.engine.__file__).parent
    assert [name for name in mam2.engine.__all__ if (folder / name).is_dir() or (folder / f"{name}.py").exists()] == []


def test_a_mistake_is_an_exception() -> None:
    with pytest.raises(mam2.engine.UserError, match="no such file or folder"):
        mam2.engine.index("/nowhere")
    with pytest.raises(mam2.engine.UserError, match="unknown key 'epoch'; did you mean 'epochs'"):
        mam2.engine.load_recipe("demo", optim={"epoch": 1.0})


def test_a_recipe_takes_size_preset_and_values() -> None:
    config = mam2.engine.load_recipe("mam2-fast", size="small", preset="cae", optim={"epochs": 3}, data={"frames": 8})
    assert (config.model.width, config.model.decoder.width) == (384, 384)
    assert (config.optim.epochs, config.data.frames) == (3.0, 8)
    assert config.optim.base_lr == mam2.engine.load_recipe("mam2-fast").optim.base_lr
    tuned = mam2.engine.load_recipe("kinetics400/finetune", mam2.engine.FinetuneConfig, optim={"batch": 16})
    assert tuned.optim.batch == 16
    with pytest.raises(mam2.engine.UserError, match="size 'giant': expected one of tiny, small"):
        mam2.engine.load_recipe("mam2-fast", size="giant")
    with pytest.raises(mam2.engine.UserError, match="for recipes that pre-train"):
        mam2.engine.load_recipe("kinetics400/finetune", mam2.engine.FinetuneConfig, size="small")
