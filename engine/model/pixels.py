"""Pixels as the model takes them: their statistics per channel, their scale, and channels as colors.

A clip holds uint8 values from 0 to 255, or floats from 0 to 1. C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PIXEL_MEAN = (0.485, 0.456, 0.406)
"""ImageNet's mean of each channel, for pixels from 0 to 1."""
PIXEL_STD = (0.229, 0.224, 0.225)
"""ImageNet's standard deviation of each channel, for pixels from 0 to 1."""


def pixel_statistics(
    channels: int, mean: Sequence[float] = (), std: Sequence[float] = ()
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and standard deviation of each channel: those given, else ImageNet's.

    For another number of channels than 3, every channel has the mean of ImageNet's three values: 0.449 and 0.226.
    """
    found = []
    for given, known in ((mean, PIXEL_MEAN), (std, PIXEL_STD)):
        default = known if channels == len(known) else (sum(known) / len(known),) * channels
        found.append(tuple(float(value) for value in given) or default)
    return found[0], found[1]


def unit_pixels(clip: Tensor) -> Tensor:
    """Returns pixels as floats from 0 to 1: uint8 is divided by 255, floats stay as they are."""
    return clip.float() / 255 if clip.dtype == torch.uint8 else clip.float()


def gray_embedding(
    weight: Tensor, bias: Tensor, statistics: Sequence[Sequence[float]], gray: Sequence[Sequence[float]]
) -> tuple[Tensor, Tensor]:
    """Converts a patch embedding for C channels to one channel: weight [D, P·C] -> [D, P], and bias [D].

    On a gray clip it returns what the given one returns on a clip with C equal channels: the sum of its weights over
    the channels, as in timm, corrected for the different normalization.

    statistics, gray: mean and standard deviation per channel of the given embedding, and of the result.
    """
    mean, std = (weight.new_tensor(values, dtype=torch.float64) for values in statistics)
    gray_mean, gray_std = (float(values[0]) for values in gray)
    by_channel = weight.double().unflatten(1, (-1, len(mean))) / std
    shift = (by_channel * (gray_mean - mean)).sum((1, 2))
    return (gray_std * by_channel.sum(2)).to(weight.dtype), (bias.double() + shift).to(bias.dtype)


def as_colors(pictures: Tensor) -> Tensor:
    """Returns pictures [..., C] as [..., 3]: one channel is gray, of two blue is 0, of more than three the first three
    are red, green and blue."""
    channels = pictures.shape[-1]
    if channels == 1:
        return pictures.expand(*pictures.shape[:-1], 3)
    if channels == 2:
        return torch.cat([pictures, torch.zeros_like(pictures[..., :1])], -1)
    return pictures[..., :3]
