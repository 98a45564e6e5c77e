"""`mam2 export`: weights for Hugging Face, for VideoMAE's code, and graphs for any program."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

SHOWN = 10
"""Classes that are printed; the file has all of them."""


def run(arguments: list[str]) -> int:
    def export(
        checkpoint: tyro.conf.Positional[Path],
        to: Literal["huggingface", "videomae", "torch", "onnx"],
        out: Path,
        frames: int | None = None,
        size: int | None = None,
        heads: int | None = None,
        decoder_heads: int | None = None,
    ) -> int:
        """Write a model for elsewhere: a classifier, VideoMAE with its decoder where that has a place, or an encoder.

        Args:
            checkpoint: a run or checkpoint of MAM2, a checkpoint of VideoMAE's code, or a folder of Hugging Face.
            to: `huggingface`: a folder for from_pretrained of transformers' VideoMAE classes and its image processor;
                `videomae`: a .pth for the --finetune of VideoMAE's code; `torch` (.pt2, of torch.export) and `onnx`:
                a graph that takes uint8 clips [B, 3, T, H, W] and gives tokens [B, N, D], or a classifier's logits.
            out: the folder or file to write.
            frames: frames of the clips that it takes, where the checkpoint does not say them.
            size: height and width of these clips, pixels.
            heads: attention heads, of a checkpoint of VideoMAE's code of a width that it never published.
            decoder_heads: the same of its decoder.
        """
        from mam2.engine.checkpoints.exporting import export

        result = export(checkpoint, to, out, frames=frames, size=size, heads=heads, decoder_heads=decoder_heads)
        clip = ", ".join(map(str, result.clip))
        print(f"{out}: {result.model}, for clips [B, 3, {clip}] (frames, height, width)")
        if result.decoder_left_out:
            print(f"without the decoder: {result.decoder_left_out}")
        if classes := result.classes:
            first = ", ".join(f"{number} {name}" for number, name in enumerate(classes[:SHOWN]))
            print(f"classes, in the order of the logits: {first}{', …' * (len(classes) > SHOWN)} ({len(classes)})")
        return 0

    return tyro.cli(export, args=arguments, prog="mam2 export")
