"""Random draws with a name: one counter-based generator (Philox) for each draw, whatever was drawn before."""

from __future__ import annotations

from enum import IntEnum, unique

import numpy as np


@unique
class Draw(IntEnum):
    """What is drawn. The numbers are part of every run's random state: none may change or be used twice."""

    ORDER = 0
    """The order of the videos in an epoch."""
    CLIP = 1
    """Frames and crops of a clip."""
    REPLACEMENT = 2
    """The video shown instead of one that cannot be decoded."""
    RAND_AUGMENT = 16
    ERASE = 17
    MIX = 18
    DROP = 19
    """Stochastic depth, and dropout of features."""


def generator_of(draw: Draw, seed: int, *counter: int) -> np.random.Generator:
    """Returns the generator of one draw: equal arguments give equal numbers, and others independent ones.

    counter: at most three numbers of at least 0 that name the draw, an epoch or step first; missing ones are 0.
    """
    # Philox increments the first counter word with every number drawn.
    words = np.zeros(4, np.uint64)
    words[1 : 1 + len(counter)] = counter
    return np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, draw], np.uint64), counter=words))
