"""Prints which share of PyAV's decoding may hold Python's lock, in processor time of one thread.

    python -m benchmarks.decoding_gil [VIDEOS]     # synthetic videos of 340 x 256 pixels, or your own

PyAV releases the lock inside FFmpeg: while it opens a file, reads packets, decodes, and converts frames to RGB. NumPy
releases it while it copies frames. All other time counts as holding it. With a share p, threads decode at most 1 / p
times as fast as one thread. Processor time does not depend on what else the machine does. The measurement's own time is
subtracted.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.loader_settings import SETTINGS, write_files
from benchmarks.report import table

CLIPS = 24
"""Clips decoded after a first one, which is not counted."""


class Clock:
    """Seconds of processor time spent in calls that release the lock, by name."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self.calls = 0

    def call(self, name: str, work: Callable[[], Any]) -> Any:
        self.calls += 1
        start = time.thread_time()
        try:
            return work()
        finally:
            self.spent[name] = self.spent.get(name, 0.0) + time.thread_time() - start

    def items(self, name: str, items: Iterator[Any]) -> Iterator[Any]:
        """Yields the items; counts the time that each takes to come."""
        end = object()
        while (item := self.call(name, lambda: next(items, end))) is not end:
            yield item


def cost_per_call() -> float:
    """Returns the seconds that a measured call itself takes outside of the measured time."""
    clock, calls = Clock(), 20000
    start = time.thread_time()
    for _ in range(calls):
        clock.call("", lambda: None)
    return (time.thread_time() - start - clock.spent[""]) / calls


def measure(requests: list[tuple[str, tuple[int, ...]]]) -> dict[str, float]:
    """Returns milliseconds of processor time per clip, in total and of each kind of call that releases the lock."""
    from mam2.engine.data import decoding

    clock, cost = Clock(), cost_per_call()
    decode_packet, read_packets, reformatter = (
        decoding.decode_packet,
        decoding.read_packets,
        decoding.VideoReformatter,
    )

    class Frame:
        def __init__(self, frame: Any) -> None:
            self._frame = frame

        def to_ndarray(self) -> Any:
            return clock.call("copy", self._frame.to_ndarray)

    class Reformatter:
        def __init__(self) -> None:
            self._own = reformatter()

        def reformat(self, *args: Any, **options: Any) -> Any:
            return Frame(clock.call("convert", lambda: self._own.reformat(*args, **options)))

    class Opened:
        @staticmethod
        def open(*args: Any, **options: Any) -> Any:
            return clock.call("open", lambda: av.open(*args, **options))

        def __getattr__(self, name: str) -> Any:
            return getattr(av, name)

    av, stack = decoding.av, decoding._stack
    with (
        mock.patch.object(decoding, "av", Opened()),
        mock.patch.object(decoding, "VideoReformatter", Reformatter),
        mock.patch.object(decoding, "_stack", lambda *args: clock.call("copy", lambda: stack(*args))),
        mock.patch.object(decoding, "decode_packet", lambda *args: clock.call("decode", lambda: decode_packet(*args))),
        mock.patch.object(decoding, "read_packets", lambda *args: clock.items("read", read_packets(*args))),
    ):
        decoding.decode_frames(*requests[0])
        clock.spent.clear()
        clock.calls = 0
        start = time.thread_time()
        for request in requests[1:]:
            decoding.decode_frames(*request)
        total = time.thread_time() - start - clock.calls * cost
    clips = len(requests) - 1
    return {"total": 1000 * total / clips} | {name: 1000 * spent / clips for name, spent in clock.spent.items()}


def rows(folder: Path, data: Path | None) -> Iterator[dict[str, Any]]:
    """Yields a row for the clips of mam2-fast from own videos, or for each of two distances of key frames."""
    from mam2.engine.config.recipe import load_recipe
    from mam2.engine.data.manifest import read_manifest
    from mam2.engine.data.sampling import draw_clip

    config = load_recipe("mam2-fast").data
    settings = dataclasses.replace(SETTINGS["cpu"], files=2, frames=240, height=256, width=340)
    for gop in (12, 250) if data is None else (None,):
        manifest = read_manifest(data, progress=False) if data else write_files(folder, "h264", gop, settings)
        videos = manifest.videos
        requests = []
        for number in range(CLIPS + 1):
            place = number % len(videos)
            requests.append((videos[place].path, draw_clip(place, videos[place], number, config, 0).frames))
        found = measure(requests)
        held = 1 - sum(spent for name, spent in found.items() if name != "total") / found["total"]
        yield {"files": "own" if data else "h264", "gop": gop, "held_percent_at_most": 100 * held} | {
            f"{name}_ms": spent for name, spent in found.items()
        }


def main() -> None:
    data = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    with tempfile.TemporaryDirectory() as folder:
        columns = (
            "files",
            "gop",
            "held_percent_at_most",
            "total_ms",
            "open_ms",
            "read_ms",
            "decode_ms",
            "convert_ms",
            "copy_ms",
        )
        print(table(list(rows(Path(folder), data)), columns))


if __name__ == "__main__":
    main()
