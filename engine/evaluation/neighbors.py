"""`mam2 neighbors`: evaluates frozen features by their nearest neighbors, without training.

OUT/neighbors.json
    retrieval.png     queries and their results
    masks.png         masks propagated from the first frame of a clip to the others
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mam2.engine.checkpoints.frozen import FrozenEncoder
from mam2.engine.checkpoints.untrained import load_all_frozen
from mam2.engine.config.limits import BATCH, COUNT, COUNT_OR_NONE, check_flags
from mam2.engine.config.training import RunConfig
from mam2.engine.data.sources import check_source
from mam2.engine.errors import UserError
from mam2.engine.evaluation.feature_files import FeatureCache, FeatureSpec
from mam2.engine.evaluation.mask_propagation import PropagationScore, score_propagation
from mam2.engine.evaluation.pools import Pool
from mam2.engine.evaluation.propagation import CONTEXT, RADIUS, TOP_K
from mam2.engine.evaluation.retrieval import Retrieval, retrieve
from mam2.engine.files import check_apart, make_folder, write_whole, writing
from mam2.engine.runtime.device import pick_device

FEWEST_ROWS = 14
"""Minimum tokens along a side of the mask clips, as in a ViT at 224²: fewer cannot represent masks."""


@dataclass(frozen=True, kw_only=True)
class NeighborsReport:
    layer: int
    """The layer; 0: each encoder's last."""
    pool: Pool
    retrieval: Retrieval | None
    """Results of retrieval; None without data."""
    mask_clips: int
    propagation: tuple[PropagationScore, ...]
    """Results of mask propagation, the unchanged first mask first; empty without mask clips."""


def neighbors(
    checkpoints: Sequence[str | Path],
    out: str | Path,
    *,
    data: str | Path | None = None,
    val: str | Path | None = None,
    recipe: str = "",
    layer: int = 0,
    pool: Pool = "mean",
    masks: int = 12,
    mask_size: int = 0,
    top_k: int = TOP_K,
    radius: int = RADIUS,
    context: int = CONTEXT,
    cache: str | Path = "features",
    stride: int = 0,
    frames: int | None = None,
    size: int | None = None,
    heads: int | None = None,
    batch: int = 32,
    device: Literal["auto", "cuda", "cpu"] = "auto",
    precision: Literal["auto", "bfloat16", "float32"] = "auto",
    progress: bool = True,
) -> NeighborsReport:
    """Compares frozen encoders by retrieval of videos and by propagation of masks.

    Args:
        checkpoints: arguments of `load_encoder`, or `random`.
        out: folder for neighbors.json, retrieval.png and masks.png; created if missing.
        data: labeled folder or list, the gallery; None: no retrieval.
        val: labeled folder or list of queries; None: each video of `data` is a query for the others.
        recipe: pre-training recipe with the model and clips of `random`.
        layer: encoder block whose tokens are compared, from 1; 0 is the last.
        pool: groups of tokens for the feature of a clip, see pools.py.
        masks: number of synthetic clips whose masks are propagated; 0: none.
        mask_size: their height and width in pixels, a multiple of the patch; 0: the encoder's, or 14 patches if that is
            larger.
        top_k, radius, context: see `propagate_masks`.
        cache: folder for the features of videos, see `FeatureCache`.
        stride, frames, size, heads: see `load_frozen`.
        batch: clips per forward pass.
        device: auto uses a GPU if there is one.
        precision: auto is bfloat16 autocast on a GPU and on x86 CPUs with bfloat16 instructions, else float32.
        progress: draw progress bars (only on a terminal).

    Raises:
        UserError: checkpoints, data, sizes or folders cannot be used.
    """
    check_flags(
        layer=(layer, COUNT_OR_NONE),
        masks=(masks, COUNT_OR_NONE),
        mask_size=(mask_size, COUNT_OR_NONE),
        top_k=(top_k, COUNT),
        radius=(radius, COUNT),
        context=(context, COUNT),
        stride=(stride, COUNT_OR_NONE),
        frames=(frames, COUNT),
        size=(size, COUNT),
        heads=(heads, COUNT),
        batch=(batch, BATCH),
    )
    if not checkpoints:
        raise UserError(
            "neighbors: expected at least one checkpoint: mam2 neighbors CHECKPOINT --data LIST --out FOLDER"
        )
    if data is None and (val is not None or not masks):
        raise UserError("neighbors: nothing to compare: pass a list with --data, or --masks without --val")
    for source in (data, val):
        if source is not None:
            check_source(source)
            check_apart(source, out)
    run = RunConfig(device=device, precision=precision)
    encoders = load_all_frozen(
        list(dict.fromkeys(map(Path, checkpoints))),
        pick_device(run),
        recipe=recipe,
        stride=stride,
        frames=frames,
        size=size,
        heads=heads,
    )
    for frozen in encoders:
        if layer > frozen.depth:
            raise UserError(f"--layer {layer}: {frozen.name} has layers 1 to {frozen.depth}; 0 is the last")
    asked = {frozen: (layer or frozen.depth, _mask_size(frozen, mask_size)) for frozen in encoders}
    folder = make_folder(out)
    retrieval = None
    if data is not None:
        specs = [FeatureSpec(frozen, number, pool) for frozen, (number, _) in asked.items()]
        queries, files = Path(val) if val else None, FeatureCache(Path(cache), run)
        retrieval, picture = retrieve(specs, Path(data), queries, files, batch=batch, progress=progress)
        with writing(folder):
            write_whole(folder / "retrieval.png", picture)
    propagation: list[PropagationScore] = []
    if masks:
        propagation, picture = score_propagation(
            asked, clips=masks, top_k=top_k, radius=radius, context=context, batch=batch, run=run, progress=progress
        )
        with writing(folder):
            write_whole(folder / "masks.png", picture)
    report = NeighborsReport(
        layer=layer, pool=pool, retrieval=retrieval, mask_clips=masks, propagation=tuple(propagation)
    )
    with writing(folder):
        write_whole(folder / "neighbors.json", json.dumps(dataclasses.asdict(report), indent=1) + "\n")
    return report


def _mask_size(frozen: FrozenEncoder, asked: int) -> int:
    (_, rows, _), (_, patch, _) = frozen.encoder.grid, frozen.encoder.patch_size
    if asked % patch:
        raise UserError(f"--mask-size {asked}: expected a multiple of {patch}, the patch of {frozen.name}")
    return asked or max(rows, FEWEST_ROWS) * patch
