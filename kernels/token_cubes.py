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


def cube_view(video: torch.Tensor, patch_size: Sequence[int]) -> torch.Tensor:
    """Returns the view [B,T/τ,H/p,W/p, τ,p,p,C] of video [B,C,T,H,W]."""
    tubelet, height, width = patch_size
    batch, channels, frames, rows, columns = video.shape
    grid = frames // tubelet, tubelet, rows // height, height, columns // width, width
    return video.view(batch, channels, *grid).permute(0, 2, 4, 6, 3, 5, 7, 1)


def frame_view(video: torch.Tensor, patch_size: Sequence[int]) -> torch.Tensor:
    """Returns the view [B,T,H/p,W/p, p,p,C] of video [B,C,T,H,W]."""
    return cube_view(video, (1, *patch_size[1:])).squeeze(4)


def cut(video: torch.Tensor, patch_size: Sequence[int]) -> torch.Tensor:
    """Returns all tokens [B·N,P] of video [B,C,T,H,W], contiguous; they may be the memory of the clip."""
    view = cube_view(video, patch_size)
    shape = math.prod(view.shape[:4]), math.prod(view.shape[4:])
    if view.device.type != "cpu":
        return view.reshape(shape)
    values = view.view(INTEGERS[view.dtype.itemsize]).numpy()
    return torch.from_numpy(np.ascontiguousarray(values)).view(view.dtype).view(shape)


def select(view: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Returns rows [B·K,P] of a view [B,slots,rows,columns,…] at the numbers index [B,K] within slots·rows·columns."""
    grid, shape = view.shape[1:4], (index.numel(), math.prod(view.shape[4:]))
    if view.device.type != "cpu":
        numbers = (torch.arange(len(index), device=index.device)[:, None], *torch.unravel_index(index, grid))
        return view[numbers].reshape(shape)
    values = view.view(INTEGERS[view.dtype.itemsize])
    run, channels = view.shape[-2] * view.shape[-1], view.shape[-1]
    if view.stride()[-2:] == (channels, 1) and view.numel():  # NumPy copies a row of a patch as one item
        items = values.flatten(-2).numpy().view(f"V{run * view.itemsize}")[..., 0]
    else:
        items = values.numpy()
    places = np.arange(len(index))[:, None], *np.unravel_index(index.numpy(), grid)
    picked = np.ascontiguousarray(items[places])  # NumPy keeps the clip's order of dimensions in memory
    return torch.from_numpy(picked.view(f"i{view.itemsize}")).view(view.dtype).view(shape)
