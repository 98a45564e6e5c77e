"""Named encoder sizes, and named presets of regressor and decoders, as values of the config classes."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, TypeVar

from torch import nn

from mam2.engine.config.pretrain import DecoderConfig, ModelConfig, RegressorConfig


class Size(NamedTuple):
    """An encoder's embedding width, blocks and attention heads: the fields of `ModelConfig` with these names."""

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
    """Regressor, decoders, LayerScale and projection norm: fields of `ModelConfig`."""

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
"""`cae` is CAE's regressor and decoders, as wide as the encoder, with CAE's LayerScale in all blocks, including the
encoder's, and CAE's LayerNorm after a projection to another width. One difference: CAE's MLP adds to the normalized
state, ours to the residual stream. `fast` has half the width, attends only to the visible tokens, and has neither
LayerScale nor this LayerNorm."""

Part = TypeVar("Part", RegressorConfig, DecoderConfig)


def resized(model: ModelConfig, size: str) -> ModelConfig:
    """Returns the model with the encoder of a size of `SIZES`; regressor and decoders keep their widths relative to it.

    VideoMAE's decoder then has its published widths: 192, 384, 512 and 640 for small to huge.
    """
    to = SIZES[size]
    scale = to.width / model.width
    return dataclasses.replace(
        model,
        **to._asdict(),
        regressor=_scaled(model.regressor, scale, to),
        decoder=_scaled(model.decoder, scale, to),
    )


def with_preset(model: ModelConfig, preset: str) -> ModelConfig:
    """Returns the model with regressor and decoders of a preset of `PRESETS`, scaled to its encoder."""
    of = Size(model.width, model.depth, model.heads)
    scale = model.width / SIZES["base"].width
    chosen = PRESETS[preset]
    regressor, decoder = _scaled(chosen.regressor, scale, of), _scaled(chosen.decoder, scale, of)
    return dataclasses.replace(model, **chosen._replace(regressor=regressor, decoder=decoder)._asdict())


def _scaled(part: Part, scale: float, encoder: Size) -> Part:
    """`part` with `scale` times its width, heads about as wide as the encoder's, and a depth of at most a third of
    the encoder's."""
    width = round(part.width * scale)
    head = encoder.width / encoder.heads
    most = range(1, width + 1)
    heads = min((count for count in most if width % (8 * count) == 0), key=lambda count: abs(width / count - head))
    depth = min(part.depth, max(encoder.depth // 3, 1))
    return dataclasses.replace(part, width=width, depth=depth, heads=heads)


def parameters_by_part(model: nn.Module) -> dict[str, int]:
    """Returns the number of parameters of each direct child of `model`, in order; its own are counted under `other`."""
    parts = {name: sum(p.numel() for p in child.parameters()) for name, child in model.named_children()}
    own = sum(p.numel() for p in model.parameters(recurse=False))
    return {**parts, "other": own} if own else parts
