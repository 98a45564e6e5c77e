"""A classifier: a pre-trained encoder with a classification head.

Shapes: B clips, T frames, D width, V classes, E values per text embedding. VideoMAE's head: the mean over all tokens
without the encoder's final LayerNorm, then a new LayerNorm and a linear layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mam2.engine.config.finetune import HeadTask
from mam2.engine.model.blocks import VideoTransformer, layer_norm
from mam2.engine.model.encoder import Encoder

HEAD_SCALE = 0.001
"""Scale of the linear head's initial weights (VideoMAE's `init_scale`).

First steps change the encoder only a little.
"""

LEAST_DEVIATION = 0.01
"""Smallest standard deviation of a feature that `standardize_features` divides by; their mean square is 1."""


class Classifier(VideoTransformer):
    """Encoder, mean over tokens, LayerNorm, head.

    Args:
        encoder: used without a copy; its final LayerNorm is replaced by the identity.
        head: [B, D] -> logits [B, V]; `linear_head` or a `TextHead`.
        task: what the logits are of: one class per video, several, or a number to predict.
    """

    def __init__(self, encoder: Encoder, head: nn.Module, task: HeadTask = "classes") -> None:
        super().__init__()
        self.task: HeadTask = task
        self.encoder = encoder
        self.encoder.norm = nn.Identity()  # type: ignore[assignment]
        self.norm = layer_norm(encoder.width)
        self.head = head

    def forward(self, video: Tensor, path_scales: Tensor | None = None, feature_scales: Tensor | None = None) -> Tensor:
        """Returns logits [B, V], float32.

        Args:
            video: [B, C, T, H, W], uint8 (0 to 255) or float (0 to 1), any strides.
            path_scales: [depth, 2, B] for stochastic depth, see `mam2.engine.model.blocks.Block`.
            feature_scales: [B, D], factors of the features before the head, for dropout; drawn outside.
        """
        features = self.norm(self.encoder.encode(video, path_scales).mean(1))
        if feature_scales is not None:
            features = features * feature_scales
        if self.task == "regression":
            # bfloat16 would round a value in its own units to three digits
            head = self.head
            assert isinstance(head, nn.Linear)
            with torch.autocast(features.device.type, enabled=False):
                return F.linear(features.float(), head.weight.float(), head.bias.float())
        return self.head(features).float()

    def scores(self, logits: Tensor) -> Tensor:
        """Maps logits [..., V] to float64 probabilities of the classes; in regression they are the values already."""
        logits = logits.double()
        if self.task == "multi-label":
            return logits.sigmoid()
        return logits.softmax(-1) if self.task == "classes" else logits


def in_units(model: Classifier, mean: float, std: float) -> None:
    """Changes a regression head that predicts standardized values to one that predicts them in their own units."""
    head = model.head
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.weight.mul_(std)
        head.bias.mul_(std).add_(mean)


def train_only_last(model: Classifier, blocks: int) -> None:
    """Freezes patch embedding and blocks of a classifier's encoder, except the last `blocks`; -1 freezes nothing.

    What is frozen runs without autograd: nothing in it, and none of its inputs, requires a gradient.
    """
    if blocks < 0:
        return
    encoder = model.encoder
    frozen = len(encoder.blocks) - blocks
    encoder.patch_embed.requires_grad_(False)
    encoder.blocks[:frozen].requires_grad_(False)


def linear_head(width: int, classes: int) -> nn.Linear:
    """Returns a linear head: weights normal with standard deviation 0.02 · `HEAD_SCALE`, zero bias."""
    head = nn.Linear(width, classes)
    nn.init.trunc_normal_(head.weight, std=0.02)
    with torch.no_grad():
        head.weight.mul_(HEAD_SCALE)
    nn.init.zeros_(head.bias)
    return head


@torch.no_grad()
def pooled_features(model: Classifier, videos: Iterable[Tensor]) -> Tensor:
    """Returns the mean token of clips, the input of the LayerNorm before the head: [clips, D] float32 on the CPU.

    videos: [B, 3, T, H, W] each, as of `Classifier.forward`. No path is dropped, and `model` keeps its mode.
    """
    training = model.training
    model.eval()
    pooled = torch.cat([model.encoder.encode(video).float().mean(1).cpu() for video in videos])
    model.train(training)
    return pooled


@torch.no_grad()
def standardize_features(model: Classifier, pooled: Tensor) -> float:
    """Sets a classifier's LayerNorm so that each of its outputs has mean 0 and variance 1 over some clips.

    After an early stage of pre-training, most of the pooled features is the same for every clip, and a head on them
    learns slowly.

    Args:
        pooled: [two or more, D] from `pooled_features`.

    Returns:
        The share of the features' mean square that differs between the clips, 0 to 1.
    """
    norm = model.norm
    assert norm.bias is not None
    features = F.layer_norm(pooled.double(), norm.normalized_shape, eps=norm.eps)
    variance, mean = torch.var_mean(features, 0, correction=0)
    deviation = variance.sqrt().clamp(min=LEAST_DEVIATION)
    norm.weight.copy_(1 / deviation)
    norm.bias.copy_(-mean / deviation)
    return float(variance.sum() / features.square().mean(0).sum().clamp(min=1e-12))


def logits_of(model: Classifier) -> int:
    """Returns the number of classes of a classifier."""
    head = model.head
    rows = head.embeddings if isinstance(head, TextHead) else head.weight
    assert isinstance(rows, Tensor)
    return len(rows)


class TextHead(nn.Module):
    """Head for named classes: the similarity of a clip to the text embedding of each name.

    As in "Revisiting Classifier" (Wu, Sun, Ouyang, arXiv 2207.01297), the classifier's rows are text embeddings, and
    logits are cosines divided by a learned temperature. There, video and text encoder share a space; here a learned
    projection maps the features to the text embeddings' space.
    """

    def __init__(self, width: int, embeddings: Tensor, *, temperature: float = 0.01, frozen: bool = True) -> None:
        """embeddings: [V, E] float. temperature: initial value; CLIP's is 0.01. frozen: do not train the embeddings."""
        super().__init__()
        self.projection = nn.Linear(width, embeddings.shape[1])
        nn.init.trunc_normal_(self.projection.weight, std=width**-0.5)
        nn.init.zeros_(self.projection.bias)
        self.embeddings = nn.Parameter(embeddings.detach().clone().float(), requires_grad=not frozen)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))

    def forward(self, features: Tensor) -> Tensor:
        """Maps features [B, D] to logits [B, V]."""
        projected = F.normalize(self.projection(features).float(), dim=-1)
        # float32 everywhere: a hundredth of a cosine is a whole logit
        with torch.autocast(features.device.type, enabled=False):
            cosines = projected @ F.normalize(self.embeddings, dim=-1).T
        return self.log_scale.exp() * cosines
