"""Named random draws: one counter-based generator (Philox) per draw, independent of earlier draws."""

from __future__ import annotations

from enum import IntEnum, unique

import numpy as np


@unique
class Draw(IntEnum):
    """The kinds of draws. The numbers are part of every run's random state: none may change or be used twice."""

    ORDER = 0
    """The order of the videos in an epoch."""
    CLIP = 1
    """Frames and crops of a clip."""
    REPLACEMENT = 2
    """The replacement of a video that cannot be decoded."""
    MIXTURE = 3
    """The order of the data sets in a block of samples."""
    RAND_AUGMENT = 16
    ERASE = 17
    MIX = 18
    DROP = 19
    """Stochastic depth, and dropout of features."""


def generator_of(draw: Draw, seed: int, *counter: int) -> np.random.Generator:
    """Returns the generator of one draw: equal arguments give equal numbers, other arguments independent ones.

    counter: at most three numbers of at least 0 that identify the draw, an epoch or step first; missing ones are 0.
    """
    # Philox increments the first counter word with every number drawn.
    words = np.zeros(4, np.uint64)
    words[1 : 1 + len(counter)] = counter
    return np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, draw], np.uint64), counter=words))
