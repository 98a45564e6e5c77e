"""`mam2 embed`: computes one feature vector per video, for search or clustering."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mam2.engine.commands.flags import ENCODER, EncoderFlags
from mam2.engine.commands.options import run_verb
from mam2.engine.units import counted


def run(arguments: list[str]) -> int:
    def embed(
        checkpoint: tyro.conf.Positional[Path],
        data: Path,
        out: Path,
        window: str | None = None,
        hop: str | None = None,
        layer: int = 0,
        pool: Literal["mean", "time", "time-center", "time-space"] = "mean",
        encoder: Annotated[EncoderFlags, tyro.conf.arg(name="")] = ENCODER,
    ) -> int:
        """Write a feature vector of the middle clip of every video, or with --window or --hop of all its parts.

        Args:
            checkpoint: a run folder, a checkpoint, or weights of VideoMAE or Hugging Face; `random` is the
                encoder of --recipe with random weights.
            data: folder of videos, an annotation list, or a video.
            out: features.npy (float32 [videos, D]; features.json next to it lists the video of each row, the weights
                file and the SHA-256 of its encoder), .npz, .safetensors or .parquet (needs pyarrow). For windows, a
                .csv table next to it lists video, start and end of each row.
            window: length of a window in frames of the file (16) or seconds (2s); the encoder's frames are evenly
                spaced in it. Default, with --hop: the length of the checkpoint's training clips.
            hop: distance of the starts of two windows, in frames of the file (8) or seconds (1s); default: the length
                of a window.
            layer: encoder block whose tokens are averaged, from 1; 0 is the last.
            pool: mean: average over all tokens, D values. time: average per time slot, slots × D concatenated values.
                time-center, time-space: see mam2 probe.
            encoder: model and clips of the encoders, and how they are computed.
        """
        from mam2.engine.evaluation.embedding import embed
        from mam2.engine.files import one_line

        found = embed(
            checkpoint,
            data,
            out,
            window=window,
            hop=hop,
            layer=layer,
            pool=pool,
            **dataclasses.asdict(encoder),
        )
        count, values = found.features.shape
        videos = f"{counted(len(set(found.paths)), 'video')}"
        rows = videos if found.start_s is None else f"{counted(count, 'window')} of {videos}"
        left_out = f"; {len(found.skipped)} left out" if found.skipped else ""
        print(f"{rows}, {values} values each: {out}{left_out}")
        for path, reason in found.skipped.items():
            print(one_line(f"left out  {path}: {reason}"))
        return 0

    return run_verb(embed, arguments, "embed")
