"""The linear probe and its intervals."""

import pytest
import torch

from mam2.engine.evaluate.probe import bootstrap, linear_probe


def _clusters(count, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    centres = torch.eye(4).repeat(1, 3) * 3 + 100
    return centres[labels] + spread * torch.randn(count, 12, generator=generator), labels


def test_separable_features_are_separated():
    train, test = _clusters(200, 0.3, 0), _clusters(100, 0.3, 1)
    result = linear_probe(*train, *test)
    assert result.accuracy == 1.0
    assert result.right.all()


def test_noise_gives_chance():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1200, 16, generator=generator)
    labels = torch.randint(4, (1200,), generator=generator)
    result = linear_probe(features[:600], labels[:600], features[600:], labels[600:])
    assert result.interval[0] < 0.25 < result.interval[1] + 0.03
    assert result.accuracy < 0.35


def test_scale_of_the_features_does_not_matter():
    (train, labels), (test, test_labels) = _clusters(200, 2.0, 0), _clusters(200, 2.0, 1)
    scale = torch.logspace(-3, 3, 12)
    plain = linear_probe(train, labels, test, test_labels)
    scaled = linear_probe(train * scale, labels, test * scale, test_labels)
    assert scaled.accuracy == pytest.approx(plain.accuracy, abs=0.01)


def test_bootstrap_interval_matches_the_normal_one():
    values = (torch.arange(1000) % 10 < 3).double()
    low, high = bootstrap(values)
    half = 1.96 * (0.3 * 0.7 / 1000) ** 0.5
    assert low == pytest.approx(0.3 - half, abs=0.006)
    assert high == pytest.approx(0.3 + half, abs=0.006)


def test_bootstrap_of_a_ratio_weighs_by_the_denominator():
    low, high = bootstrap(torch.tensor([1.0, 100.0]), torch.tensor([2.0, 100.0]))
    assert low == pytest.approx(0.5)
    assert high == pytest.approx(1.0)
