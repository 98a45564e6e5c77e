"""Draws the predictions of checkpoints for clips: pictures, animations and a page with a slider.

    OUT/index.html                    self-contained: every clip, every checkpoint, attention maps by a click
        01-NAME.png  .gif  .mp4       for each clip

Shapes: B clips, T'×H'×W' the token grid, Nv/Nm visible/masked tokens, C channels.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor

from mam2.engine.checkpoints.frozen import load_pretrained
from mam2.engine.checkpoints.weights import find_weights
from mam2.engine.config.limits import COUNT, COUNT_OR_NONE, check_flags
from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.config.recipe import to_dict
from mam2.engine.config.training import RunConfig
from mam2.engine.data.batch import channels_first
from mam2.engine.data.loader import ClipLoader
from mam2.engine.data.manifest import Manifest, read_manifest
from mam2.engine.data.synthetic import write_clip
from mam2.engine.errors import UserError
from mam2.engine.evaluation.pixel_predictions import reconstruct_pixels
from mam2.engine.evaluation.pretext import ClipReconstruction, evaluation_mask, reconstruct
from mam2.engine.evaluation.regressor_attention import regressor_attention
from mam2.engine.evaluation.report import draw_rows, shown
from mam2.engine.evaluation.scores import score
from mam2.engine.evaluation.visualize_page import LABELS, READS, ClipView, write_page
from mam2.engine.files import check_apart, whole_file, write_whole, written_aside
from mam2.engine.model.mam2 import MAM2
from mam2.engine.runtime.device import pick_device
from mam2.engine.tokenizer.files import load_vqgan
from mam2.engine.tokenizer.prepare import FILE as TOKENIZER_FILE
from mam2.engine.tokenizer.prepare import build_tokenizer
from mam2.kernels import TubeMask

TILE = 160
"""Height of a picture in the GIF and the video, in pixels."""
PER_SECOND = 4
"""Slots per second."""
ROUNDS = 3
"""Number of repetitions of the clip in the video."""
STRIP_INCHES = 1.0


def visualize(
    checkpoints: Sequence[str | Path],
    data: str | Path,
    out: str | Path,
    *,
    clips: int = 4,
    tokenizer: str | Path | None = None,
    stride: int = 0,
    frames: int | None = None,
    size: int | None = None,
    heads: int | None = None,
    decoder_heads: int | None = None,
    device: Literal["auto", "cuda", "cpu"] = "auto",
    progress: bool = True,
) -> Path:
    """Draws the predictions of checkpoints for clips of `data`, side by side; returns the path of the page.

    Args:
        checkpoints: runs or checkpoints of pre-training, also VideoMAE's or Hugging Face's.
        data: a video, a folder or a list, of which `clips` evenly spaced videos are shown.
        out: output folder, created if missing.
        tokenizer: VQGAN for checkpoints whose run folder no longer contains theirs.
        stride: distance of two sampled frames; 0: as in the checkpoints.
        frames, size, heads, decoder_heads: for checkpoints that do not state them, see `load_model`.
        device: device of the models; auto uses a GPU if there is one.
        progress: draw a progress bar (only on a terminal).

    Raises:
        UserError: an input cannot be read, or the output cannot be written.
    """
    check_flags(
        clips=(clips, COUNT),
        stride=(stride, COUNT_OR_NONE),
        frames=(frames, COUNT),
        size=(size, COUNT),
        heads=(heads, COUNT),
        decoder_heads=(decoder_heads, COUNT),
    )
    if not checkpoints:
        raise UserError(
            "visualize: expected at least one checkpoint: mam2 visualize CHECKPOINT --data CLIPS --out FOLDER"
        )
    out, where = Path(out), pick_device(RunConfig(device=device))
    check_apart(data, out, inside=False)
    everything = read_manifest(data, progress=progress)
    places = np.unique(np.linspace(0, len(everything.videos) - 1, clips).round().astype(int))
    manifest = Manifest(tuple(everything.videos[place] for place in places))
    by_clip: dict[int, list[ClipView]] = {}
    configs: dict[str, dict[str, Any]] = {}
    said = {"stride": stride, "frames": frames, "size": size, "heads": heads, "decoder_heads": decoder_heads}
    for path in dict.fromkeys(map(Path, checkpoints)):
        config, found = _look(path, manifest, where, Path(tokenizer) if tokenizer else None, said)
        configs[str(path)] = to_dict(config)
        for place, one in found.items():
            by_clip.setdefault(place, []).append(one)
    if not by_clip:
        raise UserError(f"{data}: none of the {len(places)} selected videos can be decoded")
    try:
        out.mkdir(parents=True, exist_ok=True)
        named: dict[str, list[ClipView]] = {}
        for number, (place, seen) in enumerate(sorted(by_clip.items()), 1):
            stem = re.sub(r"[^\w.-]+", "-", Path(manifest.videos[place].path).stem)[:60]
            name = f"{number:02d}-{stem}"
            rows = [
                (f"{one.checkpoint[-24:]}\n{LABELS[kind]}" if len(checkpoints) > 1 else LABELS[kind], pictures[None])
                for one in seen
                for kind, pictures in one.panels.items()
            ]
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Glyph")  # for scripts that matplotlib's font lacks
                write_whole(out / f"{name}.png", draw_rows(rows, [name], inches=STRIP_INCHES))
            pages = _side_by_side(seen, named=len(checkpoints) > 1)
            images = [Image.fromarray(frame) for frame in pages]
            with whole_file(out / f"{name}.gif") as file:
                images[0].save(
                    file, "GIF", save_all=True, append_images=images[1:], duration=1000 // PER_SECOND, loop=0
                )
            with written_aside(out / f"{name}.mp4") as aside:
                write_clip(aside, np.concatenate([pages] * ROUNDS), fps=PER_SECOND)
            named[name] = seen
        return write_page(out / "index.html", named, configs)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror or error}") from None


def _look(
    path: Path, manifest: Manifest, device: torch.device, tokenizer: Path | None, said: dict[str, Any]
) -> tuple[PretrainConfig, dict[int, ClipView]]:
    """Returns a checkpoint's config, and its predictions for each clip by index in the manifest."""
    model, config = load_pretrained(path, device, **said)
    model.eval()
    predict: Callable[[Tensor], ClipReconstruction]
    codes = None
    if isinstance(model, MAM2):
        if config.needs_codes:
            codes = build_tokenizer(load_vqgan(tokenizer or _tokenizer_of(path)), config, device)
            if codes.codebook_size != (answers := model.codebook_size):
                raise UserError(
                    f"{path}: predicts {answers} codes, the tokenizer has {codes.codebook_size}; pass that of its run"
                )

        def predict(clip: Tensor) -> ClipReconstruction:
            return reconstruct(model, codes, clip, config)
    else:

        def predict(clip: Tensor) -> ClipReconstruction:
            return reconstruct_pixels(model, clip, config)

    found = {}
    with ClipLoader(manifest, config.data, batch=1, device=device, seed=0, train=False) as loader:
        for batch in loader.evaluate():
            clip = batch.clip.to(device)
            mask, strips = evaluation_mask(clip, config), predict(clip)
            video = channels_first(clip)
            attention = None
            if isinstance(model, MAM2) and model.regressor.blocks:
                attention = regressor_attention(model, video, mask)[0].cpu()
            panels = {name: pictures[0].float().cpu() for name, pictures in shown(strips).items()}
            marked = int(_movement(clip, config).gather(1, mask.masked)[0].argmax())
            if attention is not None:
                panels[READS] = _reading(panels["original"], mask, attention, marked, config)
            found[int(batch.index[0])] = ClipView(
                checkpoint=str(path),
                panels=panels,
                scores=score(model, codes, clip, mask, config),
                grid=config.grid,
                visible=mask.visible[0].cpu(),
                masked=mask.masked[0].cpu(),
                attention=attention,
                marked=marked,
            )
    return config, found


def _tokenizer_of(path: Path) -> Path:
    """Returns the tokenizer in the run folder of a checkpoint."""
    weights = find_weights(path)
    assert weights is not None  # a MAM2 model always has a weights file
    for folder in list(weights.absolute().parents)[:3]:
        if (folder / TOKENIZER_FILE).is_file():
            return folder / TOKENIZER_FILE
    raise UserError(f"{path}: no {TOKENIZER_FILE} in its run folder; pass the run's VQGAN with --tokenizer")


def _movement(clip: Tensor, config: PretrainConfig) -> Tensor:
    """Returns the mean absolute difference of each token's frames to the next frames.

    Clip [B, T, H, W, C] -> [B, N].
    """
    changes = torch.zeros(clip.shape, device=clip.device)
    changes[:, :-1] = clip.float().diff(dim=1).abs()
    tubelet, side, _ = config.patch_size
    return rearrange(changes, "b (t p) (h q) (w r) c -> b (t h w) (p q r c)", p=tubelet, q=side, r=side).mean(2)


def _reading(original: Tensor, mask: TubeMask, attention: Tensor, marked: int, config: PretrainConfig) -> Tensor:
    """Draws a clip's visible patches, brighter with more attention from the marked masked patch, which is framed."""
    slots, rows, columns = config.grid
    side = config.model.patch
    light = torch.zeros(slots * rows * columns)
    weights = attention[marked]
    light[mask.visible[0].cpu()] = 0.15 + 0.85 * weights / weights.max()
    light = light.view(slots, rows, columns, 1)
    picture = original * light.repeat_interleave(side, 1).repeat_interleave(side, 2)
    slot, rest = divmod(int(mask.masked[0, marked]), rows * columns)
    top, left = (place * side for place in divmod(rest, columns))
    edge = max(side // 8, 1)
    frame = picture[slot, top : top + side, left : left + side]
    inside = frame[edge:-edge, edge:-edge].clone()
    frame[:] = torch.tensor([1.0, 0.55, 0.0])
    frame[edge:-edge, edge:-edge] = inside
    return picture


def _side_by_side(seen: Sequence[ClipView], *, named: bool) -> np.ndarray:
    """Arranges a column per kind of picture and a row per checkpoint, with names: uint8 [T', H, W, 3], even sides."""
    kinds = [name for name in LABELS if any(name in one.panels for one in seen)]
    slots = max(one.grid[0] for one in seen)
    gap, head = 4, 18
    line = 14 if named else 0
    width = len(kinds) * (TILE + gap) + gap
    height = head + len(seen) * (TILE + gap + line) + gap
    frames = []
    for slot in range(slots):
        page = Image.new("RGB", (width + width % 2, height + height % 2), "white")
        draw = ImageDraw.Draw(page)
        for column, name in enumerate(kinds):
            draw.text((gap + column * (TILE + gap), 3), LABELS[name], fill="black")
        for row, one in enumerate(seen):
            top = head + row * (TILE + gap + line)
            if named:
                draw.text((gap, top), one.checkpoint[-80:], fill="#555")
            for column, name in enumerate(kinds):
                if name in one.panels:
                    pictures = one.panels[name]
                    picture = pictures[slot * len(pictures) // slots]
                    image = Image.fromarray((picture.clamp(0, 1) * 255).round().byte().numpy())
                    resampling = Image.Resampling.NEAREST if len(picture) < TILE else Image.Resampling.BICUBIC
                    page.paste(image.resize((TILE, TILE), resampling), (gap + column * (TILE + gap), top + line))
        frames.append(np.asarray(page))
    return np.stack(frames)
