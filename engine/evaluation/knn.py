"""k nearest neighbors on frozen features. n training and m test videos, D values, V classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBORS = 20
TEMPERATURE = 0.07
"""Both are DINO's (Caron et al. 2021, after Wu et al. 2018): a neighbor's vote is exp(cosine / temperature)."""
CHUNK = 1024


def knn(train: Tensor, train_labels: Tensor, test: Tensor) -> Tensor:
    """Returns the class with most votes among the nearest training features: [n, D], int64 [n], [m, D] -> int64 [m].

    The training features' mean is subtracted before cosines are computed, because the common part carries no
    information. With fewer than `Neighbors` training videos, all vote.
    """
    mean = train.float().mean(0)
    train, test = (F.normalize(features.float() - mean, dim=1) for features in (train, test))
    votes_of = F.one_hot(train_labels).float()
    answers = []
    for part in test.split(CHUNK):
        cosines, nearest = (part @ train.T).topk(min(NEIGHBORS, len(train)), dim=1)
        votes = (cosines / TEMPERATURE).exp()[..., None] * votes_of[nearest]
        answers.append(votes.sum(1).argmax(1))
    return torch.cat(answers)
