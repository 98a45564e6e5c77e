"""The tokenizer: maps a clip to VQGAN codebook indices, one or several per token.

Shapes: B clips, T frames, T'×H'×W' the token grid, N = T'·H'·W' tokens, F frames with codes per token, D codes per
patch of the VQGAN, K = F·D codes per token (the D codes of its first frame, then those of the next), V codes.
A token has the codes of its first frame, or those of every frame; frames are resized so that the code map is exactly
H'×W'. Without the dimension K only first frames have codes, one each.
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
"""Largest share of padding images in a call that is accepted to avoid a compilation for another number of images."""
MOST_SIZES = 4
"""Maximum numbers of images for which the network is compiled, besides `images_per_pass`: torch.compile allows 8."""


class Tokenizer(nn.Module):
    """A frozen VQGAN that encodes clips on their token grid.

    Args:
        vqgan: is set to evaluation mode and frozen.
        grid: tokens along time, height and width (T', H', W').
        precision: precision of the convolutions; `float32` is exact float32 on a GPU too, without TF32. The nearest
            codes are computed in float32; bfloat16 convolutions change some of them.
        frames: the frames of a token that have codes: its `first`, or `all`.
        images_per_pass: frames per pass of the network; limits its memory.
        compiled: compiles the function from images to codes, for example `torch.compile`. Each number of images costs
            a compilation, so that parts are padded to a few numbers of images.
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
        """Computes all codes: video [B, C, T, H, W], uint8 (0 to 255) or float (0 to 1) -> int64 [B, N] or [B, N, K].

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
        """Returns the share of a video's codes that would differ with exact float32 convolutions."""
        parts = self._frames(video).split(self.images_per_pass)
        with self._arithmetic(video.device, "float32"):
            expected = torch.cat([self.vqgan.codes(self._prepared(part)) for part in parts])
        return float((self.codes(video) != self._by_token(expected, len(video))).float().mean())

    def _part_size(self, images: int) -> int:
        """Returns the images per part of a call: a compiled number if it needs little padding, else a new one."""

        def padded(size: int) -> int:
            return -(-images // size) * size

        known = min(self._sizes, key=padded, default=None)
        if known is None or padded(known) > (1 + MOST_WASTE) * images:
            equal = -(-images // -(-images // self.images_per_pass))
            known = equal if len(self._sizes) < MOST_SIZES else min([*self._sizes, self.images_per_pass], key=padded)
            self._sizes.add(known)
        return known

    def _by_token(self, maps: Tensor, clips: int) -> Tensor:
        """Rearranges code maps [B·T'·F, H', W'] or [B·T'·F, H', W', D] to [B, N] or [B, N, K]."""
        slots, rows, columns = self.grid
        depth = self.vqgan.config.codes_per_patch
        codes = maps.reshape(clips, slots, -1, rows * columns, depth).transpose(2, 3).flatten(3).flatten(1, 2)
        return codes.squeeze(2) if self.frames == "first" and depth == 1 else codes

    def _frames(self, video: Tensor) -> Tensor:
        """Returns the frames of a video that have codes: [B·T', C, H, W] or [B·T, 3, H, W]."""
        slots, channels = self.grid[0], self.vqgan.config.image_channels
        if video.ndim != 5 or video.shape[1] != channels or video.shape[2] % slots:
            raise ValueError(
                f"video: expected [B, {channels}, T, H, W] with T a multiple of {slots}, found {tuple(video.shape)}; "
                "build the tokenizer with the grid of these clips"
            )
        step = 1 if self.frames == "all" else video.shape[2] // slots
        return video[:, :, ::step].transpose(1, 2).flatten(0, 1)

    def _prepared(self, frames: Tensor, images: int = 0) -> Tensor:
        """Returns frames in the VQGAN's scale and range, [images, 3, h, w], padded with black frames."""
        if self._compiled and len(frames) < images:
            frames = F.pad(frames, (0, 0) * 3 + (0, images - len(frames)))
        height, width = (side * self.vqgan.config.factor for side in self.grid[1:])
        return _prepare(frames, height, width)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Decodes codes to pictures in the VQGAN's scale, float32 in [0, 1].

        [B, N] int64 -> [B, T', 3, h, w] of first frames; [B, N, K] -> [B, T'·F, 3, h, w] of F frames per token.
        """
        slots, rows, columns = self.grid
        tokens, depth = slots * rows * columns, self.vqgan.config.codes_per_patch
        one = codes.ndim == 2 and depth == 1
        if not (one or (codes.ndim == 3 and codes.shape[2] % depth == 0)) or codes.shape[1] != tokens:
            multiple = f"[B, {tokens}] or [B, {tokens}, F]" if depth == 1 else f"[B, {tokens}, F·{depth}]"
            raise ValueError(f"codes: expected {multiple}, found {tuple(codes.shape)}")
        by_frame = codes.reshape(len(codes), slots, rows * columns, -1, depth).transpose(2, 3)
        of_images = by_frame.reshape(-1, rows, columns, depth)
        maps = (of_images.squeeze(3) if depth == 1 else of_images).split(self.images_per_pass)
        with self._arithmetic(codes.device, self.precision):
            images = torch.cat([self.vqgan.decode(part).float() for part in maps])
        return ((images + 1) / 2).clamp(0, 1).view(len(codes), -1, *images.shape[1:])

    @contextmanager
    def _arithmetic(self, device: torch.device, precision: str) -> Iterator[None]:
        """Context for convolutions in a precision; float32 without TF32, which is cuDNN's default."""
        cudnn: Any = torch.backends.cudnn
        # `flags` switches off everything that is not passed, even cuDNN itself.
        exact = cudnn.flags(
            enabled=cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False
        )
        with exact, torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            yield


def scale_pixels(frames: Tensor) -> Tensor:
    """Converts pixels to the VQGAN's range: uint8 (0 to 255) or float (0 to 1) -> float32 in [-1, 1]."""
    return frames.float() / 127.5 - 1 if frames.dtype == torch.uint8 else frames.float() * 2 - 1


def codebook_usage(codes: Tensor, size: int) -> tuple[int, float]:
    """Runs `usage_of` for `codes` of any shape (int64) and a codebook of `size`."""
    return usage_of(torch.bincount(codes.flatten(), minlength=size))


def numbered(codes: Tensor, size: int, codebooks: int) -> Tensor:
    """Numbers codes int64 [..., K] of `codebooks` of `size` consecutively: [M], from 0 to codebooks·size - 1.

    K is a multiple of `codebooks`, whose codes follow each other. With one codebook the codes do not change.
    """
    if codebooks == 1:
        return codes.flatten()
    return (codes.reshape(-1, codebooks) + size * torch.arange(codebooks, device=codes.device)).flatten()


def usage_of(histogram: Tensor) -> tuple[int, float]:
    """Returns the number of codes that occur, and the perplexity, from the counts [V] of the codes.

    The perplexity, exp(entropy), is the number of equally frequent codes with the same entropy: 1 if only one occurs.
    """
    share = histogram.double() / histogram.sum()
    return int((histogram > 0).sum()), float(torch.special.entr(share).sum().exp())


def _prepare(frames: Tensor, height: int, width: int) -> Tensor:
    """Resizes [B, C, H, W] to [B, C, height, width] float32 in [-1, 1], channels last."""
    images = scale_pixels(frames).contiguous(memory_format=torch.channels_last)
    if images.shape[2:] != (height, width):
        images = F.interpolate(images, (height, width), mode="bilinear", antialias=True)
    return images
