"""Muon with AdamW: against the formula in float64 and torch.optim.Muon; which parameters each trains; skipped steps."""

import dataclasses
import math
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mam2.engine.checkpoints import checkpoint
from mam2.engine.config.finetune import FinetuneOptimConfig
from mam2.engine.config.recipe import load_recipe
from mam2.engine.config.training import OptimConfig
from mam2.engine.errors import UserError
from mam2.engine.model.blocks import Block
from mam2.engine.model.mam2 import MAM2
from mam2.engine.model.videomae import VideoMAE
from mam2.engine.runtime.distributed import World
from mam2.engine.train import muon
from mam2.engine.train.muon import MuonAdamW, orthogonal
from mam2.engine.train.optimizer import build_layered_optimizer, build_optimizer, hidden_matrices
from mam2.engine.train.pretrain import pretrain
from mam2.engine.train.step import PretrainStep
from tests.helpers.small_models import classifier

CONFIG = OptimConfig(name="muon", weight_decay=0.1, momentum=0.9, muon_rate=0.5)
CODES, BATCH = 16, 4


def small_model(objective="mam2", **loss):
    """A demo small enough for a step in milliseconds; regressor and decoders of another width than the encoder."""
    recipe = load_recipe("demo")
    config = dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, objective=objective, width=24, depth=2, heads=2, layer_scale=0.1),
        loss=dataclasses.replace(recipe.loss, **loss),
        optim=dataclasses.replace(recipe.optim, batch=BATCH, name="muon"),
        run=dataclasses.replace(recipe.run, compile=False, device="cpu"),
    )
    torch.manual_seed(0)
    return (VideoMAE(config) if objective == "videomae" else MAM2(config, CODES)), config


def polynomial(matrix):
    """The result of the iteration on a matrix, computed from its singular values in float64."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    s = s / matrix.norm().clamp(min=1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ s.diag() @ vt


@pytest.mark.parametrize("shape", [(5, 5), (8, 3), (3, 8)])
def test_the_iteration_maps_singular_values_by_its_polynomial(shape):
    torch.manual_seed(0)
    matrices = torch.randn(4, *shape, dtype=torch.float64)
    before = matrices.clone()
    torch.testing.assert_close(orthogonal(matrices), torch.stack([polynomial(m) for m in matrices]))
    assert torch.equal(matrices, before)
    values = torch.linalg.svdvals(orthogonal(matrices))
    assert 0.6 < values.min() < values.max() < 1.3
    assert orthogonal(torch.zeros(1, *shape)).count_nonzero() == 0


def test_three_updates_are_those_of_the_formula_in_float64():
    """Muon updates queries, keys and values of a block separately; AdamW updates the other parameters."""
    torch.manual_seed(0)
    block = Block(6, 2, 2.0).double()
    optimizer = build_optimizer(block, CONFIG, torch.float64)
    names = ["attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"]
    weights = {name: block.get_parameter(name).detach().clone() for name in names}
    averages = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for _ in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * group["scale"]
        for parameter in block.parameters():
            parameter.grad = torch.randn_like(parameter)
        for name in names:
            gradient = block.get_parameter(name).grad
            averages[name] = 0.9 * averages[name] + 0.1 * gradient
            update = 0.1 * gradient + 0.9 * averages[name]
            parts = update.chunk(3 if "qkv" in name else 1)
            directions = torch.cat([0.2 * math.sqrt(max(part.shape)) * polynomial(part) for part in parts])
            weights[name] = weights[name] * (1 - 0.01 * 0.1) - 0.01 * directions
        optimizer.step()
    for name in names:
        torch.testing.assert_close(block.get_parameter(name).detach(), weights[name], msg=name)
        torch.testing.assert_close(optimizer.state[block.get_parameter(name)]["momentum_buffer"], averages[name])


def test_updates_are_those_of_pytorchs_muon():
    """Momentum bit by bit; weights, which move by about 0.01 in each step, within a few roundings of bfloat16."""
    torch.manual_seed(0)
    shapes = [(16, 16), (32, 8), (8, 32), (16, 16), (32, 8)]
    ours, theirs = ([nn.Parameter(torch.zeros(shape)) for shape in shapes] for _ in range(2))
    group = {"params": ours, "parts": 1, "lr": 0.02, "weight_decay": 0.1, "momentum": 0.95}
    bias = {"params": [nn.Parameter(torch.zeros(3))], "betas": (0.9, 0.95), "eps": 1e-8}
    optimizer = MuonAdamW([group, bias])
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        optimizer.step(), reference.step()
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=2e-4)
            states = optimizer.state[mine]["momentum_buffer"], reference.state[other]["momentum_buffer"]
            assert torch.equal(*states)


def test_matrices_taken_together_or_one_by_one_give_the_same(monkeypatch):
    weights = []
    for most in (2**24, 1):
        monkeypatch.setattr(muon, "VALUES_AT_ONCE", most)
        model, config = small_model()
        optimizer = build_optimizer(model, config.optim, torch.float64)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        optimizer.step()
        weights.append([p.detach().clone() for p in model.parameters()])
    for together, single in zip(*weights, strict=True):
        torch.testing.assert_close(together, single)


@pytest.mark.parametrize("objective", ["mam2", "videomae"])
def test_muon_trains_the_matrices_of_all_blocks_and_adamw_the_rest(objective):
    """Every parameter is in one group."""
    model, config = small_model(objective)
    optimizer = build_optimizer(model, config.optim)
    found = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert id(parameter) not in found
            found[id(parameter)] = group.get("parts", 0), group["weight_decay"]
    assert len(found) == len(list(model.parameters()))
    counts = {0: 0, 1: 0, 3: 0}
    for name, parameter in model.named_parameters():
        in_block = ".blocks." in f".{name}" and parameter.ndim == 2
        parts = (3 if "qkv" in name else 1) if in_block else 0
        decay = config.optim.weight_decay if parameter.ndim > 1 and "mask_token" not in name else 0.0
        assert found[id(parameter)] == (parts, decay), name
        counts[parts] += 1
    regressor, decoders = (config.model.regressor.depth, 2) if objective == "mam2" else (0, 1)
    selves = 2 + decoders * config.model.decoder.depth
    assert (counts[3], counts[1]) == (selves, 3 * selves + 6 * regressor)


def test_fine_tuning_scales_both_by_the_layer():
    model = classifier()
    config = FinetuneOptimConfig(name="muon", layer_decay=0.5, muon_rate=4.0)
    optimizer = build_layered_optimizer(model, 2, config)
    found = {id(p): (g["scale"], "parts" in g) for g in optimizer.param_groups for p in g["params"]}
    assert len(found) == len(list(model.parameters())) == sum(len(g["params"]) for g in optimizer.param_groups)
    for name, parameter in model.named_parameters():
        layer = {"encoder.patch_embed": 0.125, "encoder.blocks.0": 0.25, "encoder.blocks.1": 0.5}
        scale = next((value for part, value in layer.items() if name.startswith(f"{part}.")), 1.0)
        matrix = name.startswith("encoder.blocks.") and parameter.ndim == 2
        assert found[id(parameter)] == (scale * 4 if matrix else scale, matrix), name
    assert len(hidden_matrices(model)) == 8


def test_a_matrix_that_does_not_consist_of_equal_parts_is_refused():
    group = {"params": [nn.Parameter(torch.zeros(4, 4))], "parts": 3, "momentum": 0.9}
    with pytest.raises(ValueError, match=r"expected a matrix of 3 equal parts, found shape \(4, 4\)"):
        MuonAdamW([group])


def step_of(**loss):
    model, config = small_model(**loss)
    return PretrainStep(config, model, torch.device("cpu"), World())


def batch(number):
    generator = torch.Generator().manual_seed(number)
    clips = torch.randint(0, 256, (BATCH, 3, 8, 32, 32), dtype=torch.uint8, generator=generator)
    return clips, torch.randint(CODES, (BATCH, 64), generator=generator)


def state(take):
    moments = [value for entries in take.optimizer.state.values() for value in entries.values()]
    return [tensor.detach().clone() for tensor in [*take.model.parameters(), *moments]]


def equal(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["encoder.blocks.0.attn.qkv.weight", "encoder.norm.bias"])
def test_a_step_that_is_not_finite_changes_nothing(value, where):
    """One bad value of one gradient, of Muon or AdamW: weights and state of both do not change, the next step does."""
    take, plain = step_of(), step_of()
    for one in (take, plain):
        one(0, [batch(0)], 1e-3, inspect=False)
    before = state(take)
    parameter = take.model.get_parameter(where)
    hook = parameter.register_hook(lambda gradient: torch.where(torch.arange(gradient.shape[-1]) == 0, value, gradient))
    assert take(1, [batch(1)], 1e-3, inspect=False)["bad"] == 1
    hook.remove()
    assert equal(state(take), before)
    assert all(parameter.grad is None for parameter in take.model.parameters())
    for one in (take, plain):
        assert one(2, [batch(2)], 1e-3, inspect=False)["bad"] == 0
    assert equal(state(take), state(plain))


def test_a_first_step_that_is_not_finite_changes_nothing():
    take = step_of()
    before = [p.detach().clone() for p in take.model.parameters()]
    hook = take.model.encoder.patch_embed.weight.register_hook(lambda gradient: gradient * math.nan)
    take(0, [batch(0)], 1e-3, inspect=False)
    hook.remove()
    assert equal([p.detach() for p in take.model.parameters()], before)
    assert all(value.count_nonzero() == 0 for entries in take.optimizer.state.values() for value in entries.values())


@pytest.mark.slow
def test_a_stopped_run_resumes_exactly(clips, tmp_path, monkeypatch, small):
    """Weights and state equal those of a run that did not stop bit by bit; the run cannot be resumed with AdamW."""
    config = small(optim={"name": "muon"}, run={"log_every": 1})
    pretrain(config, clips, tmp_path / "whole", progress=False)
    original, calls = PretrainStep.__call__, []

    def step(self, *args, **options):
        calls.append(None)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **options)

    monkeypatch.setattr(PretrainStep, "__call__", step)
    assert pretrain(config, clips, tmp_path / "run", progress=False).step == 3
    with pytest.raises(UserError, match=r"optim\.name = 'muon', now it is 'adamw'"):
        pretrain(small(run={"log_every": 1}), clips, tmp_path / "run", resume=True, progress=False)
    path = checkpoint.newest(tmp_path / "run") / "state.json"
    written = path.read_text()
    path.write_text(written.replace('"name": "muon",', ""))  # by a version that had AdamW only
    with pytest.raises(UserError, match=r"optim\.name = 'adamw', now it is 'muon'"):
        pretrain(config, clips, tmp_path / "run", resume=True, progress=False)
    path.write_text(written)
    assert pretrain(config, clips, tmp_path / "run", resume=True, progress=False).step == 8
    assert "per step, Muon on " in (tmp_path / "run" / "log.txt").read_text()
    for name in (checkpoint.WEIGHTS, checkpoint.OPTIMIZER):
        tensors = [load_file(checkpoint.newest(tmp_path / run) / name) for run in ("whole", "run")]
        assert tensors[0].keys() == tensors[1].keys()
        for key in tensors[0]:
            assert torch.equal(tensors[0][key], tensors[1][key]), key
    kinds = {key.rpartition(".")[2] for key in tensors[0]}
    assert kinds == {"momentum_buffer", "exp_avg", "exp_avg_sq", "step", "cpu"}


def test_gathered_matrices_may_lie_in_memory_in_any_order(monkeypatch):
    """As FSDP2 of torch 2.11 gathers them: sharded rows first, then the matrices of the stack."""
    weights = []
    for gather in (muon._whole, lambda stacked, _: stacked.transpose(0, 1).contiguous().transpose(0, 1)):
        monkeypatch.setattr(muon, "_whole", gather)
        torch.manual_seed(0)
        layers = [nn.Linear(4, 6, bias=False) for _ in range(3)]
        matrices = {"params": [layer.weight for layer in layers], "parts": 3, "momentum": 0.9}
        optimizer = MuonAdamW([matrices, {"params": [nn.Parameter(torch.zeros(1))]}])
        optimizer.param_groups[0]["lr"] = 0.1
        for layer in layers:
            layer.weight.grad = torch.randn(6, 4)
        optimizer.step()
        weights.append([layer.weight.detach().clone() for layer in layers])
    torch.testing.assert_close(*weights)
