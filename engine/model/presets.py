"""Named sizes of the encoder and named forms of the rest, as data on the config classes."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from mam2.engine.config import DecoderConfig, RegressorConfig


class Size(NamedTuple):
    """An encoder's embedding width, blocks and attention heads: the fields of `ModelConfig` of these names."""

    width: int
    depth: int
    heads: int


SIZES = {
    "tiny": Size(width=96, depth=4, heads=3),
    "small": Size(width=384, depth=12, heads=6),
    "base": Size(width=768, depth=12, heads=12),
    "large": Size(width=1024, depth=24, heads=16),
    "huge": Size(width=1280, depth=32, heads=16),
}


class Preset(NamedTuple):
    """What comes after the encoder, and how blocks and projection are built: fields of `ModelConfig`."""

    regressor: RegressorConfig
    decoder: DecoderConfig
    layer_scale: float = 0.0
    projection_norm: bool = False


PRESETS = {
    "fast": Preset(
        RegressorConfig(depth=4, width=384, heads=6, keys="visible"),
        DecoderConfig(depth=4, width=384, heads=6),
    ),
    "cae": Preset(
        RegressorConfig(depth=4, width=768, heads=12, keys="all"),
        DecoderConfig(depth=4, width=768, heads=12),
        layer_scale=0.1,
        projection_norm=True,
    ),
}
"""`cae` is CAE's regressor and decoders at the base width, with its LayerScale in all blocks, the encoder's too, and
its LayerNorm after a projection to another width; that the MLP of CAE's regressor adds to the normalized state is left
out. `fast` halves the width and asks the visible tokens only, without these."""


def parameters_by_part(model: nn.Module) -> dict[str, int]:
    """Parameters below each direct child of `model`, in order; those it holds itself are counted under `other`."""
    parts = {name: sum(p.numel() for p in child.parameters()) for name, child in model.named_children()}
    own = sum(p.numel() for p in model.parameters(recurse=False))
    return {**parts, "other": own} if own else parts
