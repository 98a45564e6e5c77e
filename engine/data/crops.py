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
PART_BYTES = 2**28
"""Bytes of the float32 frames that a GPU crops in one call."""


class TorchCrops:
    """Replaces the `ClipGraph` of the decoder "pyav". A clip depends only on its own frames.

    A GPU crops the 8-bit clips of one size together. Clip by clip, a batch takes about 30 operators per clip, which
    Python launches while the training's own launches wait for its lock.
    """

    def __init__(self, size: int, *, views: int, device: torch.device, values: PixelValues | None = None) -> None:
        """size: height and width of a clip in pixels. device: device of the computation and the results.

        values: of the frames; None: 8-bit RGB.
        """
        self._size, self._views, self._device, self._values = size, views, device, values or PixelValues()
        self._together = device.type != "cpu"

    def run(
        self, payloads: Sequence[NDArray[Any]], frames: Sequence[Sequence[int]], views: Sequence[Sequence[View]]
    ) -> list[Tensor]:
        """Returns the clips of S samples: for each of the R views a tensor [S, T, H, W, C], uint8 or float32.

        payloads: decoded frames [T, h, w, C]. frames: not used, as the frames are decoded.
        """
        clips: list[list[Tensor]] = [[] for _ in payloads]
        for places in _parts(payloads):
            given = [torch.from_numpy(payloads[place]) for place in places]
            value_range = self._values.range_of(given[0].dtype)
            if self._together and given[0].dtype == torch.uint8:
                videos = torch.empty((len(given), *given[0].shape), dtype=torch.uint8, device=self._device)
                for video, host in zip(videos, given, strict=True):
                    video.copy_(host, non_blocking=True)
                for view in range(self._views):
                    found = crop_together(videos, [views[place][view] for place in places], self._size, value_range)
                    for place, clip in zip(places, found, strict=True):
                        clips[place].append(clip)
            else:
                for place, host in zip(places, given, strict=True):
                    video = host.to(self._device, non_blocking=True)
                    clips[place] = [
                        crop(video, views[place][view], self._size, value_range) for view in range(self._views)
                    ]
        return [torch.stack([shown[view] for shown in clips]) for view in range(self._views)]


def _parts(payloads: Sequence[NDArray[Any]]) -> list[list[int]]:
    """Returns the places of the clips that are cropped together: of one size and type, at most PART_BYTES."""
    parts: dict[tuple[Any, ...], list[list[int]]] = {}
    for place, payload in enumerate(payloads):
        most = max(PART_BYTES // (4 * payload.size), 1)
        found = parts.setdefault((payload.shape, payload.dtype), [[]])
        if len(found[-1]) == most:
            found.append([])
        found[-1].append(place)
    return [places for found in parts.values() for places in found]


def crop_together(
    videos: Tensor, views: Sequence[View], size: int, value_range: tuple[float, float] | None = None
) -> Tensor:
    """Crops one view of each of several clips: [S, T, h, w, C] uint8 -> [S, T, size, size, C]; see `crop`.

    Up to rounding the result is that of `crop` for each clip. The filters cover whole frames, with zeros outside of the
    crop, so that a filter is one product with all frames of its clip.
    """
    clips, frames, height, width, channels = videos.shape
    edges = np.array([(view.y0, view.y1, view.x0, view.x1) for view in views])
    rows = _on_device(_dense(edges[:, 0] * height, edges[:, 1] * height, height, size), videos.device)
    columns = _dense(edges[:, 2] * width, edges[:, 3] * width, width, size)
    mirrored = np.array([view.flip for view in views])
    columns[mirrored] = columns[mirrored, ::-1]
    planes = videos.permute(0, 2, 1, 4, 3).float().reshape(clips, height, -1)  # [S, h, T·C·w]
    planes = _scaled(planes, value_range)
    shrunk = (rows @ planes).view(clips, -1, width)  # [S, size·T·C, w]
    found = shrunk @ _on_device(columns, videos.device).mT
    clip = _as_pixels(found, value_range).view(clips, size, frames, channels, size)
    return clip.permute(0, 2, 1, 4, 3).contiguous()


def _on_device(values: NDArray[np.float32], device: torch.device) -> Tensor:
    """Copies values to a device; the host does not wait for a GPU."""
    host = torch.from_numpy(values)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def _scaled(pixels: Tensor, value_range: tuple[float, float] | None) -> Tensor:
    """Maps a range of float values to 0 to 1; None changes nothing."""
    if value_range is None:
        return pixels
    low, high = value_range
    return ((pixels - low) / (high - low)).clamp_(0, 1)


def _as_pixels(values: Tensor, value_range: tuple[float, float] | None) -> Tensor:
    """Returns resized values as the pixels of a clip: uint8, or float32 from 0 to 1 with a value range."""
    return values.clamp_(0, 1) if value_range else values.round_().clamp_(0, 255).to(torch.uint8)


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
    planes = _scaled(planes, value_range)
    shrunk = torch.cat([taps @ planes[:, :, low - top : high - top] for taps, low, high in rows], 2)
    parts = [shrunk[..., low - left : high - left] @ taps.mT for taps, low, high in columns]
    clip = _as_pixels(torch.cat(parts, 3), value_range).permute(0, 2, 3, 1)
    return (clip.flip(2) if view.flip else clip).contiguous()


def _taps(
    begin: float, end: float, length: int, size: int, device: torch.device, per_block: int = ROWS
) -> list[tuple[Tensor, int, int]]:
    """Yields the filters of output pixels between two edges of an input of `length` pixels.

    For each group of `per_block` of the `size` outputs: weights float32 [outputs, high - low], and the inputs low to
    high - 1 to which they apply.
    """
    all_places, all_weights = _filters(np.array([begin]), np.array([end]), length, size)
    places, weights = all_places[0], all_weights[0]
    blocks = []
    for start in range(0, size, per_block):
        some, parts = places[start : start + per_block], weights[start : start + per_block]
        low, high = int(some.min()), int(some.max()) + 1
        dense = np.zeros((len(some), high - low))
        np.add.at(dense, (np.arange(len(some))[:, None], some - low), parts)
        blocks.append((torch.from_numpy(dense.astype(np.float32)).to(device), low, high))
    return blocks


def _filters(
    begins: NDArray[np.float64], ends: NDArray[np.float64], length: int, size: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Returns the filters of output pixels between pairs of edges [B] of an input of `length` pixels.

    Input pixels [B, size, K], the same one several times at the edge of the input, and their weights, some of them 0.
    """
    scale = (ends - begins)[:, None, None] / size
    radius = np.maximum(scale, 1.0)
    centers = begins[:, None, None] + (np.arange(size)[:, None] + 0.5) * scale - 0.5
    first = np.ceil(centers - radius).astype(int)
    places = first + np.arange(int(np.ceil(2 * radius.max())) + 1)
    weights = np.maximum(1 - np.abs(places - centers) / radius, 0)
    weights /= weights.sum(2, keepdims=True)
    return places.clip(0, length - 1), weights


def _dense(begins: NDArray[np.float64], ends: NDArray[np.float64], length: int, size: int) -> NDArray[np.float32]:
    """Returns the filters of `_filters` as matrices [B, size, length]."""
    places, weights = _filters(begins, ends, length, size)
    dense = np.zeros((len(places), size, length), np.float32)
    np.add.at(
        dense, (np.arange(len(places))[:, None, None], np.arange(size)[:, None], places), weights.astype(np.float32)
    )
    return dense
