"""The order over several data sets: exact shares, passes of each set, the same from any first step."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from mam2.engine.data.sample_order import MOST_BLOCK, SampleOrder, samples_per_block
from mam2.engine.data.sampling import replacement, sample_at


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ((3.0, 1.0), [3, 1]),
        ((0.7, 0.3), [7, 3]),
        ((2.0, 4.0, 6.0), [1, 2, 3]),
        ((0.335, 0.1, 0.565), [67, 20, 113]),  # weights as V-JEPA uses them
        ((1e-9, 1.0), [1, MOST_BLOCK]),
    ],
)
def test_a_block_has_the_proportion_of_the_weights(weights, counts):
    assert samples_per_block(weights) == counts


@pytest.mark.parametrize("n", [1, 7, 32])
def test_one_set_is_in_the_order_that_it_always_had(n):
    order = SampleOrder((n,), (), seed=4)
    assert [order.at(counter) for counter in range(3 * n)] == [sample_at(counter, n, 4) for counter in range(3 * n)]
    assert order.replacement(n - 1, 2, 3) == replacement(n - 1, n, 2, 4, 3)


def test_sets_without_weights_are_one_list():
    order = SampleOrder((5, 9, 3), (), seed=1)
    assert [order.at(counter) for counter in range(60)] == [sample_at(counter, 17, 1) for counter in range(60)]
    assert order.shares == pytest.approx([5 / 17, 9 / 17, 3 / 17])


SIZES, WEIGHTS = (5, 9, 3), (0.5, 0.3, 0.2)


def test_every_block_has_the_shares_and_every_set_its_own_passes():
    order = SampleOrder(SIZES, WEIGHTS, seed=2)
    samples = [order.at(counter) for counter in range(900)]
    numbers = [0 if video < 5 else 1 if video < 14 else 2 for _, video in samples]
    for first in range(0, 900, 10):
        assert [numbers[first : first + 10].count(number) for number in range(3)] == [5, 3, 2]
    assert len({tuple(numbers[first : first + 10]) for first in range(0, 900, 10)}) > 60  # in an order of its own
    for number, (size, first) in enumerate(zip(SIZES, (0, 5, 14), strict=True)):
        own = [sample for sample, of in zip(samples, numbers, strict=True) if of == number]
        assert [epoch for epoch, _ in own] == [rank // size for rank in range(len(own))]
        passes = [[video for _, video in own[at : at + size]] for at in range(0, len(own) - size + 1, size)]
        assert all(sorted(videos) == list(range(first, first + size)) for videos in passes)
        assert any(one != other for one, other in pairwise(passes))


def test_two_sets_of_one_size_are_in_different_orders():
    order = SampleOrder((20, 20), (1, 1), seed=0)
    videos = [order.at(counter)[1] for counter in range(40)]
    first, second = ([video % 20 for video in videos if video // 20 == number] for number in range(2))
    assert sorted(first) == sorted(second)
    assert first != second


@pytest.mark.parametrize("weights", [(), WEIGHTS, (1 / 3, 1 / 7, 0.123456789)])
def test_the_stream_can_be_entered_anywhere_and_says_what_was_seen(weights):
    forward = SampleOrder(SIZES, weights, seed=3)
    samples = [forward.at(counter) for counter in range(200)]
    backward = SampleOrder(SIZES, weights, seed=3)
    assert [backward.at(counter) for counter in reversed(range(200))] == samples[::-1]
    for done in (0, 1, 17, 18, 100, 199):
        counted = Counter(0 if video < 5 else 1 if video < 14 else 2 for _, video in samples[:done])
        assert forward.seen(done) == [counted[number] for number in range(3)]
    assert sum(forward.seen(10**9 + 7)) == 10**9 + 7
    assert forward.seen(10**9)[0] / 10**9 == pytest.approx(forward.shares[0], abs=1e-4)


def test_a_replacement_is_of_the_same_set():
    for weights in ((), WEIGHTS):
        order = SampleOrder(SIZES, weights, seed=0)
        drawn = {video: {order.replacement(video, 1, attempt) for attempt in range(1, 60)} for video in (0, 7, 16)}
        assert drawn == {0: set(range(5)), 7: set(range(5, 14)), 16: set(range(14, 17))}
