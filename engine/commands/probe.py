"""`mam2 probe`: what frozen encoders know of a labelled set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

if TYPE_CHECKING:
    from mam2.engine.evaluation.probe_run import ProbeReport, Score


def run(arguments: list[str]) -> int:
    def probe(
        checkpoints: tyro.conf.Positional[tuple[Path, ...]],
        data: Path,
        val: Path | None = None,
        recipe: str = "",
        probes: tuple[Literal["linear", "attentive", "knn"], ...] = ("linear", "attentive", "knn"),
        pools: tuple[Literal["mean", "time", "time-center", "time-space"], ...] = ("mean", "time"),
        layers: tuple[int, ...] = (),
        group: str = "",
        out: Path = Path("probe.json"),
        cache: Path = Path("features"),
        stride: int = 0,
        frames: int | None = None,
        size: int | None = None,
        heads: int | None = None,
        batch: int = 32,
        device: Literal["auto", "cuda", "cpu"] = "auto",
        precision: Literal["auto", "bfloat16", "float32"] = "auto",
    ) -> int:
        """Probe frozen encoders: one clip a video, features computed once and kept.

        Args:
            checkpoints: run folders, checkpoints, or weights of VideoMAE or Hugging Face; compared with the first one.
                `random` is an encoder with random weights, like the first of the others, or of --recipe.
            data: labelled folder or list to train the probes on.
            val: labelled folder or list to test on; without it a fifth of each class of data.
            recipe: of pre-training: model and clips of the checkpoint `random`.
            probes: logistic regression and nearest neighbors of pooled tokens, and attentive: learned queries over the
                tokens in place of the means.
            pools: what is averaged. mean: all tokens of a clip, as the field does, which loses the order of time.
                time: the tokens of each time slot. time-center: these, and those of the center of the frame in each
                slot. time-space: each quarter of the frame in each slot.
            layers: blocks of the encoder whose tokens are probed, from 1; by default the last.
            group: column of the lists, or TABLE:COLUMN of another table with a path column, that names what belongs
                together, such as the speaker. Intervals are then over groups, and settings are chosen on held-out
                groups.
            out: the table as JSON.
            cache: folder of features, by the hash of weights and videos; delete it at will.
            stride: distance of two sampled frames instead of the checkpoint's.
            frames: frames of the clips of a checkpoint that does not say them; of others, clips of so many frames.
            size: height and width of these clips, pixels.
            heads: attention heads, of a checkpoint of VideoMAE's code of a width that it never published.
            batch: clips that go through an encoder at once.
            device: `auto` takes a GPU if there is one.
            precision: auto is bfloat16 autocast on a GPU and on x86 CPUs that multiply it, else float32.
        """
        from mam2.engine.evaluation.probing import probe

        result = probe(
            checkpoints,
            data,
            val,
            recipe=recipe,
            probes=probes,
            pools=pools,
            layers=layers,
            group=group,
            out=out,
            cache=cache,
            stride=stride,
            frames=frames,
            size=size,
            heads=heads,
            batch=batch,
            device=device,
            precision=precision,
        )
        print(table(result))
        print(out)
        return 0

    return tyro.cli(probe, args=arguments, prog="mam2 probe")


def table(result: ProbeReport) -> str:
    """The accuracies of checkpoints, layers and pools below each other, a column per probe."""
    probes = list(dict.fromkeys(score.probe for score in result.scores))
    lines = [("checkpoint", "layer", "pool", *probes)]
    rows: dict[tuple[str, int, str], list[Score]] = {}
    for score in result.scores:
        rows.setdefault((score.checkpoint, score.layer, score.pool), []).append(score)
    several = len({(checkpoint, layer) for checkpoint, layer, _ in rows}) > 1
    for (checkpoint, layer, pool), scores in rows.items():
        lines.append((checkpoint, str(layer), pool, *(_share(score.accuracy, score.interval) for score in scores)))
        if several and (checkpoint, layer) != _reference(result.scores):
            lines.append(("", "", "", *(_share(score.gain, score.gain_interval, sign="+") for score in scores)))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    first, at = _reference(result.scores)
    notes = [
        f"{result.train} training and {result.test} test videos of {result.classes} classes"
        + (f", {result.skipped} left out" if result.skipped else "")
        + f"; always the commonest class: {100 * result.commonest:.1f} %",
        "Share of right answers (95 % bootstrap interval over the test videos"
        + (f"' {result.groups} groups)" if result.groups else ")")
        + (f"; below it, in points, the gain over {first}, layer {at}, with the same pool." if several else "."),
    ]
    if result.both:
        notes.append(f"{result.both} test videos are training videos as well: these accuracies are too high.")
    return "\n".join([*text, "", *notes])


def _reference(scores: Sequence[Score]) -> tuple[str, int]:
    first = [score for score in scores if score.checkpoint == scores[0].checkpoint]
    return first[0].checkpoint, max(score.layer for score in first)


def _share(value: float, interval: tuple[float, float], sign: str = "") -> str:
    low, high = (f"{100 * bound:{sign}.1f}" for bound in interval)
    return f"{100 * value:{sign}.1f}{'' if sign else ' %'} ({low} to {high})"
