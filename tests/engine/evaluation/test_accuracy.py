"""Measures of predictions against plain loops and numbers counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mam2.engine.evaluation import accuracy


def test_average_precision_is_that_of_a_plain_loop_over_thresholds():
    """With ties, a class without videos and one that all videos have."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (40, 5), generator=generator).double() / 5
    truth = torch.rand(40, 5, generator=generator) < 0.3
    truth[:, 3], truth[:, 4] = False, True
    expected = []
    for column, has in zip(scores.T.numpy(), truth.T.numpy(), strict=True):
        total, before = 0.0, 0.0
        for threshold in sorted(set(column), reverse=True):
            taken = column >= threshold
            recall = (taken & has).sum() / max(has.sum(), 1)
            total += (recall - before) * (taken & has).sum() / taken.sum()
            before = recall
        expected.append(total if has.any() else None)
    assert accuracy.average_precisions(scores, truth) == [
        None if value is None else pytest.approx(value) for value in expected
    ]
    known = [value for value in expected if value is not None]
    assert accuracy.mean_average_precision(scores, truth) == pytest.approx(np.mean(known))


def test_r_squared_counted_by_hand():
    values = torch.tensor([1.0, 2.0, 6.0])
    assert accuracy.r_squared(torch.tensor([2.0, 2.0, 5.0]), values) == pytest.approx(1 - 2 / 14)
    assert accuracy.r_squared(values.mean().expand(3), values) == pytest.approx(0)
    same = torch.tensor([4.0, 4.0])
    assert (accuracy.r_squared(same, same), accuracy.r_squared(same + 1, same)) == (1, 0)
