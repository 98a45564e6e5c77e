"""The masks' generator on the host, and masks drawn with it on a CPU in NumPy.

`draw_mask` and `draw_subset` return bit for bit what `draw_mask` and `masked_subset` of reference_masks.py define, in
fewer passes. The arrays of a mask are so small that the number of operations counts more than their size: a round of
Philox takes three, and one partial sort replaces three sorts. PyTorch has no product of 32-bit words, with which a
round would take twelve.

B clips, n positions.
"""

import functools
import sys
from collections.abc import Sequence

import numpy as np
import torch

PHILOX_ROUNDS = 10
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF

POSITION_BITS = 23
"""Bits of a position in a rank; the key is above them."""
LOW = int(sys.byteorder == "big")
"""Place of the low word in a 64-bit number seen as two 32-bit words."""
_MULTIPLIERS = np.array(PHILOX_MULTIPLIERS, dtype=np.uint64).reshape(2, 1, 1)


@functools.lru_cache(maxsize=64)
def _round_keys(seed: int) -> np.ndarray:
    """Returns the keys of all rounds [rounds,2,1,1] uint32."""
    words = seed & WORD, (seed >> 32) & WORD
    pairs = list(zip(words, PHILOX_WEYL, strict=True))
    keys = [[(word + turn * weyl) & WORD for word, weyl in pairs] for turn in range(PHILOX_ROUNDS)]
    return np.array(keys, dtype=np.uint32).reshape(PHILOX_ROUNDS, 2, 1, 1)


def philox(seed: int, counter: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the first word [B,n] uint32 of Philox4x32-10 (Salmon et al. 2011).

    `counter` holds 4 int64 arrays that broadcast to [B,n]; the lowest 32 bits of each count. The key is the lowest 64
    bits of `seed`. The state is two arrays [2,B,n]: words 0 and 2, which are multiplied, and words 1 and 3.
    """
    shape = 2, *np.broadcast(*counter).shape
    keys = _round_keys(seed)
    multiplied, other, product = np.empty(shape, np.uint32), np.empty(shape, np.uint32), np.empty(shape, np.uint64)
    multiplied[0], other[0], multiplied[1], other[1] = counter
    other ^= keys[0]
    words = product.view(np.uint32).reshape(*shape, 2)[::-1]  # the products change places
    high, low = words[..., 1 - LOW], words[..., LOW]
    for key in keys[1:]:
        np.multiply(multiplied, _MULTIPLIERS, out=product)
        np.bitwise_xor(high, other, out=multiplied)
        np.bitwise_xor(low, key, out=other)
    return (multiplied[1] * _MULTIPLIERS[1, 0] >> np.uint64(32)).astype(np.uint32) ^ other[0]


def position_keys(seed: int, first_sample: int, batch: int, positions: int, step: int) -> np.ndarray:
    """Returns the random keys [B,n] uint32 of positions 0 to n−1 of samples first_sample to first_sample + B − 1.

    The key of (sample, position) is Philox of the counter (position, sample low word, sample high word, step).
    """
    sample = np.arange(first_sample, first_sample + batch)[:, None]
    return philox(seed, (np.arange(positions)[None, :], sample, sample >> 32, np.array([[step]])))


def motion_order(keys: np.ndarray, energy: np.ndarray, strength: int) -> np.ndarray:
    """Returns `reference_masks.motion_order` of keys [B,n] and energies [B,slots,n]."""
    total = energy.sum(axis=1, dtype=np.float64)
    mean = total.mean(axis=1, keepdims=True)
    mean[mean <= 0] = 1.0  # a static clip: equal weights
    weight = np.maximum(total * (strength / mean) + (65536 - strength), 2.0**-24)
    wait = -np.log((2**33 - 1 - 2 * keys.astype(np.int64)) * 2.0**-33)
    return ((np.log(wait) - np.log(weight) + 64) * 2.0**33).astype(np.int64)


def draw_mask(
    step: torch.Tensor,
    seed: int,
    first_sample: int,
    batch: int,
    slots: int,
    positions: int,
    hidden: int,
    energy: torch.Tensor | None,
    strength: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `reference_masks.draw_mask` of the same arguments; all tensors are on the CPU."""
    keys = position_keys(seed, first_sample, batch, positions, int(step))
    if energy is not None:
        keys = motion_order(keys, energy.detach().numpy().reshape(batch, slots, positions), strength)
    # key and position in one number: all distinct, so that the `hidden` smallest are well defined
    rank = (keys.astype(np.int64) << POSITION_BITS) | np.arange(positions)
    threshold = np.partition(rank, hidden - 1, axis=1)[:, hidden - 1 : hidden]
    is_hidden = rank <= threshold
    return _tokens(~is_hidden, slots, positions - hidden), _tokens(is_hidden, slots, hidden)


@functools.lru_cache(maxsize=16)
def _turns(grid: tuple[int, int, int]) -> np.ndarray:
    """Returns place − slot of every token [N], see masked_subset.py."""
    slot, row, column = np.indices(grid, sparse=True)
    return np.asarray(np.where(row % 2 == 0, column % 2, 3 - column % 2) - slot).reshape(-1)


def draw_subset(
    masked: torch.Tensor, step: torch.Tensor, grid: Sequence[int], count: int, by_cell: bool, seed: int, sample: int
) -> torch.Tensor:
    """Returns `reference_masks.masked_subset` of the same arguments; all tensors are on the CPU."""
    tokens, number = masked.numpy(), int(step)
    clips = np.arange(sample, sample + len(tokens))[:, None]
    rank = philox(seed, (tokens, clips, clips >> 32, np.array([[number]]))).astype(np.int64)
    if by_cell:
        slots, rows, columns = grid
        rank |= ((_turns((slots, rows, columns))[tokens] - number - clips) & 3) << 32
    rank = (rank << POSITION_BITS) | np.arange(tokens.shape[1])
    threshold = np.partition(rank, count - 1, axis=1)[:, count - 1 : count]
    return torch.from_numpy(tokens[rank <= threshold].reshape(len(tokens), count))


def _tokens(chosen: np.ndarray, slots: int, count: int) -> torch.Tensor:
    """Returns the tokens [B,slots·count] of the `count` chosen positions of each row of chosen [B,n], ascending."""
    batch, positions = chosen.shape
    starts = np.arange(0, slots * positions, positions) - np.arange(0, batch * positions, positions)[:, None]
    tokens = np.flatnonzero(chosen).reshape(batch, 1, count) + starts[:, :, None]
    return torch.from_numpy(tokens.reshape(batch, slots * count))
