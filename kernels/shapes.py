"""Checks the arguments of the operators and raises every error that a user can see.

B clips, C channels, T frames, H height, W width, N tokens (T'·H'·W'), K tokens selected from a clip.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

VIDEO_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)
NORMALIZATIONS = ("channel", "patch", None)
DIFFERENCES = ("adjacent", "intra")
PIXEL_TARGETS = ("pixel", "joint")
REDUCTIONS = ("mean", "sum", "none")

REPEATED = -(2**40)
"""Replaces every token number of a clip that contains one twice; the operators raise for it (on a GPU: NaN)."""
OTHER_COUNT = -(2**41)
"""OTHER_COUNT − n replaces every token number of a clip whose boolean mask masks n tokens, an unexpected number."""


class Grid(NamedTuple):
    """The token grid of a clip: `slots` tubelets of `rows` x `columns` patches of `values` numbers each."""

    slots: int
    rows: int
    columns: int
    values: int

    @property
    def tokens(self) -> int:
        return self.slots * self.rows * self.columns


def token_grid(video: torch.Tensor, patch_size: Sequence[int]) -> Grid:
    """Returns the token grid of a clip [B,C,T,H,W] that passed `check_video`."""
    tubelet, height, width = patch_size
    _, channels, frames, rows, columns = video.shape
    return Grid(frames // tubelet, rows // height, columns // width, tubelet * height * width * channels)


def check_video(video: torch.Tensor, patch_size: Sequence[int]) -> Grid:
    """Returns the token grid of `video` [B,C,T,H,W]; raises ValueError if it cannot be cut into whole cubes."""
    if not isinstance(video, torch.Tensor):
        raise ValueError(f"video: expected a tensor [B,C,T,H,W], found {type(video).__name__}")
    if video.dim() != 5:
        raise ValueError(f"video: expected 5 dimensions [B,C,T,H,W], found shape {tuple(video.shape)}")
    if video.dtype not in VIDEO_DTYPES:
        raise ValueError(f"video: expected uint8 (0 to 255) or a float type (0 to 1), found {video.dtype}")
    if video.requires_grad:
        raise ValueError("video: no gradient flows to the clip; pass video.detach()")
    if isinstance(patch_size, int) or len(patch_size) != 3 or min(patch_size) < 1:
        raise ValueError(f"patch_size: expected 3 positive integers (tubelet, height, width), found {patch_size}")
    for name, size, patch in zip(("frames", "height", "width"), video.shape[2:], patch_size, strict=True):
        if size % patch or size == 0:
            swapped = name == "frames" and size in (1, 3) and video.shape[1] not in (1, 3)
            raise ValueError(
                f"video: expected {name} to be a multiple of {patch} (patch_size {tuple(patch_size)}), found {size}; "
                f"{'pass [B,C,T,H,W], of [B,T,C,H,W] its transpose(1, 2)' if swapped else 'crop or resize the clip'}"
            )
    return token_grid(video, patch_size)


def check_grid(grid: Sequence[int]) -> None:
    """Raises ValueError unless `grid` is (T', H', W'), the tokens of a clip."""
    if len(grid) != 3 or min(grid) < 1:
        raise ValueError(f"grid: expected 3 positive integers (slots, rows, columns of tokens), found {tuple(grid)}")


def check_index(name: str, index: torch.Tensor, video: torch.Tensor) -> None:
    """Raises ValueError unless `index` is int64 [B,K] on the device of `video`."""
    if index.dim() != 2 or index.shape[0] != video.shape[0]:
        raise ValueError(f"{name}: expected shape [{video.shape[0]}, K] (one row per clip), found {tuple(index.shape)}")
    if index.dtype != torch.int64:
        raise ValueError(
            f"{name}: expected int64 token numbers or a TubeMask, found {index.dtype}; "
            "convert a mask of zeros and ones with TubeMask.from_bool(mask.bool())"
        )
    if index.device != video.device:
        raise ValueError(f"{name}: expected the device of video ({video.device}), found {index.device}")


def check_bool_mask(mask: torch.Tensor, video: torch.Tensor, grid: Grid) -> None:
    """Raises ValueError unless the boolean `mask` is [B,N] on the device of `video`."""
    expected = [video.shape[0], grid.tokens]
    if list(mask.shape) != expected or mask.device != video.device:
        raise ValueError(
            f"mask: expected bool {expected} (True = masked) on {video.device}, "
            f"found shape {list(mask.shape)} on {mask.device}"
        )


def unfit_tokens(lowest: int, highest: int, count: int, tokens: int) -> Exception:
    """Returns the error for token numbers [B,count], `lowest` to `highest`, unfit for clips of `tokens` tokens."""
    if lowest == REPEATED:
        return ValueError(
            "token numbers: expected each at most once per clip, found one twice; "
            "pass a mask of zeros and ones as bool: mask.bool()"
        )
    if lowest <= OTHER_COUNT:
        return ValueError(
            f"mask: expected {count} masked tokens in every clip, the number in pred or weight, "
            f"found a clip with {OTHER_COUNT - lowest}"
        )
    return IndexError(f"token numbers: expected 0 to {tokens - 1}, found {lowest} to {highest}")


def check_pred(pred: torch.Tensor, masked: torch.Tensor, grid: Grid, values: int) -> None:
    """Raises ValueError unless `pred` holds `values` floats for each token of `masked` [B,Nm], or for every token."""
    batch, count = masked.shape
    fits = pred.dim() == 3 and pred.shape[0] == batch and pred.shape[1] in (count, grid.tokens)
    if not fits or pred.shape[2] != values:
        every = f"[{batch}, {grid.tokens}, {values}]"
        some = f"[{batch}, {count}, {values}] (masked tokens) or {every} (every token)"
        of_all = f"{every}, as all are masked (a mask of zeros and ones must be bool)"
        expected = some if count < grid.tokens else of_all
        raise ValueError(f"pred: expected {expected}, found {list(pred.shape)}")
    if not pred.dtype.is_floating_point or pred.device != masked.device:
        raise ValueError(f"pred: expected a float type on {masked.device}, found {pred.dtype} on {pred.device}")


def check_weight(weight: torch.Tensor, masked: torch.Tensor, grid: Grid) -> None:
    """Raises ValueError unless `weight` holds a number for each token of `masked` [B,Nm], or for every token."""
    shapes = list(masked.shape), [masked.shape[0], grid.tokens]
    if list(weight.shape) not in shapes or weight.device != masked.device or weight.is_complex():
        raise ValueError(
            f"weight: expected bool or real {shapes[0]} (masked tokens) or {shapes[1]} (every token) on "
            f"{masked.device}, found {weight.dtype} {list(weight.shape)} on {weight.device}"
        )


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, found {value!r}")


def target_values(grid: Grid, patch_size: Sequence[int], target: str) -> int:
    """Returns the number of values of a token's target; raises ValueError if the target needs longer tubelets."""
    if target in ("intra", "joint") and patch_size[0] < 2:
        instead = "adjacent" if target == "intra" else "pixel"
        raise ValueError(f"patch_size: {target!r} needs tubelets of at least 2 frames, found 1; use {instead!r}")
    return grid.values - grid.values // patch_size[0] if target == "intra" else grid.values


def check_statistics(
    mean: Sequence[float] | None, std: Sequence[float] | None, channels: int
) -> tuple[list[float] | None, list[float] | None]:
    """Returns `mean` and `std` as lists of `channels` floats, or None twice; raises ValueError if they are invalid."""
    if mean is None and std is None:
        return None, None
    if mean is None or std is None:
        raise ValueError("mean and std: expected both or neither, found one of them")
    for name, values in (("mean", mean), ("std", std)):
        if isinstance(values, (int, float)):
            raise ValueError(
                f"{name}: expected {channels} values (one per channel of video), found the number {values}"
            )
        if len(values) != channels:
            raise ValueError(f"{name}: expected {channels} values (one per channel of video), found {len(values)}")
    if min(std) <= 0:
        raise ValueError(f"std: expected positive values, found {tuple(std)}")
    return [float(value) for value in mean], [float(value) for value in std]


def check_deviation(normalize: str | None, patch_size: Sequence[int], channels: int) -> None:
    """Raises ValueError if `normalize` is unknown or needs the variance of a single value."""
    check_choice("normalize", normalize, NORMALIZATIONS)
    tubelet, height, width = patch_size
    pixels = tubelet * height * width
    if (normalize == "channel" and pixels < 2) or (normalize == "patch" and pixels * channels < 2):
        raise ValueError(f"normalize: {normalize!r} needs at least 2 values per cube, found 1; pass normalize=None")
