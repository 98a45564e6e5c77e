"""`mam2 index`: what videos there are, kept beside them."""

from __future__ import annotations

from pathlib import Path

import tyro


def run(arguments: list[str]) -> int:
    def index(
        data: tyro.conf.Positional[Path], out: Path | None = None, threads: int = 0, plot: Path | None = None
    ) -> int:
        """Open every video once, write what it holds as JSON lines, and print what it means for training.

        A second run opens only files whose size or time of change is another one. An index that cannot be read is
        written anew.

        Args:
            data: folder of videos, annotation list, or a video.
            out: the index; beside the data, DATA.index.jsonl, where nothing else is said, and found there by pretrain.
            threads: files opened at once; 0 for twice the cores.
            plot: draw histograms of lengths, sizes and key-frame distances into this file (.png, .svg, .pdf).
        """
        from mam2.engine.data.indexing import index

        result = index(data, out, threads=threads, plot=plot)
        if result.replaced:
            print(f"{result.replaced}: it is written anew")
        changes = result.changes
        print(result.summary())
        print(f"\n{result.path}: {changes.new} files new, {changes.changed} changed, {changes.removed} gone, ", end="")
        print(f"{changes.unchanged} unchanged and not opened")
        return 0

    return tyro.cli(index, args=arguments, prog="mam2 index")
