"""`mam2 finetune`: a recipe, labeled videos, a pre-trained encoder, and a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from mam2.engine.commands.options import named_recipe
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
        """Train a classifier on a pre-trained encoder; RUN/best holds the one of the best validation.

        Args:
            recipe: name of a shipped recipe, or a TOML file (or a run's config.json).
            data: labeled training videos: a folder with a folder a class, or an annotation list.
            val: labeled validation videos of the same classes.
            out: run folder for checkpoints and logs.
            checkpoint: the encoder: a run or checkpoint of mam2, of VideoMAE, or a folder of Hugging Face's.
            config: values of the recipe.
            frames: frames of the clips that the checkpoint was trained on, where it does not say them.
            size: height and width of these clips, pixels.
            heads: attention heads, of a checkpoint of VideoMAE's code of a width that it never published.
            scratch: draw the encoder's weights at random instead.
            resume: go on from the newest checkpoint in the run folder.
        """
        check_flags(frames=(frames, COUNT), size=(size, COUNT), heads=(heads, COUNT))
        if not resume and (checkpoint is None) != scratch:
            raise UserError("name the encoder with --checkpoint, or --scratch for weights drawn at random, not both")
        from mam2.engine.train.finetune import finetune

        said = {"frames": frames, "size": size, "heads": heads}
        result = finetune(config, data, out, val=val, encoder=checkpoint, resume=resume, encoder_options=said)
        return 128 + result.signal if result.signal else 0

    return tyro.cli(finetune, args=arguments, prog="mam2 finetune")
