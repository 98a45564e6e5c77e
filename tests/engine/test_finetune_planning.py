"""`mam2 plan` of a fine-tuning run: declared FLOPs, parameters and memory against those of a step."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mam2.engine.checkpoints.classifiers import build_classifier
from mam2.engine.config.finetune import FinetuneConfig
from mam2.engine.config.recipe import load_recipe
from mam2.engine.finetune_costs import BLOCKS, finetune_costs, trained_matrices, trained_parameters
from mam2.engine.finetune_planning import plan_finetuning
from mam2.engine.layer_costs import SINGLE
from mam2.engine.runtime.distributed import World
from mam2.engine.train.classifier_step import FinetuneStep, classifier_flops
from mam2.engine.train.optimizer import hidden_matrices
from tests.helpers.commands import outcome

MODEL = {"width": 48, "depth": 3, "heads": 3, "classes": 5}
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "whole": {},
    "last": {"optim": {"train_last": 1}},
    "last three": {"optim": {"train_last": 3}},
    "head": {"optim": {"train_last": 0}},
    "scaled": {"model": MODEL | {"layer_scale": 0.1}, "optim": {"train_last": 2}},
    "adapters": {"adapters": {"rank": 4}},
}


def case(name: str, small_finetuning: Any, **tables: dict[str, Any]) -> FinetuneConfig:
    if name == "adapters":
        pytest.importorskip("peft", reason="peft is not installed: pip install '.[adapters]'")
    base: dict[str, dict[str, Any]] = {"data": {"frames": 4, "size": 32}, "model": MODEL, "optim": {}}
    given = CASES[name]
    merged = {key: base.get(key, {}) | given.get(key, {}) | tables.get(key, {}) for key in {*base, *given, *tables}}
    merged["optim"] = {"batch": 4} | merged["optim"]
    return small_finetuning(**merged)


def model_and_video(config: FinetuneConfig) -> tuple[Any, torch.Tensor]:
    step = FinetuneStep(config, build_classifier(config), torch.device("cpu"), World())
    size = config.data.size
    return step.model, torch.randint(0, 256, (4, 3, config.data.frames, size, size), dtype=torch.uint8)


@pytest.mark.parametrize("name", CASES)
def test_declared_flops_and_parameters_are_those_of_autograd(name: str, small_finetuning: Any) -> None:
    config = case(name, small_finetuning)
    model, video = model_and_video(config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(video).sum().backward()
    head = counter.get_flop_counts().get("Classifier.head", {})
    counted = counter.get_total_flops() - sum(head.values())
    assert counted / len(video) == pytest.approx(classifier_flops(config), rel=1e-9)
    declared = finetune_costs(config, SINGLE)
    assert sum(cost.parameters for cost in declared.values()) == sum(p.numel() for p in model.parameters())
    assert trained_parameters(config) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["whole", "last", "adapters"])
def test_muon_is_planned_for_the_matrices_that_it_trains(name: str, small_finetuning: Any) -> None:
    model, _ = model_and_video(config := case(name, small_finetuning, optim={"name": "muon"}))
    found: dict[tuple[int, int], int] = {}
    for parameter, parts in hidden_matrices(model).items():
        if parameter.requires_grad:
            shape = (parameter.shape[0] // parts, parameter.shape[1])
            found[shape] = found.get(shape, 0) + parts
    assert found == dict(trained_matrices(config))


@pytest.mark.parametrize(
    ("name", "recompute"),
    [*((name, False) for name in CASES), *((name, True) for name in ("whole", "last three", "head", "adapters"))],
)
def test_held_activations_are_what_autograd_saves(name: str, recompute: bool, small_finetuning: Any) -> None:
    """Within 15 %: LayerNorm's statistics, attention's sums and index tensors are not declared."""
    config = case(name, small_finetuning, run={"recompute": recompute}, model={**MODEL, "depth": 6})
    model, video = model_and_video(config)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: weakref.WeakSet[Saved] = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> Saved:
        held.add(saved := Saved(tensor))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        result = model(video)  # keeps the graph
    sizes = {saved.tensor.untyped_storage().data_ptr(): saved.tensor.untyped_storage().nbytes() for saved in held}
    saved = sum(size for pointer, size in sizes.items() if pointer not in weights)
    assert result.requires_grad
    declared = held_bytes(config)
    if recompute and name != "head":  # one block's activations are computed again in the backward pass
        plain = case(name, small_finetuning, model={**MODEL, "depth": 6})
        trained = {"last three": 3}.get(name, 6)
        declared -= finetune_costs(plain, SINGLE)[BLOCKS].held_bytes // trained
    assert saved / len(video) == pytest.approx(declared, rel=0.15, abs=1000)


class Saved:
    """A tensor that autograd has saved; it is in a weak set as long as the graph needs it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def held_bytes(config: FinetuneConfig) -> int:
    return sum(cost.held_bytes for cost in finetune_costs(config, SINGLE).values())


def test_a_large_encoder_with_adapters_fits_where_whole_fine_tuning_does_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["plan", "kinetics400/finetune", "--size", "large", "--gpu", "rtx3060", "--optim.micro-batch", "4"]
    status, whole, _ = outcome(capsys, *arguments)
    assert status == 0
    assert "DOES NOT FIT" in whole
    status, found, _ = outcome(capsys, *arguments, "--adapters.rank", "16", "--videos", "240000")
    assert status == 0
    assert "DOES NOT FIT" not in found
    for message in ("trained  6.29 M of 310 M parameters: adapters of rank 16 and the head", "4 clips on 1 device"):
        assert message in found
    (time,) = (line for line in found.splitlines() if line.startswith("time"))
    assert "(estimated)" in time


def test_memory_grows_with_what_is_trained(small_finetuning: Any) -> None:
    base = load_recipe("kinetics400/finetune", FinetuneConfig)
    plans = {}
    for last in (0, 4, -1):
        config = dataclasses.replace(base, optim=dataclasses.replace(base.optim, train_last=last, micro_batch=4))
        plans[last] = plan_finetuning(config, gpu="h200")
    head, some, whole = (plans[last] for last in (0, 4, -1))
    assert head.memory["weights"] == some.memory["weights"] == whole.memory["weights"]
    for key in ("gradients", "moments", "activations"):  # several passes: gradients stay between them
        assert head.memory[key] < some.memory[key] < whole.memory[key], key
    assert head.clips_per_s > some.clips_per_s > whole.clips_per_s


def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = outcome(
        capsys, "plan", "kinetics400/finetune", "--gpu", "h200", "--adapters.rank", "8", "--optim.train-last", "2"
    )
    assert (status, err.count("\n")) == (2, 1)
    assert "optim.train_last 2: adapters.rank 8 freezes the whole encoder" in err
