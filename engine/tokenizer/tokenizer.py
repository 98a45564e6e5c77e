"""The tokenizer: VQGAN codes of the tokens of a clip, its names for how they look.

Shapes: B clips, T frames, T'×H'×W' the token grid, N = T'·H'·W' tokens, F codes a token, V codes.
A token's code is that of its first frame, or there is one of each of its frames; frames are resized so that the code
map is exactly H'×W'. Without the dimension F only first frames have codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mam2.engine.tokenizer.vqgan import VQGAN

MOST_WASTE = 0.25
"""Largest share of padding in the images of a call that spares a compilation for another number of images."""
MOST_SIZES = 4
"""Numbers of images that the network is compiled for, beside `images_per_pass`: torch.compile allows 8."""


class Tokenizer(nn.Module):
    """A frozen VQGAN laid over the token grid of a clip.

    Args:
        vqgan: set to evaluation and frozen here.
        grid: tokens along time, height and width (T', H', W').
        precision: of the convolutions; `float32` is exact float32 on a GPU too, without TF32. Codes are chosen in
            float32 from what the convolutions return; bfloat16 changes some of them.
        frames: `first`: one code a token; `all`: F, one of each of its frames.
        images_per_pass: frames that go through the network at once; bounds its memory.
        compiled: makes a faster function of the one from images to codes, `torch.compile` for example. Each number of
            images costs a compilation, so that parts are then padded to a few numbers of images.
    """

    def __init__(
        self,
        vqgan: VQGAN,
        grid: tuple[int, int, int],
        precision: Literal["float32", "bfloat16"] = "float32",
        *,
        frames: Literal["first", "all"] = "first",
        images_per_pass: int = 64,
        compiled: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
    ) -> None:
        super().__init__()
        if precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision: expected 'float32' or 'bfloat16', found {precision!r}")
        frozen = vqgan.eval().requires_grad_(False)
        self.vqgan: VQGAN = frozen.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.grid = grid
        self.precision = precision
        self.frames = frames
        self.images_per_pass = images_per_pass
        self._image_codes = compiled(self.vqgan.codes) if compiled else self.vqgan.codes
        self._compiled = compiled is not None
        self._sizes: set[int] = set()

    @property
    def codebook_size(self) -> int:
        """V: codes are 0 to V - 1."""
        return self.vqgan.config.codes

    @torch.no_grad()
    def codes(self, video: Tensor) -> Tensor:
        """Codes of every token: video [B, 3, T, H, W], uint8 (0 to 255) or float (0 to 1) -> int64 [B, N] or [B, N, F].

        Raises:
            ValueError: T is not a multiple of the grid's T'.
        """
        frames = self._frames(video)
        size = self._part_size(len(frames)) if self._compiled else self.images_per_pass
        with self._arithmetic(video.device, self.precision):
            maps = [self._image_codes(self._prepared(part, size)) for part in frames.split(size)]
        return self._by_token(torch.cat(maps)[: len(frames)], len(video))

    @torch.no_grad()
    def changed_share(self, video: Tensor) -> float:
        """Share of the codes of a video, as for `codes`, that exact float32 convolutions would choose otherwise."""
        parts = self._frames(video).split(self.images_per_pass)
        with self._arithmetic(video.device, "float32"):
            expected = torch.cat([self.vqgan.codes(self._prepared(part)) for part in parts])
        return float((self.codes(video) != self._by_token(expected, len(video))).float().mean())

    def _part_size(self, images: int) -> int:
        """Images of each part of a call with so many: a known number where it pads little, else one of few new ones."""

        def padded(size: int) -> int:
            return -(-images // size) * size

        known = min(self._sizes, key=padded, default=None)
        if known is None or padded(known) > (1 + MOST_WASTE) * images:
            equal = -(-images // -(-images // self.images_per_pass))
            known = equal if len(self._sizes) < MOST_SIZES else min([*self._sizes, self.images_per_pass], key=padded)
            self._sizes.add(known)
        return known

    def _by_token(self, maps: Tensor, clips: int) -> Tensor:
        """Code maps [B·T'·F, H', W'] -> [B, N] or [B, N, F]."""
        slots, rows, columns = self.grid
        codes = maps.view(clips, slots, -1, rows * columns).transpose(2, 3).flatten(1, 2)
        return codes if self.frames == "all" else codes.squeeze(2)

    def _frames(self, video: Tensor) -> Tensor:
        """The frames of a video that have codes: [B·T', 3, H, W] or [B·T, 3, H, W]."""
        slots = self.grid[0]
        if video.ndim != 5 or video.shape[1] != 3 or video.shape[2] % slots:
            raise ValueError(
                f"video: expected [B, 3, T, H, W] with T a multiple of {slots}, found {tuple(video.shape)}; "
                "give the tokenizer the grid of these clips"
            )
        step = 1 if self.frames == "all" else video.shape[2] // slots
        return video[:, :, ::step].transpose(1, 2).flatten(0, 1)

    def _prepared(self, frames: Tensor, images: int = 0) -> Tensor:
        """Frames at the VQGAN's scale and range, [images, 3, h, w]: black ones fill up where there are fewer."""
        if self._compiled and len(frames) < images:
            frames = F.pad(frames, (0, 0) * 3 + (0, images - len(frames)))
        height, width = (side * self.vqgan.config.factor for side in self.grid[1:])
        return _prepare(frames, height, width)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Pictures of codes, at the VQGAN's own scale, float32 in [0, 1].

        [B, N] int64 -> [B, T', 3, h, w] of first frames; [B, N, F] -> [B, T'·F, 3, h, w] of all.
        """
        slots, rows, columns = self.grid
        if codes.ndim not in (2, 3) or codes.shape[1] != slots * rows * columns:
            tokens = slots * rows * columns
            raise ValueError(f"codes: expected [B, {tokens}] or [B, {tokens}, F], found {tuple(codes.shape)}")
        by_frame = codes.reshape(len(codes), slots, rows * columns, -1).transpose(2, 3)
        maps = by_frame.reshape(-1, rows, columns).split(self.images_per_pass)
        with self._arithmetic(codes.device, self.precision):
            images = torch.cat([self.vqgan.decode(part).float() for part in maps])
        return ((images + 1) / 2).clamp(0, 1).view(len(codes), -1, *images.shape[1:])

    @contextmanager
    def _arithmetic(self, device: torch.device, precision: str) -> Iterator[None]:
        """Convolutions in a precision; float32 ones without TF32, which is cuDNN's default."""
        cudnn: Any = torch.backends.cudnn
        # What `flags` is not told it switches off, cuDNN itself as well.
        exact = cudnn.flags(
            enabled=cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False
        )
        with exact, torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            yield


def scale_pixels(frames: Tensor) -> Tensor:
    """Pixels to the VQGAN's range: uint8 (0 to 255) or float (0 to 1) -> float32 in [-1, 1]."""
    return frames.float() / 127.5 - 1 if frames.dtype == torch.uint8 else frames.float() * 2 - 1


def codebook_usage(codes: Tensor, size: int) -> tuple[int, float]:
    """`usage_of` for `codes` of any shape (int64) from a codebook of `size`."""
    return usage_of(torch.bincount(codes.flatten(), minlength=size))


def usage_of(histogram: Tensor) -> tuple[int, float]:
    """How many codes occur, given how often each does [V], and the perplexity of their distribution.

    The perplexity, exp(entropy), is how many equally frequent codes would be as hard to guess: 1 when all are one.
    """
    share = histogram.double() / histogram.sum()
    return int((histogram > 0).sum()), float(torch.special.entr(share).sum().exp())


def _prepare(frames: Tensor, height: int, width: int) -> Tensor:
    """[B, 3, H, W] -> [B, 3, height, width] float32 in [-1, 1], channels last."""
    images = scale_pixels(frames).contiguous(memory_format=torch.channels_last)
    if images.shape[2:] != (height, width):
        images = F.interpolate(images, (height, width), mode="bilinear", antialias=True)
    return images
