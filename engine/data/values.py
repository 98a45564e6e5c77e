"""The values of files as pixels: 8-bit values stay uint8; all others become floats from 0 to 1.

T frames, h×w pixels of a file, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mam2.engine.config.training import DataConfig
from mam2.engine.data.decoding import DecodeError
from mam2.engine.data.video import Video

RANGES = {"uint8": (0.0, 255.0), "uint16": (0.0, 65535.0), "float32": (0.0, 1.0)}
"""Values that become 0 and 1, by the type of the file's values, unless data.value_range is set."""
TOLERANCE = 1e-3
"""Distance by which floats may exceed 0 to 1 without data.value_range."""


class PixelValues(NamedTuple):
    """How the values of a loader's files become pixels."""

    channels: int = 3
    floats: bool = False
    """Whether clips are float32 from 0 to 1; else uint8."""
    value_range: tuple[float, ...] = ()
    """`data.value_range`."""

    @classmethod
    def of(cls, config: DataConfig, videos: Iterable[Video]) -> PixelValues:
        """Floats are needed for a value range, or if a file has other values than 8-bit ones."""
        deep = any(video.value_type(config.channels) != "uint8" for video in videos)
        return cls(config.channels, bool(config.value_range) or deep, config.value_range)

    @property
    def dtype(self) -> torch.dtype:
        """Returns the type of the clips."""
        return torch.float32 if self.floats else torch.uint8

    def range_of(self, dtype: torch.dtype | np.dtype[Any]) -> tuple[float, float] | None:
        """Returns the values of a type that become 0 and 1; None if clips keep uint8."""
        if not self.floats:
            return None
        low, high = self.value_range or RANGES[str(dtype).removeprefix("torch.")]
        return low, high

    def check(self, frames: NDArray[Any]) -> NDArray[Any]:
        """Returns the frames [T, h, w, C]. Raises DecodeError for floats outside 0 to 1 without a value range."""
        if frames.dtype == np.float32 and not self.value_range:
            low, high = float(frames.min()), float(frames.max())
            if low < -TOLERANCE or high > 1 + TOLERANCE:
                raise DecodeError(f"values from {low:g} to {high:g}; expected 0 to 1, or a data.value_range")
        return frames
