"""The order of the samples of a run over one or several data sets: a pure function of (seed, number of the sample).

Without weights the videos of all sets form one list, which is shuffled again for every pass. With weights the stream is
divided into blocks of equal length. Every block contains the same number of samples of each set, in a random order of
its own, so that the shares of the sets are exact after every block. Each set continues through its own shuffled passes,
and shows every video once per pass.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from mam2.engine.data.draws import Draw, generator_of
from mam2.engine.data.sampling import replacement, shuffled

MOST_BLOCK = 2**16
"""Maximum number of samples of a block; weights that would need longer blocks are rounded to this resolution."""


def samples_per_block(weights: Sequence[float]) -> list[int]:
    """Returns the samples of each set in a block: the smallest whole numbers in the proportion of the weights.

    (3, 1) gives 3 and 1, (0.7, 0.3) gives 7 and 3. At least 1 per set. weights: positive numbers.
    """
    exact = [Fraction(str(float(weight))) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    if sum(whole) // math.gcd(*whole) > MOST_BLOCK:
        whole = [max(round(weight / sum(exact) * MOST_BLOCK), 1) for weight in exact]
    divisor = math.gcd(*whole)
    return [count // divisor for count in whole]


class SampleOrder:
    """Which video each sample shows. A video is given by its place in the joined list of all sets, from 0."""

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        """sizes: videos of each set, at least 1.

        weights: shares of the sets in the samples, positive, one per set; empty: every video equally often.
        """
        self._ends = list(accumulate(sizes))
        self._seed = seed
        self._block_counts = np.array(samples_per_block(weights)) if weights else np.empty(0, np.int64)
        self._lists = list(sizes) if weights else [self._ends[-1]]
        self.sizes = tuple(sizes)
        """Videos of each set."""
        # a batch may span the end of a pass, and the streams of a loader are at different places
        self._pass = functools.lru_cache(maxsize=2 * len(self._lists) + 2)(self._shuffle)
        self._block = functools.lru_cache(maxsize=4)(self._draw_block)

    @property
    def shares(self) -> list[float]:
        """Share of each set in the samples; the sum is 1."""
        counts = self._block_counts if len(self._block_counts) else np.array(self.sizes)
        return (counts / counts.sum()).tolist()

    def at(self, counter: int) -> tuple[int, int]:
        """Returns the pass of its list, from 0, and the video of sample `counter`."""
        number, rank = (0, counter) if not len(self._block_counts) else self._list_and_rank(counter)
        epoch, place = divmod(rank, self._lists[number])
        first = self._ends[number - 1] if number else 0
        return epoch, first + int(self._pass(number, epoch)[place])

    def replacement(self, video: int, epoch: int, attempt: int) -> int:
        """Draws the video of the same set that replaces one that cannot be decoded, at attempt 1, 2, …"""
        number = bisect_right(self._ends, video)
        first = self._ends[number - 1] if number else 0
        return first + replacement(video, self.sizes[number], epoch, self._seed, attempt)

    def seen(self, samples: int) -> list[int]:
        """Returns how many of the first `samples` samples show a video of each set."""
        sets = len(self.sizes)
        if not len(self._block_counts):
            epoch, place = divmod(samples, self._ends[-1])
            part = np.searchsorted(self._ends, self._pass(0, epoch)[:place], side="right")
            return (epoch * np.array(self.sizes) + np.bincount(part, minlength=sets)).tolist()
        block, place = divmod(samples, int(self._block_counts.sum()))
        part = self._block(block)[0][:place]
        return (block * self._block_counts + np.bincount(part, minlength=sets)).tolist()

    def _list_and_rank(self, counter: int) -> tuple[int, int]:
        """Returns the set of a sample, and the number of earlier samples of this set."""
        block, place = divmod(counter, int(self._block_counts.sum()))
        numbers, ranks = self._block(block)
        number = int(numbers[place])
        return number, block * int(self._block_counts[number]) + int(ranks[place])

    def _draw_block(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns the set of each sample of a block, and the number of the set's earlier samples in the block."""
        counts = self._block_counts
        numbers = np.repeat(np.arange(len(counts)), counts)
        numbers = generator_of(Draw.MIXTURE, self._seed, block).permutation(numbers)
        ranks = np.empty_like(numbers)
        for number, count in enumerate(counts):
            ranks[numbers == number] = np.arange(count)
        return numbers, ranks

    def _shuffle(self, number: int, epoch: int) -> NDArray[np.int64]:
        return shuffled(self._lists[number], self._seed, epoch, number)
