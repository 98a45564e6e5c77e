"""`mam2 train-tokenizer`: trains a VQ model on the user's clips."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro


def run(arguments: list[str]) -> int:
    def train_tokenizer(
        data: tyro.conf.Positional[Path],
        out: Path,
        codes: int = 1024,
        channels: int = 32,
        factor: int = 16,
        size: int = 224,
        steps: int = 2000,
        batch: int = 16,
        flip: bool = True,
        image_channels: int = 3,
        value_range: tuple[float, float] | None = None,
        seed: int = 0,
        threads: int = 0,
        device: Literal["auto", "cuda", "cpu"] = "auto",
    ) -> int:
        """Train a VQ model on frames of your videos; one video in twenty, at most 64, is held out to measure it.

        Args:
            data: folder of videos, or an annotation list.
            out: new folder: tokenizer.safetensors (for --tokenizer.path), reconstructions.png, training.png,
                report.json and training.jsonl. It appears only when everything is complete.
            codes: codebook size.
            channels: base width of the network, a multiple of 8.
            factor: pixels per code along height and width, a power of two; use the patch size of pre-training.
            size: height and width of the training frames, a multiple of `factor`.
            steps: training steps.
            batch: frames per step.
            flip: mirror half of the frames.
            image_channels: channels of the frames: 3, 1 for gray, or those of arrays.
            value_range: the two values that become 0 and 1, as data.value_range; default: by the type of the values.
            seed: seed of weights, frames and crops.
            threads: decoding threads; 0: one per core that this process may use.
            device: `auto` uses a GPU if there is one.
        """
        from mam2.engine.tokenizer.from_videos import train_tokenizer

        trained = train_tokenizer(
            data,
            out,
            codes=codes,
            channels=channels,
            factor=factor,
            size=size,
            steps=steps,
            batch=batch,
            flip=flip,
            image_channels=image_channels,
            value_range=value_range,
            seed=seed,
            threads=threads,
            device=device,
        )
        result = trained.quality
        print(
            f"held out: {trained.held_out} videos, {result.frames} frames\n"
            f"explained of the variance within a frame: {result.explained:.1%}{_color(result.color_explained)}; "
            f"k-means of raw patches with as many centers: {result.kmeans_explained:.1%}"
            f"{_color(result.kmeans_color_explained)}\n"
            f"PSNR {result.psnr_db:.1f} dB (each frame's mean color: {result.mean_color_psnr_db:.1f} dB); "
            f"{result.codes_used} of {codes} codes used, perplexity {result.perplexity:.0f}\n"
            f"written: {trained.path}, reconstructions.png, training.png\n{trained.advice}"
        )
        return 0

    return tyro.cli(train_tokenizer, args=arguments, prog="mam2 train-tokenizer")


def _color(share: float | None) -> str:
    return "" if share is None else f" ({share:.1%} of its color)"
