"""Measures how well a VQGAN reconstructs frames from their codes: numbers and pictures.

Shapes: B clips, T frames, F = B·T frames, H×W pixels, C = 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from mam2.engine.tokenizer.tokenizer import codebook_usage, scale_pixels
from mam2.engine.tokenizer.vqgan import VQGAN

SHOWN = 8
"""Number of frames in the picture."""


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """Frames reconstructed from their codes."""

    frames: int
    psnr_db: float
    """Peak signal-to-noise ratio over all pixels: 10 log10(1 / mean squared error), for pixels from 0 to 1."""
    mean_colour_psnr_db: float
    """PSNR of replacing each frame by its mean color."""
    codes_used: int
    """Number of different codes over all frames."""
    perplexity: float
    """See `codebook_usage`."""
    original: Tensor
    """[SHOWN or fewer, H, W, C] float32 in 0 to 1."""
    reconstructed: Tensor
    """The reconstructions, like `original`."""


@torch.no_grad()
def measure_reconstruction(vqgan: VQGAN, clips: Iterable[Tensor]) -> Reconstruction:
    """Encodes and decodes the frames of clips, uint8 [B, T, H, W, C] on the VQGAN's device.

    H and W are multiples of its factor. Raises ValueError if there is no clip.
    """
    factor = vqgan.config.factor
    error, spread, values = 0.0, 0.0, 0
    codes: list[Tensor] = []
    shown: list[tuple[Tensor, Tensor]] = []
    for clip in clips:
        images = scale_pixels(clip.flatten(0, 1).movedim(-1, 1))
        found = vqgan.codes(images)
        original, back = (images + 1) / 2, ((vqgan.decode(found) + 1) / 2).clamp(0, 1)
        error += float((back - original).square().double().sum())
        spread += float((original - original.mean((2, 3), keepdim=True)).square().double().sum())
        values += original.numel()
        codes.append(found.flatten().cpu())
        if len(shown) < SHOWN:  # one per clip
            step = clip.shape[1]
            shown += list(zip(original[::step].cpu(), back[::step].cpu(), strict=True))
    if not codes:
        raise ValueError(f"clips: expected at least one, with sides that are multiples of {factor}, found none")
    used, perplexity = codebook_usage(torch.cat(codes), vqgan.config.codes)
    originals, reconstructed = zip(*shown[:SHOWN], strict=True)
    return Reconstruction(
        frames=values // (originals[0].numel()),
        psnr_db=float(-10 * np.log10(error / values)),
        mean_colour_psnr_db=float(-10 * np.log10(spread / values)),
        codes_used=used,
        perplexity=perplexity,
        original=torch.stack(originals).movedim(1, -1),
        reconstructed=torch.stack(reconstructed).movedim(1, -1),
    )


def draw_reconstructions(result: Reconstruction, path: Path) -> None:
    """Draws frames and their reconstructions below them, as PNG."""
    count = len(result.original)
    figure = Figure(figsize=(1.6 * count + 0.9, 3.4), layout="constrained")
    axes = figure.subplots(2, count, squeeze=False)
    for row, (name, pictures) in enumerate((("original", result.original), ("from codes", result.reconstructed))):
        for axis, picture in zip(axes[row], pictures.numpy(), strict=True):
            axis.imshow(picture)
            axis.set_xticks([])
            axis.set_yticks([])
        axes[row, 0].set_ylabel(name)
    figure.savefig(path, dpi=120)


def draw_training(reports: Sequence[dict[str, float]], path: Path) -> None:
    """Draws the loss and the use of the codes over the steps, as PNG; reports from `train_tokenizer`."""
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    loss, usage = figure.subplots(1, 2)
    steps = [report["step"] for report in reports]
    marker = "." if len(steps) == 1 else None  # a single point would have no visible line
    loss.plot(steps, [report["loss"] for report in reports], marker=marker)
    loss.set_title("reconstruction loss", fontsize=10)
    for name, label in {"codes_used": "codes in use", "perplexity": "perplexity"}.items():
        usage.plot(steps, [report[name] for report in reports], label=label, marker=marker)
    usage.set_title("codebook", fontsize=10)
    usage.legend(frameon=False, fontsize=8)
    for axis in (loss, usage):
        axis.set_xlabel("step", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
