"""Named random draws: each keeps its Philox stream in all versions."""

import numpy as np
import pytest

from mam2.engine.data.draws import Draw, generator_of


@pytest.mark.parametrize(
    ("draw", "number"),
    [
        *(("ORDER", 0), ("CLIP", 1), ("REPLACEMENT", 2), ("MIXTURE", 3)),
        *(("RAND_AUGMENT", 16), ("ERASE", 17), ("MIX", 18), ("DROP", 19)),
    ],
)
def test_a_draw_keeps_its_stream(draw, number):
    """Key (seed, draw), counter (0, epoch or step, sample, part): what resumed runs and caches of codes rely on."""
    bits = np.random.Philox(key=np.array([7, number], np.uint64), counter=np.array([0, 3, 5, 1], np.uint64))
    assert (generator_of(Draw[draw], 7, 3, 5, 1).random(4) == np.random.Generator(bits).random(4)).all()


def test_all_draws_are_pinned_and_missing_counters_are_zero():
    assert len(Draw) == 8  # add a new draw to the list above
    assert generator_of(Draw.CLIP, -1, 3).random() == generator_of(Draw.CLIP, 2**64 - 1, 3, 0, 0).random()
