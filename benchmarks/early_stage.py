"""Why is an encoder after a short training with Muon a bad start for fine-tuning? It is the patch embedding.

    python -m benchmarks.early_stage runs/convergence-cpu        # a folder of `make convergence`: its synthetic clips

Pre-trains the default of the convergence run (MAM2, Muon) for some epochs, as it is and with a lower learning rate for
what AdamW trains (`optim.muon_rate` keeps Muon's rate). Then fine-tunes random and pre-trained encoders, and each with
the other's patch embedding. Prints a Markdown table, a row as soon as it is known.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.trials import prepared, trial
from benchmarks.trials.settings import SETTINGS, Setting, finetuning, pretraining
from benchmarks.trials.worker import limit_threads
from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.model.encoder import Encoder

COLUMNS = ("encoder", "patch embedding", "its largest singular value", "motion, %", "fine-tuned, %")


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.early_stage", description="Fine-tuning after a short training.")
    parser.add_argument("folder", type=Path, help="of a convergence run")
    parser.add_argument("--setting", choices=tuple(SETTINGS), default="cpu")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--base-lr", type=float, default=6.4e-2)
    parser.add_argument("--muon-rate", type=float, default=4.0, help="base-lr is divided by it, Muon's rate stays")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    limit_threads()
    print(f"| {' | '.join(COLUMNS)} |\n|{len(COLUMNS) * '---|'}")
    for row in rows(
        SETTINGS[options.setting],
        prepared.load(options.folder / "synthetic"),
        epochs=options.epochs,
        base_lr=options.base_lr,
        muon_rate=options.muon_rate,
        seed=options.seed,
    ):
        print(f"| {' | '.join(row)} |", flush=True)
    return 0


def rows(
    setting: Setting, clips: prepared.Prepared, *, epochs: float, base_lr: float, muon_rate: float, seed: int
) -> Iterator[tuple[str, ...]]:
    """Yields the cells of a row per encoder."""

    def config(rate: float, factor: float) -> PretrainConfig:
        changes = {**setting.variants[setting.default], "optim.muon_rate": factor}
        return pretraining(setting, changes, epochs=epochs, base_lr=rate, seed=seed)

    usual, lower = config(base_lr, 1.0), config(base_lr / muon_rate, muon_rate)
    random: Encoder = trial.pretraining(usual, clips).model.encoder  # type: ignore[assignment]

    def row(name: str, patches: str, encoder: Encoder) -> tuple[str, ...]:
        largest = torch.linalg.matrix_norm(encoder.patch_embed.weight.detach().float().flatten(1), 2)
        motion = trial.probe(encoder, clips, usual)["test"]["probe"]
        tuned = trial.finetune(copy.deepcopy(encoder), clips, finetuning(setting, usual), labelled=setting.labelled)
        return name, patches, f"{largest:.2f}", f"{100 * motion:.1f}", f"{100 * tuned:.1f}"

    yield row("random", "its own", random)
    trained = trial.pretrain(usual, clips).encoder
    name = f"{epochs:g} epochs, base lr {base_lr:g}"
    yield row(name, "its own", trained)
    yield row(name, "random", with_patches(trained, random))
    yield row("random", f"of {name}", with_patches(random, trained))
    gentle = trial.pretrain(lower, clips).encoder
    yield row(f"{epochs:g} epochs, base lr {base_lr / muon_rate:g}, muon_rate {muon_rate:g}", "its own", gentle)


def with_patches(encoder: Encoder, other: Encoder) -> Encoder:
    """A copy of an encoder with the patch embedding of another."""
    mixed = copy.deepcopy(encoder)
    mixed.patch_embed.load_state_dict(other.patch_embed.state_dict())
    return mixed


if __name__ == "__main__":
    sys.exit(main())
