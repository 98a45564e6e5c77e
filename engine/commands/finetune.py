"""`mam2 finetune`: trains a classifier from a recipe, labeled videos and a pre-trained encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from mam2.engine.commands.options import named_recipe, run_verb
from mam2.engine.config.finetune import FinetuneConfig
from mam2.engine.config.limits import COUNT, check_flags
from mam2.engine.errors import UserError

USAGE = "mam2 finetune RECIPE --data LIST --val LIST --checkpoint RUN --out RUN"


def run(arguments: list[str]) -> int:
    values = named_recipe(arguments, USAGE, FinetuneConfig)

    def finetune(
        recipe: tyro.conf.Positional[str],
        data: Path,
        val: Path,
        out: Path,
        checkpoint: Path | None = None,
        config: Annotated[FinetuneConfig, tyro.conf.arg(name="")] = values,
        frames: int | None = None,
        size: int | None = None,
        heads: int | None = None,
        scratch: bool = False,
        resume: bool = False,
    ) -> int:
        """Train a classifier on a pre-trained encoder; RUN/best holds the weights of the best validation.

        Args:
            recipe: name of a shipped recipe, or a TOML file (or a run's config.json).
            data: labeled training videos: a folder with one folder per class, or an annotation list.
            val: labeled validation videos of the same classes.
            out: run folder for checkpoints and logs.
            checkpoint: the encoder: a run or checkpoint of mam2, a checkpoint of VideoMAE, or a Hugging Face folder.
            config: values that override the recipe.
            frames: frames per clip of the checkpoint's training, if the checkpoint does not state them.
            size: height and width of the clips in pixels, likewise.
            heads: attention heads, for a checkpoint of VideoMAE's code whose width was never published.
            scratch: start from random weights instead of a checkpoint.
            resume: continue from the newest checkpoint in the run folder.
        """
        check_flags(frames=(frames, COUNT), size=(size, COUNT), heads=(heads, COUNT))
        if not resume and (checkpoint is None) != scratch:
            raise UserError("expected either --checkpoint with the encoder, or --scratch for random weights")
        from mam2.engine.train.finetune import finetune

        said = {"frames": frames, "size": size, "heads": heads}
        result = finetune(config, data, out, val=val, encoder=checkpoint, resume=resume, encoder_options=said)
        return 128 + result.signal if result.signal else 0

    return run_verb(finetune, arguments, "finetune")
