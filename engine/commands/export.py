"""`mam2 export`: writes weights for Hugging Face and VideoMAE's code, and graphs for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from mam2.engine.commands.options import run_verb

SHOWN = 10
"""Number of printed classes; the file contains all."""


def run(arguments: list[str]) -> int:
    def export(
        checkpoint: tyro.conf.Positional[Path],
        to: Literal["huggingface", "mam2", "videomae", "torch", "onnx"],
        out: Path | None = None,
        push: str = "",
        private: bool = False,
        license: str = "",
        scores: tuple[Path, ...] = (),
        frames: int | None = None,
        size: int | None = None,
        heads: int | None = None,
        decoder_heads: int | None = None,
    ) -> int:
        """Export a model: a classifier, VideoMAE with its decoder if the format supports it, or an encoder.

        Args:
            checkpoint: a run or checkpoint of MAM2, a checkpoint of VideoMAE's code, or a Hugging Face folder.
            to: `huggingface`: a folder for from_pretrained of transformers' VideoMAE classes and its image processor;
                `mam2`: a folder with all contents of a MAM2 checkpoint, including the tokenizer; `videomae`: a .pth for
                the --finetune of VideoMAE's code; `torch` (.pt2, of torch.export) and `onnx`: a graph that takes uint8
                clips [B, C, T, H, W] and returns tokens [B, N, D], or a classifier's logits.
            out: the folder or file to write; not needed with --push.
            push: OWNER/NAME of a repository on the hub (Hugging Face's, or HF_ENDPOINT's) to upload the folder to, with
                a model card; every verb then takes hub:OWNER/NAME as a checkpoint. Log in first: hf auth login.
            private: make a new repository visible only to its owner.
            license: identifier of the license of the weights, such as apache-2.0, cc-by-nc-4.0 or other; with it the
                folder gets a model card, written from the files of the run. --push needs it.
            scores: files of mam2 probe and mam2 evaluate for the card; those in the run folder are found.
            frames: frames per clip, if the checkpoint does not state them.
            size: height and width of the clips in pixels, likewise.
            heads: attention heads, for a checkpoint of VideoMAE's code whose width was never published.
            decoder_heads: the same for its decoder.
        """
        from mam2.engine.checkpoints.exporting import export

        result = export(
            checkpoint,
            to,
            out,
            push=push,
            private=private,
            license=license,
            scores=scores,
            frames=frames,
            size=size,
            heads=heads,
            decoder_heads=decoder_heads,
        )
        clip = ", ".join(map(str, result.clip))
        print(
            f"{result.path or push}: {result.model}, for clips [B, {result.channels}, {clip}] (frames, height, width)"
        )
        if result.decoder_left_out:
            print(f"without the decoder: {result.decoder_left_out}")
        if result.address:
            print(f"pushed to {result.address}; load it as hub:{push}")
        if classes := result.classes:
            first = ", ".join(f"{number} {name}" for number, name in enumerate(classes[:SHOWN]))
            print(f"classes, in the order of the logits: {first}{', …' * (len(classes) > SHOWN)} ({len(classes)})")
        return 0

    return run_verb(export, arguments, "export")
