"""Writes predictions as JSON, CSV or JSON lines, and a picture of every video with its most probable classes."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from mam2.engine.data.arrays import read_frames
from mam2.engine.data.decoding import DecodeError, decode_frames
from mam2.engine.data.video import Skipped, Video, probe_file
from mam2.engine.errors import UserError
from mam2.engine.files import check_apart, check_folder, make_folder, printable, write_whole, writing
from mam2.engine.model.pixels import as_colors

SUFFIXES = (".json", ".csv", ".jsonl")
DRAWN_FRAMES = 4
"""Frames per picture, evenly spaced in the video."""
FRAME_HEIGHT = 240
"""Minimum height in pixels at which the frames of a picture are decoded."""
DRAWN_CLASSES = 10
"""Maximum classes per picture."""

Top = Sequence[tuple[str, float]]
"""Names of the most probable classes with their probabilities, in descending order."""


class PredictionFiles:
    """Writes predictions as they arrive. When the block ends, also by an error, the files contain all of them."""

    def __init__(
        self,
        out: str | Path | None,
        draw: str | Path | None,
        about: Mapping[str, Any],
        *,
        top: int,
        source: str | Path | None,
    ) -> None:
        """out: output file, whose suffix selects the format. draw: folder for pictures. about: further content of the
        JSON file. top: classes per video. source: the data, which must not be overwritten.

        Raises UserError if the outputs cannot be written, before anything is classified.
        """
        self._out, self._draw = (Path(place) if place else None for place in (out, draw))
        self._about, self._top = about, top
        self._rows: list[dict[str, Any]] = []
        self._lines: IO[str] | None = None
        self._drawn = 0
        if self._out and self._out.suffix.lower() not in SUFFIXES:
            raise UserError(f"--out {self._out}: expected a name that ends in {', '.join(SUFFIXES)}")
        for place in (self._out, self._draw):
            if place and source is not None:
                check_apart(source, place)
        if self._out:
            with writing(self._out):
                check_folder(self._out.absolute().parent)
        if self._draw:
            make_folder(self._draw, "--draw")

    def __enter__(self) -> PredictionFiles:
        if self._out and self._out.suffix.lower() == ".jsonl":
            with writing(self._out):
                self._lines = self._out.open("w", encoding="ascii")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lines:
            self._lines.close()
        elif self._out:
            with writing(self._out):
                write_whole(self._out, self._as_csv() if self._out.suffix.lower() == ".csv" else self._as_json())

    def add(self, path: str, top: Top, views: int) -> None:
        """Adds a video that was classified, or whose number was predicted."""
        number = "value" if self._about.get("task") == "regression" else "probability"
        self._write({"path": path, "views": views, "top": [{"class": name, number: p} for name, p in top]})
        if self._draw and (picture := draw_prediction(path, top[:DRAWN_CLASSES])):
            self._drawn += 1
            stem = re.sub(r"[^\w.-]+", "-", printable(Path(path).stem))[:60]
            place = self._draw / f"{self._drawn:05d}-{stem}.png"
            with writing(self._draw, "--draw"):
                write_whole(place, picture)

    def add_skipped(self, skipped: Skipped) -> None:
        """Adds a video that cannot be decoded."""
        self._write({"path": skipped.path, "reason": skipped.reason})

    def _write(self, row: dict[str, Any]) -> None:
        if self._lines:
            # ASCII escapes represent every path, also one that is not UTF-8
            with writing(self._out or ""):
                self._lines.write(json.dumps(row) + "\n")
                self._lines.flush()
        elif self._out:
            self._rows.append(row)

    def _as_json(self) -> str:
        predictions = [row for row in self._rows if "top" in row]
        skipped = [row for row in self._rows if "top" not in row]
        return json.dumps(dict(self._about) | {"predictions": predictions, "skipped": skipped}, indent=1) + "\n"

    def _as_csv(self) -> str:
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        number = "value" if self._about.get("task") == "regression" else "probability"
        table.writerow(("path", "rank", "class", number, "problem"))
        for row in self._rows:
            if "top" not in row:
                table.writerow((row["path"], "", "", "", row["reason"]))
            for rank, found in enumerate(row.get("top", ()), 1):
                table.writerow((row["path"], rank, found["class"], f"{found[number]:.6f}", ""))
        return text.getvalue()


def draw_prediction(path: str, top: Top) -> bytes | None:
    """Draws frames of a video from its start to its end, and bars of its most probable classes, as PNG.

    Returns None if no frame can be decoded any more.
    """
    from matplotlib.figure import Figure  # imported here, because predictions without pictures do not need it

    video = probe_file(path)
    if isinstance(video, Skipped):
        return None
    try:
        frames = _spread_frames(video)
    except DecodeError:
        return None
    height, width = frames.shape[1:3]
    side = 2.2
    shown = len(frames) * side * width / height
    figure = Figure(figsize=(shown + 3.2, max(side, 0.24 * len(top) + 0.4)), layout="constrained")
    *panels, chart = figure.subplots(1, len(frames) + 1, width_ratios=[width / height] * len(frames) + [3.2 / side])
    name, chance = top[0]
    figure.suptitle(f"{_plain(name)} {100 * chance:.1f} %   {_plain(Path(path).name)}", fontsize=10, x=0.01, ha="left")
    for panel, frame in zip(panels, frames, strict=True):
        panel.imshow(frame)
        panel.set_axis_off()
    places = range(len(top))
    chart.barh(places, [100 * chance for _, chance in top], height=0.7)
    chart.set_yticks(places, [_plain(name) for name, _ in top], fontsize=8)
    chart.invert_yaxis()
    chart.set_xlim(0, 100)
    chart.set_xlabel("%", fontsize=8)
    chart.tick_params(axis="x", labelsize=8)
    chart.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _spread_frames(video: Video) -> NDArray[Any]:
    """Returns frames from the first to the last of a video: [DRAWN_FRAMES, H, W, 3], uint8, or of an array floats from
    its lowest to its highest value as 0 to 1."""
    numbers = np.linspace(0, max(video.frames - 1, 0), DRAWN_FRAMES).round().astype(int).tolist()
    if video.channels:
        frames = torch.from_numpy(read_frames(video.path, numbers, channels=video.channels)).float()
        low, high = frames.aminmax()
        return as_colors((frames - low) / (high - low).clamp_min(1e-12)).numpy()
    width, height = video.shown_size
    least = (FRAME_HEIGHT * width / height, float(FRAME_HEIGHT))
    return decode_frames(video.path, numbers, seek_points=video.seek_points, least_size=least)


def _plain(text: str) -> str:
    """Escapes text so that matplotlib draws it literally."""
    return printable(text).replace("$", r"\$")
