"""Probes of temporal segments: labels of parts of videos, predicted from features of windows that `embed` wrote.

The feature of a segment is the mean of the windows whose middle lies in it, or, without one, the window nearest to its
middle. All segments of a video are either training or test segments, and intervals are over videos.

n segments, D values of a feature.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mam2.engine.data.lists import LABEL_COLUMNS, PATH_COLUMNS
from mam2.engine.errors import UserError
from mam2.engine.evaluation.embedding import Embedding
from mam2.engine.evaluation.embedding_files import read_embedding
from mam2.engine.evaluation.knn import knn
from mam2.engine.evaluation.linear_probe import bootstrap, held_out, linear_probe
from mam2.engine.evaluation.probe_run import FEWEST_VIDEOS, Probe, ProbeReport, Score, digits

START_COLUMNS, END_COLUMNS = ("start_s", "start", "begin", "t_start"), ("end_s", "end", "stop", "t_end")
PROBES: tuple[Probe, ...] = ("linear", "knn")


class Segment(NamedTuple):
    path: str
    """Absolute."""
    start_s: float
    end_s: float
    """Seconds from the video's first frame."""
    label: str


def read_segments(source: Path) -> list[Segment]:
    """Reads a list of segments: CSV or tab-separated, with columns for path, label, start and end in seconds.

    Relative paths start at the list's folder. Raises UserError, with the line.
    """
    try:
        text = source.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"{source}: cannot be read: {error.strerror}") from None
    table = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if "\t" in text.split("\n")[0] else ",")
    rows = [(table.line_num, cells) for cells in table if any(cell.strip() for cell in cells)]
    header = [name.strip().lower() for name in rows[0][1]] if rows else []
    places = []
    for what, names in (
        ("videos", PATH_COLUMNS),
        ("start in seconds", START_COLUMNS),
        ("end in seconds", END_COLUMNS),
        ("label", LABEL_COLUMNS),
    ):
        place = next((header.index(name) for name in names if name in header), None)
        if place is None:
            raise UserError(
                f"{source}: no column for the {what}; its first line needs one named {', '.join(names[:4])}"
            )
        places.append(place)
    segments = []
    for number, cells in rows[1:]:
        if len(cells) != len(header):
            raise UserError(f"{source}: line {number} has {len(cells)} columns, the header has {len(header)}")
        path, start, end, label = (cells[place].strip() for place in places)
        try:
            start_s, end_s = float(start), float(end)
        except ValueError:
            start_s = end_s = np.nan
        if not (0 <= start_s < end_s < np.inf) or not label:
            raise UserError(
                f"{source}: line {number}: expected a label and seconds with 0 ≤ start < end, found {label!r}, "
                f"{start!r}, {end!r}"
            )
        segments.append(Segment(os.path.abspath(source.parent / path), start_s, end_s, label))
    if not segments:
        raise UserError(f"{source}: a header but no segments")
    return segments


def segment_features(
    embedding: Embedding, segments: Sequence[Segment]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Features [n, D] of segments, and bool [n]: for which there are windows. Raises UserError without times."""
    if embedding.start_s is None or embedding.end_s is None:
        raise UserError("holds one feature per video; segments need windows: mam2 embed with --window or --hop")
    rows: dict[str, list[int]] = {}
    for row, path in enumerate(embedding.paths):
        rows.setdefault(path, []).append(row)
    middles = (embedding.start_s + embedding.end_s) / 2
    features = np.zeros((len(segments), embedding.features.shape[1]), np.float32)
    there = np.zeros(len(segments), bool)
    for number, segment in enumerate(segments):
        own = np.array(rows.get(segment.path, ()), np.int64)
        if not len(own) or np.isnan(middles[own]).all():
            continue
        inside = own[(middles[own] >= segment.start_s) & (middles[own] < segment.end_s)]
        if not len(inside):
            inside = own[[np.nanargmin(np.abs(middles[own] - (segment.start_s + segment.end_s) / 2))]]
        features[number], there[number] = embedding.features[inside].mean(0), True
    return features, there


def probe_segments(
    files: Sequence[Path], data: Path, val: Path | None, *, probes: Sequence[Probe] = PROBES
) -> ProbeReport:
    """Probes features of windows on labeled segments.

    Args:
        files: that `embed` wrote, with windows; each is compared with the first.
        data: list of segments to train the probes on.
        val: list to test on; None: the segments of a fifth of the videos of `data`.
        probes: of `linear` and `knn`; `attentive` needs tokens, which the files do not hold, and is left out.

    Raises:
        UserError: for files and lists that cannot be used, and too few segments.
    """
    probes = [probe for probe in probes if probe in PROBES]
    if not probes:
        raise UserError("--probes: segments are probed by linear and knn; attentive needs tokens, which the file lacks")
    listed = read_segments(data)
    known = len(listed)
    listed += read_segments(val) if val else []
    names = sorted({segment.label for segment in listed[:known]})
    unknown = sorted({segment.label for segment in listed} - set(names))
    if unknown:
        raise UserError(f"--val {val}: no training segment has the label {unknown[0]!r}")
    videos = {path: place for place, path in enumerate(dict.fromkeys(segment.path for segment in listed))}
    groups = torch.tensor([videos[segment.path] for segment in listed])
    labels = torch.tensor([names.index(segment.label) for segment in listed])
    test = torch.arange(len(listed)) >= known
    if val is None:
        if len(videos) < 3:
            raise UserError(f"{data}: expected segments of three or more videos, or --val; found {len(videos)}")
        test = held_out(len(listed), groups, least=2)
    embeddings = {str(file): read_embedding(file) for file in files}
    found: dict[str, NDArray[np.float32]] = {}
    whole = np.ones(len(listed), bool)
    for name, embedding in embeddings.items():
        try:
            found[name], there = segment_features(embedding, listed)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        whole &= there
    keep = torch.from_numpy(whole)
    train, test = ~test & keep, test & keep
    if int(train.sum()) < FEWEST_VIDEOS or not test.any():
        raise UserError(
            f"{int(train.sum())} training and {int(test.sum())} test segments lie in videos of {', '.join(found)}; "
            f"expected at least {FEWEST_VIDEOS} and 1"
        )
    scores: list[Score] = []
    first: dict[Probe, Tensor] = {}
    for name, features in found.items():
        about = embeddings[name].about
        for probe in probes:
            right, setting = _right(probe, torch.from_numpy(features), labels, train, test, groups)
            gained = right - first.setdefault(probe, right)
            scores.append(
                Score(
                    checkpoint=name,
                    layer=about["layer"],
                    pool=about["pool"],
                    probe=probe,
                    accuracy=float(right.mean()),
                    interval=bootstrap(right, groups=groups[test]),
                    gain=float(gained.mean()),
                    gain_interval=bootstrap(gained, groups=groups[test]),
                    setting=setting,
                    right=digits(right),
                )
            )
    in_both = set(groups[train].tolist()) & set(groups[test].tolist())
    return ProbeReport(
        train=int(train.sum()),
        test=int(test.sum()),
        both=sum(video in in_both for video in groups[test].tolist()),
        skipped=int((~keep).sum()),
        classes=len(names),
        groups=len(groups[test].unique()),
        commonest=float(labels[test].bincount().max() / test.sum()),
        scores=tuple(scores),
        unit="segments",
    )


def _right(
    probe: Probe, features: Tensor, labels: Tensor, train: Tensor, test: Tensor, groups: Tensor
) -> tuple[Tensor, float]:
    """Returns which test segments a probe classifies correctly, float64, and the chosen setting."""
    if probe == "knn":
        return (knn(features[train], labels[train], features[test]) == labels[test]).double(), 0.0
    held = held_out(int(train.sum()), groups[train])
    result = linear_probe(features[train], labels[train], features[test], labels[test], held)
    return result.right.double(), result.penalty
