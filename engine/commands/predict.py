"""`mam2 predict`: what a fine-tuned classifier says of videos without labels."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import tyro

STDIN = Path("-")


def run(arguments: list[str]) -> int:
    def predict(
        checkpoint: tyro.conf.Positional[Path],
        data: tuple[Path, ...],
        out: Path | None = None,
        draw: Path | None = None,
        top: int = 5,
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
        """Print the likeliest classes of every video, as soon as it is classified.

        A video that cannot be decoded is named and skipped. The status is 2 where none can be decoded.

        Args:
            checkpoint: a run of mam2 finetune (its best), one of its checkpoints, a fine-tuned .pth of VideoMAE's code,
                or a Hugging Face folder of a VideoMAE that classifies.
            data: a folder of videos, an annotation list, one or more videos, or - for a line per video on the standard
                input.
            out: a file to write: .json (everything), .csv (a row per class and video) or .jsonl (a line per video,
                written at once).
            draw: folder for a picture of every video with its likeliest classes.
            top: classes shown per video; 0 for all.
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
        from mam2.engine.data.sources import read_source
        from mam2.engine.data.video import Skipped
        from mam2.engine.errors import UserError
        from mam2.engine.evaluation.prediction import Prediction, predict
        from mam2.engine.files import one_line

        if not data or (STDIN in data and len(data) > 1):
            raise UserError("--data: expected a folder, a list, videos, or - alone for a list on the standard input")

        def show(found: Prediction | Skipped) -> None:
            if isinstance(found, Skipped):
                print(one_line(f"skipped: {found.path}: {found.reason}"), file=sys.stderr, flush=True)
                return
            width = min(max(map(len, found.classes)), 24)
            cells = [f"{one_line(name)[:width]:<{width}} {100 * chance:5.1f} %" for name, chance in found.top(top)]
            print("  ".join([*cells, _short(found.path)]), flush=True)

        several = [entry.path for source in data for entry in read_source(source).entries] if len(data) > 1 else []
        result = predict(
            checkpoint,
            _lines_of_stdin() if data == (STDIN,) else several or data[0],
            out=out,
            draw=draw,
            top=top,
            temporal=temporal,
            spatial=spatial,
            batch=batch,
            frames=frames,
            size=size,
            heads=heads,
            names=read_class_names(classes),
            threads=threads,
            device=device,
            precision=precision,
            on_result=show,
        )
        if not result.predictions:
            raise UserError(f"--data: none of the {len(result.skipped)} videos can be decoded")
        print(f"{len(result.predictions)} videos, {len(result.skipped)} skipped", file=sys.stderr)
        return 0

    return tyro.cli(predict, args=arguments, prog="mam2 predict")


def _lines_of_stdin() -> Iterator[str]:
    """File names, a line each, as they come; names need not be UTF-8."""
    for line in sys.stdin.buffer:
        if name := line.strip(b"\r\n"):
            yield os.fsdecode(name)


def _short(path: str) -> str:
    """A path from the working folder on, where it lies below it."""
    from mam2.engine.files import one_line

    here = Path.cwd()
    return one_line(Path(path).relative_to(here) if Path(path).is_relative_to(here) else path)
