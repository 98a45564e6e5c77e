"""Averages over seeds what `mam2 probe` measured of several runs, with intervals and differences over groups.

    mam2 probe runs/motion-0 runs/motion-1 runs/videomae-0 --data LIST --val TEST --group META:speaker --out words.json
    python -m benchmarks.probe_seeds words.json --val TEST --group META:speaker --against videomae \\
        --encoder motion=runs/motion-0,runs/motion-1 --encoder videomae=runs/videomae-0

Several files may hold the runs of one question. Prints a Markdown table: a row per encoder and pool of the linear
probe, with the difference to `--against`. An answer counts as the share of the seeds that are right; the intervals draw
whole groups of test videos. Rows that `mam2 probe` names "RUN + pixels" are averaged like the runs; the column of seeds
says how many runs have one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.report import Row, table
from mam2.engine.data.lists import read_column
from mam2.engine.data.manifest import read_manifest
from mam2.engine.errors import UserError
from mam2.engine.evaluation.linear_probe import bootstrap

Answers = dict[tuple[str, str], Tensor]
"""By run and pool: float64 [test videos], 1 for a correct answer."""
PLUS_PIXELS = " + pixels"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.probe_seeds", description="Averages probes over seeds.")
    parser.add_argument("probes", type=Path, nargs="+", help="files that mam2 probe --out wrote, of one question")
    parser.add_argument("--val", type=Path, required=True, help="the test list of these probes")
    parser.add_argument("--group", required=True, metavar="TABLE:COLUMN", help="what the test videos belong to")
    parser.add_argument(
        "--encoder", action="append", required=True, metavar="NAME=RUN,RUN", help="the runs of an encoder"
    )
    parser.add_argument("--against", default="", help="the encoder that the others are compared with")
    options = parser.parse_args(arguments)
    try:
        encoders = dict(_named(text) for text in options.encoder)
        groups = groups_of(options.val, options.group)
        print(seed_table(read_answers(options.probes, len(groups)), encoders, groups, options.against))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def read_answers(files: Sequence[Path], videos: int) -> Answers:
    """The answers of the linear probes in files of `mam2 probe`; UserError unless each is of `videos` test videos."""
    found: Answers = {}
    for file in files:
        try:
            scores = json.loads(file.read_text(encoding="utf-8"))["scores"]
            linear = [score for score in scores if score["probe"] == "linear"]
            rights = {(score["checkpoint"], score["pool"]): score["right"] for score in linear}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}: expected a file of mam2 probe --out of this version: {error!r}") from None
        for (run, pool), right in rights.items():
            if len(right) != videos:
                raise UserError(f"{file}: {run} has answers for {len(right)} videos, the test list has {videos}")
            found[run, pool] = torch.tensor([float(digit) for digit in right], dtype=torch.float64)
    return found


def groups_of(val: Path, group: str) -> Tensor:
    """The group of each labeled video of a test list: int64. UserError if the table does not name every video."""
    source, _, column = group.rpartition(":")
    if not source:
        raise UserError(f"--group {group}: expected TABLE:COLUMN, a table with a column of paths")
    names = read_column(Path(source), column)
    paths = [video.path for video in read_manifest(val, progress=False).videos if video.label >= 0]
    if missing := next((path for path in paths if not names.get(path)), None):
        raise UserError(f"--group {group}: no group for {missing}; the table must name every video")
    numbers = {name: number for number, name in enumerate(sorted({names[path] for path in paths}))}
    return torch.tensor([numbers[names[path]] for path in paths])


def seed_table(
    answers: Mapping[tuple[str, str], Tensor], encoders: Mapping[str, Sequence[str]], groups: Tensor, against: str = ""
) -> str:
    """Markdown: a row per pool and encoder. UserError for an encoder without answers."""
    if against and against not in encoders:
        raise UserError(f"--against {against}: expected one of the encoders {', '.join(encoders)}")
    pools = list(dict.fromkeys(pool for _, pool in answers))
    rows: list[Row] = []
    for pool in pools:
        right: dict[str, Tensor] = {}
        for name, runs in encoders.items():
            for suffix in ("", PLUS_PIXELS):
                given = [answers[run + suffix, pool] for run in runs if (run + suffix, pool) in answers]
                if len(given) < len(runs) and not suffix:
                    missing = next(run for run in runs if (run, pool) not in answers)
                    raise UserError(f"no answers of {missing} with the pool {pool}; probe it with mam2 probe")
                if given:
                    right[name + suffix] = torch.stack(given)
        for name, by_seed in right.items():
            shares = 100 * by_seed.mean(1)
            row: Row = {
                "encoder": name,
                "pool": pool,
                "seeds": len(by_seed),
                "accuracy, %": f"{shares.mean():.1f}",
                "of each seed": ", ".join(f"{share:.1f}" for share in shares.tolist()),
                "95 % over groups": _interval(bootstrap(by_seed.mean(0), groups=groups)),
            }
            if against and name != against:
                gain = by_seed.mean(0) - right[against].mean(0)
                row[f"against {against}"] = (
                    f"{100 * gain.mean():+.1f} [{_interval(bootstrap(gain, groups=groups), '+')}]"
                )
            rows.append(row)
    return table(rows, list(dict.fromkeys(column for row in rows for column in row)))


def _named(text: str) -> tuple[str, list[str]]:
    name, _, runs = text.partition("=")
    if not name or not runs:
        raise UserError(f"--encoder {text}: expected NAME=RUN,RUN")
    return name, runs.split(",")


def _interval(ends: tuple[float, float], sign: str = "") -> str:
    return " to ".join(f"{100 * end:{sign}.1f}" for end in ends)


if __name__ == "__main__":
    sys.exit(main())
