"""k-means of vectors: it places the codes of a tokenizer, and codes of raw patches are what a tokenizer has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 15
SEEDED_FROM = 32
"""Vectors per center, drawn at random, among which the first centers are chosen."""
ROWS_AT_ONCE = 16384
"""Vectors that are compared with the centers at once."""


def kmeans(vectors: Tensor, count: int, generator: torch.Generator, *, rounds: int = ROUNDS) -> Tensor:
    """Centers of vectors [M, E] float32: [count, E].

    Starts from k-means++ (Arthur and Vassilvitskii 2007): each further center is a vector drawn with a probability
    proportional to its squared distance to the nearest center so far. A center that no vector is nearest to moves to a
    vector drawn in the same way. generator: on the CPU; decides all that is random.
    """
    centers = _spread(vectors, count, generator)
    for _ in range(rounds):
        assigned = nearest_center(vectors, centers)
        sizes, sums = tally(vectors, assigned, count)
        far = draw(vectors, (vectors - centers[assigned]).square().sum(1), count, generator)
        centers = torch.where((sizes > 0)[:, None], sums / sizes.clamp(min=1)[:, None], far)
    return centers


def nearest_center(vectors: Tensor, centers: Tensor) -> Tensor:
    """Of each vector [M, E] the nearest center [V, E], by Euclidean distance: int64 [M]."""
    norms = centers.square().sum(1)  # a vector's own norm is the same for every center
    return torch.cat([(norms - 2 * part @ centers.T).argmin(1) for part in vectors.split(ROWS_AT_ONCE)])


def tally(vectors: Tensor, assigned: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """How many vectors each of `count` centers has [V], and their sums [V, E]. assigned: int64 [M]."""
    sizes, sums = vectors.new_zeros(count), vectors.new_zeros(count, vectors.shape[1])
    for part, to in zip(vectors.split(ROWS_AT_ONCE), assigned.split(ROWS_AT_ONCE), strict=True):
        one_hot = torch.nn.functional.one_hot(to, count).to(vectors.dtype)  # a product repeats bit for bit on a GPU
        sizes += one_hot.sum(0)
        sums += one_hot.T @ part
    return sizes, sums


def draw(vectors: Tensor, distances: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` vectors of [M, E], each with a probability proportional to its squared distance [M] to its center."""
    reach = (distances.double() + 1e-12).cumsum(0)
    drawn = torch.rand(count, generator=generator, dtype=torch.float64).to(vectors.device)
    return vectors[torch.searchsorted(reach, drawn * reach[-1]).clamp(max=len(vectors) - 1)]


def _spread(vectors: Tensor, count: int, generator: torch.Generator) -> Tensor:
    order = torch.randperm(len(vectors), generator=generator)[: SEEDED_FROM * count]
    some = vectors[order.to(vectors.device)]
    centers = [some[:1]]
    distances = (some - some[0]).square().sum(1)
    for _ in range(1, count):
        centers.append(draw(some, distances, 1, generator))
        distances = torch.minimum(distances, (some - centers[-1]).square().sum(1))
    return torch.cat(centers)
