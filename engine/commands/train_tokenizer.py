"""`mam2 train-tokenizer`: trains a VQ model on the user's clips."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from mam2.engine.commands.flags import TOKENIZER, TokenizerFlags
from mam2.engine.commands.options import run_verb
from mam2.engine.units import counted


def run(arguments: list[str]) -> int:
    def train_tokenizer(
        data: tyro.conf.Positional[Path],
        out: Path,
        training: Annotated[TokenizerFlags, tyro.conf.arg(name="")] = TOKENIZER,
    ) -> int:
        """Train a VQ model on frames of your videos; one video in twenty, at most 64, is held out to measure it.

        Args:
            data: folder of videos, or an annotation list.
            out: new folder: tokenizer.safetensors (for --tokenizer.path), reconstructions.png, training.png,
                report.json and training.jsonl. It appears only when everything is complete.
            training: the VQ model, its frames and its training.
        """
        from mam2.engine.tokenizer.from_videos import train_tokenizer

        trained = train_tokenizer(data, out, **dataclasses.asdict(training))
        result, codes = trained.quality, training.codes * training.codes_per_patch
        print(
            f"held out: {counted(trained.held_out, 'video')}, {counted(result.frames, 'frame')}; {trained.kept}\n"
            f"explained of the variance within a frame: {result.explained:.1%}{_color(result.color_explained)}; "
            f"k-means of raw patches with as many centers: {result.kmeans_explained:.1%}"
            f"{_color(result.kmeans_color_explained)}\n"
            f"PSNR {result.psnr_db:.1f} dB (each frame's mean color: {result.mean_color_psnr_db:.1f} dB); "
            f"{result.codes_used} of {codes} codes used, perplexity {result.perplexity:.0f}\n"
            f"written: {trained.path}, reconstructions.png, training.png\n{trained.advice}"
        )
        return 0

    return run_verb(train_tokenizer, arguments, "train-tokenizer")


def _color(share: float | None) -> str:
    return "" if share is None else f" ({share:.1%} of its color)"
