"""The targets of the motion decoder; the loss is the mean squared error for all of them.

    adjacent   pixel difference to the next sampled frame   mam2.kernels.frame_difference
    intra      pixel difference within the tubelet          mam2.kernels.frame_difference
    hog        histograms of gradients of the difference    hog_of_difference
    flow       optical flow, by OpenCV                      optical_flow

hog and flow use a tubelet's first two frames. Pixel differences are computed inside the fused loss; the other targets
are first computed for the whole clip, by PyTorch (hog), or by OpenCV on the CPU (flow).

B clips, T frames, T'×H'×W' the token grid, N tokens, Nm masked, Pd values of a token's target, C channels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mam2.engine.config.pretrain import LossConfig, PretrainConfig
from mam2.engine.errors import UserError
from mam2.engine.model.pixels import unit_pixels
from mam2.kernels import TubeMask, frame_difference, linear_masked_loss, masked_frame_difference_loss

ORIENTATIONS = 9
HOG_CELLS = 2
"""Cells along each side of a patch (8 pixels wide at a patch of 16); the values of MaskFeat and Dalal."""
FLOW_CELLS = 4
"""Cells along each side of a patch; flow is smooth, so that the cells' means describe it well."""


@dataclass(frozen=True, kw_only=True)
class MotionTarget:
    """All that model, loss and training ask of a motion target."""

    values: Callable[[int, int, int], int]
    """Pd, the number of values per token, from frames per tubelet, pixels per patch and channels."""
    compute: Callable[[Tensor, LossConfig, Sequence[int]], Tensor]
    """The target of every token, from clips, `loss` and patch size: [B, C, T, H, W] -> [B, N, Pd]."""
    fused: bool = False
    """Whether it is a pixel difference, which the loss computes itself."""
    tubelet: int = 1
    """Least number of frames per tubelet."""
    missing: Callable[[TubeMask, PretrainConfig], Tensor] | None = None
    """The number of frames of all masked tokens that have no target, 0-d; None: every frame has one."""


def motion_values(target: str, patch_size: Sequence[int], channels: int = 3) -> int:
    """Returns Pd, the number of values of a token's motion target; 0 for `none`."""
    tubelet, *patch = patch_size
    return TARGETS[target].values(tubelet, math.prod(patch), channels)


def motion_target(video: Tensor, loss: LossConfig, patch_size: Sequence[int]) -> Tensor:
    """Computes the target of every token: video [B, C, T, H, W] -> [B, N, Pd]. Raises ValueError for `none`."""
    return TARGETS[loss.motion_target].compute(video, loss, patch_size)


def motion_values_vary(config: PretrainConfig) -> bool:
    """Returns whether clips differ in their number of motion values, because some frames have no target."""
    drawn_anywhere = config.mask.kind == "random" or config.mask.decoded < 1
    missing = TARGETS[config.loss.motion_target].missing
    return config.model.objective == "mam2" and missing is not None and drawn_anywhere


def motion_frames(mask: TubeMask, config: PretrainConfig) -> Tensor:
    """Returns the number of frames of the masked tokens that have a target, float64 0-d, on the mask's device."""
    missing = TARGETS[config.loss.motion_target].missing
    frames = torch.full((), mask.masked.numel() * config.model.tubelet, dtype=torch.float64, device=mask.masked.device)
    return frames if missing is None else frames - missing(mask, config)


def motion_loss(
    pred: Tensor,
    video: Tensor,
    mask: TubeMask,
    loss: LossConfig,
    patch_size: Sequence[int],
    *,
    reduction: str = "mean",
) -> Tensor:
    """Computes the mean squared error of the predicted motion of the masked tokens.

    Args:
        pred: [B, Nm, Pd].
        video: [B, C, T, H, W], uint8 (0 to 255) or float (0 to 1), any strides.
        reduction: "mean" over all existing values, or "none": [B, Nm], the mean of each token.

    Returns:
        A scalar or [B, Nm], float32.
    """
    if loss.motion_target in PIXEL_DIFFERENCES:
        options = _difference_options(loss, patch_size)
        return masked_frame_difference_loss(pred, video, mask, **options, reduction=reduction)
    with torch.no_grad():
        target = motion_target(video, loss, patch_size)
        target = target.gather(1, mask.masked[..., None].expand(-1, -1, target.shape[-1]))
    errors = F.mse_loss(pred.float(), target, reduction="none")
    return errors.mean(-1) if reduction == "none" else errors.mean()


def motion_head_loss(
    head: nn.Linear, features: Tensor, video: Tensor, mask: TubeMask, loss: LossConfig, patch_size: Sequence[int]
) -> Tensor:
    """Computes `motion_loss` of head(features), features [B, Nm, D]; pixel differences need no stored predictions."""
    if loss.motion_target not in PIXEL_DIFFERENCES:
        return motion_loss(head(features), video, mask, loss, patch_size)
    options = _difference_options(loss, patch_size)
    target = options.pop("difference")
    return linear_masked_loss(features, head.weight, video, mask, head.bias, target=target, **options)


def hog_of_difference(video: Tensor, patch_size: Sequence[int], *, eps: float) -> Tensor:
    """Computes histograms of oriented gradients of the pixel difference: video [B, C, T, H, W] -> float32 [B, N, 36·C].

    It follows Dalal and Triggs (2005) with MaskFeat's sizes (Wei et al. 2022), on d = x[1] − x[0] of each tubelet, with
    pixels from 0 to 1, separately for each channel: central differences (g_x, g_y) with repeated borders; their
    unsigned angle in 9 equal bins from 0 to π; in each of the `HOG_CELLS`² cells per patch the mean magnitude √(g_x² +
    g_y²) per bin, h; and h / (‖h‖ + eps). It omits MaskFeat's Gaussian window. eps, a magnitude, keeps the noise of
    static cells small. Value order (cell row, cell column, channel, bin).
    """
    tubelet, height, width = patch_size
    first, second = (unit_pixels(video[:, :, frame::tubelet]) for frame in (0, 1))
    difference = rearrange(second - first, "b c t h w -> (b t) c h w")
    padded = F.pad(difference, (1, 1, 1, 1), mode="replicate")
    across = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    down = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    magnitude = torch.hypot(across, down)
    bins = (torch.atan2(down, across) * (ORIENTATIONS / math.pi)).floor().long() % ORIENTATIONS
    cell = height // HOG_CELLS, width // HOG_CELLS
    histogram = torch.stack(
        [F.avg_pool2d(magnitude * (bins == orientation), cell) for orientation in range(ORIENTATIONS)], dim=-1
    )
    histogram = histogram / (histogram.norm(dim=-1, keepdim=True) + eps)
    layout = "(b t) c (h i) (w j) o -> b (t h w) (i j c o)"
    return rearrange(histogram, layout, b=len(video), i=HOG_CELLS, j=HOG_CELLS)


@torch.library.custom_op("mam2_engine::optical_flow", mutates_args=())
def _optical_flow(video: Tensor, patch_size: Sequence[int]) -> Tensor:
    tubelet, height, width = patch_size
    gray = (unit_pixels(video).mean(1) * 255).round().byte().cpu().numpy()
    flow = np.stack([[_flow(*clip[t : t + 2]) for t in range(0, len(clip), tubelet)] for clip in gray])
    field = rearrange(torch.from_numpy(flow), "b t h w c -> (b t) c h w")
    cells = F.avg_pool2d(field, (height // FLOW_CELLS, width // FLOW_CELLS))
    layout = "(b t) c (h i) (w j) -> b (t h w) (i j c)"
    return rearrange(cells, layout, b=len(video), i=FLOW_CELLS, j=FLOW_CELLS).contiguous().to(video.device)


@_optical_flow.register_fake
def _(video: Tensor, patch_size: Sequence[int]) -> Tensor:
    tokens = math.prod(size // patch for size, patch in zip(video.shape[2:], patch_size, strict=True))
    return video.new_empty((len(video), tokens, motion_values("flow", patch_size)), dtype=torch.float32)


def optical_flow(video: Tensor, patch_size: Sequence[int]) -> Tensor:
    """Computes dense flow from each tubelet's first frame to the next: video [B, C, T, H, W] -> float32 [B, N, 32].

    It uses OpenCV's dense inverse search (Kroeger et al. 2016, preset fast) on gray frames, the mean of the channels
    in 256 levels, and averages over each of
    the `FLOW_CELLS`² cells per patch. Unit: pixels of the clip, to the right and down. Value order (cell row, cell
    column, direction). It runs on the CPU and waits for the device.

    Raises:
        UserError: OpenCV is not installed.
    """
    require_flow()
    return _optical_flow(video, list(patch_size))


def require_flow() -> None:
    """Raises UserError if OpenCV is not installed."""
    try:
        import cv2  # noqa: F401
    except ImportError:
        raise UserError(
            "loss.motion_target 'flow' needs OpenCV: pip install opencv-python-headless, or use 'adjacent'"
        ) from None


def _flow(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Computes the flow between two frames uint8 [H, W]: float32 [H, W, 2]."""
    return _searcher().calc(first, second, None)


@functools.cache
def _searcher() -> Any:
    import cv2

    return cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)  # type: ignore[attr-defined]


def _difference_options(loss: LossConfig, patch_size: Sequence[int]) -> dict[str, Any]:
    """Returns the keyword arguments of `frame_difference` and `masked_frame_difference_loss`."""
    return {
        "patch_size": patch_size,
        "difference": loss.motion_target,
        "normalize": None if loss.motion_normalize == "none" else loss.motion_normalize,
        "eps": loss.motion_eps,
    }


def _frame_difference(video: Tensor, loss: LossConfig, patch_size: Sequence[int]) -> Tensor:
    return frame_difference(video, **_difference_options(loss, patch_size))


def _last_frames(mask: TubeMask, config: PretrainConfig) -> Tensor:
    """Counts the masked tokens of the last slot: a clip's last frame has no next one."""
    slots, rows, columns = config.grid
    return (mask.masked >= (slots - 1) * rows * columns).sum()


def _none(video: Tensor, loss: LossConfig, patch_size: Sequence[int]) -> Tensor:
    raise ValueError("loss.motion_target: 'none' has no motion target; use another one")


TARGETS = {
    "adjacent": MotionTarget(
        values=lambda tubelet, pixels, channels: tubelet * pixels * channels,
        compute=_frame_difference,
        fused=True,
        missing=_last_frames,
    ),
    "intra": MotionTarget(
        values=lambda tubelet, pixels, channels: (tubelet - 1) * pixels * channels,
        compute=_frame_difference,
        fused=True,
        tubelet=2,
    ),
    "hog": MotionTarget(
        values=lambda tubelet, pixels, channels: HOG_CELLS**2 * channels * ORIENTATIONS,
        compute=lambda video, loss, patch_size: hog_of_difference(video, patch_size, eps=loss.motion_eps),
        tubelet=2,
    ),
    "flow": MotionTarget(
        values=lambda tubelet, pixels, channels: FLOW_CELLS**2 * 2,
        compute=lambda video, loss, patch_size: optical_flow(video, patch_size),
        tubelet=2,
    ),
    "none": MotionTarget(values=lambda tubelet, pixels, channels: 0, compute=_none),
}
"""By the names of `LossConfig.motion_target`."""
PIXEL_DIFFERENCES = tuple(name for name, target in TARGETS.items() if target.fused)
