"""The tables of the questions about real clips."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.report import Row, table
from benchmarks.trials.jobs import ranked_rates
from benchmarks.trials.real import COMPONENTS, JUDGED_POOL, TOKENS
from benchmarks.trials.selection import METHODS, REAL_JUDGED, Results, grouped, trials_of
from mam2.engine.evaluation.linear_probe import bootstrap

POOLS = {
    "pixels": f"{COMPONENTS} principal components",
    TOKENS: "principal components, as many as cross-validation chooses",
    "attentive-time": "attentive: a query per time slot",
    "attentive": "attentive: one query",
    "time-center": "a mean per time slot, and of its center",
    "time": "a mean per time slot",
    "mean": "the mean of all tokens",
}
"""How the tokens are pooled, see `real.KINDS`; "pixels" is the baseline without an encoder.

A kind of answer that a trial lacks is left out."""
Rights = dict[str, Tensor]
"""By method: float64 [test clips], the share of the seeds whose answer is right."""


def _answers(results: Results) -> dict[str, list[dict[str, Any]]]:
    """What each method's trainings answered, by method."""
    by_method = {variant: [t["answers"] for t in cell] for (variant,), cell in
                 grouped(trials_of(results, "real"), "variant").items()}  # fmt: skip
    untrained = [trial["answers"] for trial in results["random"] if trial["data"] == "real"]
    return {**by_method, "random": untrained, "pixels": [results["real"]["pixels"]]}


def rights(results: Results, question: str, pool: str) -> Rights:
    """Which test clips of a question each method answers rightly."""
    found: Rights = {}
    for method, answers in _answers(results).items():
        given = [each[question][pool]["right"] for each in answers if pool in each[question]]
        if given:
            found[method] = torch.tensor([[float(digit) for digit in line] for line in given]).double().mean(0)
    return found


def real_table(results: Results, question: str) -> str:
    """Markdown: a row per method and pool, with intervals over the groups of the test clips."""
    groups = torch.tensor(results["real"]["questions"][question]["groups"])
    answers = _answers(results)
    trained = {variant: cell for (variant,), cell in grouped(trials_of(results, "real"), "variant").items()}
    rows: list[Row] = []
    for pool, name in POOLS.items():
        found = rights(results, question, pool)
        reference = found.get("videomae-muon")
        for method, right in found.items():
            cell = trained.get(method, [])
            row: Row = {
                "encoder": _name(method),
                "pool": name,
                "epochs": f"{cell[0]['epochs']:g}" if cell else None,
                "base lr": f"{cell[0]['base_lr']:g}" if cell else None,
                "seeds": sum(pool in each[question] for each in answers[method]) if method != "pixels" else None,
                "accuracy, %": f"{100 * right.mean():.1f}",
                "95 % over groups": _interval(bootstrap(right, groups=groups)),
            }
            if reference is not None and method != "videomae-muon":
                gain = right - reference
                row["against VideoMAE"] = f"{100 * gain.mean():+.1f} [{_interval(bootstrap(gain, groups=groups), '+')}]"
            rows.append(row)
    return table(rows, list(dict.fromkeys(name for row in rows for name in row)))


def real_sweep_table(results: Results) -> str:
    """Markdown: the accuracy by which each variant's learning rate on real clips was chosen. Empty without a sweep."""
    rows: list[Row] = []
    for (variant,), trials in grouped(trials_of(results, "real sweep"), "variant").items():
        found = {trial["base_lr"]: trial[REAL_JUDGED] for trial in trials}
        best = ranked_rates(trials, REAL_JUDGED)[variant][0]
        at_end = " (an end of the sweep)" if len(found) > 2 and best in (min(found), max(found)) else ""
        rows += [
            {
                "encoder": _name(variant),
                "epochs": f"{trials[0]['epochs']:g}",
                "base lr": f"{rate:g}",
                "accuracy, %": f"{100 * accuracy:.1f}",
                "best": f"best{at_end}" if rate == best else None,
            }
            for rate, accuracy in sorted(found.items())
        ]
    return table(rows, list(rows[0]) if rows else [])


def _name(method: str) -> str:
    return METHODS.get(method, f"MAM2, {method}")


def _interval(ends: tuple[float, float], sign: str = "") -> str:
    return " to ".join(f"{100 * end:{sign}.1f}" for end in ends)


def real_parts(results: Results) -> list[str]:
    """The part of the page about real clips; empty without such trials."""
    trials = trials_of(results, "real")
    if not trials:
        return []
    parts = ["### Real clips"]
    parts.append(
        f"Pre-trained on {results['data']['real']['train']} clips without their labels. Each question is a "
        "probe of the frozen encoder, fitted and tested on clips of their own: logistic regression, or an attentive "
        "probe, whose learned queries read all tokens, or those of a time slot. The interval draws "
        "whole groups (speakers, where the clips have any) of the test clips; seeds are averaged before."
    )
    first, *others = results["real"]["questions"]
    if swept := real_sweep_table(results):
        unseen = (
            f"; {' and '.join(others)} did not take part in the choice." if others else ", and there are no others."
        )
        parts += [
            f"Each encoder's learning rate was chosen on **{first}**, with {POOLS[JUDGED_POOL]}: the highest accuracy "
            "on its test clips, of one training per rate, with a seed that is not reported. All trainings below have "
            f"the chosen rate. So the numbers of {first} are of clips that chose the rate{unseen}",
            swept,
        ]
    for name, asked in results["real"]["questions"].items():
        groups = len(set(asked["groups"]))
        grouping = f"of {groups} groups" if groups < asked["test"] else "without groups"
        parts += [
            f"**{name}**: {asked['classes']} classes (chance {100 / asked['classes']:.0f} %), {asked['train']} clips "
            f"to fit on, {asked['test']} to test on, {grouping}.",
            real_table(results, name),
        ]
    return parts
