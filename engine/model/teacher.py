"""The teacher of the target `latents`: a moving average of the encoder that sees the whole clip.

Its standardized features are what the appearance decoder predicts, as in V-JEPA (Bardes et al., arXiv 2404.08471: the
encoder's output, an L1 loss) and data2vec (Baevski et al., arXiv 2202.03555: an average over the last blocks). If
teacher and encoder agreed on the same features for every token, the loss would be 0 and nothing learned;
`rank_and_deviation` measures how far the features are from that collapse.

Shapes: B clips, T frames, N tokens, D the encoder's width.
"""

from __future__ import annotations

import copy
import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from mam2.engine.model.encoder import Encoder


def teacher_of(encoder: Encoder) -> Encoder:
    """Returns a copy of an encoder that no gradient changes."""
    return copy.deepcopy(encoder).requires_grad_(False)


@torch.no_grad()
def latent_targets(teacher: Encoder, video: Tensor, blocks: int) -> Tensor:
    """Returns the target of every token: video [B, C, T, H, W] -> float32 [B, N, D].

    The outputs of the teacher's last `blocks` blocks, the last one after its LayerNorm, are each standardized per token
    over D, then averaged.
    """
    index = torch.arange(len(teacher.positions), device=video.device).expand(len(video), -1)
    tokens = teacher.patch_embed(teacher.tokens(video, index)) + teacher.positions[index]
    outputs = []
    for block in teacher.blocks:
        tokens = block(tokens)
        outputs.append(tokens)
    outputs[-1] = teacher.norm(tokens)
    standardized = [F.layer_norm(output.float(), output.shape[-1:]) for output in outputs[-blocks:]]
    return functools.reduce(torch.add, standardized) / blocks


@torch.no_grad()
def move_teacher(teacher: Encoder, encoder: Encoder, share: Tensor) -> None:
    """Moves the teacher's weights towards the encoder's by `share`, a 0-d tensor on their device.

    A share of 0 changes no bit of it, if the encoder is finite.
    """
    for own, new in zip(teacher.parameters(), encoder.parameters(), strict=True):
        _local(own).lerp_(_local(new), share)


def momentum(first: float, last: float, progress: float) -> float:
    """Returns the teacher's momentum, linear from `first` to `last` over a run; progress: share of it, 0 to 1."""
    return first + (last - first) * progress


def rank_and_deviation(features: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the effective rank and the mean standard deviation of features [..., D] over all tokens, 0-d float32.

    The effective rank is the participation ratio of the covariance's eigenvalues, (Σλ)² / Σλ²: 1 if the features lie on
    a line, D if they spread evenly. Two sums over the covariance give it, without a decomposition, so that a CUDA graph
    can contain it. Features that are all the same have rank 0 and deviation 0.
    """
    with torch.autocast(features.device.type, enabled=False):
        centered = features.float().flatten(0, -2)
        centered = centered - centered.mean(0)
        covariance = centered.mT @ centered / len(centered)
        variances = covariance.diagonal()
        rank = variances.sum().square() / covariance.square().sum().clamp(min=torch.finfo(torch.float32).tiny)
        return rank, variances.clamp(min=0).sqrt().mean()


def _local(parameter: Tensor) -> Tensor:
    """Returns this process's shard of a parameter that FSDP2 has sharded; teacher and encoder are sharded alike."""
    own = parameter.detach()
    return own.to_local() if isinstance(own, DTensor) else own
