"""`mam2 index`: writes an index of the videos next to them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from mam2.engine.commands.options import run_verb
from mam2.engine.errors import UserError
from mam2.engine.units import counted

if TYPE_CHECKING:
    from mam2.engine.data.indexing import IndexResult


def run(arguments: list[str]) -> int:
    def index(
        data: tyro.conf.Positional[tuple[Path, ...]],
        out: Path | None = None,
        threads: int = 0,
        plot: Path | None = None,
    ) -> int:
        """Open every video once, write its properties as JSON lines, and print a summary with advice for training.

        A second run opens only files whose size or modification time has changed. An unreadable index is written again.

        Args:
            data: folder of videos, annotation list, or a video; each of several gets its own index.
            out: the index of a single data set; default: DATA.index.jsonl next to the data, where pretrain finds it.
            threads: files opened at once; 0 for twice the cores.
            plot: draw histograms of lengths, sizes and key-frame intervals to this file (.png, .svg, .pdf), of a single
                data set.
        """
        from mam2.engine.data.indexing import index

        if not data:
            raise UserError("index: expected a folder, a list or a video: mam2 index DATA [DATA …]")
        if len(data) > 1 and (out or plot):
            flag = "--out" if out else "--plot"
            raise UserError(
                f"{flag}: is for a single data set, found {len(data)}; leave it out or index them one by one"
            )
        videos = 0
        for source in data:
            if len(data) > 1:
                print(f"{source}:")
            result = index(source, out, threads=threads, plot=plot)
            videos += len(result.manifest.videos)
            _report(result)
            if len(data) > 1:
                print()
        if len(data) > 1:
            print(f"{counted(videos, 'usable video')} in {len(data)} data sets")
        return 0

    return run_verb(index, arguments, "index")


def _report(result: IndexResult) -> None:
    if result.replaced:
        print(f"{result.replaced}: it is written again")
    changes = result.changes
    print(result.summary())
    print(
        f"\n{result.path}: {counted(changes.new, 'new file')}, {changes.changed} changed, {changes.removed} removed, ",
        end="",
    )
    print(f"{changes.unchanged} unchanged and not opened")
