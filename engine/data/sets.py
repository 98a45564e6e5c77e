"""The data sets of a run: their sources, their videos in one manifest, and their names in the log."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from mam2.engine.config.training import DataConfig
from mam2.engine.data.manifest import Manifest, VideoSet, read_manifest
from mam2.engine.data.sample_order import SampleOrder
from mam2.engine.data.sources import check_source, list_and_split
from mam2.engine.data.unusable import UnusableVideos
from mam2.engine.errors import UserError
from mam2.engine.files import check_apart
from mam2.engine.units import counted

Sources = str | Path | Sequence[str | Path]
"""One data set or several; each is a folder, an annotation list, a video or an index."""


def sources_of(data: Sources, flag: str = "--data") -> tuple[Path, ...]:
    """Returns the data sets that a caller passed as paths. Raises UserError if one is passed twice."""
    paths = (Path(data),) if isinstance(data, str | Path) else tuple(map(Path, data))
    known: dict[tuple[str, str], Path] = {}
    for path in paths:
        place, split = list_and_split(path)
        key = os.path.realpath(place), split
        if key in known:
            raise UserError(
                f"{flag} {path}: the same data set as {flag} {known[key]}; expected each set once, its share in "
                "data.weights"
            )
        known[key] = path
    return paths


def training_sources(config: DataConfig, data: Sources) -> tuple[Path, ...]:
    """Returns the data sets of a training: `data`, or if it is empty those of `data.sets`.

    Raises UserError if there is none, one is given twice, or the number of weights differs.
    """
    paths = sources_of(data) or sources_of(config.sets, "data.sets")
    if not paths:
        raise UserError("no data set: pass --data PATH, or set data.sets in the recipe")
    if config.weights and len(config.weights) != len(paths):
        raise UserError(
            f"data.weights: expected one number per data set, {len(paths)} for {', '.join(map(str, paths))}; "
            f"found {len(config.weights)}"
        )
    return paths


def with_sources(config: DataConfig, sources: Sequence[Path]) -> DataConfig:
    """Returns the config with several data sets in `sets`, so that a saved config names them; one is not recorded."""
    sets = tuple(map(str, sources)) if len(sources) > 1 else ()
    return dataclasses.replace(config, sets=sets, weights=config.weights if sets else ())


def check_sources(sources: Iterable[Path], out: str | Path) -> None:
    """Raises UserError if a source does not exist, or is the output folder."""
    for source in sources:
        check_source(source)
        check_apart(source, out)


def read_sets(sources: Sequence[Path], *, threads: int = 0, progress: bool = True) -> Manifest:
    """Returns the videos of all data sets as one manifest; of a single one what `read_manifest` returns."""
    parts = [read_manifest(source, threads=threads, progress=progress) for source in sources]
    return join_sets(parts, sources)


def join_sets(parts: Sequence[Manifest], sources: Sequence[Path]) -> Manifest:
    """Joins the manifests of data sets, in their order. Labels are kept only if all sets have the same classes."""
    if len(parts) == 1:
        return dataclasses.replace(parts[0], sets=())
    same = all(part.classes == parts[0].classes for part in parts)
    videos = [video if same else dataclasses.replace(video, label=-1) for part in parts for video in part.videos]
    return Manifest(
        tuple(videos),
        tuple(skipped for part in parts for skipped in part.skipped),
        parts[0].classes if same else (),
        tuple(
            VideoSet(str(source), len(part.videos), len(part.skipped))
            for part, source in zip(parts, sources, strict=True)
        ),
    )


def parts_of(manifest: Manifest) -> list[Manifest]:
    """Returns the manifest of each data set; the inverse of `join_sets`."""
    if not manifest.sets:
        return [manifest]
    parts, video, skipped = [], 0, 0
    for each in manifest.sets:
        videos = manifest.videos[video : video + each.videos]
        parts.append(Manifest(videos, manifest.skipped[skipped : skipped + each.skipped], manifest.classes))
        video, skipped = video + each.videos, skipped + each.skipped
    return parts


def set_names(manifest: Manifest) -> list[str]:
    """Returns a name for each data set of a manifest: its last path component if that is unique, else its path."""
    names = [Path(each.source).name or each.source for each in manifest.sets]
    count = Counter(names)
    return [name if count[name] == 1 else each.source for name, each in zip(names, manifest.sets, strict=True)]


def set_numbers(manifest: Manifest, order: SampleOrder, samples: int, views: int) -> dict[str, float]:
    """Returns numbers for the log after `samples` samples: clips seen of each data set, and passes over it.

    Empty for a single data set.
    """
    if not manifest.sets:
        return {}
    numbers: dict[str, float] = {}
    for name, count, size in zip(set_names(manifest), order.seen(samples), order.sizes, strict=True):
        numbers |= {f"clips/{name}": float(count * views), f"passes/{name}": count / size}
    return numbers


def describe_sets(manifest: Manifest, order: SampleOrder, weighted: bool) -> list[str]:
    """Returns lines for the log: what an epoch is, and the share of each data set; none for a single set."""
    if not manifest.sets:
        return []
    total = sum(order.sizes)
    how = "each video once" if not weighted else "as many as there are videos, in the proportion of data.weights"
    lines = [f"data    {len(order.sizes)} data sets; an epoch is {counted(total, 'sample')}: {how}"]
    for name, each, size, share in zip(set_names(manifest), manifest.sets, order.sizes, order.shares, strict=True):
        lines.append(
            f"data    {name}: {counted(size, 'video')}, {each.skipped + each.videos - size} unusable; "
            f"{share:.2%} of the clips, "
            f"{share * total / size:.3g} passes per epoch ({each.source})"
        )
    if not manifest.classes:
        lines.append("data    labels are not used: the sets have none, or different classes")
    return lines


def describe_seen(manifest: Manifest, unusable: UnusableVideos, numbers: dict[str, float]) -> str:
    """Returns a line for the log at the end of a run. numbers: from `set_numbers`."""
    bad = []
    for part in parts_of(manifest):
        paths = {video.path for video in part.videos} | {skipped.path for skipped in part.skipped}
        bad.append(sum(path in unusable for path in paths))
    return "; ".join(
        f"{name}: {counted(round(numbers[f'clips/{name}']), 'clip')}, {numbers[f'passes/{name}']:.3g} passes, "
        f"{count} unusable"
        for name, count in zip(set_names(manifest), bad, strict=True)
    )
