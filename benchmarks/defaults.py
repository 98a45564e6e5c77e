"""Compares values of the recipes' keys on labeled real clips, one change at a time: `python -m benchmarks.defaults`.

    python -m benchmarks.defaults --train TRAIN.csv --test TEST.csv --out runs/defaults

Each row is one short pre-training of the same tiny model on the training clips, and two linear probes of the frozen
encoder, fitted on the labeled training clips: one on the concatenated means of the time slots, one on the mean of all
tokens. Clips, codes and steps are the same in all rows except those that change them. Finished rows are stored in
OUT/rows.jsonl.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.trials import prepared, trial
from benchmarks.trials.settings import MINIATURE, Changes, changed
from mam2.engine.config.pretrain import PretrainConfig, check
from mam2.engine.config.recipe import load_recipe
from mam2.engine.config.training import RunConfig
from mam2.engine.errors import UserError
from mam2.engine.evaluation.features import extract_features
from mam2.engine.evaluation.linear_probe import linear_probe
from mam2.engine.evaluation.pools import Pool
from mam2.engine.model.encoder import Encoder

BASE: Changes = {
    "data.sampling": "uniform",
    "data.stride": 0,
    "data.frames": 8,
    "data.size": 48,
    "data.views": 1,
    "data.flip": False,
    "data.min_area": 0.5,
    "data.max_aspect": 4 / 3,
    "mask.ratio": 0.75,
    "model.width": 64,
    "model.heads": 2,
    "model.regressor.width": 64,
    "model.regressor.heads": 2,
    "model.decoder.width": 64,
    "model.decoder.heads": 2,
    "tokenizer.steps": 300,
    "loss.appearance": 0.1,
    "loss.motion_eps": 0.05,
    "optim.base_lr": 8e-3,
    "optim.min_lr": 8e-5,
    "run.precision": "float32",
    "run.compile": False,
}
"""Changes to the demo's recipe: values of the other recipes, where a tiny model allows them."""
FIXED: Changes = {"loss.balance": "fixed"}
ROWS: tuple[tuple[str, str, Changes], ...] = (
    ("motion floor", "1e-6", {"loss.motion_eps": 1e-6}),
    ("motion floor", "0.1", {"loss.motion_eps": 0.1}),
    ("appearance", "none", {"loss.appearance_target": "none", **FIXED}),
    ("balance", "fixed, codes × 1", {"loss.appearance": 1.0, **FIXED}),
    ("learning rate", "× 1/4", {"optim.base_lr": 2e-3, "optim.min_lr": 2e-5}),
    ("mask", "tubes, 0.5", {"mask.ratio": 0.5}),
    ("", "default, seed 1", {"run.seed": 1}),
    ("mask", "random, 0.75", {"mask.kind": "random"}),
    ("balance", "gradients, codes × 1", {"loss.appearance": 1.0}),
    ("learning rate", "× 2", {"optim.base_lr": 1.6e-2, "optim.min_lr": 1.6e-4}),
    ("motion floor", "0.02", {"loss.motion_eps": 0.02}),
    ("mask", "tubes, 0.9", {"mask.ratio": 0.9}),
    ("appearance", "codes only", {"loss.motion_target": "none", **FIXED}),
    ("crop", "area from 0.9", {"data.min_area": 0.9, "data.max_aspect": 1.1}),
    ("appearance", "pixels", {"loss.appearance_target": "pixels"}),
    ("balance", "gradients, codes × 0.01", {"loss.appearance": 0.01}),
    ("motion target", "intra", {"loss.motion_target": "intra"}),
    ("crop", "multi-scale", {"data.crop": "multi-scale"}),
    ("crop", "multi-scale, seed 1", {"data.crop": "multi-scale", "run.seed": 1}),
    ("tokenizer", "512 codes", {"tokenizer.codes": 512}),
    ("motion target", "hog, floor 0.05", {"loss.motion_target": "hog"}),
    ("motion target", "hog, floor 0.001", {"loss.motion_target": "hog", "loss.motion_eps": 0.001}),
    ("method", "VideoMAE", {"model.objective": "videomae", "model.decoder.depth": 2}),
)
RECORDED = 2
"""Number of crops of each training clip."""


def config_of(changes: Changes, steps: int, train_clips: int) -> PretrainConfig:
    config = changed(load_recipe("demo"), {**MINIATURE, **BASE, **changes})
    epochs = steps * config.optim.batch / train_clips
    config = changed(config, {"optim.epochs": epochs, "optim.warmup_epochs": 0.1 * epochs})
    check(config)
    return config


def accuracies(encoder: Encoder, data: prepared.Prepared) -> tuple[float, float]:
    """Returns two accuracies of linear probes on the test clips.

    On the means of the slots, on the mean of all tokens.
    """
    train, test = data.splits["train"], data.splits["test"]
    pools: tuple[Pool, ...] = ("time", "mean")
    ours, theirs = (
        extract_features(encoder, split.videos(trial.EVALUATED), pools, run=RunConfig(precision="float32"))
        for split in (train, test)
    )
    by_slot, overall = (linear_probe(ours[pool], train.labels, theirs[pool], test.labels).accuracy for pool in pools)
    return by_slot, overall


def row(changes: Changes, given: Any, clips: int) -> dict[str, Any]:
    """Trains, probes and returns the row; `clips` is the number of training clips."""
    config = config_of(changes, given.steps, clips)
    rendering = {name: value for name, value in changes.items() if name.startswith(("data.", "tokenizer."))}
    key = ",".join(f"{name}={value}" for name, value in sorted(rendering.items())) or "default"
    data = prepared.prepare(
        {"train": given.train, "test": given.test}, given.out / key, config, recorded=RECORDED, views=1
    )
    start = time.perf_counter()
    trained = trial.pretrain(config, data)
    seconds = time.perf_counter() - start
    by_slot, overall = accuracies(trained.encoder, data)
    return {"by_slot": by_slot, "overall": overall, "s": seconds} | trained.losses


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.defaults", description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, required=True, help="labeled list or folder")
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/defaults"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only", nargs="*", metavar="VALUE", help="only the rows with these names of values")
    given = parser.parse_args()
    default = config_of({}, given.steps, 1)
    sets = {"train": given.train, "test": given.test}
    data = prepared.prepare(sets, given.out / "default", default, recorded=RECORDED, views=1)
    clips = len(data.splits["train"].labels)
    file = given.out / "rows.jsonl"
    done = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    torch.manual_seed(0)
    random_encoder = accuracies(Encoder.from_config(default), data)
    test = len(data.splits["test"].labels)
    print(f"{clips} training clips, {test} test clips, {given.steps} steps of {default.optim.batch}")
    print(
        "| | value | probe by slots, % | of the mean, % | motion error / none | correct codes, % | most frequent, % "
        "| s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    print(f"| | random encoder | {100 * random_encoder[0]:.1f} | {100 * random_encoder[1]:.1f} | | | | |", flush=True)
    for family, label, changes in (("", "default, seed 0", {}), *ROWS):
        if given.only and label not in given.only:
            continue
        mine = {"family": family, "label": label, "steps": given.steps}
        found = next((line for line in done if mine.items() <= line.items()), None)
        if found is None:
            found = mine | row(changes, given, clips)
            with file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(found) + "\n")
        cells = [f"{100 * found[name]:.1f}" for name in ("by_slot", "overall")]
        cells.append(f"{found['loss/motion_relative']:.3f}" if "loss/motion_relative" in found else "")
        cells += [
            f"{100 * found[name]:.1f}" if name in found else ""
            for name in ("accuracy/codes", "accuracy/commonest_code")
        ]
        print(f"| {family} | {label} | {' | '.join(cells)} | {found['s']:.0f} |", flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"defaults: {error}", file=sys.stderr)
        sys.exit(2)
