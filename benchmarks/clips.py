"""Random inputs of the operators at the measured shapes, and the plain PyTorch code that their users would write.

B clips, T frames, N tokens, K selected tokens, P values per token, C channels, D width, V codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mam2.kernels import TubeMask, tube_mask

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Shape of a training batch and of the heads; the clip is uint8 and channels-last, as the loader returns it.

    A float clip is normalized by MEAN and STD, and planar [B,3,T,H,W] in memory, as in other codebases.
    """

    batch: int
    frames: int = 16
    size: int = 224
    patch: tuple[int, int, int] = (2, 16, 16)
    ratio: float = 0.9
    width: int = 384
    codes: int = 8192
    dtype: torch.dtype = torch.bfloat16
    clip_dtype: torch.dtype = torch.uint8
    planar: bool = False
    bias: bool = False
    """Whether linear_cross_entropy has a bias."""
    smoothing: float = 0.0
    """Label smoothing of linear_cross_entropy."""

    @property
    def grid(self) -> tuple[int, int, int]:
        tubelet, height, width = self.patch
        return self.frames // tubelet, self.size // height, self.size // width

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def masked(self) -> int:
        return self.grid[0] * int(self.ratio * self.grid[1] * self.grid[2])

    @property
    def values(self) -> int:
        return self.patch[0] * self.patch[1] * self.patch[2] * 3

    def __str__(self) -> str:
        text = f"B{self.batch} {self.frames}x{self.size}² D{self.width} V{self.codes} {str(self.dtype)[6:]}"
        text += "" if self.patch[1] in (16, 8) else f" patch {self.patch[1]}"
        text += " planar" if self.planar else ""
        text += "" if self.clip_dtype == torch.uint8 else f" {str(self.clip_dtype)[6:]} clip"
        return text + " bias" * self.bias + (f" smoothing {self.smoothing}" if self.smoothing else "")

    @property
    def statistics(self) -> dict[str, tuple[float, ...]]:
        """Returns the keyword arguments by which an operator undoes the normalization of a float clip."""
        return {} if self.clip_dtype == torch.uint8 else {"mean": MEAN, "std": STD}


def _small(batch: int) -> Shape:
    return Shape(batch=batch, frames=8, size=64, patch=(2, 8, 8), width=96, codes=512, dtype=torch.float32)


def _other(**changes: Any) -> Shape:
    return Shape(**{"batch": 64, **changes})


CLIP_VARIANTS = (
    _other(clip_dtype=torch.float32, planar=True),
    _other(clip_dtype=torch.float32),
    _other(dtype=torch.float16),
    _other(batch=1),
    _other(batch=32, frames=32),
    _other(patch=(2, 14, 14)),
)
"""The first is the clip that other codebases pass in the lines of kernels/README.md."""
HEAD_VARIANTS = (
    _other(bias=True),
    _other(codes=1024, bias=True, smoothing=0.1),
    _other(batch=4, width=768, codes=32768),
    _other(batch=2, width=2048, codes=131072),
)
"""A bias as in the engine's head; the codebook size of a recipe's tokenizer; vocabularies of language models."""
SHAPES = {
    "cuda": tuple(Shape(batch=batch) for batch in (64, 8, 16, 32, 128)),
    "cpu": tuple(_small(batch) for batch in (4, 1, 2)),
}
"""First the batch of the table, then, on a GPU, one so small that launches dominate; the others are for the plots."""


def clip(shape: Shape, device: torch.device) -> Tensor:
    """Returns [B,3,T,H,W], channels-last in memory unless the shape is planar; a float clip is normalized."""
    extent = (shape.batch, shape.frames, shape.size, shape.size, 3)
    video = torch.randint(0, 256, extent, dtype=torch.uint8, device=device).permute(0, 4, 1, 2, 3)
    if shape.planar:
        video = video.contiguous()
    if shape.clip_dtype == torch.uint8:
        return video
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1, 1) for values in (MEAN, STD))
    return torch.empty_like(video, dtype=shape.clip_dtype).copy_((video / 255 - mean) / std)


def tubes(shape: Shape, device: torch.device) -> TubeMask:
    seed = int(torch.randint(2**31, ()))
    return tube_mask(shape.batch, shape.grid, shape.ratio, seed=seed, device=device)


def loss_inputs(shape: Shape, device: torch.device) -> dict[str, Tensor]:
    """Returns a clip, its mask as token numbers and as VideoMAE's booleans, and predictions of the masked tokens."""
    mask = tubes(shape, device)
    pred = torch.randn(shape.batch, shape.masked, shape.values, device=device).to(shape.dtype)
    inputs = {"video": clip(shape, device), "masked": mask.masked, "booleans": mask.as_bool()}
    return {**inputs, "pred": pred.requires_grad_()}


def pixels(video: Tensor, shape: Shape | None = None) -> Tensor:
    """Returns pixels in [0,1], float32 for uint8.

    Undoes the normalization of a float clip if `shape` has normalized ones.
    """
    if video.dtype == torch.uint8:
        return video.float() / 255
    if shape is None or shape.clip_dtype == torch.uint8:
        return video
    mean, std = (
        torch.tensor(values, dtype=video.dtype, device=video.device).view(3, 1, 1, 1) for values in (MEAN, STD)
    )
    return video * std + mean


def cubes(video: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """[B,C,T,H,W] -> [B,N,τ·p·p,C]."""
    tubelet, height, width = patch
    cut = video.unflatten(2, (-1, tubelet)).unflatten(4, (-1, height)).unflatten(6, (-1, width))
    return cut.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4, 6).flatten(1, 3)


def pick(tokens: Tensor, index: Tensor) -> Tensor:
    """Selects from [B,N,…] by int64 [B,K], or by bool [B,N], which waits for the device to learn K -> [B,K,P]."""
    tokens = tokens.flatten(2)
    if index.dtype == torch.bool:
        return tokens[index].view(tokens.shape[0], -1, tokens.shape[2])
    return tokens.take_along_dim(index[..., None], 1)


def deviation(tokens: Tensor) -> Tensor:
    """Returns VideoMAE's divisor of each channel of each cube [B,N,τ·p·p,C] -> [B,N,1,C]."""
    return tokens.var(2, unbiased=True, keepdim=True).sqrt() + EPS


def differences(video: Tensor, patch: tuple[int, int, int], shape: Shape | None = None) -> Tensor:
    """Returns (next frame − frame, 0 for the last) / the cube's standard deviation -> [B,N,τ·p·p,C]."""
    frames = pixels(video, shape)
    following = torch.cat([frames[:, :, 1:], frames[:, :, -1:]], 2)
    return cubes(following - frames, patch) / deviation(cubes(frames, patch))
