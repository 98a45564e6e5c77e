"""`mam2 pretrain`: pre-trains from a recipe and videos into a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from mam2.engine.commands.options import named_pretraining, run_verb
from mam2.engine.config.limits import COUNT, check_flags
from mam2.engine.config.pretrain import PretrainConfig, check


def run(arguments: list[str]) -> int:
    recipe = named_pretraining(arguments, "mam2 pretrain RECIPE --data PATH --out RUN")

    def pretrain(
        recipe: tyro.conf.Positional[str],
        out: Path,
        data: tyro.conf.UseAppendAction[tuple[Path, ...]] = (),
        config: Annotated[PretrainConfig, tyro.conf.arg(name="")] = recipe,
        checkpoint: Path | None = None,
        checkpoint_moments: bool = False,
        checkpoint_frames: int | None = None,
        checkpoint_size: int | None = None,
        checkpoint_heads: int | None = None,
        checkpoint_decoder_heads: int | None = None,
        val: tyro.conf.UseAppendAction[tuple[Path, ...]] = (),
        resume: bool = False,
        size: str | None = None,
        preset: str | None = None,
    ) -> int:
        """Pre-train an encoder on videos.

        Args:
            recipe: name of a shipped recipe, or a TOML file (or a run's config.json).
            out: run folder for checkpoints and logs.
            data: folder of videos, with or without class folders, or an annotation list. Repeat the flag for several
                data sets; --data.weights 3 1 sets their shares. Default: data.sets of the recipe.
            config: values that override the recipe.
            checkpoint: start from its weights: a run or checkpoint of mam2, of VideoMAE or VideoMAE v2, or a folder of
                Hugging Face. The encoder must be the recipe's; regressor and decoders are read if their shapes match.
            checkpoint_moments: also take the optimizer's moments of the checkpoint, a run of mam2 pretrain, for a
                cooldown or a longer training.
            checkpoint_frames: frames per clip of the checkpoint's training, if the checkpoint does not state them.
            checkpoint_size: height and width of the clips in pixels, likewise.
            checkpoint_heads: attention heads, for a checkpoint of VideoMAE's code whose width was never published.
            checkpoint_decoder_heads: the same for its decoder.
            val: folder or list of validation videos, whose losses are logged, see [validation]; may be repeated.
            resume: continue from the newest checkpoint in the run folder.
            size: tiny, small, base, large or huge: size of the encoder; the other parts are scaled with it.
            preset: regressor and decoders: fast (half the encoder's width) or cae (its full width).
        """
        check(config)
        from mam2.engine.train.pretrain import pretrain

        said = {
            "frames": checkpoint_frames,
            "size": checkpoint_size,
            "heads": checkpoint_heads,
            "decoder_heads": checkpoint_decoder_heads,
        }
        for name, value in said.items():
            check_flags(**{f"checkpoint_{name}": (value, COUNT)})
        result = pretrain(
            config,
            data,
            out,
            checkpoint=checkpoint,
            checkpoint_options=said,
            checkpoint_moments=checkpoint_moments,
            val=val,
            resume=resume,
        )
        return 128 + result.signal if result.signal else 0

    return run_verb(pretrain, arguments, "pretrain")
