"""Results of a convergence run as its report reads them, made up, and the modules of the report."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

BUDGETS = (5, 10, 20, 40)
OFFSETS = (-0.01, 0.0, 0.01)
"""Accuracies, one per seed."""


def module(name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.trials.{name}")


def trials(group: str, variant: str, probe: float, *, epochs: float = 20, seeds: int = 3, **more: Any) -> list[dict]:
    """One for each seed. VideoMAE takes 2 s and 1 TFLOP an epoch, the others 3 s and 1.5 TFLOP."""
    slow = 1.0 if variant == "videomae" else 1.5
    prepared = 12.0 if variant == "mam2" else 0.0
    return [
        {
            "group": group,
            "variant": variant,
            "label": variant,
            "family": "",
            "data": "synthetic",
            "epochs": epochs,
            "steps": int(100 * epochs),
            "base_lr": 1e-3,
            "seed": seed,
            "probe": probe + offset,
            "probe_validation": probe + offset,
            "shape": probe / 2 - offset,
            "shape_validation": probe / 2 - offset,
            "finetune": probe + 0.1 + offset,
            "train_s": 2 * slow * epochs,
            "step_ms": 20 * slow,
            "epoch_s": 2 * slow,
            "flops": 1e12 * slow * epochs,
            "preparation_s": prepared,
            "preparation_flops": 2e12 if prepared else 0.0,
            "losses": {},
            **more,
        }
        for seed, offset in enumerate(OFFSETS[:seeds])
    ]


def results_of(*groups: list[dict]) -> dict[str, Any]:
    counts = {"train": 100, "validation": 20, "test": 50}
    return {
        "machine": "a machine",
        "setting": "cpu",
        "date": "2026-01-01",
        "wall_s": 600.0,
        "versions": {"torch": "2.13"},
        "default": "mam2",
        "budgets": list(BUDGETS),
        "seeds": 3,
        "data": {"synthetic": {**counts, "classes": 8}, "real": {**counts, "classes": 0}},
        "trials": [trial for group in groups for trial in group],
        "random": [],
    }


def main_groups(mam2: tuple[float, ...], videomae: tuple[float, ...], **more: Any) -> list[list[dict]]:
    return [
        trials("main", variant, probe, epochs=epochs, **more)
        for variant, curve in (("mam2", mam2), ("videomae", videomae))
        for epochs, probe in zip(BUDGETS, curve, strict=True)
    ]


BETTER, WORSE = (0.40, 0.50, 0.70, 0.80), (0.30, 0.40, 0.50, 0.60)


def full() -> dict[str, Any]:
    changed = [
        trials("ablation", "ratio-0.75", 0.62, label="0.75", family="mask ratio"),
        trials("ablation", "no-motion", 0.40, label="no motion decoder", family="motion"),
        trials("ablation", "ratio-0.8", 0.90, label="0.8", family="mask ratio", epoch_s=6.0),
    ]
    sweep = [
        trials("sweep", "mam2", probe, seeds=1, base_lr=base_lr)
        for base_lr, probe in ((3e-3, 0.5), (3e-4, 0.4), (1e-3, 0.6))
    ]
    default = trials("ablation", "mam2", 0.625, label="as it is", family="default")
    real = [
        {**trial, "answers": answers(right)}
        for variant, rights in (("mam2-muon", ("1101", "1111")), ("videomae-muon", ("1000", "1000")))
        for trial, right in zip(trials("real", variant, 0.5, seeds=2, data="real"), rights, strict=True)
    ]
    tried = [
        {**trial, "judged": judged}
        for variant, found in (("mam2-muon", (0.5, 0.6, 0.4)), ("codes alone", (0.1, 0.2, 0.3)))
        for rate, judged in zip((3e-3, 1e-3, 2e-3), found, strict=True)
        for trial in trials("real sweep", variant, 0.5, seeds=1, data="real", base_lr=rate, epochs=10)
    ]
    results = results_of(*main_groups(BETTER, WORSE), *changed, default, *sweep, real, tried)
    results["preparation"] = {"tokenizer_s": 5.0, "tokenize_s": 7.0, "tokenizer_flops": 1.5e12, "tokenize_flops": 5e11}
    untrained = {"data": "synthetic", "finetune": None, "shape": 0.2}
    results["random"] = [
        {**untrained, "probe": 0.2},
        {**untrained, "probe": 0.22, "finetune": 0.3},
        {"data": "real", "answers": answers("0101")},
    ]
    asked = {"train": 8, "test": 4, "classes": 2, "groups": [7, 7, 9, 9]}
    results["real"] = {"pixels": {"words": {"pixels": answer("1100")}}, "questions": {"words": asked}}
    return results


def answer(right: str) -> dict[str, Any]:
    return {"accuracy": right.count("1") / len(right), "right": right}


def answers(right: str) -> dict[str, Any]:
    return {"words": {"mean": answer("0000"), "time": answer(right)}}


def rows_of(table: str) -> list[dict[str, str]]:
    head, _, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    return [dict(zip(head, cells, strict=True)) for cells in body]
