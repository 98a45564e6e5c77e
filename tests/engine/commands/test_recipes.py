"""`mam2 recipes` and `mam2 completion`."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from mam2.engine.cli import VERBS
from mam2.engine.commands.completion import flags_of, recipes_of
from mam2.engine.config.describe import as_toml
from mam2.engine.config.finetune import FinetuneConfig
from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.config.recipe import load_recipe, recipe_names
from tests.helpers.commands import outcome

SHIPPED = [(kind, name) for kind in (PretrainConfig, FinetuneConfig) for name in recipe_names(kind)]


def test_every_recipe_is_listed_with_what_it_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    status, said, _ = outcome(capsys, "recipes")
    assert status == 0
    lines = {line.split()[0]: line for line in said.splitlines() if line}
    for _, name in SHIPPED:
        assert name in lines
        assert lines[name].split("  ")[-1].strip()
    assert lines["mam2-fast"].split()[1:6] == ["mam2", "768×12", "16×224²", "64", "400"]


@pytest.mark.parametrize("explained", [False, True])
@pytest.mark.parametrize(("kind", "name"), SHIPPED)
def test_a_recipe_as_toml_is_that_recipe(kind: type, name: str, explained: bool, tmp_path: Path) -> None:
    config = load_recipe(name, kind)
    (tmp_path / "own.toml").write_text(as_toml(config, explained=explained))
    assert load_recipe(tmp_path / "own.toml", kind) == config


@pytest.mark.parametrize("name", ["laptop", "ucf101/finetune"])
def test_a_written_recipe_explains_every_key(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "sub" / "own.toml"
    assert outcome(capsys, "recipes", name, "--out", file)[0] == 0
    lines = file.read_text().splitlines()
    keys = [number for number, line in enumerate(lines) if " = " in line and not line.startswith("#")]
    assert len(keys) > 40
    assert all(lines[number - 1].startswith("# ") for number in keys)
    status, said, _ = outcome(capsys, "recipes", file)
    assert status == 0
    assert said.splitlines()[2:] == outcome(capsys, "recipes", name)[1].splitlines()[2:]


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there.toml").write_text("")
    for arguments, reason in (
        (("--out", tmp_path / "a.toml"), "expected the name of a recipe"),
        (("laptop", "--out", tmp_path / "a.json"), "ends in .toml"),
        (("laptop", "--out", tmp_path / "there.toml"), "already exists"),
        (("labtop",), "did you mean laptop?"),
    ):
        status, _, said = outcome(capsys, "recipes", *arguments)
        assert status == 2
        assert reason in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pre"], ["pretrain", "predict"]),
        (["pretrain", "lap"], ["laptop"]),
        (["finetune", "ucf"], ["ucf101/finetune"]),
        (["pretrain", "laptop", "--mask.dec"], ["--mask.decoded", "--mask.decoded-kind"]),
        (["index", "--th"], ["--threads"]),
        (["plan", "laptop", "--adapters"], []),
        (["plan", "laptop", "--mask.ra"], ["--mask.ratio"]),
        (["plan", "ucf101/finetune", "--adapters"], ["--adapters.alpha", "--adapters.rank"]),
        (["plan", "ucf101/finetune", "--mask.ra"], []),
        (["plan", "own.toml", "--adapters.r"], ["--adapters.rank"]),
        (["plan", "own.toml", "--mask.ra"], ["--mask.ratio"]),
        (["doctor", "-"], []),
    ],
)
def test_bash_completes(
    words: list[str], expected: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    script = tmp_path / "mam2.sh"
    script.write_text(outcome(capsys, "completion", "bash")[1])
    line = " ".join(f"'{word}'" for word in ["mam2", *words])
    code = f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words)}; _mam2; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == expected


def test_flags_are_those_of_the_help_without_its_prose() -> None:
    assert flags_of("recipes") == ["--out"]
    assert flags_of("completion") == []
    assert "--data.no-flip" in flags_of("plan")


def test_plan_completes_the_recipes_that_it_takes() -> None:
    assert {"mam2-fast", "kinetics400/finetune"} <= set(recipes_of("plan"))
    assert "kinetics400/finetune" not in recipes_of("pretrain")


def test_every_shell_has_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    said = outcome(capsys, "completion", "fish")[1]
    fine = "__fish_seen_subcommand_from plan; and __fish_seen_subcommand_from"
    assert f"{fine} {' '.join(recipe_names(FinetuneConfig))}' -l adapters.rank" in said
    assert f"{fine} {' '.join(recipe_names())}' -l adapters.rank" not in said
    assert f"-a '{' '.join(VERBS)}'" in said
