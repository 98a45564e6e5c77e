"""`mam2 index`: what videos there are, kept beside them."""

from __future__ import annotations

import os
from pathlib import Path

import tyro

from mam2.engine.config import UserError


def run(arguments: list[str]) -> int:
    def index(
        data: tyro.conf.Positional[Path], out: Path | None = None, threads: int = 0, plot: Path | None = None
    ) -> int:
        """Open every video once, write what it holds as JSON lines, and print what it means for training.

        A second run opens only files whose size or time of change is another one.

        Args:
            data: folder of videos, annotation list, or a video.
            out: the index; beside the data, DATA.index.jsonl, where nothing else is said, and found there by pretrain.
            threads: files opened at once; 0 for twice the cores.
            plot: draw histograms of lengths, sizes and key-frame distances into this file (.png, .svg, .pdf).
        """
        from mam2.engine.data.index import draw, measure_clips_per_s, summary
        from mam2.engine.data.manifest import Manifest, index_path, read_saved_manifest, scan, write_manifest

        out = out or index_path(data)
        if not os.access(out.parent, os.W_OK):
            raise UserError(f"{out}: this folder cannot be written to; name another place with --out")
        known = read_saved_manifest(out) if out.exists() else Manifest(())
        manifest, changes = scan(data, known, threads=threads)
        write_manifest(manifest, out)
        print(summary(manifest, measure_clips_per_s(manifest.videos)))
        print(f"\n{out}: {changes.new} files new, {changes.changed} changed, {changes.removed} gone, ", end="")
        print(f"{changes.unchanged} unchanged and not opened")
        if plot:
            draw(manifest.videos, plot)
        return 0

    return tyro.cli(index, args=arguments, prog="mam2 index")
