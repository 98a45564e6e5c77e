"""Commands of the pages: every `mam2` line is accepted by its parser; the first ones of a new user are run."""

from __future__ import annotations

import functools
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro

from tests.helpers.commands import exit_status
from tests.helpers.pages import PAGES, commands, fences, verb_of
from tests.helpers.paths import CLIPS, ROOT

FIRST_PAGES = ("README.md", "docs/getting-started.md")
"""Pages whose commands are run."""
NOT_RUN = {
    "pip install": "downloads packages; tests/fresh_venv.py and tests/test_packaging.py install",
    ". .venv/bin/activate": "changes the shell only",
    "make demo": "installs an environment; tests/engine/test_demo.py runs a small demo",
    "make test": "is what runs this test",
}
"""Beginnings of commands that are not run, and the reasons."""
ADDED = {
    "index": [],
    "plan": [],
    "plot": [],
    "embed": ["--device", "cpu"],
    "finetune": [
        *("--run.device", "cpu", "--run.no-compile", "--data.threads", "1"),
        *("--optim.epochs", "1", "--optim.batch", "8", "--optim.warmup-epochs", "0", "--model.depth", "1"),
    ],
    "pretrain": [
        *("--run.device", "cpu", "--run.no-compile", "--run.log-every", "1", "--data.threads", "1"),
        *("--optim.epochs", "1", "--optim.batch", "16", "--optim.warmup-epochs", "0", "--model.depth", "1"),
        *("--tokenizer.steps", "2", "--tokenizer.channels", "8", "--tokenizer.codes", "16"),
    ],
}
"""Flags that reduce a run to one or two steps, by verb."""


def recipe_commands() -> list[list[str]]:
    """The commands in the comments of the recipes."""
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "engine" / "recipes").rglob("*.toml")]
    lines = [line for text in texts for line in re.sub(r"\\\n#\s*", "", text).splitlines()]
    return [shlex.split(line.lstrip("# "), comments=True) for line in lines if line.startswith("#   mam2 ")]


def accept(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Parses a command line of mam2 without running it; fails with the parser's message."""

    def parse(command: Any, **options: Any) -> Any:
        return parse_and_run(functools.wraps(command)(lambda *args, **kwargs: 0), **options)

    parse_and_run = tyro.cli
    monkeypatch.setattr(tyro, "cli", parse)
    status = exit_status(*words)
    monkeypatch.undo()
    assert status == 0, f"mam2 {shlex.join(words)}: {capsys.readouterr()}"


@pytest.mark.parametrize("page", [page for page in PAGES if any(map(verb_of, commands(page)))])
def test_every_command_of_a_page_is_accepted_by_its_parser(page, monkeypatch, capsys):
    for words in commands(page):
        if "mam2" in words[1:] and "|" in words:
            words = words[words.index("|") + 1 :]
        if call := verb_of(words):
            accept(call, monkeypatch, capsys)


@pytest.mark.slow
def test_every_command_of_a_recipe_is_accepted_by_its_parser(monkeypatch, capsys):
    found = recipe_commands()
    assert len(found) >= 10
    for words in found:
        accept(words[1:], monkeypatch, capsys)


@pytest.mark.parametrize(
    "line",
    ["pretrain laptop --data videos/", "plan laptop --vidoes 3", "probe a --data b --probes lin", "index a --size"],
)
def test_a_wrong_command_is_not_accepted(line, monkeypatch, capsys):
    with pytest.raises(AssertionError, match=f"mam2 {line}"):
        accept(line.split(), monkeypatch, capsys)


@pytest.mark.parametrize("page", FIRST_PAGES)
def test_every_command_of_the_first_pages_is_run_or_listed_with_the_reason(page):
    for words in commands(page):
        call = verb_of(words)
        listed = [start for start in NOT_RUN if shlex.join(words).startswith(start)]
        assert (call and call[0] in ADDED) or listed, f"{page}: {shlex.join(words)}: add it to ADDED or NOT_RUN"


def test_no_reason_is_left_over():
    lines = [shlex.join(words) for page in FIRST_PAGES for words in commands(page)]
    assert [start for start in NOT_RUN if not any(line.startswith(start) for line in lines)] == []
    verbs = {call[0] for page in FIRST_PAGES for words in commands(page) if (call := verb_of(words))}
    assert verbs == ADDED.keys()


@pytest.mark.slow
def test_the_commands_of_the_first_pages_and_the_python_of_the_readme_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("left", "right"):
        for videos in ("videos", "train", "val"):
            shutil.copytree(CLIPS / folder, Path(videos) / folder)
    calls = {shlex.join(words): verb_of(words) for page in FIRST_PAGES for words in commands(page)}
    for line, call in calls.items():
        if call:
            assert exit_status(*call, *ADDED[call[0]]) == 0, f"{line}: {capsys.readouterr()}"
    assert (tmp_path / "runs/first/curves.png").is_file()
    encode, loss = fences("README.md", "python")
    names: dict[str, Any] = {}
    exec(encode, names)
    assert names["features"].shape == (2, 192)
    outputs = torch.zeros(1, 4, 1536, requires_grad=True)
    names = {"outputs": outputs, "videos": torch.randn(1, 3, 2, 32, 64)}
    names |= {"bool_masked_pos": torch.tensor([[True, True, False, True, True, False, False, False]])}
    names |= {"IMAGENET_DEFAULT_MEAN": (0.485, 0.456, 0.406), "IMAGENET_DEFAULT_STD": (0.229, 0.224, 0.225)}
    exec(loss, names)
    assert names["loss"].item() > 0
    assert outputs.grad is not None
