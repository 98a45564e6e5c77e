"""Attentive probe: learned queries attend to the frozen tokens of a video, and a linear layer predicts the class.

As in CAE's and V-JEPA's probes, one cross-attention over the tokens replaces their mean; it is trained by AdamW. Each
group of tokens (pools.py) has one query. n videos, K cells of tokens per video, R groups, D the encoder's width, V
classes.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mam2.engine.model.blocks import initialize, layer_norm

HEAD_WIDTH = 32
"""Maximum values per attention head."""
BATCH = 128
"""Videos per step, or all if there are fewer."""
EPOCHS = 20
FEWEST_STEPS = 300
"""Minimum number of steps; for a small training set these are more than `EPOCHS` epochs."""
WARM_UP = 0.1
"""Share of the steps with a linear warm-up of the learning rate; a cosine decay follows."""
WEIGHT_DECAY = 0.01
RATES = (3e-4, 3e-3)
"""Peak learning rates to try; the better one on a held-out fifth of the training videos is used."""
CHUNK = 512


class AttentiveProbe(nn.Module):
    """Maps tokens [B, K, D] to logits [B, V]; each group of tokens has its own query."""

    mean: Tensor
    std: Tensor
    groups: Tensor

    def __init__(self, mean: Tensor, std: Tensor, groups: Tensor, classes: int) -> None:
        """mean, std: [D] of the training tokens, for their standardization. groups: bool [R, K], none empty."""
        super().__init__()
        width, asked = len(mean), len(groups)
        self.heads = max(heads for heads in range(1, width // min(HEAD_WIDTH, width) + 1) if width % heads == 0)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.register_buffer("groups", groups)
        self.query = nn.Parameter(torch.randn(1, asked, width) * 0.02)
        self.keys, self.values = nn.Linear(width, width, bias=False), nn.Linear(width, width)
        self.norm = layer_norm(width)
        self.head = nn.Linear(asked * width, classes)
        initialize(self)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = (tokens.float() - self.mean) / self.std
        queries = self.query.expand(len(tokens), -1, -1)
        q, k, v = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (queries, self.keys(tokens), self.values(tokens))
        )
        answers = F.scaled_dot_product_attention(q, k, v, attn_mask=self.groups)  # [B, heads, R, D / heads]
        return self.head(self.norm(answers.transpose(1, 2).flatten(2)).flatten(1))


def attentive_probe(
    train: NDArray[np.floating],
    train_labels: Tensor,
    test: NDArray[np.floating],
    held: Tensor,
    classes: int,
    device: torch.device,
    groups: Tensor | None = None,
) -> tuple[Tensor, float]:
    """Returns the predictions of an attentive probe, int64 [m] on the CPU, and the chosen learning rate.

    Args:
        train, test: [n, K, D] and [m, K, D], possibly memory-mapped; they are read in batches.
        train_labels: int64 [n], 0 to V - 1.
        held: bool [n], held-out training videos that choose the learning rate; the final probe is trained on them too.
        groups: bool [R, K], from `token_groups`; None: one group of all tokens.
    """
    mean, std = _statistics(train)
    everything = torch.arange(len(train))
    groups = torch.ones(1, train.shape[1], dtype=torch.bool) if groups is None else groups

    def fit(rows: Tensor, rate: float) -> AttentiveProbe:
        torch.manual_seed(0)
        probe = AttentiveProbe(mean, std, groups, classes).to(device)
        optimizer = torch.optim.AdamW(probe.parameters(), lr=rate, weight_decay=WEIGHT_DECAY)
        batch = min(BATCH, len(rows))
        steps = max(FEWEST_STEPS, EPOCHS * len(rows) // batch)
        generator = torch.Generator().manual_seed(0)
        epochs = -(-steps * batch // len(rows))
        order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(epochs)])
        for step in range(steps):
            warm = (step + 1) / (WARM_UP * steps)
            scale = min(warm, 0.5 * (1 + math.cos(math.pi * step / steps)))
            optimizer.param_groups[0]["lr"] = rate * scale
            picked = rows[order[step * batch : (step + 1) * batch]]
            loss = F.cross_entropy(probe(_rows(train, picked, device)), train_labels[picked].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return probe.eval()

    def held_out_accuracy(rate: float) -> float:
        right = _answers(fit(everything[~held], rate), train, everything[held], device) == train_labels[held]
        return float(right.double().mean())

    rate = max(RATES, key=held_out_accuracy)
    return _answers(fit(everything, rate), test, torch.arange(len(test)), device), rate


@torch.no_grad()
def _answers(probe: AttentiveProbe, tokens: NDArray[np.floating], rows: Tensor, device: torch.device) -> Tensor:
    return torch.cat([probe(_rows(tokens, part, device)).argmax(1).cpu() for part in rows.split(CHUNK)])


def _rows(tokens: NDArray[np.floating], rows: Tensor, device: torch.device) -> Tensor:
    return torch.from_numpy(tokens[rows.numpy()]).to(device)


def _statistics(tokens: NDArray[np.floating]) -> tuple[Tensor, Tensor]:
    """Returns mean and standard deviation of each of the D values over all tokens, float32 [D]."""
    count, total, squares = 0, 0.0, 0.0
    for start in range(0, len(tokens), CHUNK):
        part = tokens[start : start + CHUNK].astype(np.float64)
        count += part.shape[0] * part.shape[1]
        total, squares = total + part.sum((0, 1)), squares + np.square(part).sum((0, 1))
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - np.square(mean), 0)) + 1e-6
    return torch.as_tensor(mean).float(), torch.as_tensor(std).float()
