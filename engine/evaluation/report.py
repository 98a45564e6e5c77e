"""Writes RUN/report.html, a self-contained page with a run's curves and predictions, and the PNGs next to it."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from mam2.engine.evaluation.plots import draw_logs, png
from mam2.engine.evaluation.pretext import ClipReconstruction
from mam2.engine.files import write_whole
from mam2.engine.model.pixels import as_colors
from mam2.engine.runtime.log import read_log

ROWS = {
    "original": "original",
    "masked": "masked",
    "appearance": "predicted\nappearance",
    "codes": "the true\ncodes",
    "features": "teacher's\nfeatures",
    "predicted_features": "predicted\nfeatures",
    "motion": "true\nmotion",
    "predicted_motion": "predicted\nmotion",
}


def draw_strips(strips: ClipReconstruction, titles: Sequence[str]) -> bytes:
    """Draws strips as PNG: a column of slots per clip, a row per kind of picture."""
    return draw_rows([(ROWS[name], pictures) for name, pictures in shown(strips).items()], titles)


def shown(strips: ClipReconstruction) -> dict[str, Tensor]:
    """Returns the available pictures in the order of `ROWS`, in colors; see `as_colors`."""
    return {name: as_colors(getattr(strips, name)) for name in ROWS if getattr(strips, name) is not None}


def draw_rows(rows: Sequence[tuple[str, Tensor]], titles: Sequence[str], *, inches: float = 0.62) -> bytes:
    """Draws named rows of pictures [B, T', H, W, C] in 0 to 1 as PNG, with one column per clip.

    inches: width of a picture, at 150 pixels per inch.
    """
    clips, slots = len(titles), max(pictures.shape[1] for _, pictures in rows)
    label_inches = 0.1 + 0.07 * max(len(line) for label, _ in rows for line in label.split("\n"))
    size = inches * slots * clips + label_inches, 1.1 * inches * len(rows) + 0.3
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(rows), clips, squeeze=False)
    for column in range(clips):
        axes[0, column].set_title(titles[column], fontsize=9)
        for row, (label, batch) in enumerate(rows):
            axis = axes[row, column]
            pictures = batch[column].float().cpu().numpy()
            gap = np.ones((pictures.shape[1], 2, 3))
            axis.imshow(
                np.concatenate([part for picture in pictures for part in (picture, gap)][:-1], axis=1).clip(0, 1)
            )
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
            if column == 0:
                axis.set_ylabel(label, fontsize=8, rotation=0, ha="right", va="center")
    return png(figure)


def write_report(
    run: Path,
    *,
    title: str,
    rows: Sequence[tuple[str, str]],
    verdicts: Mapping[str, bool],
    strips: bytes,
    notes: str,
    config: Mapping[str, Any],
) -> Path:
    """Writes RUN/report.html, curves.png and strips.png. Returns the path of the page.

    Args:
        rows: names and values of the results.
        verdicts: claims, and whether the results support them.
        strips: PNG of the predictions.
        config: the run's config as nested plain values; the page shows it collapsed.
    """
    curves = draw_logs({run.name: read_log(run)})
    write_whole(run / "curves.png", curves)
    write_whole(run / "strips.png", strips)
    table = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in rows)
    claims = "".join(
        f'<li class="{"yes" if holds else "no"}">{"yes" if holds else "NO"}: {html.escape(claim)}</li>'
        for claim, holds in verdicts.items()
    )
    page = run / "report.html"
    write_whole(
        page,
        _PAGE.format(
            title=html.escape(title),
            notes=html.escape(notes),
            table=table,
            claims=claims,
            config=html.escape(json.dumps(config, indent=1)),
            strips=base64.b64encode(strips).decode(),
            curves=base64.b64encode(curves).decode(),
        ),
    )
    return page


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; margin: 1rem 0 }}
th, td {{ text-align: left; padding: .3rem 1rem .3rem 0; border-bottom: 1px solid #ddd; font-weight: normal }}
td {{ font-variant-numeric: tabular-nums }}
img {{ max-width: 100%; height: auto }}
ul {{ list-style: none; padding: 0 }} .yes {{ color: #176b2c }} .no {{ color: #b3261e; font-weight: bold }}
pre {{ overflow-x: auto; font-size: .85rem }}
figure {{ margin: 2rem 0 }} figcaption {{ color: #555 }}
.wide {{ overflow-x: auto }} .wide img {{ min-width: 40rem }}
</style></head><body>
<h1>{title}</h1>
<p>{notes}</p>
<table>{table}</table>
<ul>{claims}</ul>
<figure><div class="wide"><img alt="original, masked, predicted and true appearance and motion of test clips"
src="data:image/png;base64,{strips}"></div>
<figcaption>Test clips. Each picture shows the first frame of one slot of the clip. Masked: masked patches are gray.
Predicted appearance: the decoded predicted codes, with true codes in visible patches; below it the decoded true codes,
the best possible prediction. Motion: difference to the next frame with doubled contrast; gray means no motion.
</figcaption></figure>
<figure><img alt="losses and rates over the steps" src="data:image/png;base64,{curves}">
<figcaption>The training. The most frequent code is that of each step's own clips, so that it differs from step to step;
the table has a single code for all test clips.</figcaption></figure>
<details><summary>Config of the run (config.json)</summary><pre>{config}</pre></details>
</body></html>
"""
