"""Words and spellings that must not return: code, pages and messages use American spelling and the field's terms."""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

TEXTS = sorted(
    path
    for folder in ("kernels", "engine", "examples", "benchmarks", "docs", "tests")
    for suffix in ("*.py", "*.md")
    for path in (ROOT / folder).rglob(suffix)
    if path != Path(__file__).resolve()
) + [ROOT / name for name in ("README.md", "CONTRIBUTING.md")]

KINDS = (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING))
CODE = re.compile(r"`[^`]*`|\{[^{}]*\}|https?://\S+|\S+\(\S*|[\w-]*[_.][\w.]+")
"""Code in backticks, fields of f-strings, addresses and dotted names, which may keep another spelling."""

BRITISH = (
    r"colours?|centred?|centres|grey|neighbours?|behaviours?|labelled|unlabelled|modelling|artefacts?|"
    r"(?:normal|standard|optim|util|quant|special|vector|synchron|initial|recogn|summar|minim|maxim|organ)"
    r"is(?:e|es|ed|er|ers|ing|ation)"
)
NAMES = re.compile(rf"(?:^|_)(?:(?:re)?(?:{BRITISH})|told|anew|beside|likeliest|front_end|a_pass)(?:_|$)")
"""Words that are not part of a name in code either."""
STORED = {"labelled"}
"""Keys of files that earlier versions wrote: of the convergence study's settings."""
DIALECT = {
    r"\bBeside (?:it|what|every)\b|\bbeside (?:the|it|what|its|ours|our)\b": "say 'next to' or 'compared with'",
    r"\bwhere nothing (?:says|else)\b|\bnothing says\b": "say 'if … is unknown'",
    r"\bthat there is\b|\bwhat (?:came|comes) of it\b|\bas it stands\b|\bso many\b|\bso-many-th\b": "name the thing",
    r"\banew\b": "say 'again' or 'a new …'",
    r"\bgoes? on (?:with|from|where|there)\b|\bThe run goes on\b": "say 'continues'",
    r"\bcommonest\b(?!_)": "say 'most frequent'",
    r"\blikeliest\b": "say 'most probable'",
    r"\bgives? up\b|\bgiven up\b": "say 'stops' or 'no longer uses'",
    r"\b(?:clips|frames|codes|values|bytes|steps|tokens) an? (?:second|step|pass|token|clip|video)\b": "say 'per'",
    r"\ba folder a class\b|\bone a (?:line|frame|channel|core|level)\b": "say 'per'",
    r"^\s*(?:r?\"\"\"|# )Of (?:the|a|an|each|what|this|one)\b": "begin with what it is or does",
}


def prose(path: Path) -> list[tuple[int, str]]:
    """Numbered lines of a page, or of the comments, docstrings and messages of a module, without names of code."""
    text = path.read_text(encoding="utf-8")
    lines = list(enumerate(text.splitlines(), 1))
    if path.suffix == ".py":
        lines = []
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type in KINDS and " " in token.string:
                lines += enumerate(token.string.splitlines(), token.start[0])
    return [(number, CODE.sub("·", line)) for number, line in lines]


RULES = {rf"(?<![\w-])(?:{BRITISH})(?![\w=:-])": "American spelling", **DIALECT}


def violations(words: str) -> list[str]:
    """The words of a line that a rule rejects, each with the remedy."""
    return [
        f"{match[0].strip()!r}: {remedy}" for pattern, remedy in RULES.items() if (match := re.search(pattern, words))
    ]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_worst_words_do_not_return(path):
    found = [f"{path.name}:{number}: {word}" for number, line in prose(path) for word in violations(line)]
    assert not found, "\n".join(found)


def names_in(path: Path) -> set[str]:
    """The names of a module, without those of the test functions."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    return {token.string for token in tokens if token.type == tokenize.NAME and not token.string.startswith("test_")}


def rejected_names(names: set[str]) -> list[str]:
    """The names with a British or private word between their underscores."""
    return sorted(name for name in names - STORED if NAMES.search(name.lower()))


def test_names_in_code_are_free_of_them_too():
    found = {path.name: names for path in TEXTS if path.suffix == ".py" and (names := rejected_names(names_in(path)))}
    assert not found


def test_a_rejected_name_is_found():
    assert rejected_names({"_relabelled", "COLOUR_MAP", "told", "color"}) == ["COLOUR_MAP", "_relabelled", "told"]


def test_names_of_tests_are_free_of_them_too():
    names = {
        name: path.name
        for path in (ROOT / "tests").rglob("*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    rejected = {name: word for name in names for word in violations(name.replace("_", " "))}
    assert not rejected


def test_a_rejected_word_is_found():
    assert violations("the colour of a clip") == ["'colour': American spelling"]
    assert violations("the list is written anew") == ["'anew': say 'again' or 'a new …'"]
    assert not violations("the color of a clip")
