"""`mam2 evaluate`: tests a fine-tuned classifier with several views per video."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import tyro

from mam2.engine.commands.flags import CLASSIFIER, ClassifierFlags
from mam2.engine.commands.options import run_verb
from mam2.engine.units import counted


def run(arguments: list[str]) -> int:
    def evaluate(
        checkpoint: tyro.conf.Positional[Path],
        data: Path,
        out: Path,
        recipe: str = "",
        classifier: Annotated[ClassifierFlags, tyro.conf.arg(name="")] = CLASSIFIER,
    ) -> int:
        """Classify every video in several views; write accuracies, predictions and a confusion matrix.

        Args:
            checkpoint: a run of mam2 finetune (its best checkpoint), one of its checkpoints, a fine-tuned .pth of
                VideoMAE, or a Hugging Face folder of a VideoMAE classifier. `random` is the classifier of --recipe with
                random weights.
            data: labeled videos: a folder with one folder per class, or an annotation list.
            out: folder for results.json, predictions.tsv, classes.tsv, confusion.png and unusable.tsv.
            recipe: fine-tuning recipe with the model and clips of the checkpoint `random`.
            classifier: its model, the views of a video, and how they are computed.
        """
        from mam2.engine.evaluation.classification import MultiLabelResult, RegressionResult, evaluate

        result = evaluate(
            checkpoint,
            data,
            out,
            recipe=recipe,
            **classifier.arguments(),
        )
        if os.environ.get("RANK", "0") == "0":
            if isinstance(result, RegressionResult):
                found = f"mean absolute error {result.mae:.4g}, R² {result.r2:.4f}"
            elif isinstance(result, MultiLabelResult):
                found = f"mean average precision {result.mean_average_precision:.2%}"
            else:
                found = f"top-1 {result.top1:.2%}, top-5 {result.top5:.2%}, mean over classes {result.mean_class:.2%}"
            print(
                f"{found}: {counted(result.videos, 'video')} in {result.temporal} × {result.spatial} views, "
                f"{result.unusable} unusable\nwritten to {out}"
            )
        return 0

    return run_verb(evaluate, arguments, "evaluate")
