"""Principal components of features with more values than fit into memory, and the linear probe of them.

n training and m test videos, F values per video, k components. The features are arrays of a disk (memory maps).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mam2.engine.evaluation.linear_probe import ProbeResult, linear_probe

COUNTS = (20, 40, 80, 160, 320)
"""Numbers of components to try; the best one in cross-validation on the training videos is used."""
MOST_VIDEOS = 4096
"""The components are those of at most this many training videos, evenly spaced in the list."""
CHUNK_BYTES = 64 * 2**20
"""Size of the part of these videos' features that is in memory at a time, in float32."""
LEAST_VARIANCE = 1e-6
"""Components with a smaller share of the largest one's variance are mostly rounding errors of float32, and left out."""
TINY = 1e-30


class Components(NamedTuple):
    train: Tensor
    """float32 [n, k], the largest variance first."""
    test: Tensor
    """float32 [m, k]."""


def principal_components(
    train: NDArray[np.floating],
    train_rows: NDArray[np.int64],
    test: NDArray[np.floating],
    test_rows: NDArray[np.int64],
    *,
    count: int = COUNTS[-1],
) -> Components:
    """Returns the first principal components of the training features, for training and test videos.

    The features [videos, F] are those of the videos of two lists, of which the rows [n] and [m] are used. k is at most
    `count`; fewer where the features have fewer. The arrays are read twice, in ranges of their columns, so
    that the memory holds `CHUNK_BYTES` of the videos that define the components, the same share of all videos, their
    products (at most `MOST_VIDEOS`² float64) and the result.
    """
    places = np.linspace(0, len(train_rows) - 1, min(len(train_rows), MOST_VIDEOS)).round().astype(np.int64)
    chosen = train_rows[places]
    columns = max(CHUNK_BYTES // (4 * len(chosen)), 1)
    ranges = [slice(start, start + columns) for start in range(0, train.shape[1], columns)]
    products = torch.zeros(len(chosen), len(chosen), dtype=torch.float64)
    for part in ranges:
        centered = _centered(train, chosen, part)[0]
        products += (centered @ centered.T).double()
    variances, vectors = torch.linalg.eigh(products)
    kept = max(min(int((variances > LEAST_VARIANCE * variances[-1]).sum()), count, len(chosen) - 1), 1)
    scaled = (vectors[:, -kept:].flip(1) / variances[-kept:].flip(0).clamp(min=TINY).sqrt()).float()
    found = Components(torch.zeros(len(train_rows), kept), torch.zeros(len(test_rows), kept))
    for part in ranges:
        centered, mean = _centered(train, chosen, part)
        axes = centered.T @ scaled
        for features, rows, into in ((train, train_rows, found.train), (test, test_rows, found.test)):
            for start in range(0, len(rows), len(chosen)):
                block = _part(features, rows[start : start + len(chosen)], part)
                into[start : start + len(chosen)] += (block - mean) @ axes
    return found


def probe_components(
    parts: Sequence[Components], train_labels: Tensor, test_labels: Tensor, held: Sequence[Tensor], device: torch.device
) -> tuple[ProbeResult, int]:
    """Runs `linear_probe` on the first k components of every part, concatenated; k is chosen like its penalty.

    held: parts of the training videos to hold out in turn, bool [n] each, from `folds`. A single one, of few groups,
        would often choose a wrong k.

    Returns the result and k, the components of each part.
    """
    most = max(part.train.shape[1] for part in parts)
    best: tuple[ProbeResult, int] | None = None
    for count in sorted({min(count, most) for count in COUNTS}):
        train, test = (torch.cat([rows[:, :count] for rows in side], 1).to(device) for side in zip(*parts, strict=True))
        here = [part.to(device) for part in held]
        result = linear_probe(train, train_labels.to(device), test, test_labels.to(device), here)
        if best is None or result.validated > best[0].validated:
            best = result, count
    assert best is not None
    return best


def _part(features: NDArray[np.floating], rows: NDArray[np.int64], columns: slice) -> Tensor:
    """Returns a range of columns of some rows in memory, float32."""
    return torch.from_numpy(features[:, columns][rows].astype(np.float32))


def _centered(features: NDArray[np.floating], rows: NDArray[np.int64], columns: slice) -> tuple[Tensor, Tensor]:
    """Returns these features less their mean, and the mean."""
    part = _part(features, rows, columns)
    mean = part.mean(0)
    return part - mean, mean
