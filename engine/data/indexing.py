"""`index`: opens every video of a data set once and keeps what it holds in a file beside the data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mam2.engine.config.limits import COUNT_OR_NONE, check_flags
from mam2.engine.data.inspect import PICTURE_SUFFIXES, draw_histograms, measure_clips_per_s, summary
from mam2.engine.data.manifest import (
    INDEX_SUFFIX,
    Changes,
    Manifest,
    index_path,
    read_saved_manifest,
    scan,
    write_manifest,
)
from mam2.engine.data.sources import check_source
from mam2.engine.errors import UserError
from mam2.engine.files import check_apart, check_folder, writing


@dataclass(frozen=True, kw_only=True)
class IndexResult:
    manifest: Manifest
    """The videos that can be used, and the files that cannot, with the reason of each."""
    changes: Changes
    """Numbers of files that are new, changed, gone and unchanged since the index was written last."""
    path: Path
    """The index that was written."""
    replaced: str
    """Why an index that was there could not be read and was written anew; empty otherwise."""

    def summary(self) -> str:
        """What the videos hold, who decodes them and what to change, as lines of text; decodes some of them to measure
        clips per second."""
        return summary(self.manifest, measure_clips_per_s(self.manifest.videos))


def index(
    data: str | Path,
    out: str | Path | None = None,
    *,
    threads: int = 0,
    plot: str | Path | None = None,
    progress: bool = True,
) -> IndexResult:
    """Opens every video once and writes what it holds as JSON lines, which `read_manifest` finds beside the data.

    A second call opens only files whose size or time of change is another one. An index that cannot be read is written
    anew.

    Args:
        data: a folder of videos, an annotation list, or a video.
        out: the index; None for DATA.index.jsonl beside the data.
        threads: files opened at once; 0 for twice the cores.
        plot: a picture of lengths, sizes and key-frame distances is drawn into this file (.png, .svg, .pdf).
        progress: draw a progress bar (only on a terminal).

    Raises:
        UserError: for data without a usable video, and places that cannot be written.
    """
    check_flags(threads=(threads, COUNT_OR_NONE))
    check_source(data)
    path, picture = Path(out) if out else index_path(data), Path(plot) if plot else None
    check_apart(data, path)
    if picture and picture.suffix.lower() not in PICTURE_SUFFIXES:
        raise UserError(f"--plot {picture}: expected a name that ends in {', '.join(PICTURE_SUFFIXES)}")
    for place, argument in ((path, "--out"), (picture, "--plot")):
        if place:
            with writing(place, argument):
                check_folder(place.absolute().parent)
    known, replaced = Manifest(()), ""
    try:
        known = read_saved_manifest(path) if path.exists() else known
    except UserError as error:
        if not path.name.endswith(INDEX_SUFFIX):  # whatever it is, nobody asked to replace it
            raise UserError(f"--out {error}; name another file, or remove this one") from None
        replaced = str(error)
    manifest, changes = scan(data, known, threads=threads, progress=progress)
    with writing(path):
        write_manifest(manifest, path)
    if picture:
        with writing(picture, "--plot"):
            draw_histograms(manifest.videos, picture)
    return IndexResult(manifest=manifest, changes=changes, path=path, replaced=replaced)
