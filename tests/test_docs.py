"""The documentation: links resolve, named commands and files exist, the configuration page is current."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import io
import re
import unicodedata
from contextlib import redirect_stdout
from functools import cache

import pytest

from mam2.engine import cli
from tests.helpers.pages import PAGES, ROOT, commands, fences, text, verb_of


def prose(page: str) -> str:
    """A page without its fenced blocks and code spans, which hold no links."""
    without = re.sub(r"^```.*?^```", "", text(page), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", without)


@cache
def anchors(page: str) -> frozenset[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    without = re.sub(r"^```.*?^```", "", text(page), flags=re.MULTILINE | re.DOTALL)
    found: list[str] = []
    for heading in re.findall(r"^#+ +(.+?) *$", without, re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", unicodedata.normalize("NFC", plain).lower()).replace(" ", "-")
        found.append(slug if slug not in found else f"{slug}-{found.count(slug)}")
    return frozenset(found)


def problem(page: str, link: str) -> str | None:
    """Returns the problem of a link of a page, or None."""
    if re.match(r"[a-z]+:", link):
        return None
    target, _, anchor = link.partition("#")
    path = ((ROOT / page).parent / target).resolve() if target else ROOT / page
    if not path.exists():
        return f"{page}: {link}: no such file"
    if not path.is_relative_to(ROOT):
        return f"{page}: {link}: outside the repository"
    if anchor and anchor not in anchors(path.relative_to(ROOT).as_posix()):
        return f"{page}: {link}: no such heading"
    return None


@pytest.mark.parametrize("page", PAGES)
def test_no_merge_conflict_is_left(page: str) -> None:
    assert re.findall(r"^(?:<{7}|>{7}) .*", text(page), re.MULTILINE) == []


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    assert [found for link in links if (found := problem(page, link))] == []


def test_a_dead_link_and_a_dead_anchor_are_found():
    assert "no such file" in str(problem("README.md", "docs/nowhere.md"))
    assert "no such heading" in str(problem("README.md", "docs/design.md#nowhere"))
    assert "no such heading" in str(problem("docs/design.md", "#nowhere"))
    assert problem("docs/design.md", "#five-ideas") is None


def test_the_readme_is_short_and_links_every_page():
    assert len(text("README.md").splitlines()) <= 120
    reached, waiting = set(), ["README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached or not page.endswith(".md"):
            continue
        reached.add(page)
        for link in re.findall(r"\]\(([^)\s#:]+)(?:#[^)\s]*)?\)", prose(page)):
            waiting.append(((ROOT / page).parent / link).resolve().relative_to(ROOT).as_posix())
    assert {page for page in PAGES if page.startswith("docs/")} <= reached


def test_the_site_names_every_page_once():
    named = re.findall(r"([\w/-]+\.md)$", text("mkdocs.yml"), re.MULTILINE)
    assert len(named) == len(set(named))
    assert {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")} <= set(named)


def test_the_page_of_the_config_is_current():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate_configuration.py")
    assert spec
    assert spec.loader
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert text("docs/configuration.md") == generate.page(), "run: python docs/generate_configuration.py"


def test_every_verb_is_on_a_page():
    pages = "\n".join(text(page) for page in PAGES if page.startswith("docs/"))
    assert [verb for verb in cli.VERBS if f"mam2 {verb}" not in pages] == []


@cache
def help_of(verb: str) -> str:
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
        patch.setenv("COLUMNS", "300")
        with pytest.raises(SystemExit):
            cli.main([verb, "--help"])
    return out.getvalue().replace("_", "-")


@pytest.mark.parametrize("page", [page for page in PAGES if fences(page, "bash")])
def test_targets_and_benchmarks_named_in_commands_exist(page):
    targets = re.findall(r"^([\w-]+):", text("Makefile"), re.MULTILINE)
    for words in commands(page):
        if words[0] == "make" and len(words) > 1:
            assert words[1] in targets, words
        if "-m" in words and words[words.index("-m") + 1].startswith("benchmarks."):
            assert importlib.util.find_spec(words[words.index("-m") + 1]), words


@pytest.mark.parametrize("page", PAGES)
def test_flags_named_in_the_text_exist(page):
    """Commands in code spans are often not complete; those in blocks are parsed by tests/test_readme_commands.py."""
    for span in re.findall(r"`mam2 ([^`\n]+)`", re.sub(r"^```.*?^```", "", text(page), flags=re.MULTILINE | re.DOTALL)):
        verb, *words = span.split()
        if verb == "VERB" or verb.startswith("-"):
            continue
        assert verb in cli.VERBS, f"{page}: mam2 {span}"
        for flag in [word for word in words if word.startswith("--")]:
            assert re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w.-])", help_of(verb)), f"{page}: mam2 {span}"


def test_recipes_named_in_commands_exist():
    from mam2.engine.config.finetune import FinetuneConfig
    from mam2.engine.config.recipe import recipe_names

    known = {*recipe_names(), *recipe_names(FinetuneConfig)}
    for page in PAGES:
        for words in commands(page):
            call = verb_of(words)
            if call and call[0] in ("pretrain", "finetune", "plan", "tokenize"):
                assert call[1] in known, f"{page}: {' '.join(words)}"


@pytest.mark.parametrize("page", [page for page in PAGES if fences(page, "python")])
def test_python_of_the_pages_parses_and_its_names_exist(page):
    for block in fences(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("mam2"):
                module = importlib.import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith(("README", "CONTRIBUTING", "docs/"))])
def test_files_that_a_page_names_exist(page):
    named = re.findall(r"`((?:engine|kernels|benchmarks|tests|examples|docs)/[\w./-]*)`", text(page))
    assert [name for name in named if not (ROOT / name).exists()] == []
