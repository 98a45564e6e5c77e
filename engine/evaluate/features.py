"""Frozen features of labelled videos: one clip a video, all tokens visible, the encoder's outputs averaged."""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm import tqdm

from mam2.engine.data.loader import ClipLoader
from mam2.engine.model.mam2 import MAM2
from mam2.engine.model.videomae import VideoMAE


@torch.no_grad()
def extract_features(
    models: list[MAM2 | VideoMAE], loader: ClipLoader, *, progress: bool = True
) -> tuple[list[Tensor], Tensor]:
    """Mean-pooled encoder outputs of every video of a loader, for several models from one decoding.

    Returns one float32 [videos, D] for each model, on the CPU, and the labels int64 [videos].
    """
    device = next(models[0].parameters()).device
    features: list[list[Tensor]] = [[] for _ in models]
    labels = []
    for model in models:
        model.eval()
    for batch in tqdm(loader.evaluate(), desc="features", unit="batch", disable=None if progress else True):
        video = batch.clip.to(device).permute(0, 4, 1, 2, 3)
        for model, found in zip(models, features, strict=True):
            found.append(model.encode(video).float().mean(dim=1).cpu())
        labels.append(batch.label)
    return [torch.cat(found) for found in features], torch.cat(labels)
