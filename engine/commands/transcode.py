"""`mam2 transcode`: re-encodes videos for fast decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from mam2.engine.commands.options import run_verb


def run(arguments: list[str]) -> int:
    def transcode(
        data: tyro.conf.Positional[Path],
        out: Path,
        codec: Literal["h264", "hevc", "vp9"] = "h264",
        short_side: int = 320,
        gop: int = 30,
        jobs: int = 0,
    ) -> int:
        """Re-encode videos for fast decoding: smaller, with frequent key frames, no B-frames, upright, without sound.

        Every frame is kept, at a constant rate. Run the same command again to continue after an interruption.

        Args:
            data: folder of videos, annotation list, or a video.
            out: folder for the new videos with the same relative paths; for a list, a new list with the labels.
            codec: h264 for NVDEC; hevc also for NVDEC: smaller files, slower to encode; vp9 for DALI on a CPU.
            short_side: pixels of the shorter side; smaller videos keep their size. Both sides are rounded to multiples
                of 16.
            gop: largest number of frames from a key frame to the next.
            jobs: files at once; 0: one per core.
        """
        from mam2.engine.data.transcode import FAILURES, transcode

        written, kept, failed = transcode(data, out, codec=codec, short_side=short_side, gop=gop, jobs=jobs)
        before, after = (sum(sizes) / 1e6 for sizes in zip(*written, strict=True)) if written else (0.0, 0.0)
        print(
            f"{out}: {len(written)} written ({before:.1f} MB became {after:.1f} MB), {kept} existed already, ", end=""
        )
        print(f"{len(failed)} failed{f', see {out / FAILURES}' if failed else ''}")
        return 1 if failed else 0

    return run_verb(transcode, arguments, "transcode")
