"""`mam2 evaluate`: measures a classifier's accuracy on labeled videos, with several views per video.

OUT/results.json  predictions.tsv  classes.tsv  confusion.png  unusable.tsv
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from mam2.engine.checkpoints.classifiers import relabelled
from mam2.engine.checkpoints.load import load_any_classifier
from mam2.engine.checkpoints.untrained import is_random, random_classifier
from mam2.engine.checkpoints.weights import find_weights
from mam2.engine.config.limits import BATCH_OR_NONE, COUNT, COUNT_OR_NONE, check_flags
from mam2.engine.config.training import RunConfig
from mam2.engine.data.loader import ClipLoader
from mam2.engine.data.manifest import read_manifest
from mam2.engine.data.sources import read_source
from mam2.engine.errors import UserError
from mam2.engine.evaluation import accuracy
from mam2.engine.evaluation.views import classify_videos
from mam2.engine.files import check_apart, make_folder, unwritable, write_table, write_whole
from mam2.engine.model.classifier import logits_of
from mam2.engine.runtime.device import autocast, pick_device
from mam2.engine.runtime.distributed import join

BATCH = 32
"""Default number of clips per forward pass."""


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """Accuracies from 0 to 1, over the videos that could be decoded."""

    top1: float
    top5: float
    mean_class: float
    """Mean of the top-1 accuracies of the classes that have videos."""
    videos: int
    """Videos that could be decoded."""
    unusable: int
    """Videos that could not be decoded; the accuracies exclude them."""
    temporal: int
    spatial: int
    checkpoint: str
    data: str


def evaluate(
    checkpoint: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    recipe: str = "",
    temporal: int = 0,
    spatial: int = 0,
    batch: int = 0,
    device: Literal["auto", "cuda", "cpu"] = "auto",
    precision: Literal["auto", "bfloat16", "float32"] = "auto",
    threads: int = 0,
    frames: int | None = None,
    size: int | None = None,
    heads: int | None = None,
    names: Sequence[str] = (),
    progress: bool = True,
) -> EvaluationResult:
    """Classifies all videos of a folder or list, and writes the results to the folder `out`.

    Args:
        checkpoint: a run of `mam2 finetune` (its best checkpoint), one of its checkpoints, a fine-tuned checkpoint of
            VideoMAE's or VideoMAE v2's code (.pth), or a Hugging Face folder of VideoMAEForVideoClassification; or
            `random`.
        data: labeled videos: a folder with one folder per class, or an annotation list.
        out: output folder; created if missing.
        recipe: fine-tuning recipe with the model of `random`.
        temporal, spatial: number of views; 0: as in the run's recipe.
        batch: maximum clips per forward pass; 0: 32, or the number of crops per clip.
        device: auto uses a GPU if there is one.
        precision: auto is bfloat16 autocast on a GPU and on x86 CPUs with bfloat16 instructions, else float32.
        frames, size, heads: for a checkpoint that does not state them, see `load_encoder`.
        names: names of the classes in the order of the logits, for a checkpoint without names. Without any names,
            labels that are numbers from 0 are used as indices of the logits.
        threads: decoding threads; 0: one per core that this process may use.
        progress: draw a progress bar (only on a terminal).

    Raises:
        UserError: checkpoint, data or folder cannot be used.
    """
    check_flags(
        temporal=(temporal, COUNT_OR_NONE),
        spatial=(spatial, COUNT_OR_NONE),
        batch=(batch, BATCH_OR_NONE),
        frames=(frames, COUNT),
        size=(size, COUNT),
        heads=(heads, COUNT),
        threads=(threads, COUNT_OR_NONE),
    )
    check_apart(data, out)
    if random := is_random(checkpoint):
        classes = read_source(data).classes
        if not classes:
            raise UserError(f"{data}: no labels; expected a folder per class, or a list of `path label`")
        model, config = random_classifier(recipe, classes, frames=frames, size=size)
    elif recipe:
        raise UserError(f"--recipe {recipe}: only for the checkpoint `random`; {checkpoint} contains its model")
    else:
        model, config, classes = load_any_classifier(checkpoint, frames=frames, size=size, heads=heads)
    foreign = not random and find_weights(checkpoint) is None
    outputs = logits_of(model)
    if names and len(names) != outputs:
        raise UserError(f"--classes: {len(names)} names, but {checkpoint} has {outputs} classes")
    numbers = tuple(map(str, range(outputs)))
    classes = tuple(names) or classes or numbers
    temporal, spatial = temporal or config.test.temporal, spatial or config.test.spatial
    if min(temporal, spatial) < 1:
        raise UserError(f"expected at least one view, found temporal {temporal}, spatial {spatial}")
    run = RunConfig(device=device, precision=precision)
    # videos that cannot be decoded are counted here, without a limit
    videos = dataclasses.replace(config.data, threads=threads, max_unusable=1.0)
    where = pick_device(run)
    with join(where) as world:
        world.broadcast(lambda: make_folder(out))
        manifest = world.broadcast(lambda: read_manifest(data, threads=threads, progress=progress))
        if foreign and set(manifest.classes) <= set(numbers) and not set(manifest.classes) & set(classes):
            classes = numbers  # a list with numbers as classes, as in VideoMAE's
        manifest = world.broadcast(lambda: relabelled(manifest, data, classes))
        most = max(batch or config.test.batch or BATCH, spatial)
        with ClipLoader(manifest, videos, batch=most, device=where, seed=0, train=False) as loader:
            predictions = classify_videos(
                model.to(where).eval(),
                loader,
                manifest,
                videos,
                temporal=temporal,
                spatial=spatial,
                world=world,
                precision=lambda: autocast(run, where),
                progress=progress and world.main,
            )
            skipped = {entry.path: entry.reason for part in world.all_gather(loader.skipped) for entry in part}
        if not len(predictions.videos):
            raise world.error(f"{data}: none of the {len(manifest.videos)} videos can be decoded")
        places = predictions.videos.tolist()
        labels = torch.tensor([manifest.videos[place].label for place in places])
        counts, by_class = accuracy.class_accuracies(predictions.probabilities, labels)
        whole = len(manifest.videos) + len(manifest.skipped)
        result = EvaluationResult(
            top1=float(accuracy.top_k(predictions.probabilities, labels, 1).double().mean()),
            top5=float(accuracy.top_k(predictions.probabilities, labels, 5).double().mean()),
            mean_class=accuracy.mean_class_accuracy(predictions.probabilities, labels),
            videos=len(places),
            unusable=whole - len(places),
            temporal=temporal,
            spatial=spatial,
            checkpoint=str(checkpoint),
            data=str(data),
        )

        def write() -> None:
            folder = Path(out)
            write_whole(folder / "results.json", json.dumps(dataclasses.asdict(result), indent=1) + "\n")
            paths = [manifest.videos[place].path for place in places]
            accuracy.write_predictions(folder / "predictions.tsv", paths, labels, predictions.probabilities, classes)
            shares = ["" if share is None else f"{share:.6f}" for share in by_class]
            rows = zip(classes, counts, shares, strict=True)
            write_table(folder / "classes.tsv", [("class", "videos", "accuracy"), *rows])
            matrix = accuracy.confusion(predictions.probabilities, labels)
            write_whole(folder / "confusion.png", accuracy.draw_confusion(matrix, classes))
            reasons = {entry.path: entry.reason for entry in manifest.skipped} | skipped
            write_table(folder / "unusable.tsv", reasons.items())

        try:
            world.broadcast(write)
        except OSError as error:
            raise unwritable(out, error) from None
    return result
