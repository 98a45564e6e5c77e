"""`mam2 tokenize`: computes the codes of recorded augmentations once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from mam2.engine.commands.options import named_pretraining, run_verb
from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.units import counted, decimal_bytes


def run(arguments: list[str]) -> int:
    values = named_pretraining(arguments, "mam2 tokenize RECIPE --data PATH --out CODES --data.recorded NUMBER")

    def tokenize(
        recipe: tyro.conf.Positional[str],
        out: Path,
        data: tyro.conf.UseAppendAction[tuple[Path, ...]] = (),
        clips: Literal["none", "jpeg", "raw"] = "none",
        config: Annotated[PretrainConfig, tyro.conf.arg(name="")] = values,
        size: str | None = None,
        preset: str | None = None,
    ) -> int:
        """Compute the codes of every recorded augmentation of every video.

        An interrupted call can be repeated to continue. `mam2 pretrain` reads them with the same recipe and values, and
        --tokenizer.cache.

        Args:
            recipe: name of a shipped recipe, or a TOML file (or a run's config.json).
            out: folder for the codes.
            data: folder of videos, with or without class folders, or an annotation list; repeat the flag for several
                data sets, in the order of the pre-training. Default: data.sets of the recipe.
            clips: also write the cropped and resized clips, so that the pre-training decodes no video: `jpeg`, or `raw`
                for their exact values, about eight times as large. The size is printed before anything is written.
            config: values that override the recipe.
            size: as in `mam2 pretrain`.
            preset: as in `mam2 pretrain`.
        """
        from mam2.engine.tokenizer.precompute import tokenize
        from mam2.engine.tokenizer.tokenizer import usage_of

        result = tokenize(config, data, out, clips=clips)
        cache = result.cache
        used, perplexity = usage_of(cache.histogram())
        rate = f", {result.clips / result.seconds:.0f} clips/s" if result.clips else ""
        absent = cache.count_absent()
        where = f" (see {out / 'skipped.tsv'})" if absent else ""
        stored = f"; clips as {cache.clips.form.coding}: {decimal_bytes(cache.clips.bytes)}" if cache.clips else ""
        print(
            f"{counted(result.clips, 'clip')} tokenized in {result.seconds:.0f} s{rate}; {absent} missing{where}\n"
            f"{used} of {cache.codebook_size * cache.codes_per_patch} codes used, perplexity {perplexity:.0f}; "
            f"{decimal_bytes(cache.bytes)}{stored}\n"
            f"use them with --tokenizer.cache {out} --data.recorded {config.data.recorded}"
        )
        return 0

    return run_verb(tokenize, arguments, "tokenize")
