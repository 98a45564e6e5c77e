"""`mam2 evaluate`: tests a fine-tuned classifier with several views per video."""

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
        """Classify every video in several views; write accuracies, predictions and a confusion matrix.

        Args:
            checkpoint: a run of mam2 finetune (its best checkpoint), one of its checkpoints, a fine-tuned .pth of
                VideoMAE, or a Hugging Face folder of a VideoMAE classifier. `random` is the classifier of --recipe with
                random weights.
            data: labeled videos: a folder with one folder per class, or an annotation list.
            out: folder for results.json, predictions.tsv, classes.tsv, confusion.png and unusable.tsv.
            recipe: fine-tuning recipe with the model and clips of the checkpoint `random`.
            temporal: clips per video; 0: as in the recipe.
            spatial: crops per clip; 0: as in the recipe.
            batch: maximum clips per forward pass; 0: as in the recipe, or 32.
            frames: frames per clip; needed if the checkpoint does not state them, else overrides them.
            size: height and width of the clips in pixels, likewise.
            heads: attention heads, for a checkpoint of VideoMAE's code whose width was never published.
            classes: text file with one class name per line in the order of the logits, for a checkpoint without names.
            threads: decoding threads; 0: one per core that this process may use.
            device: auto uses a GPU if there is one.
            precision: auto is bfloat16 autocast on a GPU and on x86 CPUs with bfloat16 instructions, else float32.
        """
        from mam2.engine.commands.options import read_class_names
        from mam2.engine.evaluation.classification import MultiLabelResult, RegressionResult, evaluate

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
            if isinstance(result, RegressionResult):
                found = f"mean absolute error {result.mae:.4g}, R² {result.r2:.4f}"
            elif isinstance(result, MultiLabelResult):
                found = f"mean average precision {result.mean_average_precision:.2%}"
            else:
                found = f"top-1 {result.top1:.2%}, top-5 {result.top5:.2%}, mean over classes {result.mean_class:.2%}"
            print(
                f"{found}: {result.videos} videos in {result.temporal} × {result.spatial} views, "
                f"{result.unusable} unusable\nwritten to {out}"
            )
        return 0

    return tyro.cli(evaluate, args=arguments, prog="mam2 evaluate")
