"""`mam2 visualize`: draws the predictions of models."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from mam2.engine.commands.options import run_verb


def run(arguments: list[str]) -> int:
    def visualize(
        checkpoints: tyro.conf.Positional[tuple[Path, ...]],
        data: Path,
        out: Path,
        clips: int = 4,
        tokenizer: Path | None = None,
        stride: int = 0,
        frames: int | None = None,
        size: int | None = None,
        heads: int | None = None,
        decoder_heads: int | None = None,
        device: Literal["auto", "cuda", "cpu"] = "auto",
    ) -> int:
        """Draw clips, their masked patches, the predictions for them, and the regressor's attention.

        Args:
            checkpoints: runs or checkpoints of pre-training, also of VideoMAE or Hugging Face; shown side by side.
            data: a video, a folder or an annotation list.
            out: folder for index.html (one file for all) and a PNG, GIF and mp4 per clip.
            clips: number of videos, evenly spaced in the data.
            tokenizer: VQGAN for checkpoints that are no longer in their run folder.
            stride: distance of two sampled frames; default: the checkpoint's.
            frames: frames per clip, if the checkpoint does not state them.
            size: height and width of the clips in pixels, likewise.
            heads: attention heads, for a checkpoint of VideoMAE's code whose width was never published.
            decoder_heads: the same for its decoder.
            device: `auto` uses a GPU if there is one.
        """
        from mam2.engine.evaluation.visualize import visualize

        page = visualize(
            checkpoints,
            data,
            out,
            clips=clips,
            tokenizer=tokenizer,
            stride=stride,
            frames=frames,
            size=size,
            heads=heads,
            decoder_heads=decoder_heads,
            device=device,
        )
        print(page)
        return 0

    return run_verb(visualize, arguments, "visualize")
