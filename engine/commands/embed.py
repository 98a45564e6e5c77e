"""`mam2 embed`: a feature for each video of a folder, for search or clustering."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro


def run(arguments: list[str]) -> int:
    def embed(
        checkpoint: tyro.conf.Positional[Path],
        data: Path,
        out: Path,
        window: str | None = None,
        hop: str | None = None,
        layer: int = 0,
        recipe: str = "",
        pool: Literal["mean", "time", "time-center", "time-space"] = "mean",
        stride: int = 0,
        frames: int | None = None,
        size: int | None = None,
        heads: int | None = None,
        batch: int = 32,
        device: Literal["auto", "cuda", "cpu"] = "auto",
        precision: Literal["auto", "bfloat16", "float32"] = "auto",
    ) -> int:
        """Write a feature of the middle clip of every video, or with --window or --hop of every part of it in order.

        Args:
            checkpoint: a run folder, a checkpoint, or weights of VideoMAE or Hugging Face; `random` is an encoder with
                random weights, the model of --recipe.
            data: folder of videos, an annotation list, or a video.
            out: features.npy (float32 [videos, D]; features.json beside it says which row is which video, which file
                of weights was read and the SHA-256 of the encoder in it), .npz, .safetensors or .parquet (needs
                pyarrow). Of windows, a table .csv beside it names video, start and end of each row.
            window: length of a window: frames of the file (16) or seconds (2s); the encoder's frames are spread over
                it. By default, with --hop, the length of the clips that the checkpoint was trained on.
            hop: from the start of a window to the start of the next: frames of the file (8) or seconds (1s); by default
                the length of a window.
            layer: block of the encoder whose tokens are averaged, from 1; 0 is the last.
            recipe: of pre-training: model and clips of the checkpoint `random`.
            pool: mean: over all tokens, D values. time: over the tokens of each time slot, slots × D values one after
                the other. time-center, time-space: see mam2 probe.
            stride: distance of two sampled frames instead of the checkpoint's.
            frames: frames of the clips of a checkpoint that does not say them; of others, clips of so many frames.
            size: height and width of these clips, pixels.
            heads: attention heads, of a checkpoint of VideoMAE's code of a width that it never published.
            batch: clips that go through the encoder at once.
            device: `auto` takes a GPU if there is one.
            precision: auto is bfloat16 autocast on a GPU and on x86 CPUs that multiply it, else float32.
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
            recipe=recipe,
            pool=pool,
            stride=stride,
            frames=frames,
            size=size,
            heads=heads,
            batch=batch,
            device=device,
            precision=precision,
        )
        count, values = found.features.shape
        videos = f"{len(set(found.paths))} videos"
        rows = videos if found.start_s is None else f"{count} windows of {videos}"
        left_out = f"; {len(found.skipped)} left out" if found.skipped else ""
        print(f"{rows}, {values} values each: {out}{left_out}")
        for path, reason in found.skipped.items():
            print(one_line(f"left out  {path}: {reason}"))
        return 0

    return tyro.cli(embed, args=arguments, prog="mam2 embed")
