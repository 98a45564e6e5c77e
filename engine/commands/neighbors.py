"""`mam2 neighbors`: what the features of frozen encoders find alike, without training anything."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

if TYPE_CHECKING:
    from mam2.engine.evaluation.neighbors import NeighborsReport


def run(arguments: list[str]) -> int:
    def neighbors(
        checkpoints: tyro.conf.Positional[tuple[Path, ...]],
        out: Path,
        data: Path | None = None,
        val: Path | None = None,
        recipe: str = "",
        layer: int = 0,
        pool: Literal["mean", "time", "time-center", "time-space"] = "mean",
        masks: int = 12,
        mask_size: int = 0,
        top_k: int = 5,
        radius: int = 12,
        context: int = 7,
        cache: Path = Path("features"),
        stride: int = 0,
        frames: int | None = None,
        size: int | None = None,
        heads: int | None = None,
        batch: int = 32,
        device: Literal["auto", "cuda", "cpu"] = "auto",
        precision: Literal["auto", "bfloat16", "float32"] = "auto",
    ) -> int:
        """Compare frozen encoders without training: retrieval of videos, and masks carried through clips.

        Args:
            checkpoints: run folders, checkpoints, or weights of VideoMAE or Hugging Face; `random` is an encoder with
                random weights, like the first of the others, or of --recipe.
            out: folder for neighbors.json, retrieval.png and masks.png.
            data: labelled folder or list to find videos in; without it there is no retrieval.
            val: labelled folder or list of videos to find others for; without it each video of data is one.
            recipe: of pre-training: model and clips of the checkpoint `random`.
            layer: block of the encoder whose tokens are compared, from 1; 0 is the last.
            pool: what is averaged into the feature of a clip, see mam2 probe.
            masks: clips with known masks, made on the spot, whose first mask is carried to the other frames; 0 for
                none.
            mask_size: height and width of these clips in pixels; 0 takes the encoder's, or 14 patches where
                that is more.
            top_k: tokens that a token takes its mask from.
            radius: rows and columns that they may be away.
            context: frames before the present one that they are in, besides the first frame.
            cache: folder of features, by the hash of weights and videos; delete it at will.
            stride: distance of two sampled frames instead of the checkpoint's.
            frames: frames of the clips of a checkpoint that does not say them; of others, clips of so many frames.
            size: height and width of these clips, pixels.
            heads: attention heads, of a checkpoint of VideoMAE's code of a width that it never published.
            batch: clips that go through an encoder at once.
            device: auto takes a GPU if there is one.
            precision: auto is bfloat16 autocast on a GPU and on x86 CPUs that multiply it, else float32.
        """
        from mam2.engine.evaluation.neighbors import neighbors

        report = neighbors(
            checkpoints,
            out,
            data=data,
            val=val,
            recipe=recipe,
            layer=layer,
            pool=pool,
            masks=masks,
            mask_size=mask_size,
            top_k=top_k,
            radius=radius,
            context=context,
            cache=cache,
            stride=stride,
            frames=frames,
            size=size,
            heads=heads,
            batch=batch,
            device=device,
            precision=precision,
        )
        print(tables(report))
        print(f"written to {out}")
        return 0

    return tyro.cli(neighbors, args=arguments, prog="mam2 neighbors")


def tables(report: NeighborsReport) -> str:
    """The scores below each other, in per cent."""
    parts = []
    if found := report.retrieval:
        lines = [("retrieval", *(f"recall@{rank}" for rank in found.chance))]
        for score in found.scores:
            cells = (_share(score.recall[rank], score.interval[rank]) for rank in found.chance)
            lines.append((score.checkpoint, *cells))
        lines.append(("at random", *(f"{100 * value:.1f}" for value in found.chance.values())))
        parts.append(
            f"{_aligned(lines)}\nShare of {found.queries} queries with a video of their class among the nearest of "
            f"{found.gallery}, in % (95 % bootstrap interval over the queries)."
        )
    if report.propagation:
        lines = [("masks", "frame as", "pixels", "J", "F", "J&F")]
        for one in report.propagation:
            mean = (one.region + one.boundary) / 2
            numbers = (f"{100 * one.region:.1f}", f"{100 * one.boundary:.1f}", _share(mean, one.interval))
            lines.append((one.checkpoint or "the first mask, kept", one.context, str(one.size), *numbers))
        parts.append(
            f"{_aligned(lines)}\nMasks of {report.mask_clips} clips carried on from their first frames, in % (95 % "
            "bootstrap interval over the clips).\n"
            "still: a frame is repeated as a clip; window: it is shown among the frames around it."
        )
    return "\n\n".join(parts)


def _share(value: float, interval: tuple[float, float]) -> str:
    return f"{100 * value:.1f} ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"


def _aligned(lines: list[tuple[str, ...]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
