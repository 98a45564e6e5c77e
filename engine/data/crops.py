"""Crops, mirrors and resizes in PyTorch; replaces DALI's graph for PyAV's frames if DALI is not installed.

The filter is DALI's: bilinear, widened by the scale if an image shrinks (antialiasing), with the edge of the frame
repeated beyond it. Both agree to one gray level, of 0 to 255 (tests/engine/data/test_crops.py).

Legend: S samples per call, R views per sample, T frames, H = W = the clip's size, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mam2.engine.data.sampling import View
from mam2.engine.data.values import PixelValues

ROWS = 32
"""Output rows and columns computed at a time on a CPU, by a product with only the inputs of their filters. A GPU
computes all at once: there, launches and copies of filters cost more than products with zeros."""


class TorchCrops:
    """Replaces the `ClipGraph` of the decoder "pyav". A clip depends only on its own frames."""

    def __init__(self, size: int, *, views: int, device: torch.device, values: PixelValues | None = None) -> None:
        """size: height and width of a clip in pixels. device: device of the computation and the results.

        values: of the frames; None: 8-bit RGB.
        """
        self._size, self._views, self._device, self._values = size, views, device, values or PixelValues()

    def run(
        self, payloads: Sequence[NDArray[Any]], frames: Sequence[Sequence[int]], views: Sequence[Sequence[View]]
    ) -> list[Tensor]:
        """Returns the clips of S samples: for each of the R views a tensor [S, T, H, W, C], uint8 or float32.

        payloads: decoded frames [T, h, w, C]. frames: not used, as the frames are decoded.
        """
        videos = [torch.from_numpy(payload).to(self._device, non_blocking=True) for payload in payloads]
        return [
            torch.stack(
                [
                    crop(video, shown[view], self._size, self._values.range_of(video.dtype))
                    for video, shown in zip(videos, views, strict=True)
                ]
            )
            for view in range(self._views)
        ]


def crop(video: Tensor, view: View, size: int, value_range: tuple[float, float] | None = None) -> Tensor:
    """Crops a view from frames [T, h, w, C] and resizes it to [T, size, size, C], on their device.

    value_range: values that become 0 and 1, in a float32 result; None for uint8 frames and a uint8 result.
    """
    height, width = video.shape[1:3]
    per_block = ROWS if video.device.type == "cpu" else size
    rows = _taps(view.y0 * height, view.y1 * height, height, size, video.device, per_block)
    columns = _taps(view.x0 * width, view.x1 * width, width, size, video.device, per_block)
    top, bottom, left, right = rows[0][1], rows[-1][2], columns[0][1], columns[-1][2]
    planes = video[:, top:bottom, left:right].permute(0, 3, 1, 2).float()  # [T, C, h', w']
    if value_range:
        low_value, high_value = value_range
        planes = ((planes - low_value) / (high_value - low_value)).clamp_(0, 1)
    shrunk = torch.cat([taps @ planes[:, :, low - top : high - top] for taps, low, high in rows], 2)
    parts = [shrunk[..., low - left : high - left] @ taps.mT for taps, low, high in columns]
    clip = torch.cat(parts, 3)
    clip = clip.clamp_(0, 1) if value_range else clip.round_().clamp_(0, 255).to(torch.uint8)
    clip = clip.permute(0, 2, 3, 1)
    return (clip.flip(2) if view.flip else clip).contiguous()


def _taps(
    begin: float, end: float, length: int, size: int, device: torch.device, per_block: int = ROWS
) -> list[tuple[Tensor, int, int]]:
    """Yields the filters of output pixels between two edges of an input of `length` pixels.

    For each group of `per_block` of the `size` outputs: weights float32 [outputs, high - low], and the inputs low to
    high - 1 to which they apply.
    """
    scale = (end - begin) / size
    radius = max(scale, 1.0)
    centers = begin + (np.arange(size) + 0.5) * scale - 0.5
    first = np.ceil(centers - radius).astype(int)
    offsets = np.arange(int(np.ceil(2 * radius)) + 1)
    places = first[:, None] + offsets
    weights = np.maximum(1 - np.abs(places - centers[:, None]) / radius, 0)
    weights /= weights.sum(1, keepdims=True)
    places = places.clip(0, length - 1)
    blocks = []
    for start in range(0, size, per_block):
        some, parts = places[start : start + per_block], weights[start : start + per_block]
        low, high = int(some.min()), int(some.max()) + 1
        dense = np.zeros((len(some), high - low))
        np.add.at(dense, (np.arange(len(some))[:, None], some - low), parts)
        blocks.append((torch.from_numpy(dense.astype(np.float32)).to(device), low, high))
    return blocks
