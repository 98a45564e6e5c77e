"""Evaluates frozen encoders by label propagation on the clips of mask_clips.py.

Shapes: T frames, H'×W' tokens per frame, D the encoder's width, S the size of a clip in pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mam2.engine.checkpoints.frozen import FrozenEncoder
from mam2.engine.config.training import RunConfig
from mam2.engine.data.batch import channels_first
from mam2.engine.evaluation.features import layer_tokens
from mam2.engine.evaluation.linear_probe import bootstrap
from mam2.engine.evaluation.mask_clips import CLIP_FRAMES, OBJECTS, MaskClip, render_mask_clip
from mam2.engine.evaluation.propagation import propagate_masks, score_masks
from mam2.engine.evaluation.report import draw_rows
from mam2.engine.files import printable
from mam2.engine.model.encoder import Encoder
from mam2.engine.model.pixels import unit_pixels
from mam2.engine.model.positions import set_clip_size
from mam2.engine.runtime.device import autocast
from mam2.engine.runtime.progress import Progress

Context = Literal["still", "window"]
"""How a frame becomes a clip. still: the frame is repeated, and the slots are averaged. window: the clip contains the
frames around it, and the slot that starts with the frame is used."""
CONTEXTS: tuple[Context, ...] = ("still", "window")
DRAWN_CLIPS, DRAWN_FRAMES = 3, 5
COLORS = ((0.0, 0.0, 0.0), (0.95, 0.25, 0.2), (0.2, 0.75, 0.3))
"""Colors of the background and each object in the picture."""


@dataclass(frozen=True, kw_only=True)
class PropagationScore:
    checkpoint: str
    """The checkpoint; empty for the baseline, the unchanged mask of the first frame."""
    context: Context | Literal[""]
    size: int
    """Size S of the clips."""
    region: float
    """DAVIS' J: intersection over union, 0 to 1, the mean over clips."""
    boundary: float
    """DAVIS' F, 0 to 1, the mean over clips."""
    interval: tuple[float, float]
    """95 % bootstrap interval of the mean of J and F, over the clips."""


def score_propagation(
    encoders: Mapping[FrozenEncoder, tuple[int, int]],
    *,
    clips: int,
    top_k: int,
    radius: int,
    context: int,
    batch: int,
    run: RunConfig,
    progress: bool = True,
) -> tuple[list[PropagationScore], bytes]:
    """Scores encoders on `clips` clips; also returns a PNG of the masks of some of them.

    encoders: each with its layer, from 1, and S. top_k, radius, context: see `propagate_masks`. batch: clips per
    forward pass. run: contains the precision of the encoders.
    """
    sized = {frozen: _at_size(frozen.encoder, size) for frozen, (_, size) in encoders.items()}
    scored: dict[tuple[str, Context | Literal[""], int], list[tuple[float, float]]] = {}
    shown: dict[str, list[Tensor]] = {}
    with Progress(total=clips, desc="masks", unit="clip", shown=progress) as bar:
        for number in range(clips):
            for frozen, (layer, size) in encoders.items():
                clip = render_mask_clip(number, size)
                if frozen is next(iter(encoders)):
                    kept = clip.masks[:1].expand_as(clip.masks)
                    scored.setdefault(("", "", size), []).append(score_masks(kept, clip.masks, OBJECTS))
                    shown.setdefault("true masks", []).append(_colored(clip, clip.masks))
                for way in CONTEXTS:
                    features = frame_features(sized[frozen], clip.frames, layer, way, batch=batch, run=run)
                    first = clip.masks[0].to(features.device)
                    masks = propagate_masks(features, first, OBJECTS, top_k=top_k, radius=radius, context=context).cpu()
                    scored.setdefault((frozen.name, way, size), []).append(score_masks(masks, clip.masks, OBJECTS))
                    shown.setdefault(f"{printable(frozen.name)}\n{way}", []).append(_colored(clip, masks))
            bar.update()
    pictures = [(label, torch.stack(parts[:DRAWN_CLIPS])) for label, parts in shown.items()]
    titles = [f"clip {number + 1}" for number in range(min(clips, DRAWN_CLIPS))]
    return [_score(*key, pairs) for key, pairs in scored.items()], draw_rows(pictures, titles, inches=0.8)


@torch.no_grad()
def frame_features(
    encoder: Encoder, frames: Tensor, layer: int, context: Context, *, batch: int, run: RunConfig
) -> Tensor:
    """Computes features of each token of each frame.

    Uint8 [T, S, S, 3] -> float32 [T, H', W', D], on the encoder's device. Frames beyond the ends of the clip repeat the
    first or last frame. An encoder of other channels gets the mean of the three colors in each.
    """
    (slots, height, width), tubelet = encoder.grid, encoder.patch_size[0]
    device = encoder.positions.device
    slot = slots // 2
    offsets = torch.arange(slots * tubelet) - slot * tubelet
    offsets = offsets if context == "window" else torch.zeros_like(offsets)
    places = (torch.arange(len(frames))[:, None] + offsets).clamp(0, len(frames) - 1)
    found = []
    for part in places.split(batch):
        video = channels_first(frames[part].to(device))
        if encoder.channels != video.shape[1]:
            video = unit_pixels(video).mean(1, keepdim=True).expand(-1, encoder.channels, -1, -1, -1)
        with autocast(run, device):
            tokens = layer_tokens(encoder, video, [layer])[layer].float()
        maps = tokens.unflatten(1, (slots, height, width))
        found.append(maps[:, slot] if context == "window" else maps.mean(1))
    return torch.cat(found)


def _at_size(encoder: Encoder, size: int) -> Encoder:
    sized = copy.deepcopy(encoder)
    set_clip_size(sized, sized.grid[0] * sized.patch_size[0], size)
    return sized


def _score(
    checkpoint: str, context: Context | Literal[""], size: int, pairs: list[tuple[float, float]]
) -> PropagationScore:
    values = torch.tensor(pairs, dtype=torch.float64)
    region, boundary = values.mean(0).tolist()
    return PropagationScore(
        checkpoint=checkpoint,
        context=context,
        size=size,
        region=region,
        boundary=boundary,
        interval=bootstrap(values.mean(1)),
    )


def _colored(clip: MaskClip, masks: Tensor) -> Tensor:
    """Draws the masks over some frames of a clip: float [DRAWN_FRAMES, S, S, 3] in 0 to 1."""
    places = torch.linspace(0, CLIP_FRAMES - 1, DRAWN_FRAMES).round().long()
    gray = clip.frames[places].float().mean(-1, keepdim=True) / 255
    colors = torch.tensor(COLORS)[masks[places]]
    return torch.where(masks[places][..., None] > 0, 0.4 * gray + 0.6 * colors, 0.6 * gray)
