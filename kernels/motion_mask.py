"""Tube masks that follow motion: the probability that a position is masked grows with its motion energy.

    e[p]    = Σ (x[t+1] − x[t])²        over the frames, pixels and channels of position p
    w[p]    = 1 − s + s · e[p] / mean(e)
    hidden  = the positions with the smallest  −log(u[p]) / w[p],   u uniform, from the masks' generator

This draws positions without replacement, each with probability w divided by the sum of w over the positions not yet
drawn (Efraimidis and Spirakis 2006). If all energies are equal, as in a static clip, or if s = 0, the masks are those
of `tube_mask`. With s = 1 a position without motion is masked only after every moving position is.

The energy of a uint8 clip is an exact integer, so that CPU and GPU draw the same masks from it.

B clips, C channels, T frames, N tokens.
"""

from collections.abc import Sequence

import torch

from . import launch, reference, reference_masks
from .cube import cube_meta, cube_place, load_cube, strip_offsets
from .launch import jit, tl
from .masks import TubeMask, draw_positions
from .shapes import check_video, token_grid
from .targets import has_target


@jit(do_not_specialize_on_alignment=["slots", "rows", "columns"])
def _motion_energy_kernel(
    energy_ptr,
    video_ptr,
    slots,
    rows,
    columns,
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    CHANNELS: tl.constexpr,
    TUBELET: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PIXELS: tl.constexpr,
    ROWS: tl.constexpr,
    RUN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BYTES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    place = tl.program_id(0)
    tokens = slots * rows * columns
    base, slot = cube_place(place % tokens, rows, columns, stride_t, stride_h, stride_w, TUBELET, HEIGHT, WIDTH)
    strip, frame, offset = strip_offsets(stride_t, stride_h, stride_w, HEIGHT, WIDTH, PIXELS, ROWS, WIDE)
    source = video_ptr + (place // tokens).to(tl.int64) * stride_b + base + offset
    moves = (strip < TUBELET * HEIGHT * WIDTH // PIXELS) & has_target(frame, slot, slots, 1, TUBELET)
    cube = load_cube(
        source, moves, stride_c, stride_w, None, CHANNELS, PIXELS, ROWS, RUN, CHANNELS_LAST, WIDE, BYTES, DTYPE
    )
    following = load_cube(
        source + stride_t,
        moves,
        stride_c,
        stride_w,
        None,
        CHANNELS,
        PIXELS,
        ROWS,
        RUN,
        CHANNELS_LAST,
        WIDE,
        BYTES,
        DTYPE,
    )
    # the sum of more than 33 025 squared bytes may exceed 31 bits
    WHOLE: tl.constexpr = tl.int64 if TUBELET * HEIGHT * WIDTH * CHANNELS > 33025 else tl.int32
    SUM: tl.constexpr = WHOLE if BYTES else DTYPE
    energy = tl.zeros([ROWS], SUM)
    for segment in tl.static_range(len(cube)):
        change = (following[segment] - cube[segment]).to(SUM)
        energy += tl.sum(change * change, axis=1)
    tl.store(energy_ptr + place, tl.sum(energy, axis=0).to(energy_ptr.dtype.element_ty))


def _launch(video: torch.Tensor, patch_size: Sequence[int]) -> torch.Tensor:
    grid = token_grid(video, patch_size)
    dtype = reference.compute_dtype(video)
    energy = video.new_empty(video.shape[0], grid.tokens, dtype=reference_masks.energy_dtype(video))
    meta = cube_meta(video, patch_size, dtype)
    launch.run_kernel(
        _motion_energy_kernel,
        energy.numel(),
        energy,
        video,
        grid.slots,
        grid.rows,
        grid.columns,
        *video.stride(),
        **meta,
        num_warps=launch.warps("motion_energy", grid.values, video.device),
    )
    return energy


@torch.library.custom_op("mam2::motion_energy", mutates_args=())
def _motion_energy(video: torch.Tensor, patch_size: Sequence[int]) -> torch.Tensor:
    if launch.active_path(video) == "triton":
        return _launch(video, patch_size)
    return reference_masks.motion_energy(video, patch_size)


@_motion_energy.register_fake
def _(video: torch.Tensor, patch_size: Sequence[int]) -> torch.Tensor:
    return video.new_empty(
        video.shape[0], reference.tokens_of(video, patch_size), dtype=reference_masks.energy_dtype(video)
    )


def motion_tube_mask(
    video: torch.Tensor,
    ratio: float,
    *,
    patch_size: Sequence[int] = (2, 16, 16),
    strength: float = 0.5,
    seed: int,
    step: int | torch.Tensor = 0,
    first_sample: int = 0,
) -> TubeMask:
    """Masks the same int(ratio·H'·W') positions in every slot of a clip, moving ones more often.

    Args:
        video: [B,C,T,H,W], uint8 (0 to 255) or float, any strides. Energies are compared within a clip, so the unit
            of a float clip does not matter.
        ratio: share of the positions to mask, 0 to 1.
        patch_size: (frames, height, width) of a token.
        strength: s in the module's docstring, 0 (as `tube_mask`) to 1 (by motion alone).
        seed, step, first_sample: as in `tube_mask`; the mask is on the device of video.

    Raises:
        ValueError: a shape, type or number is invalid; or the ratio masks no position, or all of them.
    """
    grid = check_video(video, patch_size)
    if not 0 <= strength <= 1:
        raise ValueError(f"strength: expected 0 to 1, found {strength}")
    energies = reference_masks.motion_energy if launch.is_plain_cpu(video) else _motion_energy
    energy = energies(video, list(patch_size))
    where = step, first_sample, video.device
    return draw_positions(
        video.shape[0], grid.slots, grid.rows * grid.columns, ratio, seed, *where, energy, round(strength * 65536)
    )
