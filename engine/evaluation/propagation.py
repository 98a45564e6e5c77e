"""Label propagation: propagates the masks of a clip's first frame to its other frames by matching features.

It follows DAVIS' protocol for self-supervised features (Jabri et al. 2020, as in DINO's evaluation): every token of a
frame gets the soft labels of its most similar tokens in the first frame and in the last few. Nothing is trained.

Shapes: T frames of H×W pixels, H'×W' tokens per frame, D values, O objects; masks hold 0 for the background and 1 to O.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

TOP_K, RADIUS, CONTEXT = 5, 12, 7
"""Values of DINO's evaluation (Caron et al. 2021): number of tokens from which a token gets its labels, their maximum
distance in rows and columns, and the number of previous frames to search, in addition to the first."""
TEMPERATURE = 0.1
BOUNDARY_TOLERANCE = 0.008
"""Distance to the true boundary, as a share of the frame's diagonal, up to which a boundary pixel is correct."""


@torch.no_grad()
def propagate_masks(
    features: Tensor,
    first: Tensor,
    objects: int,
    *,
    top_k: int = TOP_K,
    radius: int = RADIUS,
    context: int = CONTEXT,
) -> Tensor:
    """Computes the masks of all frames from the mask of the first.

    Args:
        features: features of each token of each frame, float [T, H', W', D].
        first: the first frame's mask, int64 [H, W], 0 to O.
        objects: number of objects O.
        top_k: number of tokens from which a token gets its labels.
        radius: maximum distance of these tokens in rows and columns.
        context: number of previous frames with these tokens, in addition to the first frame.

    Returns:
        int64 [T, H, W]; the first is `first`.
    """
    frames, rows, columns, _ = features.shape
    height, width = first.shape
    flat = F.normalize(features.float().flatten(1, 2), dim=-1)
    near = _neighborhood(rows, columns, radius).to(flat.device)
    pixels = F.one_hot(first, objects + 1).movedim(-1, 0).float()
    labels = [F.adaptive_avg_pool2d(pixels, (rows, columns)).flatten(1).T]  # per frame [H'·W', O + 1]
    masks = [first]
    for frame in range(1, frames):
        sources = sorted({0, *range(max(frame - context, 0), frame)})
        cosines = torch.cat([flat[frame] @ flat[source].T for source in sources], dim=1)
        weights = (cosines / TEMPERATURE).exp() * near.repeat(1, len(sources))
        values, places = weights.topk(min(top_k, weights.shape[1]), dim=1)
        values = values / values.sum(1, keepdim=True)
        found = torch.cat([labels[source] for source in sources])[places]
        labels.append((values[..., None] * found).sum(1))
        soft = labels[-1].T.unflatten(1, (rows, columns))
        soft = F.interpolate(soft[None], (height, width), mode="bilinear", align_corners=False)[0]
        masks.append(_stretched(soft).argmax(0))
    return torch.stack(masks)


def region_similarity(found: Tensor, true: Tensor) -> Tensor:
    """Computes J, intersection over union of two masks: bool [..., H, W] -> float64 [...]; 1 if both are empty."""
    both, either = ((found & true), (found | true))
    inside, total = (mask.flatten(-2).sum(-1).double() for mask in (both, either))
    return torch.where(total > 0, inside / total.clamp_min(1), 1.0)


def boundary_accuracy(found: Tensor, true: Tensor) -> Tensor:
    """Computes F, the harmonic mean of the shares of each mask's boundary near the other's.

    Bool [..., H, W] -> float64. F is 1 if neither mask has a boundary.
    """
    height, width = true.shape[-2:]
    reach = math.ceil(BOUNDARY_TOLERANCE * math.hypot(height, width))
    ours, theirs = _boundary(found), _boundary(true)
    counts = [edge.flatten(-2).sum(-1).double() for edge in (ours, theirs)]
    hits = [
        (edge & _dilated(other, reach)).flatten(-2).sum(-1).double() for edge, other in ((ours, theirs), (theirs, ours))
    ]
    precision, recall = (
        torch.where(count > 0, hit / count.clamp_min(1), (other == 0).double())
        for hit, count, other in zip(hits, counts, reversed(counts), strict=True)
    )
    # DAVIS: a mask without a boundary, where the other has one, has precision 1 and recall 0
    precision = torch.where((counts[0] == 0) & (counts[1] > 0), 1.0, precision)
    recall = torch.where((counts[1] == 0) & (counts[0] > 0), 1.0, recall)
    total = precision + recall
    return torch.where(total > 0, 2 * precision * recall / total.clamp_min(1e-12), 0.0)


def score_masks(found: Tensor, true: Tensor, objects: int) -> tuple[float, float]:
    """Returns J and F of a clip's masks, int64 [T, H, W], as means over frames and objects.

    As in DAVIS, the first and the last frame do not count. A clip needs three frames.
    """
    inner = slice(1, -1)
    pairs = [(found[inner] == number, true[inner] == number) for number in range(1, objects + 1)]
    region = torch.stack([region_similarity(*pair) for pair in pairs]).mean()
    boundary = torch.stack([boundary_accuracy(*pair) for pair in pairs]).mean()
    return float(region), float(boundary)


def _neighborhood(rows: int, columns: int, radius: int) -> Tensor:
    """Returns float [H'·W', H'·W'], 1 if two tokens are at most `radius` rows and columns apart."""
    near = [(torch.arange(count)[:, None] - torch.arange(count)).abs() <= radius for count in (rows, columns)]
    return (near[0][:, None, :, None] & near[1][None, :, None, :]).reshape(rows * columns, -1).float()


def _stretched(soft: Tensor) -> Tensor:
    """Scales each object's labels [O + 1, H, W] to 0 to 1, so that small objects are not lost."""
    low, high = soft.amin((1, 2), keepdim=True), soft.amax((1, 2), keepdim=True)
    return torch.where(high > 0, (soft - low) / (high - low).clamp_min(1e-12), 0.0)


def _boundary(mask: Tensor) -> Tensor:
    """Returns the pixels whose right, lower or lower right neighbor is on the other side of the mask's edge."""
    right, below = mask.clone(), mask.clone()
    right[..., :, :-1], below[..., :-1, :] = mask[..., :, 1:], mask[..., 1:, :]
    corner = mask.clone()
    corner[..., :-1, :-1] = mask[..., 1:, 1:]
    corner[..., -1, :], corner[..., :, -1] = right[..., -1, :], below[..., :, -1]
    return (mask ^ right) | (mask ^ below) | (mask ^ corner)


def _dilated(mask: Tensor, reach: int) -> Tensor:
    """Returns the pixels within `reach` pixels of the mask."""
    offsets = torch.arange(-reach, reach + 1, device=mask.device)
    disc = (offsets[:, None] ** 2 + offsets**2 <= reach**2).float()
    flat = mask.reshape(-1, 1, *mask.shape[-2:]).float()
    return (F.conv2d(flat, disc[None, None], padding=reach) > 0).view(mask.shape)
