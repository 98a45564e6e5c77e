"""AdamW's parameter groups and the learning rate schedule."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from torch import nn

from mam2.engine.config.training import OptimConfig
from mam2.engine.train.optimizer import (
    build_optimizer,
    first_decay_step,
    learning_rate,
    long_warmup,
    why_not_extended,
)

CONFIG = OptimConfig(epochs=10, warmup_epochs=2, base_lr=1e-3, min_lr=1e-5)


def test_learning_rate_warms_up_then_falls_along_a_cosine():
    rates = [learning_rate(step, 100, 10.0, CONFIG, global_batch=512) for step in range(100)]
    assert rates[0] == pytest.approx(2e-3 / 20)
    assert rates[19] == rates[20] == pytest.approx(2e-3)
    assert rates[60] == pytest.approx((2e-3 + 2e-5) / 2)
    assert rates[99] == pytest.approx(2e-5, rel=0.2)
    assert all(a >= b for a, b in pairwise(rates[20:]))


def test_a_run_shorter_than_its_warm_up_works():
    assert learning_rate(0, 1, 0.1, CONFIG, global_batch=256) > 0


@pytest.mark.parametrize(("epochs", "message"), [(1, "100% of the training"), (3, "67% of the training"), (4, None)])
def test_a_warm_up_of_more_than_half_the_training_is_told_with_a_remedy(epochs, message):
    config = OptimConfig(epochs=epochs, warmup_epochs=2)
    warning = long_warmup(config)
    if message is None:
        assert warning is None
    else:
        assert message in warning
        shorter = float(warning.split("--optim.warmup-epochs ")[1])
        assert long_warmup(OptimConfig(epochs=epochs, warmup_epochs=shorter)) is None


def test_biases_norms_and_mask_tokens_are_not_decayed():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    model.register_parameter("mask_token", nn.Parameter(torch.zeros(1, 1, 4)))
    groups = build_optimizer(model, CONFIG).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(model[0].weight)}
    assert sum(len(group["params"]) for group in groups) == 5


def test_a_gradient_that_is_not_finite_changes_nothing():
    """The flag that the training loop sets is respected by the installed torch's fused AdamW."""
    weight = nn.Parameter(torch.ones(4))
    optimizer = build_optimizer(nn.ParameterList([weight]), CONFIG)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for gradient, bad in ((1.0, 0.0), (float("nan"), 1.0)):
        before = weight.detach().clone()
        weight.grad = torch.full((4,), gradient)
        optimizer.found_inf = torch.tensor(bad)
        optimizer.step()
        assert torch.equal(weight, before) == bool(bad)
    assert float(optimizer.state[weight]["step"]) == 1
    assert optimizer.state[weight]["exp_avg"].isfinite().all()


def test_warmup_stable_decay_is_constant_then_falls_linearly():
    config = dataclasses.replace(CONFIG, schedule="warmup-stable-decay", decay_share=0.3)
    rates = [learning_rate(step, 100, 10.0, config, global_batch=512) for step in range(100)]
    assert rates[:20] == [learning_rate(step, 100, 10.0, CONFIG, global_batch=512) for step in range(20)]
    assert set(rates[20:71]) == {2e-3}  # the first step of the decay still has the peak
    for step in range(70, 100):
        assert rates[step] == pytest.approx(2e-5 + (2e-3 - 2e-5) * (100 - step) / 30)
    assert first_decay_step(100, 10.0, config) == 70


@pytest.mark.parametrize(("share", "first"), [(0.0, 100), (0.2, 80), (0.95, 20), (1.0, 20)])
def test_the_decay_begins_after_the_warm_up_at_the_earliest(share, first):
    config = dataclasses.replace(CONFIG, schedule="warmup-stable-decay", decay_share=share, min_lr=0.0)
    assert first_decay_step(100, 10.0, config) == first
    rates = [learning_rate(step, 100, 10.0, config, global_batch=256) for step in range(100)]
    assert [step for step, rate in enumerate(rates) if rate == 1e-3] == list(range(19, min(first + 1, 100)))
    assert min(rates[20:]) > 0


def test_a_run_can_be_extended_until_its_rate_falls():
    short = OptimConfig(schedule="warmup-stable-decay", decay_share=0.2, epochs=10, warmup_epochs=2)
    long = dataclasses.replace(short, epochs=20)
    for done in (0, 20, 80):
        assert why_not_extended(short, long, done, 10.0) is None
        assert why_not_extended(short, short, 100, 10.0) is None
        for step in range(done):
            rates = [learning_rate(step, 10 * int(one.epochs), 10.0, one, global_batch=64) for one in (short, long)]
            assert rates[0] == rates[1]
    assert "of the checkpoint decrease the learning rate from step 80 on, but 81 steps" in why_not_extended(
        short, long, 81, 10.0
    )
    assert "of this run decrease the learning rate from step 40 on" in why_not_extended(
        short, dataclasses.replace(short, epochs=5), 60, 10.0
    )
