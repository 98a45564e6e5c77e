"""`probe`: loads checkpoints, probes them on labeled videos, and writes the scores."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from mam2.engine.checkpoints.untrained import load_all_frozen
from mam2.engine.config.limits import BATCH, COUNT, COUNT_OR_NONE, check_flags, check_value
from mam2.engine.config.training import RunConfig
from mam2.engine.data.sources import check_source
from mam2.engine.errors import UserError
from mam2.engine.evaluation.embedding_files import is_embedding_file
from mam2.engine.evaluation.probe_run import Probe, ProbePool, ProbeReport, probe_encoders
from mam2.engine.evaluation.segments import probe_segments
from mam2.engine.files import check_apart, check_folder, write_whole, writing
from mam2.engine.runtime.device import pick_device


def probe(
    checkpoints: Sequence[str | Path],
    data: str | Path,
    val: str | Path | None = None,
    *,
    recipe: str = "",
    probes: Sequence[Probe] = ("linear", "attentive", "knn"),
    pools: Sequence[ProbePool] = ("mean", "time"),
    layers: Sequence[int] = (),
    group: str = "",
    out: str | Path | None = None,
    cache: str | Path = "features",
    stride: int = 0,
    frames: int | None = None,
    size: int | None = None,
    heads: int | None = None,
    batch: int = 32,
    device: Literal["auto", "cuda", "cpu"] = "auto",
    precision: Literal["auto", "bfloat16", "float32"] = "auto",
    progress: bool = True,
) -> ProbeReport:
    """Probes frozen encoders on one clip per video; features are computed once and cached.

    Args:
        checkpoints: runs, checkpoints, or weights of VideoMAE or Hugging Face; each is compared with the first.
            `random` is an encoder with random weights and the model of the first other checkpoint, or of `recipe`;
            `pixels` are the gray pixels of its clips instead of features. Or files that `embed` wrote with windows:
            `data` and `val` are then lists of segments with columns for path, start, end (seconds) and label, see
            `mam2.engine.evaluation.segments`.
        data: labeled folder or list to train the probes.
        val: labeled folder or list to test them; None: a fifth of each class of `data`, or of its groups.
        recipe: pre-training recipe with the model and clips of `random` and `pixels`.
        probes: linear (logistic regression), attentive (learned queries over the tokens), knn (nearest neighbors).
        pools: groups of tokens to average, see `mam2.engine.evaluation.pools`; `tokens`: the principal components of
            all tokens of a clip (linear probe only).
        layers: encoder blocks whose tokens are probed, from 1; empty: the last.
        group: column of the lists, or TABLE:COLUMN of another table, that assigns videos to groups, such as the
            speaker; intervals are then over groups.
        out: output file for the scores as JSON; None writes none.
        cache: folder for features, keyed by the hash of weights and videos; it may be deleted at any time.
        stride: distance of two sampled frames instead of the checkpoints'.
        frames, size, heads: for a checkpoint that does not state them, see `load_encoder`.
        batch: clips per forward pass.
        device: auto uses a GPU if there is one.
        precision: auto is bfloat16 autocast on a GPU and on x86 CPUs with bfloat16 instructions, else float32.
        progress: draw a progress bar (only on a terminal).

    Raises:
        UserError: a checkpoint, the data or a file cannot be used, labels are missing, or there are too few videos.
    """
    check_flags(
        stride=(stride, COUNT_OR_NONE),
        frames=(frames, COUNT),
        size=(size, COUNT),
        heads=(heads, COUNT),
        batch=(batch, BATCH),
    )
    for layer in layers:
        check_value("--layers", layer, COUNT)
    if not checkpoints or not probes or not pools:
        raise UserError("probe: expected at least one checkpoint, probe and pool: mam2 probe CHECKPOINT --data LIST")
    data, val = Path(data), Path(val) if val is not None else None
    if out is not None:
        for source in (data, val or data):
            check_apart(source, out)
        with writing(out):
            check_folder(Path(out).absolute().parent)
    for source in (data, val or data):
        check_source(source)
    files = [Path(path) for path in dict.fromkeys(checkpoints) if is_embedding_file(Path(path))]
    if files and len(files) < len(set(checkpoints)):
        raise UserError("probe: name checkpoints, or files of features, not both")
    if files:
        result = probe_segments(files, data, val, probes=tuple(dict.fromkeys(probes)))
        return _written(result, out)
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
    result = probe_encoders(
        encoders,
        data,
        val,
        probes=tuple(dict.fromkeys(probes)),
        pools=tuple(dict.fromkeys(pools)),
        layers=layers,
        group=group,
        cache=Path(cache),
        batch=batch,
        run=run,
        progress=progress,
    )
    return _written(result, out)


def _written(result: ProbeReport, out: str | Path | None) -> ProbeReport:
    if out is not None:
        with writing(out):
            write_whole(Path(out), json.dumps(dataclasses.asdict(result), indent=1) + "\n")
    return result
