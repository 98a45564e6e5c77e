"""Selects tokens of a clip in plain PyTorch, without cutting the tokens that nobody asks for, or cuts all of them.

A clip [B,C,T,H,W] of any strides is seen as a grid of patches; only what is selected is copied. On a CPU NumPy copies,
because it moves whole runs of a patch where PyTorch moves single values.

B clips, C channels, K selected places, τ frames per tubelet, p patch edge.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Types that NumPy copies, by item size: it has no bfloat16."""
ORDER = (0, 2, 4, 6, 3, 5, 7, 1)
"""Dimensions of a clip [B, C, T/τ,τ, H/p,p, W/p,p] in the order of a cube."""


def cube_view(video: torch.Tensor, patch_size: Sequence[int]) -> torch.Tensor:
    """Returns the view [B,T/τ,H/p,W/p, τ,p,p,C] of video [B,C,T,H,W]."""
    return video.view(_split(video, patch_size)).permute(ORDER)


def _array(video: torch.Tensor, patch_size: Sequence[int]) -> np.ndarray:
    """Returns `cube_view` as integers of the same size."""
    values = video if video.dtype == torch.uint8 else video.view(INTEGERS[video.dtype.itemsize])
    return values.numpy().reshape(_split(video, patch_size)).transpose(ORDER)


def _split(video: torch.Tensor, patch_size: Sequence[int]) -> tuple[int, ...]:
    tubelet, height, width = patch_size
    batch, channels, frames, rows, columns = video.shape
    return batch, channels, frames // tubelet, tubelet, rows // height, height, columns // width, width


def _tensor(values: np.ndarray, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """Returns contiguous values as a tensor of that type and shape."""
    found = torch.from_numpy(values.view(f"i{dtype.itemsize}").reshape(shape))
    return found.view(dtype)


def cut(video: torch.Tensor, patch_size: Sequence[int]) -> torch.Tensor:
    """Returns all tokens [B·N,P] of video [B,C,T,H,W], contiguous; they may be the memory of the clip."""
    values = math.prod(patch_size) * video.shape[1]
    if video.device.type != "cpu":
        return cube_view(video, patch_size).reshape(-1, values)
    return _tensor(np.ascontiguousarray(_array(video, patch_size)), video.dtype, (-1, values))


def select(video: torch.Tensor, index: torch.Tensor, patch_size: Sequence[int]) -> torch.Tensor:
    """Returns the cubes [B·K,P] of video [B,C,T,H,W] at the numbers index [B,K]."""
    shape = index.numel(), math.prod(patch_size) * video.shape[1]
    if video.device.type != "cpu":
        view = cube_view(video, patch_size)
        numbers = (torch.arange(len(index), device=index.device)[:, None], *torch.unravel_index(index, view.shape[1:4]))
        return view[numbers].reshape(shape)
    items = _array(video, patch_size)
    width, channels = items.shape[-2:]
    if items.strides[-2:] == (channels * items.itemsize, items.itemsize) and items.size:
        # NumPy copies a row of a patch as one item
        items = items.reshape(*items.shape[:-2], width * channels).view(f"V{width * channels * items.itemsize}")[..., 0]
    places = np.arange(len(index))[:, None], *np.unravel_index(index.numpy(), items.shape[1:4])
    return _tensor(np.ascontiguousarray(items[places]), video.dtype, shape)  # NumPy keeps the clip's order in memory
