"""`mam2 visualize`: what models predict of clips, to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro


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
        """Draw clips, their hidden patches, what is predicted of them and what the regressor reads.

        Args:
            checkpoints: runs or checkpoints of pre-training, also VideoMAE's or Hugging Face's; shown side by side.
            data: a video, a folder or an annotation list.
            out: folder for index.html (one file for all) and a PNG, GIF and mp4 of each clip.
            clips: videos shown, evenly spread over the data.
            tokenizer: VQGAN of checkpoints that no longer lie in their run folder.
            stride: distance of two sampled frames instead of the checkpoint's.
            frames: frames of the clips of a checkpoint that does not say them.
            size: height and width of these clips, pixels.
            heads: attention heads, of a checkpoint of VideoMAE's code of a width that it never published.
            decoder_heads: the same of its decoder.
            device: `auto` takes a GPU if there is one.
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

    return tyro.cli(visualize, args=arguments, prog="mam2 visualize")
