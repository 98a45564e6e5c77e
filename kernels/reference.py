"""Gathering and the losses in plain PyTorch: the definition, the reference of the tests, and what runs without a GPU.

All functions compute in float64 if an input is float64, otherwise in float32. They work in place on buffers that they
allocated, and select cubes while the clip is still uint8, because these losses are memory-bound on a CPU.

B clips, C channels, T frames, N tokens, K selected tokens, P values per token, V codes, M rows (B·K tokens or hidden
states), τ frames per tubelet, p patch edge.
"""

import functools
import math
from collections.abc import Iterator, Sequence

import torch

from .shapes import unfit_tokens
from .token_cubes import cut, select

CHUNK_BYTES = 2 << 20
"""Bytes that the losses, scale_gradient and reference_masks.motion_energy hold at a time besides their result: these
stay in the cache, and the allocator reuses their pages."""


def row_slices(count: int, row_bytes: int) -> Iterator[slice]:
    """Divides `count` rows into slices of about CHUNK_BYTES."""
    step = max(CHUNK_BYTES // max(row_bytes, 1), 1)
    return (slice(start, start + step) for start in range(0, count, step))


def tokens_of(video: torch.Tensor, patch_size: Sequence[int]) -> int:
    """Returns N, the number of tokens of a clip [B,C,T,H,W]."""
    return math.prod(video.shape[2:]) // math.prod(patch_size)


def _check_tokens(index: torch.Tensor, tokens: int) -> None:
    """Checks token numbers [B,K].

    Raises:
        IndexError: a token does not exist.
        ValueError: a token number is REPEATED or OTHER_COUNT of shapes.py.
    """
    if index.numel():
        lowest, highest = (int(bound) for bound in index.aminmax())
        if lowest < 0 or highest >= tokens:
            raise unfit_tokens(lowest, highest, index.shape[1], tokens)


def _rows(index: torch.Tensor, tokens: int) -> torch.Tensor:
    """Converts token numbers [B,K] to row numbers [B·K] of a [B·N, …] tensor; raises as `_check_tokens`."""
    _check_tokens(index, tokens)
    return (index + torch.arange(index.shape[0], device=index.device)[:, None] * tokens).flatten()


def _unit(video: torch.Tensor) -> int:
    """Returns the value of the clip that stands for 1.0: 255 for uint8, else 1."""
    return 255 if video.dtype == torch.uint8 else 1


def _numbers(
    raw: torch.Tensor, channels: int, dtype: torch.dtype, mean: Sequence[float] | None, std: Sequence[float] | None
) -> torch.Tensor:
    """Returns the pixels as decoded, in the clip's unit: undoes the normalization of a float clip."""
    pixels = raw.to(dtype, copy=True)
    if raw.dtype != torch.uint8 and mean is not None and std is not None:
        by_channel = pixels.unflatten(-1, (-1, channels))
        by_channel.mul_(pixels.new_tensor(std)).add_(pixels.new_tensor(mean))
    return pixels


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """Returns float64 if any tensor is float64, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


@functools.lru_cache(maxsize=16)
def _statistics(
    mean: tuple[float, ...], std: tuple[float, ...], unit: int, pixels: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns mean and std of each value of a token, both [P], in the clip's unit.

    Stored, because making them costs as much as the rest of a small gathering.
    """
    with torch.inference_mode(False):
        table = torch.tensor([mean, std], dtype=dtype, device=device).mul_(unit).repeat(1, pixels)
        return table[0], table[1]


def gather_tubes(
    video: torch.Tensor,
    visible: torch.Tensor,
    patch_size: Sequence[int],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Returns the selected tokens [B,K,P], (x − mean)/std with x in [0,1]."""
    _check_tokens(visible, tokens_of(video, patch_size))
    picked, unit = select(video, visible, patch_size), _unit(video)
    compute = torch.float64 if torch.float64 in (video.dtype, dtype) else torch.float32
    if mean is not None and std is not None:
        means, stds = _statistics(tuple(mean), tuple(std), unit, math.prod(patch_size), compute, picked.device)
        values = torch.sub(picked, means).div_(stds)  # in the type of the means
    else:
        values = picked.to(compute, copy=True)
        if unit > 1:
            values.div_(unit)
    return values.to(dtype).view(*visible.shape, picked.shape[1])


def _over_rows(cubes: torch.Tensor, statistic: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns views of cubes [M,P] and statistic [M,G] that broadcast over patch rows: 3 channels do not vectorize."""
    groups = statistic.shape[1]
    if groups == 1:
        return cubes, statistic
    return cubes.unflatten(1, (-1, width * groups)), statistic.repeat(1, width)[:, None]


def _center_(cubes: torch.Tensor, groups: int, width: int, whole: bool) -> torch.Tensor:
    """Subtracts from cubes [M,P] the mean of each interleaved group; `groups` is the number of channels, or 1.

    `whole`: the cubes hold byte values. Their sum is then computed exactly, so that a cube of one color becomes 0
    without a rounding error.
    """
    by_group = cubes.unflatten(1, (-1, groups))
    count = by_group.shape[1]
    # float32 holds integers up to 2^24
    wide = torch.float64 if whole and 255 * count > 2**24 else cubes.dtype
    mean = by_group.sum(dim=1, dtype=wide).div_(count).to(cubes.dtype)
    rows, mean = _over_rows(cubes, mean, width)
    rows.sub_(mean)
    return cubes


def _deviation(centered: torch.Tensor, groups: int, normalize: str, eps: float, unit: int) -> torch.Tensor:
    """Returns the divisor [M,G] of a standardized cube, from the unbiased variance; `eps` is in units of [0,1].

    "channel" is sqrt(variance) + eps (VideoMAE), "patch" is sqrt(variance + eps) (MAE, mae_st).
    """
    variance = centered.square().unflatten(1, (-1, groups)).sum(dim=1).div_(centered.shape[1] // groups - 1)
    if normalize == "channel":
        return variance.sqrt_().add_(eps * unit)
    return variance.add_(eps * unit * unit).sqrt_()


def target(
    video: torch.Tensor,
    index: torch.Tensor,
    patch_size: Sequence[int],
    kind: str,
    normalize: str | None,
    eps: float,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Returns the target [B·K, P] of the masked tokens, in `dtype`.

    "pixel" is the standardized cube. "joint" is its first frame, then x[t] − x[0] divided by the cube's standard
    deviation for each later frame t. "adjacent" is x[t+1] − x[t] divided by the cube's standard deviation for each
    frame t of the cube, 0 if the clip has no frame t+1. "intra" is the same for t+1 inside the cube, τ−1 differences.
    A uint8 clip is computed in byte units until the last division.
    """
    channels, (tubelet, _, width), unit = video.shape[1], patch_size, _unit(video)
    count = tokens_of(video, patch_size)
    _check_tokens(index, count)
    # most tokens are selected twice: all of the cube and one frame of the next; two selections cost more than one cut
    tokens = cut(video, patch_size) if kind == "adjacent" and 2 * index.shape[1] > count else None
    raw = select(video, index, patch_size) if tokens is None else tokens.index_select(0, _rows(index, count))
    cubes = _numbers(raw, channels, dtype, mean, std)
    groups = channels if normalize == "channel" else 1
    values = cubes.shape[1]
    frame = values // tubelet
    if kind in ("pixel", "joint"):
        if normalize is not None:
            deviation = _deviation(_center_(cubes, groups, width, unit > 1), groups, normalize, eps, unit)
            torch.Tensor.div_(*_over_rows(cubes, deviation, width))
        elif unit > 1:
            cubes.div_(unit)
        if kind == "joint":
            cubes[:, frame:].unflatten(1, (-1, frame)).sub_(cubes[:, None, :frame])
        return cubes

    inside = values - frame
    difference = cubes.new_empty(len(cubes), values if kind == "adjacent" else inside)
    torch.sub(cubes[:, frame:], cubes[:, :inside], out=difference[:, :inside])
    if kind == "adjacent":
        slot = count // (video.shape[2] // tubelet)
        # a token without a next frame takes its own last one
        following = (index // slot + 1) * tubelet - lacks_next_frame(index, count, slot).long()
        if tokens is None:
            frames = select(video, following * slot + index % slot, (1, *patch_size[1:]))
        else:
            place = following // tubelet * slot + index % slot
            rows = _rows(place, count) * tubelet + (following % tubelet).flatten()
            frames = tokens.view(-1, frame).index_select(0, rows)
        torch.sub(_numbers(frames, channels, dtype, mean, std), cubes[:, inside:], out=difference[:, inside:])
    if normalize is not None:
        deviation = _deviation(_center_(cubes, groups, width, unit > 1), groups, normalize, eps, unit)
        torch.Tensor.div_(*_over_rows(difference, deviation, width))
    elif unit > 1:
        difference.div_(unit)
    return difference


def lacks_next_frame(index: torch.Tensor, tokens: int, slot: int) -> torch.Tensor:
    """Returns True for the last `slot` tokens, those of the clip's last slot: their last frame has no next frame."""
    return index >= tokens - slot


def masked_errors(
    pred: torch.Tensor,
    video: torch.Tensor,
    masked: torch.Tensor,
    factors: torch.Tensor | None,
    divisor: int,
    needs: Sequence[bool],
    patch_size: Sequence[int],
    kind: str,
    normalize: str | None,
    eps: float,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    gradient: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the squared error of each masked token [B,K] times its factor, the same without, and the gradient.

    pred is [B,K,P] for the masked tokens, or [B,N,P] for every token; then only the masked ones count. `factors` are
    None (1), a scalar or [B,K]; all are divided by `divisor`. `needs`: whether pred and factors get a gradient. Without
    a gradient for the factors the second result is empty, and a token of factor 0 has neither error nor gradient. The
    gradient, in the shape and type of pred, is that of the first result; it is empty if not needed. `gradient`, if
    given, is contiguous memory for it, and may be a pred of the masked tokens.
    """
    batch, count = masked.shape
    dtype = compute_dtype(pred, video)
    token_count = tokens_of(video, patch_size)
    slot = token_count // (video.shape[2] // patch_size[0])
    every_token = pred.shape[1] != count
    unweighted = pred.new_empty(batch, count, dtype=dtype)
    if gradient is None:
        empty = torch.zeros_like if every_token else torch.empty_like
        gradient = empty(pred, memory_format=torch.contiguous_format) if needs[0] else pred.new_empty(0)
    in_place = needs[0] and not every_token and pred.dtype == dtype
    share = float("nan") if divisor == 0 else 1 / divisor
    scales = pred.new_tensor(share, dtype=dtype) if factors is None else factors.to(dtype) * share
    for part in row_slices(batch, count * pred.shape[2] * dtype.itemsize):
        index = masked[part]
        goal = target(video[part], index, patch_size, kind, normalize, eps, mean, std, dtype)
        rows = _rows(index, token_count) if every_token else None
        flat = pred[part].flatten(0, 1)
        out = gradient[part].view(goal.shape) if in_place else goal
        residual = torch.sub(flat if rows is None else flat.index_select(0, rows), goal, out=out)
        if kind == "adjacent":
            ends = (lacks_next_frame(index, token_count, slot).flatten().nonzero()[:, 0] + 1) * patch_size[0] - 1
            residual.view(-1, residual.shape[1] // patch_size[0]).index_fill_(0, ends, 0)
        if scales.dim() and not needs[1]:
            residual.index_fill_(0, (scales[part].flatten() == 0).nonzero()[:, 0], 0)
        unweighted[part] = torch.linalg.vector_norm(residual, dim=1).square_().view(index.shape)
        if needs[0]:
            residual.mul_(2 * (scales[part].reshape(-1, 1) if scales.dim() else scales))
        if needs[0] and rows is not None:
            gradient[part].flatten(0, 1).index_copy_(0, rows, residual.to(pred.dtype))
        elif needs[0] and not in_place:
            gradient[part] = residual.view(gradient[part].shape)
    results = unweighted * scales, unweighted.mul_(share) if needs[1] else unweighted.new_empty(0)
    return *results, gradient


def scale_gradient(gradient: torch.Tensor, scale: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Returns gradient · scale; scale has the leading dimensions of gradient. The product is float32 or float64.

    `out`, if given, is contiguous and may be the gradient itself.
    """
    factors = scale.view((*scale.shape, *[1] * (gradient.dim() - scale.dim())))
    wide = torch.promote_types(gradient.dtype, scale.dtype)
    if wide == gradient.dtype:
        return torch.mul(gradient, factors, out=out)
    if out is None:
        out = torch.empty_like(gradient, memory_format=torch.contiguous_format)
    lead = gradient.shape[: max(gradient.dim() - 1, scale.dim())]
    shape = math.prod(lead), math.prod(gradient.shape[len(lead) :])
    rows, scaled = gradient.reshape(shape), out.view(shape)
    factors = factors.expand((*lead, *[1] * (gradient.dim() - len(lead)))).reshape(-1, 1)
    for part in row_slices(len(rows), wide.itemsize * shape[1]):
        scaled[part] = rows[part] * factors[part]
    return out


def softmax_gradient_(
    logits: torch.Tensor,
    labels: torch.Tensor,
    upstream: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    needs_gradient: bool,
) -> torch.Tensor:
    """Returns the cross-entropy [M] of logits [M,V]; with `needs_gradient`, overwrites logits with the gradient.

    The gradient of row m is (softmax − (1−s)·onehot − s/V), times `upstream`, a scalar or [M], if given; ignored rows
    give 0.
    """
    ignored, column = labels == ignore_index, labels[:, None]
    factors = (
        logits.new_ones((), dtype=compute_dtype(logits)) if upstream is None else upstream.to(compute_dtype(logits))
    )
    factors = torch.where(ignored, 0.0, factors)[:, None]
    column = column.masked_fill(ignored[:, None], 0)
    loss = factors.new_empty(len(logits))
    for part in row_slices(len(logits), logits.shape[1] * factors.itemsize):
        wide, own, factor = logits[part].to(factors.dtype), column[part], factors[part]
        errors = wide.amax(dim=1, keepdim=True)
        errors -= (1 - label_smoothing) * wide.gather(1, own)
        if label_smoothing:
            errors -= label_smoothing * wide.mean(dim=1, keepdim=True)
        # in place: memory for another copy costs as much as the exponentials
        probabilities = torch.softmax(wide, dim=1, out=wide if needs_gradient else None)
        # the largest probability is 1 / Σ exp(logit − largest)
        errors -= probabilities.amax(dim=1, keepdim=True).log_()
        loss[part] = errors[:, 0]
        if needs_gradient:
            wide.mul_(factor).scatter_add_(1, own, (label_smoothing - 1) * factor)
            if label_smoothing:
                wide -= label_smoothing / wide.shape[1] * factor
            if wide.dtype != logits.dtype:
                logits[part] = wide
    return loss.masked_fill_(ignored, 0)
