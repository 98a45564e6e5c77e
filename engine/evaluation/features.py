"""Frozen features of labeled videos: one clip per video, all tokens visible, averaged outputs of the encoder."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from mam2.engine.data.loader import ClipLoader
from mam2.engine.model.encoder import Encoder
from mam2.engine.model.mam2 import MAM2
from mam2.engine.model.videomae import VideoMAE
from mam2.engine.runtime.progress import Progress


@torch.no_grad()
def extract_features(
    models: list[MAM2 | VideoMAE], loader: ClipLoader, *, progress: bool = True
) -> tuple[list[Tensor], Tensor]:
    """Computes mean-pooled encoder outputs of every video of a loader, for several models with one decoding.

    Returns one float32 [videos, D] per model, on the CPU, and the labels int64 [videos].
    """
    device = next(models[0].parameters()).device
    features: list[list[Tensor]] = [[] for _ in models]
    labels = []
    for model in models:
        model.eval()
    bar = Progress(loader.evaluate(), "features", loader.evaluated_batches, unit="batch", shown=progress)
    for batch in bar:
        video = batch.video.to(device)
        for model, found in zip(models, features, strict=True):
            found.append(model.encode(video).float().mean(dim=1).cpu())
        labels.append(batch.label)
    return [torch.cat(found) for found in features], torch.cat(labels)


def layer_tokens(encoder: Encoder, video: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
    """Returns every token after each of the given blocks, from one pass: video [B, 3, T, H, W] -> [B, N, D] per layer.

    layers: numbers from 1. The tokens of the last block are the encoder's output, after its final LayerNorm.
    """
    depth = len(encoder.blocks)
    if not all(1 <= layer <= depth for layer in layers):
        raise ValueError(f"layers: expected numbers from 1 to {depth}, the encoder's blocks, found {list(layers)}")
    tokens: dict[int, Tensor] = {}
    with ExitStack() as hooks:
        for layer in set(layers) - {depth}:

            def keep(_module: object, _inputs: object, output: Tensor, layer: int = layer) -> None:
                tokens[layer] = output

            hooks.callback(encoder.blocks[layer - 1].register_forward_hook(keep).remove)
        tokens[depth] = encoder.encode(video)
    return tokens
