"""Measures how well a VQGAN reconstructs frames from their codes: numbers and pictures.

Shapes: B clips, T frames, F = B·T frames, H×W pixels, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from mam2.engine.model.pixels import as_colors, unit_pixels
from mam2.engine.tokenizer.fidelity import fidelity, squared_deviations, squared_errors, unit_range
from mam2.engine.tokenizer.kmeans import nearest_sum
from mam2.engine.tokenizer.tokenizer import codebook_usage, numbered, scale_pixels
from mam2.engine.tokenizer.training import frame_patches
from mam2.engine.tokenizer.vqgan import VQGAN

SHOWN = 8
"""Number of frames in the picture."""


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """Frames reconstructed from their codes."""

    frames: int
    psnr_db: float
    """Peak signal-to-noise ratio over all pixels: 10 log10(1 / mean squared error), for pixels from 0 to 1."""
    mean_color_psnr_db: float
    """PSNR of replacing each frame by its mean color."""
    explained: float
    """Share of the variance within a frame that the decoded codes explain, see `Fidelity`."""
    color_explained: float | None
    """The same for color only. None for gray frames."""
    kmeans_explained: float
    """`explained` for k-means of raw patches with one center per code: each patch is replaced by its center, or with
    several codes per patch by the sum of its centers, each from k-means of what those before it leave."""
    kmeans_color_explained: float | None
    """`color_explained` for the same k-means."""
    codes_used: int
    """Number of different codes over all frames, of all codebooks."""
    perplexity: float
    """See `codebook_usage`; of all codebooks together."""
    original: Tensor
    """[SHOWN or fewer, H, W, C] float32 in 0 to 1."""
    reconstructed: Tensor
    """Reconstructions from the codes, like `original`."""
    from_kmeans: Tensor
    """Reconstructions from k-means centers, like `original`."""


@torch.no_grad()
def measure_reconstruction(vqgan: VQGAN, clips: Iterable[Tensor], centers: Tensor) -> Reconstruction:
    """Encodes and decodes the frames of clips [B, T, H, W, C] on the VQGAN's device.

    Args:
        clips: H and W are multiples of the VQGAN's factor.
        centers: [D, V, P], k-means centers of patches of the training frames, see `Trained.centers`.

    Raises:
        ValueError: there is no clip.
    """
    factor = vqgan.config.factor
    by_codes, by_kmeans, deviations = torch.zeros(3, 2, dtype=torch.float64)
    values = 0
    codes: list[Tensor] = []
    shown: list[tuple[Tensor, ...]] = []
    for clip in clips:
        frames = clip.flatten(0, 1)
        original = unit_pixels(frames.movedim(-1, 1))
        found = vqgan.codes(scale_pixels(frames.movedim(-1, 1)))
        patches = nearest_sum(frame_patches(frames, factor), centers.to(frames.device))
        baseline = F.fold(patches.unflatten(0, (len(frames), -1)).mT, original.shape[2:], factor, stride=factor)
        back, by_patch = unit_range(vqgan.decode(found)), unit_range(baseline.to(original))
        by_codes += squared_errors(back, original)
        by_kmeans += squared_errors(by_patch, original)
        deviations += squared_deviations(original)
        values += original.numel()
        codes.append(numbered(found, vqgan.config.codes, vqgan.config.codes_per_patch).cpu())
        if len(shown) < SHOWN:  # one per clip
            step = clip.shape[1]
            shown += zip(*(pictures[::step].cpu() for pictures in (original, back, by_patch)), strict=True)
    if not codes:
        raise ValueError(f"clips: expected at least one, with sides that are multiples of {factor}, found none")
    used, perplexity = codebook_usage(torch.cat(codes), vqgan.config.codes * vqgan.config.codes_per_patch)
    originals, reconstructed, from_kmeans = zip(*shown[:SHOWN], strict=True)
    of_codes, of_kmeans = fidelity(by_codes, deviations), fidelity(by_kmeans, deviations)
    return Reconstruction(
        frames=values // (originals[0].numel()),
        psnr_db=float(-10 * (by_codes[0] / values).log10()),
        mean_color_psnr_db=float(-10 * (deviations[0] / values).log10()),
        explained=of_codes.explained,
        color_explained=of_codes.color,
        kmeans_explained=of_kmeans.explained,
        kmeans_color_explained=of_kmeans.color,
        codes_used=used,
        perplexity=perplexity,
        original=torch.stack(originals).movedim(1, -1),
        reconstructed=torch.stack(reconstructed).movedim(1, -1),
        from_kmeans=torch.stack(from_kmeans).movedim(1, -1),
    )


def draw_reconstructions(result: Reconstruction, path: Path) -> None:
    """Draws frames, their reconstructions, and those of k-means of patches below each other, as PNG."""
    count = len(result.original)
    rows = {"original": result.original, "from codes": result.reconstructed, "k-means": result.from_kmeans}
    figure = Figure(figsize=(1.6 * count + 0.9, 1.7 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), count, squeeze=False)
    for row, (name, pictures) in enumerate(rows.items()):
        for axis, picture in zip(axes[row], pictures.numpy(), strict=True):
            axis.imshow(as_colors(torch.from_numpy(picture)).numpy())
            axis.set_xticks([])
            axis.set_yticks([])
        axes[row, 0].set_ylabel(name)
    figure.savefig(path, dpi=120)


def draw_training(reports: Sequence[dict[str, float]], path: Path) -> None:
    """Draws the loss and the use of the codes over the steps, as PNG; reports from `train_with_progress`."""
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
