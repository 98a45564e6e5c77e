"""Frozen features of clips, all tokens visible. Every probe, embedding and retrieval computes its features here.

Shapes: B clips, T'×H'×W' the token grid, N tokens, D the encoder's width, R groups of tokens (pools.py), K = T'·k·k
cells.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mam2.engine.config.training import RunConfig
from mam2.engine.evaluation.pools import Pool, pool_tokens
from mam2.engine.model.encoder import Encoder
from mam2.engine.runtime.device import autocast

CELLS = 4
"""For the attentive probe, tokens are averaged over this many rows and columns of cells per slot. A clip of 16 frames
of 224² then takes 0.2 MB in float16 at a width of 768; all its tokens would take 2.4 MB."""
FeatureKind = Pool | Literal["cells", "tokens"]
"""A pool; `cells`: means of areas of a slot; `tokens`: all tokens, concatenated."""
Kind = TypeVar("Kind", bound=FeatureKind)


def extract_features(
    encoder: Encoder, clips: Iterable[Tensor], kinds: Sequence[Kind], *, run: RunConfig
) -> dict[Kind, Tensor]:
    """Computes features of the last layer for batches of clips, from any source.

    Args:
        encoder: is switched to evaluation mode.
        clips: at least one batch, uint8 [B, C, T, H, W], on any device.
        kinds: each of `clip_features`.
        run: contains the precision of the encoder.

    Returns:
        The features of all clips by kind, in the order of the clips, on the CPU.
    """
    encoder.eval()
    last = len(encoder.blocks)
    wanted = [(last, kind) for kind in kinds]
    parts = [clip_features(encoder, video, wanted, run=run) for video in clips]
    return {kind: torch.cat([part[last, kind] for part in parts]) for kind in kinds}


@torch.no_grad()
def clip_features(
    encoder: Encoder, video: Tensor, wanted: Collection[tuple[int, Kind]], *, run: RunConfig
) -> dict[tuple[int, Kind], Tensor]:
    """Computes features of one batch of clips, uint8 [B, C, T, H, W], with one forward pass.

    Args:
        encoder: in evaluation mode.
        video: clips on any device.
        wanted: layers, from 1, and what to compute of their tokens: a pool, which gives float32 [B, R·D], `cells`,
            which gives float16 [B, K, D], or `tokens`, which gives float16 [B, N·D].
        run: contains the precision of the encoder.

    Returns:
        The features by layer and kind, on the CPU.

    Raises:
        ValueError: the encoder has no such layer.
    """
    device = encoder.positions.device
    with autocast(run, device):
        tokens = layer_tokens(encoder, video.to(device), [layer for layer, _ in wanted])
        return {(layer, kind): _reduced(tokens[layer], encoder.grid, kind).cpu() for layer, kind in wanted}


def _reduced(tokens: Tensor, grid: tuple[int, int, int], kind: FeatureKind) -> Tensor:
    if kind == "tokens":
        return tokens.flatten(1).half()
    if kind != "cells":
        return pool_tokens(tokens, grid, kind).flatten(1)
    slots, height, width = grid
    maps = rearrange(tokens.float(), "b (t h w) d -> (b t) d h w", t=slots, h=height, w=width)
    cells = F.adaptive_avg_pool2d(maps, cell_grid(grid)[1:])
    return rearrange(cells, "(b t) d h w -> b (t h w) d", t=slots).half()


def cell_grid(grid: tuple[int, int, int]) -> tuple[int, int, int]:
    """Returns slots, rows and columns of the cells of a token grid; their product is K."""
    slots, height, width = grid
    return slots, min(CELLS, height), min(CELLS, width)


def layer_tokens(encoder: Encoder, video: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
    """Returns every token after each of the given blocks, from one pass: video [B, C, T, H, W] -> [B, N, D] per layer.

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
