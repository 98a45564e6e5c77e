"""`mam2 index`: writes an index of the videos next to them."""

from __future__ import annotations

from pathlib import Path

import tyro


def run(arguments: list[str]) -> int:
    def index(
        data: tyro.conf.Positional[Path], out: Path | None = None, threads: int = 0, plot: Path | None = None
    ) -> int:
        """Open every video once, write its properties as JSON lines, and print a summary with advice for training.

        A second run opens only files whose size or modification time has changed. An unreadable index is written again.

        Args:
            data: folder of videos, annotation list, or a video.
            out: the index; default: DATA.index.jsonl next to the data, where pretrain finds it.
            threads: files opened at once; 0 for twice the cores.
            plot: draw histograms of lengths, sizes and key-frame intervals to this file (.png, .svg, .pdf).
        """
        from mam2.engine.data.indexing import index

        result = index(data, out, threads=threads, plot=plot)
        if result.replaced:
            print(f"{result.replaced}: it is written again")
        changes = result.changes
        print(result.summary())
        print(
            f"\n{result.path}: {changes.new} files new, {changes.changed} changed, {changes.removed} removed, ", end=""
        )
        print(f"{changes.unchanged} unchanged and not opened")
        return 0

    return tyro.cli(index, args=arguments, prog="mam2 index")
