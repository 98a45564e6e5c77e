"""`index`: opens every video of a data set once and stores its properties in a file next to the data."""

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
    """The usable videos, and the unusable files with the reasons."""
    changes: Changes
    """Numbers of new, changed, removed and unchanged files since the index was last written."""
    path: Path
    """The written index."""
    replaced: str
    """Why an existing index could not be read and was replaced; empty otherwise."""

    def summary(self) -> str:
        """Returns the contents of the videos, their decoders and advice as text.

        Decodes some to measure clips per second.
        """
        return summary(self.manifest, measure_clips_per_s(self.manifest.videos))


def index(
    data: str | Path,
    out: str | Path | None = None,
    *,
    threads: int = 0,
    plot: str | Path | None = None,
    progress: bool = True,
) -> IndexResult:
    """Opens every video once and writes its properties as JSON lines, which `read_manifest` finds next to the data.

    A second call opens only files whose size or modification time has changed. An unreadable index is replaced.

    Args:
        data: a folder of videos, an annotation list, or a video.
        out: the index; None for DATA.index.jsonl next to the data.
        threads: files opened at once; 0 for twice the cores.
        plot: file for histograms of lengths, sizes and key-frame intervals (.png, .svg, .pdf).
        progress: draw a progress bar (only on a terminal).

    Raises:
        UserError: the data has no usable video, or the output cannot be written.
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
        if not path.name.endswith(INDEX_SUFFIX):  # not an index: it must not be replaced
            raise UserError(f"--out {error}; choose another file, or remove this one") from None
        replaced = str(error)
    manifest, changes = scan(data, known, threads=threads, progress=progress)
    with writing(path):
        write_manifest(manifest, path)
    if picture:
        with writing(picture, "--plot"):
            draw_histograms(manifest.videos, picture)
    return IndexResult(manifest=manifest, changes=changes, path=path, replaced=replaced)
