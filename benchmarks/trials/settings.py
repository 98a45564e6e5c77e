"""What a convergence run trains: sizes for a machine, two methods under two optimizers, and the ablations.

Every variant is a set of changes of one base config, `MINIATURE`, on a token grid on which the mask ratios 0.75 and
0.9 differ. No recipe is read: the trainings of a run stay the same while recipes change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from mam2.engine.config.finetune import FinetuneConfig
from mam2.engine.config.pretrain import PretrainConfig

Changes = Mapping[str, Any]
"""Values of a config by their dotted names, as of the command line."""


class Ablation(NamedTuple):
    family: str
    label: str
    changes: Changes


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Sizes of a run. Epochs are passes over the training videos, each video in one view."""

    name: str
    counts: Mapping[str, int]
    """Synthetic clips of each split."""
    base: Changes
    """Changes for the pre-training, on top of `MINIATURE`."""
    rates: Mapping[str, tuple[float, ...]]
    """Base learning rates tried, by optimizer: as many for each."""
    sweep_epochs: float
    sweep_seeds: int
    later_rates: Mapping[float, Mapping[str, tuple[float, ...]]]
    """Rates tried again at larger budgets, by budget and optimizer: from each of these budgets on, the best at it."""
    budgets: tuple[float, ...]
    """Epochs of the main comparison, each a training with its own schedule."""
    seeds: int
    first_seeds: int
    """Seeds of the main comparison that are trained at all budgets, and fine-tuned, before the others."""
    default: str = "mam2-muon"
    """Variant that the ablations change."""
    families: tuple[str, ...] = ("targets", "mask", "precision", "loss balance", "regressor", "motion target")
    """Of ablations, the important ones first."""
    ablation_epochs: float
    """One of the budgets, whose trainings of the default are what the ablations are compared with."""
    ablation_seeds: int = 3
    """Number of seeds per changed setting; the default has all."""
    finetune: Changes
    """Changes for the fine-tuning, on top of `FINE_TUNING`."""
    finetune_seeds: int = 2
    labelled: int
    """Training videos whose labels it sees."""
    videomae: Changes
    """What makes VideoMAE of it: as many blocks after the encoder as MAM2 has in a row, regressor and decoder."""
    real: Changes = dataclasses.field(default_factory=lambda: {"data.sampling": "uniform", "data.stride": 0})
    """Changes for the pre-training on real clips, which may be shorter than the synthetic ones."""
    real_variants: tuple[str, ...] = (
        "mam2-muon",
        "videomae-muon",
        "motion alone",
        "codes alone",
        "codes alone, 4 per patch",
    )
    real_epochs: float = 10
    real_factors: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)
    """Learning rates tried on real clips, as multiples of the rate that the sweep on synthetic clips chose."""
    real_seeds: int = 2
    rounds: int = 20
    """In which a step of every variant is timed."""
    recorded: int = 2
    """Clips of each training video."""
    views: int = 4
    """Crops of each clip."""

    @property
    def variants(self) -> dict[str, Changes]:
        """Method and optimizer, by name."""
        methods = {"mam2": {}, "videomae": {"model.objective": "videomae", **self.videomae}}
        muon = {f"{name}-muon": {**changes, "optim.name": "muon"} for name, changes in methods.items()}
        return {**methods, **muon}

    @property
    def all_variants(self) -> dict[str, Changes]:
        """`variants`, and the default with one of its targets alone."""
        default = self.variants[self.default]
        return {**self.variants, **{name: {**default, **changes} for name, changes in TARGETS_ALONE.items()}}


MINIATURE: Changes = {
    "data.frames": 8,
    "data.stride": 2,
    "data.size": 32,
    "data.threads": 1,
    "data.min_area": 0.7,
    "data.max_aspect": 1.1,
    "data.flip": False,  # the class is the direction
    "data.views": 1,
    "mask.kind": "tube",
    "mask.ratio": 0.75,
    "model.patch": 8,
    "model.tubelet": 2,
    "model.width": 96,
    "model.depth": 3,
    "model.heads": 3,
    "model.regressor.depth": 1,
    "model.regressor.width": 96,
    "model.regressor.heads": 3,
    "model.regressor.keys": "visible",
    "model.decoder.depth": 1,
    "model.decoder.width": 96,
    "model.decoder.heads": 3,
    "tokenizer.codes": 128,
    "tokenizer.channels": 24,
    "tokenizer.steps": 1000,
    "tokenizer.batch": 16,
    "loss.appearance": 0.01,
    "loss.motion": 1.0,
    "loss.balance": "gradient",
    "loss.motion_eps": 0.1,
    "optim.name": "adamw",
    "optim.muon_rate": 1.0,  # the sweeps choose Muon's rate
    "optim.batch": 32,
}
"""A tiny MAM2 with balanced losses."""
FINE_TUNING: Changes = {
    "data.frames": 8,
    "data.stride": 2,
    "data.size": 32,
    "data.threads": 1,
    "data.min_area": 0.7,
    "data.max_aspect": 1.1,
    "data.flip": False,
    "augment.operations": 2,
    "augment.magnitude": 5.0,
    "augment.erase": 0.1,
    "augment.mixup": 0.2,
    "augment.cutmix": 0.0,
    "optim.name": "adamw",
    "optim.batch": 32,
    "optim.epochs": 10.0,
    "optim.warmup_epochs": 1.0,
    "optim.base_lr": 8e-3,
    "optim.drop_path": 0.0,
    "test.temporal": 2,
    "test.spatial": 1,
}
ALONE = {"loss.balance": "fixed", "loss.appearance": 1.0, "loss.motion": 1.0}
"""A single loss needs no balance, and its weight changes nothing for either optimizer."""
TARGETS_ALONE: Mapping[str, Changes] = {
    "motion alone": {"loss.appearance_target": "none", **ALONE},
    "codes alone": {"loss.motion_target": "none", **ALONE},
    "codes alone, 4 per patch": {"loss.motion_target": "none", **ALONE, "tokenizer.codes_per_patch": 4},
}
LATENTS: Changes = {"loss.appearance_target": "latents", "loss.teacher_momentum": 0.99}
"""Features of a teacher that follows within a hundred steps, as so short a training needs."""
ABLATIONS = (
    *(Ablation("targets", label, changes) for label, changes in TARGETS_ALONE.items()),
    Ablation("targets", "pixels instead of codes", {"loss.appearance_target": "pixels"}),
    Ablation("targets", "codes of both frames", {"tokenizer.frames": "all"}),
    Ablation("targets", "4 codes per patch", {"tokenizer.codes_per_patch": 4}),
    Ablation("targets", "latents × 0.1", {**LATENTS, "loss.appearance": 0.1}),
    Ablation("targets", "latents × 0.1, visible tokens too", {**LATENTS, "loss.appearance": 0.1, "loss.visible": 1.0}),
    Ablation("targets", "latents × 1", {**LATENTS, "loss.appearance": 1.0}),
    Ablation("targets", "latents alone", {**LATENTS, "loss.motion_target": "none", **ALONE}),
    Ablation("regressor", "off: the decoders do both jobs", {"model.regressor.depth": 0}),
    Ablation("regressor", "keys and values: all", {"model.regressor.keys": "all"}),
    Ablation("motion target", "intra", {"loss.motion_target": "intra"}),
    Ablation("motion target", "hog", {"loss.motion_target": "hog"}),
    Ablation("mask", "ratio 0.9", {"mask.ratio": 0.9}),
    Ablation("mask", "random", {"mask.kind": "random"}),
    Ablation("mask", "half of the hidden tokens decoded", {"mask.decoded": 0.5}),
    Ablation("precision", "float32", {"run.precision": "float32"}),
    Ablation("loss balance", "fixed, codes × 1", {"loss.balance": "fixed", "loss.appearance": 1.0}),
    Ablation("loss balance", "gradients, codes × 1", {"loss.appearance": 1.0}),
)

CPU = Setting(
    name="cpu",
    counts={"train": 1600, "validation": 800, "test": 800},
    base={
        "data.size": 40,
        "data.views": 1,
        "mask.ratio": 0.75,
        "model.width": 64,
        "model.heads": 2,
        "model.regressor.width": 64,
        "model.regressor.heads": 2,
        "model.decoder.width": 64,
        "model.decoder.heads": 2,
        "tokenizer.steps": 300,
        "run.precision": "bfloat16",  # everywhere, whatever the CPU does faster
        "run.compile": False,  # takes longer than it saves in such short trainings
    },
    rates={"adamw": (4e-3, 8e-3, 1.6e-2, 3.2e-2), "muon": (1.6e-2, 3.2e-2, 6.4e-2, 1.28e-1)},
    sweep_epochs=5,
    sweep_seeds=1,
    later_rates={
        10: {"adamw": (4e-3, 8e-3, 1.6e-2), "muon": (1.6e-2, 3.2e-2, 6.4e-2)},
        20: {"adamw": (8e-3, 1.6e-2, 3.2e-2), "muon": (1.6e-2, 3.2e-2, 6.4e-2)},
        40: {"adamw": (8e-3, 1.6e-2, 3.2e-2), "muon": (1.6e-2, 3.2e-2, 6.4e-2)},
    },
    budgets=(2, 5, 10, 20, 40),
    seeds=5,
    first_seeds=2,
    ablation_epochs=10,
    finetune={"data.size": 40, "optim.epochs": 16, "run.precision": "bfloat16", "run.compile": False},
    labelled=400,
    videomae={"model.decoder.depth": 2},
)
QUICK = dataclasses.replace(
    CPU,
    name="quick",
    rounds=3,
    counts={"train": 64, "validation": 32, "test": 32},
    base={**CPU.base, "tokenizer.steps": 5},
    rates={"adamw": (8e-3,), "muon": (3.2e-2,)},
    sweep_epochs=1,
    sweep_seeds=1,
    later_rates={2: {"adamw": (8e-3,), "muon": (3.2e-2, 1.6e-2)}},
    budgets=(1, 2),
    seeds=2,
    first_seeds=1,
    ablation_epochs=1,
    ablation_seeds=1,
    finetune={**CPU.finetune, "optim.epochs": 1, "optim.warmup_epochs": 0.0},
    finetune_seeds=1,
    real_epochs=1,
    real_factors=(1.0, 0.5),
    real_seeds=1,
)
GPU = Setting(
    name="gpu",
    counts={"train": 12000, "validation": 1000, "test": 2000},
    base={
        "data.frames": 16,
        "data.stride": 1,
        "data.size": 112,
        "data.views": 1,
        "data.threads": 0,
        "mask.ratio": 0.75,
        "model.patch": 16,
        "model.width": 384,
        "model.depth": 12,
        "model.heads": 6,
        "model.regressor.depth": 4,
        "model.regressor.width": 192,
        "model.regressor.heads": 3,
        "model.decoder.depth": 2,
        "model.decoder.width": 192,
        "model.decoder.heads": 3,
        "tokenizer.codes": 512,
        "tokenizer.channels": 32,
        "tokenizer.batch": 64,
        "optim.batch": 256,
    },
    rates={"adamw": (3e-4, 6e-4, 1.2e-3, 2.4e-3), "muon": (1.2e-3, 2.4e-3, 4.8e-3, 9.6e-3)},
    sweep_epochs=5,
    sweep_seeds=1,
    later_rates={
        epochs: {"adamw": (6e-4, 1.2e-3, 2.4e-3), "muon": (2.4e-3, 4.8e-3, 9.6e-3)} for epochs in (10, 20, 40)
    },
    budgets=(2, 5, 10, 20, 40),
    seeds=5,
    first_seeds=3,
    ablation_epochs=10,
    finetune={"data.frames": 16, "data.stride": 1, "data.size": 112, "data.threads": 0, "optim.batch": 256,
              "optim.base_lr": 1e-3, "optim.epochs": 10, "optim.drop_path": 0.1},
    labelled=4000,
    videomae={"model.decoder.depth": 6},
    recorded=1,
)  # fmt: skip
SETTINGS = {setting.name: setting for setting in (CPU, QUICK, GPU)}


def changed(config: Any, changes: Changes) -> Any:
    """A config with some of its values replaced."""
    for name, value in changes.items():
        head, _, rest = name.partition(".")
        config = dataclasses.replace(config, **{head: changed(getattr(config, head), {rest: value}) if rest else value})
    return config


def optimizer_of(changes: Changes) -> str:
    return changes.get("optim.name", "adamw")


def base_of(setting: Setting, variant: str) -> str:
    """The method and optimizer whose learning rate a variant takes."""
    return variant if variant in setting.variants else setting.default


WARM_UP = 0.05
"""Share of a training's steps; VideoMAE's is 40 of 800 epochs."""
FLOOR = 0.01
"""Learning rate at the end over that at the peak."""


def pretraining(
    setting: Setting, changes: Changes, *, epochs: float = 1.0, base_lr: float = 1e-3, seed: int = 0
) -> PretrainConfig:
    """The base config with changes. epochs: of one view; where a video has several, it is shown less often."""
    config = changed(PretrainConfig(), {**MINIATURE, **setting.base, **changes})
    epochs /= config.data.views
    schedule = {"epochs": epochs, "warmup_epochs": WARM_UP * epochs, "base_lr": base_lr, "min_lr": FLOOR * base_lr}
    return changed(config, {**{f"optim.{name}": value for name, value in schedule.items()}, "run.seed": seed})


def finetuning(setting: Setting, pretrained: PretrainConfig) -> FinetuneConfig:
    """For an encoder that was pre-trained so; the same for every variant."""
    model, data = pretrained.model, pretrained.data
    sizes = {name: getattr(model, name) for name in ("patch", "tubelet", "width", "depth", "heads", "mlp_ratio")}
    described = {f"model.{name}": value for name, value in {**sizes, "frames": data.frames, "size": data.size}.items()}
    return changed(FinetuneConfig(), {**FINE_TUNING, **described, **setting.finetune, "run.seed": pretrained.run.seed})
