"""Masks in plain PyTorch: the definition, the reference of the tests, and what runs on a GPU without Triton.

B clips, C channels, T frames, N tokens, n positions.
"""

from collections.abc import Sequence

import numpy as np
import torch

from . import host_masks
from .reference import compute_dtype, row_slices, tokens_of

CELL = 4
"""Number of patches in a cell of 2×2."""


def motion_order(keys: torch.Tensor, energy: torch.Tensor, strength: int) -> torch.Tensor:
    """Returns integers [B,n] in whose order positions are masked, from 32-bit keys [B,n] and energies [B,slots,n].

    The integers are log(−log(u)/w) with u = 1 − (key + ½)/2^32 and w = 65536 − strength + strength·energy/mean(energy),
    at least 2^−24, in steps of 2^−33: the steps are fine enough that equal energies keep the order of the keys.
    """
    total = energy.double().sum(dim=1)
    mean = total.mean(dim=1, keepdim=True)
    share = total / torch.where(mean > 0, mean, 1.0)  # a static clip: equal weights
    weight = (65536 - strength + strength * share).clamp(min=2**-24)
    wait = -torch.log((2**33 - 1 - 2 * keys).double() * 2**-33)
    return ((wait.log() - weight.log() + 64) * 2**33).long()


def draw_mask(
    step: torch.Tensor,
    seed: int,
    first_sample: int,
    batch: int,
    slots: int,
    positions: int,
    hidden: int,
    energy: torch.Tensor | None,
    strength: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks in every clip the `hidden` positions with the smallest random keys, the same positions in all slots.

    The keys are those of `host_masks.position_keys`; on a GPU the host waits for `step`. With motion energies
    [B,slots·positions], `motion_order` replaces the keys. Ties go to the smaller position.
    Returns visible [B, slots·(positions−hidden)], masked [B, slots·hidden].
    """
    words = host_masks.position_keys(seed, first_sample, batch, positions, int(step))
    keys = torch.from_numpy(words.astype(np.int64)).to(step.device)
    if energy is not None:
        keys = motion_order(keys, energy.unflatten(1, (slots, positions)), strength)
    order = keys.sort(dim=1, stable=True).indices
    offset = torch.arange(slots, device=step.device)[None, :, None] * positions
    parts = order[:, hidden:], order[:, :hidden]
    visible, masked = ((part.sort(dim=1).values[:, None, :] + offset).flatten(1) for part in parts)
    return visible, masked


def masked_subset(
    masked: torch.Tensor, step: torch.Tensor, grid: Sequence[int], count: int, by_cell: bool, seed: int, sample: int
) -> torch.Tensor:
    """Draws `count` of the masked tokens [B,Nm] of every clip -> [B,count], as `masked_subset.py` defines it.

    The keys are those of `host_masks.position_keys`; on a GPU the host waits for the device. sample: that of the first
    clip.
    """
    batch, entries = masked.shape
    device = masked.device
    clips = np.arange(sample, sample + batch)[:, None]
    words = host_masks.philox(seed, (masked.cpu().numpy(), clips, clips >> 32, np.array([[int(step)]])))
    rank = torch.from_numpy(words.astype(np.int64)).to(device)
    if by_cell:
        _, rows, columns = grid
        samples = torch.from_numpy(clips).to(device)
        slot, row, column = masked // (rows * columns), masked // columns % rows, masked % columns
        # clockwise from the upper left patch
        place = torch.where(row % 2 == 0, column % 2, 3 - column % 2)
        rank += ((place - slot - step - samples) % CELL) << 32
    # rank and entry in one number: all distinct, so that the `count` smallest are well defined
    rank = rank.bitwise_left_shift_(host_masks.POSITION_BITS).add_(torch.arange(entries, device=device))
    smallest = rank.topk(count, dim=1, largest=False, sorted=False).values
    return masked[rank <= smallest.amax(dim=1, keepdim=True)].view(batch, count)


def energy_dtype(video: torch.Tensor) -> torch.dtype:
    """Returns the type of motion energies: int64 for a uint8 clip, whose energies are exact, else float."""
    return torch.int64 if video.dtype == torch.uint8 else compute_dtype(video)


def _frame_distances(frames: np.ndarray) -> np.ndarray:
    """Returns |x[t+1] − x[t]| of bytes [B,C,T,H,W], 0 for the last frame: a quarter of the memory of floats."""
    distances = np.empty_like(frames)
    earlier, later, inside = frames[:, :, :-1], frames[:, :, 1:], distances[:, :, :-1]
    np.maximum(earlier, later, out=inside)
    np.subtract(inside, np.minimum(earlier, later), out=inside)
    distances[:, :, -1] = 0
    return distances


def motion_energy(video: torch.Tensor, patch_size: Sequence[int]) -> torch.Tensor:
    """Returns Σ (x[t+1] − x[t])² over the values of each token [B,N], in the clip's units; the last frame adds 0."""
    (tubelet, height, width), dtype = patch_size, energy_dtype(video)
    inside = compute_dtype(video)
    if dtype == torch.int64 and tubelet * height * 255**2 >= 2**24:  # float32 holds integers up to 2^24
        inside = torch.float64
    energy = video.new_empty(len(video), tokens_of(video, patch_size), dtype=dtype)
    for part in row_slices(len(video), video[:1].numel() * inside.itemsize):
        if video.dtype == torch.uint8 and video.device.type == "cpu":
            change = torch.from_numpy(_frame_distances(video[part].numpy())).to(inside)
        else:
            change = video[part].to(inside, copy=True)
            for frame in range(video.shape[2] - 1):  # in place: a second buffer would cost more than the loop
                change[:, :, frame].sub_(change[:, :, frame + 1])
            change[:, :, -1] = 0
        change.square_()
        last = change.stride(1) == 1  # the sums run along memory: [B,T,H,W,C] or [B,T,H,C,W]
        rows = change.permute(0, 2, 3, 4, 1) if last else change.permute(0, 2, 3, 1, 4)
        rows = rows.unflatten(1, (-1, tubelet)).unflatten(3, (-1, height)).sum(4).sum(2).to(dtype)
        columns = (
            rows.flatten(3).unflatten(3, (-1, width * rows.shape[4])) if last else rows.sum(3).unflatten(3, (-1, width))
        )
        energy[part] = columns.sum(4).flatten(1)
    return energy
