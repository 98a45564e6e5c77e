"""Do codes that mean something teach more than a tokenizer's? Appearance codes from k-means of HOG or of features.

    python -m benchmarks.cluster_codes runs/convergence-cpu        # a folder of `make convergence`: its synthetic clips

Trains the default of the convergence run (MAM2, Muon) on other codes, as many as the tokenizer has: clusters of the
histograms of gradients of each token's first frame (of its pixels, not of their differences), and clusters of the
tokens of an encoder that the default has trained for as long before (as HuBERT's second iteration does), which saw the
whole clip. Each set of codes alone and together with the motion target. Prints a row per training.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.trials import prepared, trial
from benchmarks.trials.settings import SETTINGS, TARGETS_ALONE, Setting, pretraining
from benchmarks.trials.worker import limit_threads
from mam2.engine.model.encoder import Encoder
from mam2.engine.tokenizer.kmeans import kmeans, nearest_center

COLUMNS = ("codes", "weight", "seed", "motion, %", "shape, %", "color, %", "texture, %")
WEIGHTS: Mapping[str, Mapping[str, Any]] = {
    "alone": TARGETS_ALONE["codes alone"],
    "0.1 of the motion's gradient": {"loss.appearance": 0.1},
    "1": {"loss.appearance": 1.0},
}
BINS, CELLS = 9, 2
"""Directions of a histogram; cells of a patch per side."""
FITTED = 1500
"""Clips on whose tokens k-means is fitted."""
AT_ONCE = 200
Describe = Callable[[Tensor], Tensor]
"""Describes the tokens of clips: uint8 [B, C, T, H, W] -> [B, N, E]."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.cluster_codes", description="Codes from clusters.")
    parser.add_argument("folder", type=Path, help="of a convergence run")
    parser.add_argument("--setting", choices=tuple(SETTINGS), default="cpu")
    parser.add_argument("--base-lr", type=float, default=3.2e-2)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    limit_threads()
    print(f"| {' | '.join(COLUMNS)} |\n|{len(COLUMNS) * '---|'}")
    clips = prepared.load(options.folder / "synthetic")
    for seed in range(options.seeds):
        for row in rows(SETTINGS[options.setting], clips, options.base_lr, seed):
            print(f"| {' | '.join(row)} |", flush=True)
    return 0


def rows(setting: Setting, clips: prepared.Prepared, base_lr: float, seed: int) -> Iterator[tuple[str, ...]]:
    """Yields the cells of a row per training."""

    def trained(changes: Mapping[str, Any], codes: np.ndarray) -> tuple[Encoder, dict[str, float]]:
        config = pretraining(
            setting,
            {**setting.variants[setting.default], **changes},
            epochs=setting.ablation_epochs,
            base_lr=base_lr,
            seed=seed,
        )
        encoder = trial.pretrain(config, dataclasses.replace(clips, codes=codes)).encoder
        return encoder, trial.probe(encoder, clips, config)["test"]

    def row(name: str, weight: str, found: Mapping[str, float]) -> tuple[str, ...]:
        asked = ("probe", "shape", "color", "texture")
        return name, weight, str(seed), *(f"{100 * found[question]:.1f}" for question in asked)

    first, found = trained({}, clips.codes)
    yield row("of the tokenizer", "0.01", found)
    config = pretraining(setting, {})
    patch, tubelet = config.model.patch, config.model.tubelet
    for name, describe in (
        ("HOG", lambda video: hog(video, patch, tubelet)),
        ("features", lambda video: first.encode(video).float()),
    ):
        codes = cluster_codes(clips, describe, seed)
        for weight, changes in WEIGHTS.items():
            yield row(name, weight, trained(changes, codes)[1])


@torch.no_grad()
def cluster_codes(clips: prepared.Prepared, describe: Describe, seed: int) -> np.ndarray:
    """Returns the codes of all training clips: the nearest of as many centers as the tokenizer has codes.

    Each number of the descriptions is divided by its standard deviation before k-means. Returns int16 [videos,
    augmentations, views, N, 1].
    """
    clip_array = clips.splits["train"].clips
    flat = clip_array.reshape(-1, *clip_array.shape[3:])
    chosen = np.sort(np.random.default_rng(seed).permutation(len(flat))[:FITTED])
    sample = torch.cat(
        [describe(prepared.as_video(flat[part])) for part in np.split(chosen, range(100, len(chosen), 100))]
    )
    scale = sample.flatten(0, 1).std(0) + 1e-6
    centers = kmeans(sample.flatten(0, 1) / scale, clips.codebook_size, torch.Generator().manual_seed(seed))
    found = []
    for first in range(0, len(flat), AT_ONCE):
        described = describe(prepared.as_video(flat[first : first + AT_ONCE]))
        found.append(nearest_center(described.flatten(0, 1) / scale, centers).view(described.shape[:2]))
    return torch.cat(found).numpy().astype(np.int16).reshape(*clip_array.shape[:3], -1, 1)


def hog(video: Tensor, patch: int, tubelet: int) -> Tensor:
    """Returns the histograms of gradients of each token's first frame, of each color, with a length of at most 1.

    video: uint8 [B, C, T, H, W]. Returns float32 [B, N, CELLS² · C · BINS].
    """
    frames = video[:, :, ::tubelet].float() / 255
    across, down = torch.zeros_like(frames), torch.zeros_like(frames)
    across[..., 1:-1] = frames[..., 2:] - frames[..., :-2]
    down[..., 1:-1, :] = frames[..., 2:, :] - frames[..., :-2, :]
    direction = (torch.atan2(down, across) % torch.pi / torch.pi * BINS).long().clamp(max=BINS - 1)
    length = across.hypot(down).unsqueeze(-1)
    votes = torch.zeros(*frames.shape, BINS).scatter_(-1, direction.unsqueeze(-1), length)
    batch, channels, slots, height, width = frames.shape
    side = patch // CELLS
    cells = votes.view(batch, channels, slots, height // patch, CELLS, side, width // patch, CELLS, side, BINS).sum(
        (5, 8)
    )
    histograms = cells.permute(0, 2, 3, 5, 4, 6, 1, 7).reshape(batch, -1, CELLS**2 * channels * BINS)
    return histograms / (histograms.norm(dim=-1, keepdim=True) + 0.2)


if __name__ == "__main__":
    sys.exit(main())
