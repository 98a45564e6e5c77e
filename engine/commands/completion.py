"""`mam2 completion`: prints a script for shell completion of verbs, recipes and flags."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import tyro

from mam2.engine.commands import VERBS
from mam2.engine.commands.options import run_verb
from mam2.engine.config.finetune import FinetuneConfig
from mam2.engine.config.recipe import recipe_names

ENTRY = re.compile(r"^[│ ]*((?:-\w, )?--[a-z].*)$", re.MULTILINE)
"""A line of tyro's help that starts with an option."""
FLAG = re.compile(r"--[a-z][\w.-]*\w")
PRETRAINING = ("pretrain", "tokenize")
"""Verbs whose first argument is a pre-training recipe."""
EITHER = ("plan",)
"""Verbs that take recipes of both kinds; their flags depend on the recipe."""

BASH = """\
# mam2 completion bash: eval "$(mam2 completion bash)" in ~/.bashrc, or save it in bash-completion's folder
_mam2() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" verb="${{COMP_WORDS[1]}}" recipe="${{COMP_WORDS[2]}}" words=""
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="{verbs}"
    else
        case "$verb:$word" in
{cases}
        esac
    fi
    COMPREPLY=( $(compgen -W "$words" -- "$word") )
}}
complete -o default -F _mam2 mam2
"""
ZSH = """\
# mam2 completion zsh: eval "$(mam2 completion zsh)" in ~/.zshrc, after compinit
autoload -Uz bashcompinit && bashcompinit
"""
FISH = """\
# mam2 completion fish: mam2 completion fish > ~/.config/fish/completions/mam2.fish
complete -c mam2 -n '__fish_use_subcommand' -f -a '{verbs}'
{lines}
"""


def run(arguments: list[str]) -> int:
    return run_verb(completion, arguments, "completion")


def completion(shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]]) -> int:
    """Print a script for shell completion of the verbs, recipes and flags of this version.

    Args:
        shell: bash: `eval "$(mam2 completion bash)"` in ~/.bashrc. zsh: the same in ~/.zshrc, after compinit. fish:
            `mam2 completion fish > ~/.config/fish/completions/mam2.fish`.
    """
    flags = {verb: flag_sets(verb) for verb in VERBS}
    print(fish(flags) if shell == "fish" else (ZSH if shell == "zsh" else "") + bash(flags), end="")
    return 0


class FlagSet(NamedTuple):
    flags: list[str]
    recipes: Sequence[str] = ()
    """Recipes with which a verb has these flags; empty: all others."""


def flag_sets(verb: str) -> list[FlagSet]:
    """Returns the flags of a verb, for each kind of recipe; with a file of either kind those of both."""
    if verb not in EITHER:
        return [FlagSet(flags_of(verb))]
    kinds = [FlagSet(flags_of(verb, names[0]), names) for names in (recipe_names(), recipe_names(FinetuneConfig))]
    return [*kinds, FlagSet(sorted({flag for kind in kinds for flag in kind.flags}))]


def flags_of(verb: str, *recipe: str) -> list[str]:
    """Returns the flags in the help of a verb, without or with a recipe."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        importlib.import_module(f"mam2.engine.commands.{verb.replace('-', '_')}").run([*recipe, "--help"])
    entries = ENTRY.findall(text.getvalue())
    # two spaces separate an option's names from its meaning
    return sorted({flag for entry in entries for flag in FLAG.findall(entry.partition("   ")[0])} - {"--help"})


def recipes_of(verb: str) -> list[str]:
    """Returns the recipes that may be a verb's first argument."""
    return {
        **dict.fromkeys(("recipes", "plan"), recipe_names() + recipe_names(FinetuneConfig)),
        "finetune": recipe_names(FinetuneConfig),
        **dict.fromkeys(PRETRAINING, recipe_names()),
    }.get(verb, [])


def bash(flags: dict[str, list[FlagSet]]) -> str:
    cases = []
    for verb, sets in flags.items():
        offered = [f'{"|".join(each.recipes) or "*"}) words="{" ".join(each.flags)}" ;;' for each in sets]
        cases.append(f'            {verb}:-*) case "$recipe" in {" ".join(offered)} esac ;;')
        if recipes := recipes_of(verb):
            cases.append(f'            {verb}:*) [ "$COMP_CWORD" -eq 2 ] && words="{" ".join(recipes)}" ;;')
    return BASH.format(verbs=" ".join(flags), cases="\n".join(cases))


def fish(flags: dict[str, list[FlagSet]]) -> str:
    lines = []
    for verb, sets in flags.items():
        named = " ".join(recipe for each in sets for recipe in each.recipes)
        for names, recipes in sets:
            condition = f"__fish_seen_subcommand_from {verb}"
            if recipes:
                condition += f"; and __fish_seen_subcommand_from {' '.join(recipes)}"
            elif named:
                condition += f"; and not __fish_seen_subcommand_from {named}"
            lines += [f"complete -c mam2 -n '{condition}' -l {name.removeprefix('--')}" for name in names]
        if recipes := recipes_of(verb):
            lines.append(f"complete -c mam2 -n '__fish_seen_subcommand_from {verb}' -a '{' '.join(recipes)}'")
    return FISH.format(verbs=" ".join(flags), lines="\n".join(lines))
