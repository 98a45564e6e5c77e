"""`mam2 index`: what videos there are, kept beside them."""

from __future__ import annotations

from pathlib import Path

import tyro

from mam2.engine.errors import UserError
from mam2.engine.files import check_apart, check_folder, writing


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
        from mam2.engine.data.inspect import PICTURE_SUFFIXES, draw, measure_clips_per_s, summary
        from mam2.engine.data.manifest import (
            INDEX_SUFFIX,
            Manifest,
            index_path,
            read_saved_manifest,
            scan,
            write_manifest,
        )
        from mam2.engine.data.sources import check_source

        check_source(data)
        out = out or index_path(data)
        check_apart(data, out)
        if plot and plot.suffix.lower() not in PICTURE_SUFFIXES:
            raise UserError(f"--plot {plot}: expected a name that ends in {', '.join(PICTURE_SUFFIXES)}")
        for place, argument in ((out, "--out"), (plot, "--plot")):
            if place:
                with writing(place, argument):
                    check_folder(place.absolute().parent)
        known = Manifest(())
        try:
            known = read_saved_manifest(out) if out.exists() else known
        except UserError as error:
            if not out.name.endswith(INDEX_SUFFIX):  # whatever it is, nobody asked to replace it
                raise UserError(f"--out {error}; name another file, or remove this one") from None
            print(f"{error}: it is written anew")
        manifest, changes = scan(data, known, threads=threads)
        with writing(out):
            write_manifest(manifest, out)
        print(summary(manifest, measure_clips_per_s(manifest.videos)))
        print(f"\n{out}: {changes.new} files new, {changes.changed} changed, {changes.removed} gone, ", end="")
        print(f"{changes.unchanged} unchanged and not opened")
        if plot:
            with writing(plot, "--plot"):
                draw(manifest.videos, plot)
        return 0

    return tyro.cli(index, args=arguments, prog="mam2 index")
