"""The page of `mam2 visualize`: one file, no network; a slider moves through pictures stored as strips of slots.

Shapes: T'×H'×W' the token grid, Nv/Nm visible/masked tokens, C = 3.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from mam2.engine.evaluation.report import ROWS
from mam2.engine.evaluation.scores import Scores, joined
from mam2.engine.files import write_whole

READS = "reads"
LABELS = {name: label.replace("\n", " ") for name, label in ROWS.items()} | {READS: "read by the marked patch"}
TIE = 1e-9
"""Shares that differ by less count as equal."""
EXACT_UP_TO = 96
"""Pictures up to this height in pixels are stored as PNG, larger ones as JPEG."""


@dataclass(frozen=True, kw_only=True)
class ClipView:
    """The results of one checkpoint for one clip, without a batch dimension."""

    checkpoint: str
    scores: Scores
    panels: dict[str, Tensor]
    """Pictures by the names of `LABELS`, [T', H, W, C] float in 0 to 1, on the CPU."""
    grid: tuple[int, int, int]
    visible: Tensor
    """Visible tokens, int64 [Nv]."""
    masked: Tensor
    """Masked tokens, int64 [Nm]."""
    attention: Tensor | None = None
    """float32 [Nm, Nv], see `regressor_attention`; None for a model without a regressor."""
    marked: int = 0
    """Index in `masked` of the masked token with the most motion."""


def write_page(path: Path, clips: Mapping[str, Sequence[ClipView]], configs: Mapping[str, Mapping[str, Any]]) -> Path:
    """Writes the page of named clips, each with the results of one or more checkpoints. Returns its path.

    configs: config of each checkpoint as nested plain values; the page shows them collapsed.
    """
    maps: list[dict[str, Any]] = []
    sections = []
    for name, seen in clips.items():
        kinds = [kind for kind in LABELS if any(kind in one.panels for one in seen)]
        tiles = dict.fromkeys(kinds, "")
        for one in seen:
            for kind in kinds:
                tiles[kind] += _tile(one, kind, len(maps), len(seen) > 1) if kind in one.panels else "<figure></figure>"
            if one.attention is not None:
                maps.append(_attention(one, one.attention))
        blocks = "".join(
            f'<div class="kind"><h3>{html.escape(LABELS[kind])}</h3><div class="tiles">{tiles[kind]}</div></div>'
            for kind in kinds
        )
        slots = max(one.grid[0] for one in seen)
        sections.append(
            f'<section style="--checkpoints:{len(seen)}"><h2>{html.escape(name)}</h2><div class="bar">'
            f'<button type="button">play</button><input type="range" min="0" max="{slots - 1}" value="0" '
            f'aria-label="slot of {html.escape(name)}"><output>1 / {slots}</output></div>'
            f'<div class="kinds">{blocks}</div></section>'
        )
    by_checkpoint: dict[str, list[Scores]] = {}
    for seen in clips.values():
        for one in seen:
            by_checkpoint.setdefault(one.checkpoint, []).append(one.scores)
    scores = {name: joined(parts) for name, parts in by_checkpoint.items()}
    folded = "".join(
        f"<details><summary>Config of {html.escape(name)}</summary><pre>"
        f"{html.escape(json.dumps(config, indent=1))}</pre></details>"
        for name, config in configs.items()
    )
    page = _PAGE.replace("%MAPS%", json.dumps(maps)).replace("%CONFIGS%", folded)
    page = page.replace("%SCORES%", _table(scores)).replace("%CLIPS%", str(len(clips)))
    write_whole(path, page.replace("%SECTIONS%", "\n".join(sections)).encode("utf-8", "backslashreplace"))
    return path


def _table(scores: Mapping[str, Scores]) -> str:
    """Returns a table with a row per checkpoint: its scores on these clips and those of an uninformed prediction."""
    columns = (
        ("correct masked codes", [one.code_accuracy for one in scores.values()]),
        ("always the most frequent", [one.commonest_code for one in scores.values()]),
        ("motion error / predicting no motion", [one.relative_motion for one in scores.values()]),
        ("pixel error / predicting 0", [one.relative_pixels for one in scores.values()]),
        ("feature error / predicting 0", [one.relative_latents for one in scores.values()]),
    )
    kept = [(title, values) for title, values in columns if any(value is not None for value in values)]
    head = "".join(f"<th>{title}</th>" for title, _ in kept)
    rows = ""
    for number, (name, one) in enumerate(scores.items()):
        cells = (values[number] for _, values in kept)
        row = "".join(f"<td>{'–' if cell is None else f'{100 * cell:.1f} %'}</td>" for cell in cells)
        rows += f"<tr><th>{html.escape(name)}</th>{row}<td>{_verdict(one)}</td></tr>"
    return f"<table><tr><th>checkpoint</th>{head}<th>better than uninformed</th></tr>{rows}</table>"


def _verdict(scores: Scores) -> str:
    """Returns whether each prediction is better than the uninformed one."""
    accuracy, commonest = scores.code_accuracy, scores.commonest_code
    beats = {"codes": None if accuracy is None or commonest is None else accuracy > commonest + TIE}
    relatives = {
        "motion": scores.relative_motion,
        "pixels": scores.relative_pixels,
        "features": scores.relative_latents,
    }
    for name, relative in relatives.items():
        beats[name] = None if relative is None else relative < 1
    return ", ".join(
        f'{name} <span class="{"yes" if holds else "no"}">{"yes" if holds else "NO"}</span>'
        for name, holds in beats.items()
        if holds is not None
    )


def _tile(one: ClipView, kind: str, number: int, named: bool) -> str:
    """Returns one kind of picture of one checkpoint.

    `number` is that of its attention map, if patches can be clicked.
    """
    touched = one.attention is not None and kind in ("masked", READS)
    data = f' data-map="{number}" data-kind="{kind}"' if touched else ""
    pictures = one.panels["original" if kind == READS else kind]  # attention is drawn over the original
    exact = pictures.shape[1] <= EXACT_UP_TO
    return (
        f'<figure><div class="tile" role="img" aria-label="{html.escape(LABELS[kind])}" '
        f'data-slots="{len(pictures)}"{data} style="background-image:url({_strip(pictures, exact)});'
        f"{'image-rendering:pixelated;' if exact else ''}"
        f'background-size:{100 * len(pictures)}% 100%">{"<canvas></canvas>" if touched else ""}</div>'
        + (f"<figcaption>{html.escape(one.checkpoint)}</figcaption>" if named else "")
        + "</figure>"
    )


def _strip(pictures: Tensor, exact: bool) -> str:
    """Returns [T', H, W, C] side by side as a data URL: PNG if exact, else JPEG."""
    joined = (pictures.clamp(0, 1) * 255).round().byte().movedim(0, 1).flatten(1, 2).numpy()
    buffer = io.BytesIO()
    Image.fromarray(joined).save(buffer, "PNG" if exact else "JPEG", **({} if exact else {"quality": 88}))
    return f"data:image/{'png' if exact else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _attention(one: ClipView, attention: Tensor) -> dict[str, Any]:
    """Returns the data for the attention map of any patch: the weights of each row divided by its largest, as bytes."""
    relative = attention / attention.amax(1, keepdim=True).clamp_min(1e-12)
    weights = (relative * 255).round().byte().numpy().tobytes()
    return {
        "grid": one.grid,
        "visible": one.visible.tolist(),
        "masked": one.masked.tolist(),
        "marked": one.marked,
        "weights": base64.b64encode(weights).decode(),
    }


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>What the model predicts</title>
<style>
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 1.5rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.15rem; margin: 0; overflow-wrap: anywhere }
h3 { font-size: .85rem; font-weight: 600; margin: 0 0 .25rem }
p { margin: .5rem 0; max-width: 46rem }
.wide { overflow-x: auto } table { border-collapse: collapse; margin: .5rem 0; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .2rem 1rem .2rem 0; border-bottom: 1px solid #ddd; font-weight: normal }
.yes { color: #176b2c } .no { color: #b3261e; font-weight: bold } pre { overflow-x: auto; font-size: .85rem }
section { margin: 2rem 0; border-top: 1px solid #ddd; padding-top: 1rem }
.bar { position: sticky; top: 0; z-index: 1; background: #fff; display: flex; gap: .75rem; align-items: center;
  padding: .5rem 0 }
.bar input { flex: 1; max-width: 30rem; height: 2rem; min-width: 0 }
.bar output { font-variant-numeric: tabular-nums; white-space: nowrap }
button { font: inherit; padding: .3rem .8rem; min-width: 4.2rem; border: 1px solid #888; border-radius: 6px;
  background: #f4f4f4 }
.kinds { display: grid; gap: 1rem; align-items: end;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, calc(var(--checkpoints) * 9.5rem)), 1fr)) }
.tiles { display: grid; gap: .4rem; grid-template-columns: repeat(var(--checkpoints), minmax(0, 1fr)) }
figure { margin: 0; min-width: 0 } figcaption { font-size: .75rem; color: #555; overflow-wrap: anywhere }
.tile { aspect-ratio: 1; background-repeat: no-repeat; background-position: 0 0 }
.tile[data-map] { cursor: pointer } canvas { width: 100%; height: 100%; display: block }
</style></head><body>
<h1>What the model predicts</h1>
<div class="wide">%SCORES%</div>
<p>Measured on the masked patches of the %CLIPS% clips shown, too few to compare models. Predicting 0 means predicting
the mean color of each patch if pixels are standardized.</p>
<p>Each picture shows the first frame of one slot of the clip. Masked patches are gray; in pictures of predicted motion,
visible patches too. Motion is the difference to the next frame, with doubled contrast. If the model has a regressor,
click a patch in the masked picture: the last picture shows its attention to the visible patches in all slots; brighter
patches get more.</p>
%SECTIONS%
%CONFIGS%
<script>
const maps = %MAPS%.map(map => ({...map, weights: Uint8Array.from(atob(map.weights), c => c.charCodeAt(0)),
  place: new Map(map.masked.map((token, row) => [token, row]))}));
function slotOf(tile, section) {
  const range = section.querySelector("input"), most = Math.max(+range.max, 1);
  return Math.round(+range.value / most * (tile.dataset.slots - 1));
}
function draw(tile, slot) {
  const map = maps[tile.dataset.map], canvas = tile.firstChild, [, rows, columns] = map.grid;
  const side = Math.max(1, Math.ceil(2 * tile.clientWidth / columns)), context = canvas.getContext("2d");
  canvas.width = columns * side; canvas.height = rows * side;
  const first = slot * rows * columns, token = map.masked[map.marked], own = Math.floor(token / (rows * columns));
  if (tile.dataset.kind === "reads") {
    const light = new Map(map.visible.map((visible, column) =>
      [visible, map.weights[map.marked * map.visible.length + column] / 255]));
    for (let place = 0; place < rows * columns; place++) {
      const weight = light.get(first + place);
      context.fillStyle = `rgba(0,0,0,${weight === undefined ? 1 : .85 * (1 - weight)})`;
      context.fillRect(place % columns * side, Math.floor(place / columns) * side, side, side);
    }
  }
  const place = token - own * rows * columns, line = Math.max(2, side / 8);
  context.strokeStyle = "#ff8c00"; context.lineWidth = line;
  context.setLineDash(own === slot ? [] : [line, line]);
  context.strokeRect(place % columns * side + line / 2, Math.floor(place / columns) * side + line / 2, side - line,
    side - line);
}
function show(section) {
  const range = section.querySelector("input");
  section.querySelector("output").value = `${+range.value + 1} / ${+range.max + 1}`;
  for (const tile of section.querySelectorAll(".tile")) {
    const slot = slotOf(tile, section), last = tile.dataset.slots - 1;
    tile.style.backgroundPositionX = `${last ? 100 * slot / last : 0}%`;
    if (tile.dataset.map) draw(tile, slot);
  }
}
for (const section of document.querySelectorAll("section")) {
  const range = section.querySelector("input"), button = section.querySelector("button");
  let timer;
  range.oninput = () => show(section);
  button.onclick = () => {
    clearInterval(timer);
    button.textContent = button.textContent === "play" ? "stop" : "play";
    if (button.textContent === "stop") timer = setInterval(() => {
      range.value = (+range.value + 1) % (+range.max + 1); show(section);
    }, 250);
  };
  for (const tile of section.querySelectorAll(".tile[data-map]")) tile.onclick = event => {
    const map = maps[tile.dataset.map], [, rows, columns] = map.grid, box = tile.getBoundingClientRect();
    const row = Math.floor((event.clientY - box.top) / box.height * rows);
    const column = Math.floor((event.clientX - box.left) / box.width * columns);
    const hidden = map.place.get((slotOf(tile, section) * rows + row) * columns + column);
    if (hidden !== undefined) { map.marked = hidden; show(section); }
  };
  show(section);
}
onresize = () => document.querySelectorAll("section").forEach(show);
</script>
</body></html>
"""
