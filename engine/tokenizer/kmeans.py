"""k-means of vectors: it initializes the codes of a tokenizer, and of raw patches it is the baseline of a tokenizer."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 15
SEEDED_FROM = 32
"""Number of random vectors per center from which the initial centers are chosen."""
ROWS_AT_ONCE = 16384
"""Number of vectors that are compared with the centers at once."""


def kmeans(vectors: Tensor, count: int, generator: torch.Generator, *, rounds: int = ROUNDS) -> Tensor:
    """Returns centers [count, E] of vectors [M, E] float32.

    It starts with k-means++ (Arthur and Vassilvitskii 2007): each further center is a vector drawn with a probability
    proportional to its squared distance to the nearest center so far. A center without vectors moves to a vector drawn
    in the same way. generator: on the CPU; the only source of random numbers.
    """
    centers = _spread(vectors, count, generator)
    for _ in range(rounds):
        assigned = nearest_center(vectors, centers)
        sizes, sums = tally(vectors, assigned, count)
        far = draw(vectors, (vectors - centers[assigned]).square().sum(1), count, generator)
        centers = torch.where((sizes > 0)[:, None], sums / sizes.clamp(min=1)[:, None], far)
    return centers


def residual_kmeans(vectors: Tensor, count: int, depth: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Runs `depth` k-means one after the other, each of what the centers before it leave of the vectors [M, E].

    Returns:
        The centers [depth, count, E], and the number of vectors of each [depth, count].
    """
    centers, sizes = [], []
    for number in range(depth):
        centers.append(kmeans(vectors, count, generator))
        assigned = nearest_center(vectors, centers[-1])
        sizes.append(tally(vectors, assigned, count)[0])
        if number < depth - 1:
            vectors = vectors - centers[-1][assigned]
    return torch.stack(centers), torch.stack(sizes)


def nearest_sum(vectors: Tensor, centers: Tensor) -> Tensor:
    """Returns for vectors [M, E] the sums of the centers [D, V, E] that `residual_kmeans` would choose: [M, E]."""
    total = torch.zeros_like(vectors)
    for level in centers:
        total = total + level[nearest_center(vectors - total, level)]
    return total


def nearest_center(vectors: Tensor, centers: Tensor) -> Tensor:
    """Returns the nearest of the centers [V, E] for each vector [M, E], by Euclidean distance: int64 [M]."""
    norms = centers.square().sum(1)  # a vector's own norm is the same for every center
    return torch.cat([(norms - 2 * part @ centers.T).argmin(1) for part in vectors.split(ROWS_AT_ONCE)])


def tally(vectors: Tensor, assigned: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns the number of vectors of each of `count` centers [V], and their sums [V, E]. assigned: int64 [M]."""
    sizes, sums = vectors.new_zeros(count), vectors.new_zeros(count, vectors.shape[1])
    if vectors.device.type == "cpu":  # adds in the order of the vectors, and is 90 times as fast as the product
        return sizes.index_add_(0, assigned, vectors.new_ones(len(vectors))), sums.index_add_(0, assigned, vectors)
    for part, to in zip(vectors.split(ROWS_AT_ONCE), assigned.split(ROWS_AT_ONCE), strict=True):
        one_hot = torch.nn.functional.one_hot(to, count).to(vectors.dtype)  # a product repeats bit for bit on a GPU
        sizes += one_hot.sum(0)
        sums += one_hot.T @ part
    return sizes, sums


def draw(vectors: Tensor, distances: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draws `count` vectors of [M, E] with probabilities proportional to the squared distances [M] to their centers."""
    reach = _running_sums(distances.double() + 1e-12)
    drawn = torch.rand(count, generator=generator, dtype=torch.float64).to(vectors.device)
    return vectors[torch.searchsorted(reach, drawn * reach[-1]).clamp(max=len(vectors) - 1)]


def _running_sums(values: Tensor) -> Tensor:
    """Returns the sums of values [M] up to each, float64 and ascending.

    On a GPU they are sums of integers, in units of 2^-60 of the whole: those of floats differ from call to call there,
    and torch refuses them if it may only be deterministic.
    """
    if values.device.type == "cpu":
        return values.cumsum(0)
    return (values / values.sum() * 2.0**60).long().cumsum(0).double()


def _spread(vectors: Tensor, count: int, generator: torch.Generator) -> Tensor:
    order = torch.randperm(len(vectors), generator=generator)[: SEEDED_FROM * count]
    some = vectors[order.to(vectors.device)]
    norms = some.square().sum(1)
    centers = [some[:1]]
    distances = (norms + norms[0] - 2 * (some @ some[0])).clamp(min=0)
    for _ in range(1, count):
        center = draw(some, distances, 1, generator)
        centers.append(center)
        # |a − b|² from norms: one product instead of a copy of all differences
        distances = torch.minimum(distances, (norms + center.square().sum() - 2 * (some @ center[0])).clamp(min=0))
    return torch.cat(centers)
