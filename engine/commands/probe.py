"""`mam2 probe`: probes frozen encoders on labeled videos."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from mam2.engine.commands.flags import ENCODER, EncoderFlags
from mam2.engine.commands.options import run_verb

if TYPE_CHECKING:
    from mam2.engine.evaluation.probe_run import ProbeReport, Score


def run(arguments: list[str]) -> int:
    def probe(
        checkpoints: tyro.conf.Positional[tuple[Path, ...]],
        data: Path,
        val: Path | None = None,
        probes: tuple[Literal["linear", "attentive", "knn"], ...] = ("linear", "attentive", "knn"),
        pools: tuple[Literal["mean", "time", "time-center", "time-space", "tokens"], ...] = ("mean", "time"),
        layers: tuple[int, ...] = (),
        group: str = "",
        out: Path = Path("probe.json"),
        cache: Path = Path("features"),
        encoder: Annotated[EncoderFlags, tyro.conf.arg(name="")] = ENCODER,
    ) -> int:
        """Probe frozen encoders on one clip per video; features are computed once and cached.

        Args:
            checkpoints: run folders, checkpoints, or weights of VideoMAE or Hugging Face; all are compared with the
                first. `random` is an encoder with random weights and the model of the first other checkpoint, or of
                --recipe; `pixels` are the gray pixels of its clips in place of features.
            data: labeled folder or list to train the probes.
            val: labeled folder or list to test them; default: a fifth of each class of data.
            probes: logistic regression or nearest neighbors on averaged tokens; attentive: learned queries over the
                tokens instead of averages.
            pools: how tokens are averaged. mean: all tokens of a clip, which is common but loses the temporal order.
                time: the tokens of each time slot. time-center: these, and those of the frame's center in each slot.
                time-space: each quarter of the frame in each slot. tokens: not averaged; the linear probe sees the
                principal components of all tokens of a clip.
            layers: encoder blocks whose tokens are probed, from 1; default: the last.
            group: column of the lists, or TABLE:COLUMN of another table with a path column, that assigns videos to
                groups, such as the speaker. Intervals are then over groups, and settings are chosen on held-out
                groups.
            out: output file for the table as JSON.
            cache: folder for features, keyed by the hash of weights and videos; it may be deleted at any time.
            encoder: model and clips of the encoders, and how they are computed.
        """
        from mam2.engine.evaluation.probing import probe

        result = probe(
            checkpoints,
            data,
            val,
            probes=probes,
            pools=pools,
            layers=layers,
            group=group,
            out=out,
            cache=cache,
            **dataclasses.asdict(encoder),
        )
        print(table(result))
        print(out)
        return 0

    return run_verb(probe, arguments, "probe")


def table(result: ProbeReport) -> str:
    """Returns the table of accuracies: a row per checkpoint, layer and pool, a column per probe."""
    probes = list(dict.fromkeys(score.probe for score in result.scores))
    lines = [("checkpoint", "layer", "pool", *probes)]
    rows: dict[tuple[str, int, str], dict[str, Score]] = {}
    for score in result.scores:
        pool = f"{score.pool} ({score.components})" if score.components else score.pool
        rows.setdefault((score.checkpoint, score.layer, pool), {})[score.probe] = score
    several = len({(checkpoint, layer) for checkpoint, layer, _ in rows}) > 1
    for (checkpoint, layer, pool), scores in rows.items():
        found = [scores.get(probe) for probe in probes]
        lines.append((checkpoint, str(layer), pool, *(_share(s.accuracy, s.interval) if s else "-" for s in found)))
        if several and (checkpoint, layer) != _reference(result.scores):
            lines.append(("", "", "", *(_share(s.gain, s.gain_interval, sign="+") if s else "" for s in found)))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    first, at = _reference(result.scores)
    notes = [
        f"{result.train} training and {result.test} test {result.unit} of {result.classes} classes"
        + (f", {result.skipped} left out" if result.skipped else "")
        + f"; always the most frequent class: {100 * result.commonest:.1f} %",
        f"Share of correct answers (95 % bootstrap interval over the test {result.unit}"
        + (f"' {result.groups} groups)" if result.groups else ")")
        + (f"; below it, in points, the gain over {first}, layer {at}, with the same pool." if several else "."),
    ]
    if any(score.components for score in result.scores):
        notes.append("tokens (k): the linear probe of the first k principal components of all tokens of a clip.")
    if result.both:
        notes.append(
            f"{result.both} test {result.unit} are also in the training videos: these accuracies are too high."
        )
    return "\n".join([*text, "", *notes])


def _reference(scores: Sequence[Score]) -> tuple[str, int]:
    first = [score for score in scores if score.checkpoint == scores[0].checkpoint]
    return first[0].checkpoint, max(score.layer for score in first)


def _share(value: float, interval: tuple[float, float], sign: str = "") -> str:
    low, high = (f"{100 * bound:{sign}.1f}" for bound in interval)
    return f"{100 * value:{sign}.1f}{'' if sign else ' %'} ({low} to {high})"
