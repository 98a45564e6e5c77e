"""`mam2 evaluate`: a fine-tuned classifier tested with many views."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import tyro


def run(arguments: list[str]) -> int:
    def evaluate(
        checkpoint: tyro.conf.Positional[Path],
        data: Path,
        out: Path,
        recipe: str = "",
        temporal: int = 0,
        spatial: int = 0,
        batch: int = 0,
        frames: int | None = None,
        size: int | None = None,
        heads: int | None = None,
        classes: Path | None = None,
        threads: int = 0,
        device: Literal["auto", "cuda", "cpu"] = "auto",
        precision: Literal["auto", "bfloat16", "float32"] = "auto",
    ) -> int:
        """Classify every video in many views; write accuracies, predictions and a confusion picture.

        Args:
            checkpoint: a run of mam2 finetune (its best), one of its checkpoints, a fine-tuned .pth of VideoMAE's code,
                or a Hugging Face folder of a VideoMAE that classifies. `random` is a classifier with random weights,
                the model of --recipe.
            data: labelled videos: a folder with a folder a class, or an annotation list.
            out: folder for results.json, predictions.tsv, classes.tsv, confusion.png and unusable.tsv.
            recipe: of fine-tuning: model and clips of the checkpoint `random`.
            temporal: clips of a video; 0 takes the recipe's.
            spatial: crops of a clip; 0 takes the recipe's.
            batch: most clips in a forward pass; 0 takes the recipe's, or 32.
            frames: frames of the clips of a checkpoint that does not say them; of others, clips of so many frames.
            size: height and width of these clips, pixels.
            heads: attention heads, of a checkpoint of VideoMAE's code of a width that it never published.
            classes: text file with a class name per line in the order of the logits, for a checkpoint without names.
            threads: decoding threads; 0 means as many as this process may use cores.
            device: auto takes a GPU if there is one.
            precision: auto is bfloat16 autocast on a GPU and on x86 CPUs that multiply it, else float32.
        """
        from mam2.engine.commands.options import read_class_names
        from mam2.engine.evaluation.classification import evaluate

        result = evaluate(
            checkpoint,
            data,
            out,
            recipe=recipe,
            temporal=temporal,
            spatial=spatial,
            batch=batch,
            device=device,
            precision=precision,
            threads=threads,
            frames=frames,
            size=size,
            heads=heads,
            names=read_class_names(classes),
        )
        if os.environ.get("RANK", "0") == "0":
            print(
                f"top-1 {result.top1:.2%}, top-5 {result.top5:.2%}, mean of the classes {result.mean_class:.2%}: "
                f"{result.videos} videos in {result.temporal} × {result.spatial} views, {result.unusable} unusable\n"
                f"written to {out}"
            )
        return 0

    return tyro.cli(evaluate, args=arguments, prog="mam2 evaluate")
