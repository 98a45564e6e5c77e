"""A step's arithmetic and set-up: sums, sharding, process groups, compilations, logged values."""

import dataclasses
import functools

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounter

from mam2.engine.config.recipe import load_recipe
from mam2.engine.model.mam2 import MAM2
from mam2.engine.runtime.distributed import World
from mam2.engine.train import objective as objectives
from mam2.engine.train import step as steps
from mam2.engine.train.objective import Balance, build_objective
from mam2.engine.train.step import PretrainStep
from mam2.kernels import TubeMask, tube_mask

CODES, CPU = 16, torch.device("cpu")


def config(width=24, loss=None, **run):
    recipe = load_recipe("demo")
    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, width=width, depth=1, heads=2),
        loss=dataclasses.replace(recipe.loss, **(loss or {})),
        optim=dataclasses.replace(recipe.optim, batch=4),
        run=dataclasses.replace(recipe.run, **{"compile": False, "precision": "float32", **run}),
    )


def build(given=None, world=None):
    given = given or config()
    torch.manual_seed(0)
    return PretrainStep(given, MAM2(given, CODES), CPU, world or World())


def batch(clips=4):
    generator = torch.Generator().manual_seed(0)
    video = torch.randint(0, 256, (clips, 3, 8, 32, 32), dtype=torch.uint8, generator=generator)
    return video, torch.randint(CODES, (clips, 64), generator=generator)


@pytest.mark.parametrize("decoded", [{}, {"kind": "tube", "decoded": 0.6, "decoded_kind": "random"}])
def test_passes_with_different_numbers_of_motion_values_give_the_mean_of_all(decoded):
    """The gradient of four passes is that of one: a mean of the passes' means would differ by about one percent."""
    found = []
    for micro_batch in (4, 1):
        given = config(loss={"motion_target": "adjacent", "balance": "fixed"})
        given = dataclasses.replace(
            given,
            data=dataclasses.replace(given.data, views=1),
            mask=dataclasses.replace(given.mask, **{"kind": "random", **decoded}),
            optim=dataclasses.replace(given.optim, micro_batch=micro_batch),
        )
        step = build(given)
        video, codes = batch()
        parts = [
            (video[first : first + micro_batch], codes[first : first + micro_batch])
            for first in range(0, 4, micro_batch)
        ]
        passes = step._passes(0, parts)
        assert (len(passes), len(passes[0])) == ((1, 3) if micro_batch == 4 else (4, 4))
        values = step._gradients(passes, len(passes), inspect=False)
        gradients = {name: p.grad.clone() for name, p in step.model.named_parameters() if p.grad is not None}
        found.append(gradients | {"loss": values["loss/motion"]})
        if micro_batch == 1:
            plain = sum(step.objective(*arguments[:3])[1]["loss/motion"] for arguments in passes) / 4
            assert abs(plain / values["loss/motion"] - 1) > 1e-5  # without the correction they would differ
    for name, whole in found[0].items():
        torch.testing.assert_close(found[1][name], whole, rtol=1e-4, atol=1e-6, msg=name)


def test_products_are_summed_in_float32_within_a_step():
    matmul, seen = torch.backends.cuda.matmul, []
    before = matmul.allow_bf16_reduced_precision_reduction
    step = build()
    take = step._run
    step._run = lambda *given: seen.append(matmul.allow_bf16_reduced_precision_reduction) or take(*given)
    step(0, [batch()], 1e-3, inspect=False)
    assert seen == [False]
    assert matmul.allow_bf16_reduced_precision_reduction == before


def test_sharded_weights_travel_in_the_precision_of_the_products(monkeypatch):
    gpu = torch.device("cuda")
    policy = steps._policy(torch.bfloat16, gpu)
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
    assert not policy.cast_forward_inputs, "the residual stream stays float32"
    assert steps._policy(torch.float32, gpu).param_dtype is None
    asked, used = [], []
    monkeypatch.setattr(steps, "_policy", lambda *given: asked.append(given) or "policy")
    monkeypatch.setattr(steps, "fully_shard", lambda module, mp_policy: used.append(mp_policy))
    build(config(sharding="fsdp", precision="bfloat16"), World(size=2))
    assert asked == [(torch.bfloat16, CPU)]
    assert set(used) == {"policy"}
    assert len(used) > 3, "every block and the whole"


def test_the_balances_ranks_have_a_group_of_their_own(monkeypatch):
    groups = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "new_group", lambda: "own")
    monkeypatch.setattr(dist, "all_reduce", lambda values, group=None: groups.append(group))
    Balance(1.0).factor(torch.ones(2), torch.ones(2))
    assert groups == ["own"]


@pytest.mark.slow
def test_one_process_may_train_one_model_after_the_other(monkeypatch):
    """torch.compile counts a function's compilations over all models, and refuses more than a few."""

    def compiler(run, device):
        return (lambda part: torch.compile(part, fullgraph=True, dynamic=False, backend="eager")), "traced"

    monkeypatch.setattr(steps, "compiler", compiler)
    with torch._dynamo.config.patch(recompile_limit=3):
        for width in (16, 20, 24, 28, 32):
            build(config(width, compile=True, compile_blocks=False))(0, [batch()], 1e-3, inspect=False)


@pytest.mark.slow
def test_figures_for_the_log_cost_no_compilation_on_a_cpu(monkeypatch):
    counter = CompileCounter()

    def compiler(run, device):
        return (lambda part: torch.compile(part, fullgraph=True, dynamic=False, backend=counter)), "traced"

    monkeypatch.setattr(steps, "compiler", compiler)
    step = build(config(compile=True))
    step(0, [batch()], 1e-3, inspect=False)
    compilations = counter.frame_count
    assert "accuracy/codes" in step(1, [batch()], 1e-3, inspect=True)
    assert counter.frame_count == compilations > 0


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager_decomp_partition"])
def test_equal_blocks_are_compiled_once_and_give_the_result_of_the_eager_step(backend, monkeypatch):
    """The second backend divides the graphs as the default one does, but runs PyTorch's operators."""

    def compiler(run, device):
        compiled = functools.partial(torch.compile, fullgraph=True, dynamic=False, backend=backend)
        return compiled, "compiled, whole graphs"

    def one_step(depth, **run):
        given = config(loss={"alignment": 0.5}, **run)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        step = build(dataclasses.replace(given, model=dataclasses.replace(given.model, depth=depth)))
        values = [step(number, [batch()], 1e-3, inspect=True) for number in range(2)][-1]
        return step.compiled, values, torch._dynamo.utils.counters["stats"]["unique_graphs"]

    expected = one_step(3)[1]
    monkeypatch.setattr(steps, "compiler", compiler)
    text, found, graphs = one_step(3, compile=True)
    assert text == "compiled, block by block"
    assert graphs == one_step(1, compile=True)[2] > 0
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0 if backend == "eager" else 1e-4, atol=0, msg=name)


def test_the_most_frequent_code_is_that_of_each_codebook():
    """The first codebook has one code in all tokens, the second two: the most frequent codes are 3/4 of all."""
    given = config()
    given = dataclasses.replace(given, tokenizer=dataclasses.replace(given.tokenizer, codes_per_patch=2))
    objective = build_objective(MAM2(given, CODES), given, lambda part: part)
    video, codes = batch(2)
    mask = tube_mask(2, given.grid, given.mask.ratio, seed=0, device="cpu")
    codes = torch.stack([torch.full_like(codes, 3), torch.tensor([[1], [2]]).expand_as(codes)], 2)
    found = objective(video, mask, codes, inspect=True)[2]
    assert found["accuracy/commonest_code"] == 0.75


def test_figures_of_the_log_are_those_of_a_few_clips(monkeypatch):
    monkeypatch.setattr(objectives, "INSPECTED_CLIPS", 3)
    given = config()
    torch.manual_seed(0)
    objective = build_objective(MAM2(given, CODES), given, lambda part: part)
    video, codes = batch(5)
    mask = tube_mask(5, given.grid, given.mask.ratio, seed=0, device="cpu")
    _, _, found = objective(video, mask, codes, inspect=True)
    _, _, few = objective(video[:3], TubeMask(mask.visible[:3], mask.masked[:3]), codes[:3], inspect=True)
    _, _, others = objective(video[2:], TubeMask(mask.visible[2:], mask.masked[2:]), codes[2:], inspect=True)
    assert found.keys() == {"accuracy/codes", "accuracy/commonest_code", "loss/motion_relative"}
    assert found == few
    assert found != others
    assert not any(figure.requires_grad for figure in found.values())


@pytest.mark.slow
def test_alignment_and_figures_are_compiled_as_whole_graphs():
    given = config(loss={"alignment": 1.0})
    compiled = []

    def traced(part):
        compiled.append(part.__name__)
        return torch.compile(part, fullgraph=True, dynamic=False, backend="eager")

    torch._dynamo.reset()
    torch.manual_seed(0)
    model = MAM2(given, CODES)
    video, codes = batch()
    mask = tube_mask(4, given.grid, given.mask.ratio, seed=0, device="cpu")
    objective = build_objective(model, given, traced)
    assert "alignment_loss" in compiled
    assert "_inspect" not in compiled, "on a CPU not worth it"
    build_objective(MAM2(given, CODES).to("meta"), given, traced)
    assert "_inspect" in compiled, "on a GPU"
    objective._figures = traced(objective._inspect)
    total, losses, figures = objective(video, mask, codes, inspect=True)
    total.backward()
    expected = build_objective(model, given, lambda part: part)(video, mask, codes, inspect=True)
    torch.testing.assert_close(losses, expected[1])
    torch.testing.assert_close(figures, expected[2])
