"""How much of frames a reconstruction explains, by squared errors: the measure by which tokenizers are judged.

Shapes: B frames, H×W pixels, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from mam2.engine.model.pixels import unit_pixels
from mam2.engine.tokenizer.tokenizer import scale_pixels
from mam2.engine.tokenizer.vqgan import VQGAN

GRAY = 1e-3
"""Share of color in the variance below which frames count as gray; video compression leaves about this much."""


class Fidelity(NamedTuple):
    """What reconstructions explain of frames; 1 is perfect, 0 is no better than the mean color of each frame."""

    explained: float
    """1 − squared error / squared deviation from the frame's mean color, both summed over all frames."""
    color: float | None
    """The same for color only: each pixel's difference to the mean of its channels. None for gray frames."""


def squared_errors(reconstructed: Tensor, original: Tensor) -> Tensor:
    """Sums of the squared errors of frames [B, C, H, W] in 0 to 1: of all values, and of color. float64 [2], CPU."""
    return _sums(reconstructed - original, _color(reconstructed) - _color(original))


def squared_deviations(original: Tensor) -> Tensor:
    """Sums of the squared deviations from each frame's mean: of all values, and of color. float64 [2], on the CPU."""
    return _sums(*(part - part.mean((2, 3), keepdim=True) for part in (original, _color(original))))


def fidelity(errors: Tensor, deviations: Tensor) -> Fidelity:
    """The shares from sums over all frames: float64 [2] each, from `squared_errors` and `squared_deviations`."""
    explained, color = (1 - errors / deviations.clamp(min=1e-12)).tolist()
    return Fidelity(explained, color if deviations[1] > GRAY * deviations[0] else None)


@torch.no_grad()
def measure_fidelity(vqgan: VQGAN, frames: Iterable[Tensor]) -> Fidelity:
    """Encodes and decodes batches of frames, uint8 or float [B, H, W, C], of which whole patches are used."""
    errors, deviations = torch.zeros(2, 2, dtype=torch.float64)
    factor, device = vqgan.config.factor, next(vqgan.parameters()).device
    for batch in frames:
        height, width = (side // factor * factor for side in batch.shape[1:3])
        images = batch[:, :height, :width].to(device).movedim(-1, 1)
        original = unit_pixels(images)
        errors += squared_errors(unit_range(vqgan.decode(vqgan.codes(scale_pixels(images)))), original)
        deviations += squared_deviations(original)
    return fidelity(errors, deviations)


def unit_range(decoded: Tensor) -> Tensor:
    """Maps decoded pixels, about -1 to 1, to 0 to 1."""
    return ((decoded.float() + 1) / 2).clamp(0, 1)


def _color(images: Tensor) -> Tensor:
    """Subtracts gray from images [B, C, H, W]."""
    return images - images.mean(1, keepdim=True)


def _sums(*parts: Tensor) -> Tensor:
    return torch.stack([part.square().double().sum() for part in parts]).cpu()
