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


def motion_energy(video: torch.Tensor, patch_size: Sequence[int]) -> torch.Tensor:
    """Returns Σ (x[t+1] − x[t])² over the values of each token [B,N], in the clip's units; the last frame adds 0.

    The squared changes of some clips exist at a time, or of some slots of one clip: few enough to stay in the cache.
    """
    (tubelet, height, width), dtype = patch_size, energy_dtype(video)
    inside = compute_dtype(video)
    if dtype == torch.int64 and tubelet * height * 255**2 >= 2**24:  # float32 holds integers up to 2^24
        inside = torch.float64
    batch, _, frames, rows, columns = video.shape
    slots, whole = frames // tubelet, torch.float64 if dtype == torch.int64 else dtype
    energy = video.new_empty(batch, slots, tokens_of(video, patch_size) // slots, dtype=dtype)
    bytes_of_slot = video[:1, :, :tubelet].numel() * inside.itemsize
    for clips in row_slices(batch, slots * bytes_of_slot):
        for part in row_slices(slots, len(energy[clips]) * bytes_of_slot):
            first, stop = part.start * tubelet, min(part.stop, slots) * tubelet
            pixels = video[clips, :, first : stop + 1].to(inside)
            change = torch.empty_like(pixels[:, :, : stop - first])
            earlier, later = pixels[:, :, :-1], pixels[:, :, 1:]
            torch.ops.aten.mse_loss.out(earlier, later, 0, out=change[:, :, : later.shape[2]])  # squares, in one pass
            change[:, :, later.shape[2] :] = 0
            # the sums run along memory: [B,T,H,W,C] or [B,T,H,C,W]
            last = change.stride(1) == 1
            lines = change.permute(0, 2, 3, 4, 1) if last else change.permute(0, 2, 3, 1, 4)
            lines = lines.reshape(len(change), -1, tubelet, rows // height, height, lines[0, 0, 0].numel())
            lines = lines.sum(4).sum(2)
            if not last:
                lines = lines.unflatten(3, (-1, columns)).sum(3, dtype=whole)
            cells = lines.unflatten(3, (columns // width, -1))
            energy[clips, part] = cells.sum(4, dtype=whole).flatten(2)
    return energy.flatten(1)
