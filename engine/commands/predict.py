"""`mam2 predict`: classifies videos without labels with a fine-tuned classifier."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import tyro

from mam2.engine.commands.flags import CLASSIFIER, ClassifierFlags
from mam2.engine.commands.options import run_verb
from mam2.engine.units import counted

STDIN = Path("-")


def run(arguments: list[str]) -> int:
    def predict(
        checkpoint: tyro.conf.Positional[Path],
        data: tuple[Path, ...],
        out: Path | None = None,
        draw: Path | None = None,
        top: int = 5,
        classifier: Annotated[ClassifierFlags, tyro.conf.arg(name="")] = CLASSIFIER,
    ) -> int:
        """Print the most probable classes of every video, as soon as it is classified.

        A video that cannot be decoded is reported and skipped. The exit status is 2 if none can be decoded.

        Args:
            checkpoint: a run of mam2 finetune (its best checkpoint), one of its checkpoints, a fine-tuned .pth of
                VideoMAE, or a Hugging Face folder of a VideoMAE classifier.
            data: a folder of videos, an annotation list, one or more videos, or - for one path per line on standard
                input.
            out: output file: .json (everything), .csv (one row per class and video) or .jsonl (one line per video,
                written immediately).
            draw: folder for a picture of every video with its most probable classes.
            top: classes per video; 0: all.
            classifier: its model, the views of a video, and how they are computed.
        """
        from mam2.engine.data.sources import read_source
        from mam2.engine.data.unusable import none_decoded
        from mam2.engine.data.video import Skipped
        from mam2.engine.errors import UserError
        from mam2.engine.evaluation.prediction import Prediction, predict
        from mam2.engine.files import one_line

        if not data or (STDIN in data and len(data) > 1):
            raise UserError("--data: expected a folder, a list, videos, or only - for a list on standard input")

        def show(found: Prediction | Skipped) -> None:
            if isinstance(found, Skipped):
                print(one_line(f"skipped: {found.path}: {found.reason}"), file=sys.stderr, flush=True)
                return
            width = min(max(map(len, found.classes)), 24)
            cells = [f"{one_line(name)[:width]:<{width}} {100 * chance:5.1f} %" for name, chance in found.top(top)]
            if found.task == "regression":
                cells = [f"{value:.6g}" for _, value in found.top(top)]
            print("  ".join([*cells, _short(found.path)]), flush=True)

        several = [entry.path for source in data for entry in read_source(source).entries] if len(data) > 1 else []
        result = predict(
            checkpoint,
            _lines_of_stdin() if data == (STDIN,) else several or data[0],
            out=out,
            draw=draw,
            top=top,
            on_result=show,
            **classifier.arguments(),
        )
        if not result.predictions:
            raise UserError(none_decoded("--data", result.skipped))
        print(f"{counted(len(result.predictions), 'video')}, {len(result.skipped)} skipped", file=sys.stderr)
        return 0

    return run_verb(predict, arguments, "predict")


def _lines_of_stdin() -> Iterator[str]:
    """Yields file names from standard input, one per line; names need not be UTF-8."""
    for line in sys.stdin.buffer:
        if name := line.strip(b"\r\n"):
            yield os.fsdecode(name)


def _short(path: str) -> str:
    """Returns a path relative to the working folder if it is below it."""
    from mam2.engine.files import one_line

    here = Path.cwd()
    return one_line(Path(path).relative_to(here) if Path(path).is_relative_to(here) else path)
