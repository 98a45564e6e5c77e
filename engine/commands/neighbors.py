"""`mam2 neighbors`: compares the features of frozen encoders by nearest neighbors, without training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from mam2.engine.commands.flags import ENCODER, EncoderFlags
from mam2.engine.commands.options import run_verb
from mam2.engine.units import counted

if TYPE_CHECKING:
    from mam2.engine.evaluation.neighbors import NeighborsReport


def run(arguments: list[str]) -> int:
    def neighbors(
        checkpoints: tyro.conf.Positional[tuple[Path, ...]],
        out: Path,
        data: Path | None = None,
        val: Path | None = None,
        layer: int = 0,
        pool: Literal["mean", "time", "time-center", "time-space"] = "mean",
        masks: int = 12,
        mask_size: int = 0,
        top_k: int = 5,
        radius: int = 12,
        context: int = 7,
        cache: Path = Path("features"),
        encoder: Annotated[EncoderFlags, tyro.conf.arg(name="")] = ENCODER,
    ) -> int:
        """Compare frozen encoders without training, by retrieval of videos and propagation of masks through clips.

        Args:
            checkpoints: run folders, checkpoints, or weights of VideoMAE or Hugging Face; `random` is an encoder with
                random weights and the model of the first other checkpoint, or of --recipe.
            out: folder for neighbors.json, retrieval.png and masks.png.
            data: labeled folder or list to search in; without it there is no retrieval.
            val: labeled folder or list of queries; default: each video of data is a query.
            layer: encoder block whose tokens are compared, from 1; 0 is the last.
            pool: how tokens are averaged to the feature of a clip, see mam2 probe.
            masks: number of synthetic clips with known masks, whose first mask is propagated to the other frames; 0:
                none.
            mask_size: height and width of these clips in pixels; 0: the encoder's, or 14 patches if that is larger.
            top_k: number of tokens from which a token takes its mask.
            radius: maximum distance of these tokens in rows and columns.
            context: number of previous frames with these tokens, in addition to the first frame.
            cache: folder for features, keyed by the hash of weights and videos; it may be deleted at any time.
            encoder: model and clips of the encoders, and how they are computed.
        """
        from mam2.engine.evaluation.neighbors import neighbors

        report = neighbors(
            checkpoints,
            out,
            data=data,
            val=val,
            layer=layer,
            pool=pool,
            masks=masks,
            mask_size=mask_size,
            top_k=top_k,
            radius=radius,
            context=context,
            cache=cache,
            **dataclasses.asdict(encoder),
        )
        print(tables(report))
        print(f"written to {out}")
        return 0

    return run_verb(neighbors, arguments, "neighbors")


def tables(report: NeighborsReport) -> str:
    """Returns the scores of all encoders as tables, in percent."""
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
            + (f" Left out: {counted(found.left_out, 'file')}." if found.left_out else "")
        )
    if report.propagation:
        lines = [("masks", "frame as", "pixels", "J", "F", "J&F")]
        for one in report.propagation:
            mean = (one.region + one.boundary) / 2
            numbers = (f"{100 * one.region:.1f}", f"{100 * one.boundary:.1f}", _share(mean, one.interval))
            lines.append((one.checkpoint or "the first mask, kept", one.context, str(one.size), *numbers))
        parts.append(
            f"{_aligned(lines)}\nMasks of {counted(report.mask_clips, 'clip')} carried on from their first "
            "frames, in % (95 % "
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
