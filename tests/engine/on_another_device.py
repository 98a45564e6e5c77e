"""Runs the engine on a device whose tensors may not meet CPU tensors; run by test_on_another_device.py.

What is made on the CPU by mistake raises here as on a GPU; so does what `run.deterministic` cannot allow there.
"""

import dataclasses
import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mam2 import kernels
from mam2.engine.checkpoints.checkpoint import set_moment
from mam2.engine.checkpoints.classifiers import build_classifier
from mam2.engine.checkpoints.host_copies import copies
from mam2.engine.checkpoints.saver import _moments
from mam2.engine.config.finetune import FinetuneConfig
from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.config.recipe import load_recipe
from mam2.engine.config.training import RunConfig
from mam2.engine.data.batch import channels_first
from mam2.engine.data.crops import TorchCrops
from mam2.engine.data.sampling import View
from mam2.engine.evaluation import attentive
from mam2.engine.evaluation.components import Components, probe_components
from mam2.engine.evaluation.features import clip_features
from mam2.engine.evaluation.knn import knn
from mam2.engine.evaluation.linear_probe import folds, held_out, linear_probe
from mam2.engine.evaluation.mask_propagation import frame_features
from mam2.engine.evaluation.pixel_predictions import reconstruct_pixels
from mam2.engine.evaluation.pretext import evaluation_mask, reconstruct
from mam2.engine.evaluation.propagation import propagate_masks
from mam2.engine.evaluation.regressor_attention import regressor_attention
from mam2.engine.evaluation.scores import score
from mam2.engine.model.build import build_model
from mam2.engine.model.classifier import pooled_features, standardize_features
from mam2.engine.runtime.distributed import World
from mam2.engine.tokenizer.prepare import build_tokenizer
from mam2.engine.tokenizer.tokenizer import Tokenizer
from mam2.engine.tokenizer.training import train_vqgan
from mam2.engine.tokenizer.vqgan import VQGAN, small
from mam2.engine.train.classifier_step import FinetuneStep
from mam2.engine.train.finetune_targets import ClassTargets, SetTargets, Targets, ValueTargets
from mam2.engine.train.step import PretrainStep
from mam2.engine.train.validation_model import in_equal_batches, share_weights
from mam2.kernels.masked_subset import masked_subset
from tests.helpers.other_device import other_device

BATCH, CODES = 4, 16
PLAIN = {"precision": "float32", "compile": False}


@pytest.fixture(name="there")
def device() -> Iterator[torch.device]:
    with other_device() as there:
        yield there


@pytest.fixture(name="deterministic")
def only_deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def changed(config: Any, **tables: dict[str, Any]) -> Any:
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **values) for name, values in tables.items()}
    )


def config_of(recipe: str = "demo", **tables: dict[str, Any]) -> PretrainConfig:
    clips = {"views": 1, "size": 32, "frames": 8}
    sizes = {"width": 24, "depth": 2, "heads": 2, "patch": 8}
    small_one = changed(
        load_recipe(recipe), data=clips, model=sizes, optim={"batch": BATCH, "clip_norm": 0.5}, run=PLAIN
    )
    return changed(small_one, **tables)


def clips(there: torch.device, count: int = BATCH) -> Tensor:
    return torch.randint(0, 256, (count, 8, 32, 32, 3), dtype=torch.uint8).to(there)


def tokenizer_of(config: PretrainConfig, there: torch.device) -> Tokenizer:
    return build_tokenizer(VQGAN(small(8, CODES, 8)), config, there)


def test_the_device_refuses_tensors_of_the_cpu(there: torch.device) -> None:
    tensor = torch.arange(3.0).to(there)
    assert (tensor + tensor.new_ones(3)).tolist() == [1, 2, 3]
    assert (tensor * 2).sum().item() == 6
    for function in (
        lambda: tensor + torch.ones(3),
        lambda: tensor @ torch.ones(3),
        lambda: torch.ones(3).add_(tensor),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            function()


@pytest.mark.parametrize("held", [None, held_out(60), folds(60)], ids=["none", "one", "several"])
def test_linear_probe(held: Any, there: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("mam2.engine.evaluation.linear_probe"), "PENALTIES", (0.1,))
    features = torch.randn(60, 4)
    labels = (features[:, 0] > 0).long()
    given = features.to(there), labels.to(there)
    parts = [part.to(there) for part in held] if isinstance(held, list) else held
    found = linear_probe(*given, *given, parts.to(there) if isinstance(parts, Tensor) else parts)
    assert torch.equal(found.right, linear_probe(features, labels, features, labels, held).right)


def test_other_probes(there: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attentive, "FEWEST_STEPS", 3)
    monkeypatch.setattr(attentive, "EPOCHS", 1)
    monkeypatch.setattr(importlib.import_module("mam2.engine.evaluation.linear_probe"), "PENALTIES", (0.1,))
    monkeypatch.setattr(importlib.import_module("mam2.engine.evaluation.components"), "COUNTS", (4,))
    features, labels = torch.randn(40, 6, 8), torch.arange(40) % 2
    rows = features[:, 0].to(there)
    assert knn(rows, labels.to(there), rows).device == there
    groups = torch.ones(2, 6, dtype=torch.bool)
    attentive.attentive_probe(features.numpy(), labels, features.numpy(), held_out(40), 2, there, groups)
    parts = [Components(features[:, 0], features[:, 1])]
    probe_components(parts, labels, labels, folds(40), there)


@pytest.mark.parametrize("frames", ["first", "all"])
def test_tokenizer(frames: str, there: torch.device) -> None:
    tokenizer = tokenizer_of(config_of(tokenizer={"frames": frames}), there)
    video = channels_first(clips(there))
    assert tokenizer.decode(tokenizer.codes(video)).device == there
    assert tokenizer.changed_share(video) == 0


@pytest.mark.usefixtures("deterministic")
def test_training_of_a_tokenizer(there: torch.device) -> None:
    frames = [clips(there)[:, 0] for _ in range(40)]
    train_vqgan(frames, small(8, CODES, 8), 3, there, lambda *_: None, seed=0)


STEPS: dict[str, dict[str, dict[str, Any]]] = {
    "codes": {"loss": {"balance": "gradient", "alignment": 0.5}},
    "pixels": {"loss": {"appearance_target": "pixels", "motion_target": "intra"}},
    "latents": {"loss": {"appearance_target": "latents", "visible": 0.5}, "optim": {"name": "muon"}},
    "motion mask, hog": {"mask": {"kind": "motion"}, "loss": {"motion_target": "hog"}},
    "cells": {"mask": {"kind": "random", "decoded": 0.5, "decoded_kind": "cell"}, "run": {"recompute": True}},
}


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("name", STEPS)
def test_steps_and_pictures_of_mam2(name: str, there: torch.device) -> None:
    config = config_of(**STEPS[name])
    model = build_model(config, CODES)
    step = PretrainStep(config, model, there, World())
    codes = torch.randint(0, CODES, (BATCH, np.prod(config.grid))).to(there) if config.needs_codes else None
    for number in range(2):
        values = step(number, [(channels_first(clips(there)), codes)], 1e-3, inspect=True)
        assert {value.device for value in values.values()} == {there}
    clip, tokenizer = clips(there), tokenizer_of(config, there) if config.needs_codes else None
    mask = evaluation_mask(clip, config)
    model.eval()
    score(model, tokenizer, clip, mask, config)
    reconstruct(model, tokenizer, clip, config)
    regressor_attention(model, channels_first(clip), mask)


@pytest.mark.parametrize("objective", ["videomae", "joint"])
def test_steps_and_pictures_of_videomae(objective: str, there: torch.device) -> None:
    config = config_of("videomae", model={"objective": objective})
    model = build_model(config, 0)
    PretrainStep(config, model, there, World())(0, [(channels_first(clips(there)), None)], 1e-3, inspect=True)
    clip = clips(there)
    score(model, None, clip, evaluation_mask(clip, config), config)
    reconstruct_pixels(model, clip, config)


TARGETS: dict[str, Targets] = {
    "classes": ClassTargets(5, 0.1, [1.0, 2.0, 1.0, 1.0, 1.0]),
    "multi-label": SetTargets([[0], [1, 2], [3], [4]], 5, 0.1),
    "regression": ValueTargets([1.0, 2.0, 3.0, 4.0], 2.5, 1.0),
}


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("task", TARGETS)
def test_steps_of_finetuning(task: str, there: torch.device) -> None:
    """Without erasing, whose noise a generator of the device draws. A resumed run continues with the moments."""
    config = changed(
        FinetuneConfig(),
        data={"views": 1, "size": 32, "frames": 8},
        model={"width": 24, "depth": 2, "heads": 2, "patch": 8, "frames": 8, "size": 32, "target_std": 1.0}
        | {"classes": 1 if task == "regression" else 5},
        optim={"batch": BATCH, "ema": 0.9, "drop_path": 0.2},
        head={"task": task, "dropout": 0.5},
        augment={"erase": 0.0} | ({"mixup": 0.0, "cutmix": 0.0} if task == "regression" else {}),
        run=PLAIN,
    )
    model = build_classifier(config)
    standardize_features(model.to(there), pooled_features(model, [channels_first(clips(there))]))
    step = FinetuneStep(config, model, there, World(), TARGETS[task])
    judge = build_classifier(config).to(there).eval().requires_grad_(False)
    gather = share_weights(judge, lambda: step.model.state_dict() | dict(step.average))
    for number in range(4):
        video = channels_first(clips(there))
        step(number, [(video, step.prepare(number, video, torch.arange(BATCH)))], 1e-3, inspect=True)
    gather()
    in_equal_batches(lambda video: judge.scores(judge(video)), BATCH)(channels_first(clips(there, 3)))
    parameters = dict(model.named_parameters())
    for key, tensor in copies(_moments(model, step.optimizer, step.extra_state()), keep=True).items():
        name, _, entry = key.rpartition(".")
        if name in parameters:
            set_moment(step.optimizer, parameters[name], entry, tensor)
    step(4, [(video, step.prepare(4, video, torch.arange(BATCH)))], 1e-3, inspect=False)


def test_features_and_propagated_masks(there: torch.device) -> None:
    encoder, run = build_model(config_of(), CODES).to(there).eval().encoder, RunConfig(precision="float32")
    kinds: Any = [(1, "mean"), (2, "cells"), (2, "tokens")]
    assert {
        found.device.type for found in clip_features(encoder, channels_first(clips(there)), kinds, run=run).values()
    } == {"cpu"}
    frames, first = torch.randint(0, 256, (10, 32, 32, 3), dtype=torch.uint8), torch.randint(0, 3, (32, 32)).to(there)
    features = frame_features(encoder, frames, 2, "window", batch=4, run=run)
    assert propagate_masks(features, first, 2, top_k=3, radius=2, context=2).device == there


def test_operators_and_crops(there: torch.device) -> None:
    video, patch = channels_first(clips(there, 2)), (2, 8, 8)
    mask = kernels.random_mask(2, (4, 4, 4), 0.5, seed=0, device=there)
    kernels.motion_tube_mask(video, 0.5, patch_size=patch, seed=0)
    kernels.running_cell_mask(2, (4, 4, 4), seed=0, device=there)
    assert masked_subset(mask.masked, (4, 4, 4), 16, by_cell=True, seed=0).device == there
    for given, count in ((mask, 32), (mask.as_bool(), 32), (None, 64)):
        for loss in (kernels.masked_pixel_loss, kernels.masked_frame_difference_loss):
            pred, weight = torch.randn(2, count, 384).to(there).requires_grad_(), torch.rand(2, count).to(there)
            loss(pred, video, given, patch_size=patch, weight=weight).backward()
    crops = TorchCrops(16, views=1, device=there)
    crops.run([np.zeros((4, 20, 30, 3), np.uint8)], [range(4)], [[View(0, 0, 1, 1, True)]])
