"""Draws which tokens of a clip are masked: index tensors, drawn on the device without a host synchronization.

Masks come from a counter-based generator (Philox4x32-10) keyed by (seed, step, sample, position), so that a resumed
run, another batch split and another device draw the same masks. The tokens with the smallest random keys are masked.

B clips, N tokens (T'·H'·W'), Nv/Nm visible/masked.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from . import host_masks, launch, reference_masks
from .launch import jit, tl
from .shapes import OTHER_COUNT, REPEATED, Grid, check_bool_mask, check_grid, check_index


class TubeMask(NamedTuple):
    """The visible and the masked tokens of every clip: int64, ascending in each row, together every token once."""

    visible: torch.Tensor
    masked: torch.Tensor

    def as_bool(self) -> torch.Tensor:
        """[B,N] bool, True = masked."""
        tokens = self.visible.shape[1] + self.masked.shape[1]
        mask = torch.zeros(self.masked.shape[0], tokens, dtype=torch.bool, device=self.masked.device)
        return mask.scatter(1, self.masked, True)

    @classmethod
    def from_bool(cls, mask: torch.Tensor) -> "TubeMask":
        """Converts [B,N] bool, True = masked. Waits for the device once, to check the counts.

        Raises:
            ValueError: not a boolean matrix; or the rows mask different numbers of tokens; or under torch.compile,
                which cannot wait for the device.
        """
        if mask.dim() != 2 or mask.dtype != torch.bool:
            raise ValueError(f"mask: expected bool [B,N], found {mask.dtype} {tuple(mask.shape)}")
        if torch.compiler.is_compiling():
            raise ValueError("mask: torch.compile cannot count a boolean mask; pass a TubeMask or int64 token numbers")
        counts = mask.sum(dim=1).tolist()
        if len(set(counts)) > 1:
            raise ValueError(
                f"mask: expected the same number of masked tokens in every clip, found {sorted(set(counts))}"
            )
        hidden = counts[0] if counts else 0
        order = order_by(mask)
        return cls(visible=order[:, hidden:].contiguous(), masked=order[:, :hidden].contiguous())


def order_by(mask: torch.Tensor) -> torch.Tensor:
    """Returns token numbers [B,N]: first those that are True in mask [B,N], then the others, both ascending."""
    return mask.to(torch.uint8).sort(dim=1, stable=True, descending=True).indices


def masked_index(
    mask: TubeMask | torch.Tensor | None, grid: Grid, video: torch.Tensor, count: int | None = None
) -> torch.Tensor:
    """Returns masked token numbers [B,Nm] of a TubeMask, a bool [B,N], an index, or None (every token).

    `count` is the expected Nm of a boolean mask. If it is given, the host does not wait for the device; a clip that
    masks another number of tokens gets OTHER_COUNT for each token. A clip with a repeated token number gets REPEATED.

    Raises:
        ValueError: the mask's type, shape or device is invalid.
    """
    if mask is None:
        return torch.arange(grid.tokens, device=video.device).expand(video.shape[0], -1)
    if isinstance(mask, TubeMask):
        index = mask.masked
    elif not isinstance(mask, torch.Tensor):
        raise ValueError(f"mask: expected a TubeMask, a tensor or None, found {type(mask).__name__}")
    elif mask.dtype == torch.bool:
        check_bool_mask(mask, video, grid)
        if not count:
            return TubeMask.from_bool(mask).masked
        found = mask.sum(dim=1, keepdim=True)
        return torch.where(found == count, order_by(mask)[:, :count], OTHER_COUNT - found)
    else:
        index = mask
    check_index("mask", index, video)
    return index if isinstance(mask, TubeMask) else without_repeats(index, grid.tokens)


def without_repeats(index: torch.Tensor, tokens: int) -> torch.Tensor:
    """Returns the token numbers [B,K]; in a clip that contains one twice, every number is REPEATED.

    Marks the numbers among the `tokens` and counts the marks: a sort takes longer. Numbers out of range do not count.
    """
    inside = (index >= 0) & (index < tokens)
    marks = index.new_zeros(index.shape[0], tokens + 1, dtype=torch.bool)
    marks.scatter_(1, torch.where(inside, index, tokens), True)
    repeated = marks[:, :tokens].sum(dim=1, keepdim=True) < inside.sum(dim=1, keepdim=True)
    return torch.where(repeated, REPEATED, index)


@jit
def random_keys(position, sample, step, seed):
    """Returns `host_masks.position_keys` of a block of positions int32 of one sample, as int64."""
    zero = position * 0
    low, high = (sample & 0xFFFFFFFF).to(tl.uint32), (sample >> 32).to(tl.uint32)
    step = (step & 0xFFFFFFFF).to(tl.uint32)
    word, _, _, _ = tl.philox(
        seed, position.to(tl.uint32), zero.to(tl.uint32) + low, zero.to(tl.uint32) + high, zero.to(tl.uint32) + step
    )
    return word.to(tl.int64)


@jit
def are_smallest(rank, place, count):
    """Returns which of a block of distinct ranks are the `count` smallest; place: 0, 1, 2, … in the block."""
    largest = tl.sum(tl.where(place == count - 1, tl.sort(rank), 0), axis=0)
    return rank <= largest


# no specialization on argument values: the kernel's sort takes seconds to compile
@jit(do_not_specialize=["seed", "first_sample", "slots", "positions", "hidden", "strength"])
def _draw_mask_kernel(
    visible_ptr,
    masked_ptr,
    step_ptr,
    energy_ptr,
    seed: tl.int64,
    first_sample: tl.int64,
    slots: tl.int32,
    positions: tl.int32,
    hidden: tl.int32,
    strength: tl.int32,
    GUIDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    clip = tl.program_id(0).to(tl.int64)
    position = tl.arange(0, BLOCK)
    mask = position < positions
    sample = first_sample + clip
    key = random_keys(position, sample, tl.load(step_ptr), seed)
    if GUIDED:
        energy = tl.zeros([BLOCK], tl.float64)
        for slot in range(slots):
            energies = energy_ptr + (clip * slots + slot) * positions
            energy += tl.load(energies + position, mask=mask, other=0).to(tl.float64)
        mean = tl.sum(energy, axis=0) / positions
        share = energy / tl.where(mean > 0, mean, 1.0)  # a static clip: equal weights
        weight = tl.maximum(65536 - strength + strength * share, 2.0**-24)
        wait = -tl.log((8589934591 - 2 * key).to(tl.float64) * 2.0**-33)
        key = ((tl.log(wait) - tl.log(weight) + 64.0) * 2.0**33).to(tl.int64)
    # key (40 bits) and position in one number: all distinct, so that the `hidden` smallest are well defined
    rank = tl.where(mask, key * 8388608 + position, 0x7FFFFFFFFFFFFFFF)
    is_hidden = are_smallest(rank, position, hidden)
    hidden_before = tl.cumsum(is_hidden.to(tl.int32), axis=0) - is_hidden.to(tl.int32)
    for slot in range(slots):
        token = (position + slot * positions).to(tl.int64)
        masked = masked_ptr + (clip * slots + slot) * hidden + hidden_before
        visible = visible_ptr + (clip * slots + slot) * (positions - hidden) + position - hidden_before
        tl.store(masked, token, mask=mask & is_hidden)
        tl.store(visible, token, mask=mask & (is_hidden == 0))


def _launch(
    step: torch.Tensor,
    seed: int,
    first_sample: int,
    batch: int,
    slots: int,
    positions: int,
    hidden: int,
    energy: torch.Tensor | None = None,
    strength: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    visible = step.new_empty(batch, slots * (positions - hidden))
    masked = step.new_empty(batch, slots * hidden)
    block = launch.power_of_two(positions)
    meta = {"GUIDED": energy is not None, "BLOCK": block, "num_warps": launch.warps("draw_mask", block, step.device)}
    arguments = (visible, masked, step, energy, seed, first_sample, slots, positions, hidden, strength)
    launch.run_kernel(_draw_mask_kernel, batch, *arguments, **meta)
    return visible, masked


@torch.library.custom_op("mam2::draw_mask", mutates_args=())
def _draw_mask(
    step: torch.Tensor,
    seed: int,
    first_sample: int,
    batch: int,
    slots: int,
    positions: int,
    hidden: int,
    energy: torch.Tensor | None = None,
    strength: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    draw_mask = reference_masks.draw_mask if step.device.type != "cpu" else host_masks.draw_mask
    if launch.active_path(step) == "triton":
        draw_mask = _launch
    return draw_mask(step, seed, first_sample, batch, slots, positions, hidden, energy, strength)


@_draw_mask.register_fake
def _(
    step: torch.Tensor,
    seed: int,
    first_sample: int,
    batch: int,
    slots: int,
    positions: int,
    hidden: int,
    energy: torch.Tensor | None = None,
    strength: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    return step.new_empty(batch, slots * (positions - hidden)), step.new_empty(batch, slots * hidden)


def step_on(step: int | torch.Tensor, device: torch.device | str | None) -> torch.Tensor:
    """Returns the step's number as a 0-d int64 tensor on a device; None: that of `step`, or the default device."""
    if not isinstance(step, torch.Tensor):
        return torch.full((), step, dtype=torch.int64, device=device)
    if step.dim() or step.dtype != torch.int64:
        raise ValueError(f"step: expected an int or a 0-d int64 tensor, found {step.dtype} {tuple(step.shape)}")
    return step if device is None else step.to(device)


def draw_positions(
    batch: int,
    slots: int,
    positions: int,
    ratio: float,
    seed: int,
    step: int | torch.Tensor,
    first_sample: int,
    device: torch.device | str | None,
    energy: torch.Tensor | None = None,
    strength: int = 0,
) -> TubeMask:
    """Masks int(ratio·positions) positions, the same in every slot; with energies [B,N], moving ones more often.

    `strength` is in units of 1/65536. The other arguments and the errors are those of `tube_mask`.
    """
    hidden = int(ratio * positions)
    if not 0 < hidden < positions:
        raise ValueError(
            f"ratio: {ratio} hides {hidden} of {positions} positions; expected at least 1 hidden and 1 visible"
        )
    if batch < 0:
        raise ValueError(f"batch: expected 0 or more clips, found {batch}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected 0 to 2**63 - 1, found {seed}")
    step = step_on(step, device)
    draw_mask = host_masks.draw_mask if launch.is_plain_cpu(step, energy) else _draw_mask
    return TubeMask(*draw_mask(step, seed, first_sample, batch, slots, positions, hidden, energy, strength))


def tube_mask(
    batch: int,
    grid: Sequence[int],
    ratio: float,
    *,
    seed: int,
    step: int | torch.Tensor = 0,
    first_sample: int = 0,
    device: torch.device | str | None = None,
) -> TubeMask:
    """Masks the same int(ratio·H'·W') positions in every slot of a clip (VideoMAE's tube masking).

    Args:
        batch: number of clips B.
        grid: (T', H', W') tokens of a clip.
        ratio: share of the positions to mask, 0 to 1.
        seed: 0 to 2**63 − 1.
        step: training step, of which the lowest 32 bits are used. Pass a 0-d int64 tensor in a compiled or captured
            step, so that the step is not specialized on the number.
        first_sample: sample number of the first clip; clip b has the sample number first_sample + b.
        device: device of the mask; default: the device of `step`, or the default device.

    Raises:
        ValueError: the grid or a number is invalid; or the ratio masks no position, or all of them.
    """
    check_grid(grid)
    slots, rows, columns = grid
    return draw_positions(batch, slots, rows * columns, ratio, seed, step, first_sample, device)


def random_mask(
    batch: int,
    grid: Sequence[int],
    ratio: float,
    *,
    seed: int,
    step: int | torch.Tensor = 0,
    first_sample: int = 0,
    device: torch.device | str | None = None,
) -> TubeMask:
    """Masks int(ratio·T'·H'·W') tokens drawn anywhere in space and time (mae_st). Arguments as in `tube_mask`."""
    check_grid(grid)
    slots, rows, columns = grid
    return draw_positions(batch, 1, slots * rows * columns, ratio, seed, step, first_sample, device)
