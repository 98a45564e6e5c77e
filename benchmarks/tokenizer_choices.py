"""Kinds of codes on your clips, without training: `python -m benchmarks.tokenizer_choices CLIPS`.

Codebooks come from patches of training frames, in the first 64 principal components of these patches. Every kind is
measured on frames of held-out videos, those that `mam2 train-tokenizer` holds out. For one code per patch and for
residual codes this is, but for the components that are left out, the state in which a training of a tokenizer starts.

    D × V       D codes per patch, each of a codebook of V
    one         k-means
    residual    k-means, then k-means of what the centers before leave
    product     k-means of every D-th principal component, for each of the D beginnings
    scalar      finite scalar quantization: each of D components rounded to V levels, evenly after tanh (Mentzer et al.
                2023, "Finite Scalar Quantization: VQ-VAE Made Simple", arXiv 2309.15505), without its network
    explained   share of the variance within a frame that the decoded codes explain; color: the same of color alone
    used        codes that occur in the held-out frames, of all codebooks
    seconds     processor time of the codebooks; residual codes: of all codebooks up to this one

`--picture FILE` draws held-out frames and what the codes keep of them, for the first size.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from mam2.engine.config.training import DataConfig
from mam2.engine.data.loader import ClipLoader
from mam2.engine.data.manifest import Manifest, read_manifest
from mam2.engine.errors import UserError
from mam2.engine.tokenizer.fidelity import Fidelity, fidelity, squared_deviations, squared_errors, unit_range
from mam2.engine.tokenizer.from_videos import FRAME_DISTANCE, split_held_out
from mam2.engine.tokenizer.kmeans import kmeans, nearest_center, residual_kmeans
from mam2.engine.tokenizer.prepare import clip_frames
from mam2.engine.tokenizer.training import frame_patches

COMPONENTS = 64
SIZES = ((224, 16), (224, 8), (112, 8), (112, 16))
"""Height and width of the frames, and pixels per code along each."""
RESIDUAL = ((512, 4), (1024, 1), (4096, 1))
"""Codebook sizes V, and the most codes per patch D."""
PRODUCT = ((512, 2), (512, 4))
FEW = (((512, 2),), ())
"""The same for all sizes but the first: the largest codebook takes most of the time."""
SCALAR = ((8, 3), (8, 4))
SPREAD = 1.5
"""Standard deviations of a component that `scalar` divides by before tanh."""
SHOWN = {"one": [(512, 1), (4096, 1)], "residual": [(512, 2), (512, 4)]}


@dataclass(frozen=True)
class Patches:
    """Patches of frames of one size, as coefficients of principal components."""

    train: Tensor
    """[M, components] float32."""
    held_out: Tensor
    """[F·h·w, components] float32."""
    frames: Tensor
    """Held-out frames [F, 3, H, W] in -1 to 1."""
    mean: Tensor
    """[P]"""
    basis: Tensor
    """[P, components], orthonormal."""
    factor: int

    def decode(self, coefficients: Tensor) -> Tensor:
        """Returns the frames [F, 3, H, W] with these coefficients."""
        patches = (coefficients @ self.basis.T + self.mean).unflatten(0, (len(self.frames), -1)).mT
        return F.fold(patches, self.frames.shape[2:], self.factor, stride=self.factor)


@dataclass(frozen=True)
class Row:
    kind: str
    size: int
    factor: int
    codes: int
    depth: int
    found: Fidelity
    used: int
    seconds: float
    decoded: Tensor
    """Frames [F, 3, H, W] in -1 to 1."""


def read_frames(data: Path, count: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Returns about `count` training frames and all held-out frames, uint8 [F, size, size, 3]."""
    kept, held_out = split_held_out(read_manifest(data))
    config = DataConfig(frames=2, stride=FRAME_DISTANCE, size=size, threads=1)
    with ClipLoader(Manifest(held_out), config, batch=8, device="cpu", seed=seed, train=False) as loader:
        judged = torch.cat([batch.clip.flatten(0, 1) for batch in loader.evaluate()])
    with ClipLoader(Manifest(kept), config, batch=8, device="cpu", seed=seed) as loader:
        return torch.cat(list(itertools.islice(clip_frames(loader, 16), -(-count // 16)))), judged


def prepare(frames: Tensor, held_out: Tensor, factor: int, patches: int, generator: torch.Generator) -> Patches:
    """Cuts frames uint8 [F, H, W, 3] into patches and finds their principal components."""
    train = frame_patches(frames, factor)
    train = train[torch.randperm(len(train), generator=generator)[:patches]]
    mean = train.mean(0)
    centered = train - mean
    basis = torch.linalg.eigh((centered.T @ centered).double()).eigenvectors.flip(1)[:, :COMPONENTS].float()
    pixels = held_out.movedim(-1, 1).float() / 127.5 - 1
    return Patches(centered @ basis, (frame_patches(held_out, factor) - mean) @ basis, pixels, mean, basis, factor)


def rows_of(
    patches: Patches,
    generator: torch.Generator,
    residual: Sequence[tuple[int, int]] = RESIDUAL,
    product: Sequence[tuple[int, int]] = PRODUCT,
) -> Iterator[Row]:
    """Yields a row per choice. residual, product: codebook sizes V and codes per patch D."""
    deviations = squared_deviations(unit_range(patches.frames))

    def row(kind: str, codes: int, depth: int, named: Tensor, used: int, seconds: float) -> Row:
        decoded = patches.decode(named)
        errors = squared_errors(unit_range(decoded), unit_range(patches.frames))
        size = patches.frames.shape[2]
        return Row(kind, size, patches.factor, codes, depth, fidelity(errors, deviations), used, seconds, decoded)

    for codes, most in residual:
        named, used, started = torch.zeros_like(patches.held_out), 0, time.process_time()
        rest = patches.train
        for depth in range(1, most + 1):
            centers = residual_kmeans(rest, codes, 1, generator)[0][0]
            rest = rest - centers[nearest_center(rest, centers)]
            chosen = nearest_center(patches.held_out - named, centers)
            named, used = named + centers[chosen], used + len(chosen.unique())
            yield row("one" if depth == 1 else "residual", codes, depth, named, used, time.process_time() - started)
    for codes, depth in product:
        named, used, started = torch.empty_like(patches.held_out), 0, time.process_time()
        for first in range(depth):
            centers = kmeans(patches.train[:, first::depth].contiguous(), codes, generator)
            chosen = nearest_center(patches.held_out[:, first::depth], centers)
            named[:, first::depth] = centers[chosen]
            used += len(chosen.unique())
        yield row("product", codes, depth, named, used, time.process_time() - started)
    for levels, depth in SCALAR:
        named, started = torch.zeros_like(patches.held_out), time.process_time()
        scale = SPREAD * patches.train[:, :depth].std(0)
        steps = ((patches.held_out[:, :depth] / scale).tanh() * (levels / 2)).floor().clamp(-levels / 2, levels / 2 - 1)
        named[:, :depth] = ((steps + 0.5) / (levels / 2)).atanh() * scale
        used = len(steps.unique(dim=0))
        yield row("scalar", levels, depth, named, used, time.process_time() - started)


def table(rows: Sequence[Row]) -> str:
    """Returns the rows as a Markdown table."""
    lines = ["| frames | pixels per code | kind | D × V | explained | color | used | seconds |", "|---" * 8 + "|"]
    for row in rows:
        color = "" if row.found.color is None else f"{row.found.color:.1%}"
        codes = f"{row.size}² | {row.factor} | {row.kind} | {row.depth} × {row.codes}"
        lines.append(f"| {codes} | {row.found.explained:.1%} | {color} | {row.used} | {row.seconds:.0f} |")
    return "\n".join(lines)


def draw(rows: Sequence[Row], original: Tensor, path: Path, frames: int = 8) -> None:
    """Draws frames [F, 3, H, W] in -1 to 1 and the rows' decoded ones below each other."""
    every = max(len(original) // frames, 1)
    shown = {"original": original} | {f"{row.depth} × {row.codes}": row.decoded for row in rows}
    count = len(original[::every][:frames])
    figure = Figure(figsize=(1.6 * count + 0.9, 1.65 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), count, squeeze=False)
    for line, (name, pictures) in zip(axes, shown.items(), strict=True):
        for axis, picture in zip(line, unit_range(pictures[::every][:frames]), strict=True):
            axis.imshow(picture.movedim(0, -1).numpy())
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(name)
    figure.savefig(path, dpi=90)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", type=Path, help="folder of videos, or an annotation list")
    parser.add_argument("--sizes", type=int, default=len(SIZES), help=f"use the first of {SIZES}")
    parser.add_argument("--frames", type=int, default=640, help="training frames")
    parser.add_argument("--patches", type=int, default=60000, help="training patches for the codebooks")
    parser.add_argument("--divide", type=int, default=1, help="divisor of all codebook sizes, for a quick trial")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, help="file for pictures (.png)")
    given = parser.parse_args(arguments)
    frames, held_out = read_frames(given.data, given.frames, SIZES[0][0], given.seed)
    print(f"{len(frames)} training frames, {len(held_out)} held-out frames of other videos", flush=True)
    rows: list[Row] = []
    for size, factor in SIZES[: given.sizes]:
        generator = torch.Generator().manual_seed(given.seed)
        small, judged = (_resized(part, size) for part in (frames, held_out))
        patches = prepare(small, judged, factor, given.patches, generator)
        several = (RESIDUAL, PRODUCT) if not rows else FEW
        found = list(rows_of(patches, generator, *(_divided(choices, given.divide) for choices in several)))
        if given.picture and not rows:
            by_codes = {(row.kind, row.codes, row.depth): row for row in found}
            wanted = [(kind, *choice) for kind in SHOWN for choice in _divided(SHOWN[kind], given.divide)]
            draw([by_codes[choice] for choice in wanted], patches.frames, given.picture)
        rows += found
    print(table(rows))


def _divided(choices: Sequence[tuple[int, int]], by: int) -> list[tuple[int, int]]:
    return [(codes // by, depth) for codes, depth in choices]


def _resized(frames: Tensor, size: int) -> Tensor:
    """Resizes uint8 [F, H, W, 3] to [F, size, size, 3]."""
    if frames.shape[1] == size:
        return frames
    smaller = F.interpolate(frames.movedim(-1, 1).float(), (size, size), mode="bilinear", antialias=True)
    return smaller.round().clamp(0, 255).to(torch.uint8).movedim(1, -1)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
