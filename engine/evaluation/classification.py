"""`mam2 evaluate`: measures a fine-tuned model on labeled videos, with several views per video.

OUT/results.json  predictions.tsv  unusable.tsv; for classes also classes.tsv, for one class per video confusion.png
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mam2.engine.checkpoints.classifiers import check_labeled, relabeled
from mam2.engine.checkpoints.load import load_any_classifier
from mam2.engine.checkpoints.untrained import is_random, random_classifier
from mam2.engine.checkpoints.weights import find_weights
from mam2.engine.config.finetune import HeadTask
from mam2.engine.config.limits import BATCH_OR_NONE, COUNT, COUNT_OR_NONE, check_flags
from mam2.engine.config.training import RunConfig
from mam2.engine.data.label_texts import SEPARATOR, class_places, true_classes, true_values, values_of
from mam2.engine.data.loader import ClipLoader
from mam2.engine.data.manifest import Manifest, read_manifest
from mam2.engine.data.sources import read_source
from mam2.engine.data.unusable import none_decoded
from mam2.engine.data.video import Skipped
from mam2.engine.errors import UserError
from mam2.engine.evaluation import accuracy
from mam2.engine.evaluation.views import classify_videos
from mam2.engine.files import check_apart, make_folder, unwritable, write_table, write_whole
from mam2.engine.model.classifier import Classifier, logits_of
from mam2.engine.runtime.device import autocast, pick_device
from mam2.engine.runtime.distributed import join
from mam2.engine.units import counted

BATCH = 32
"""Default number of clips per forward pass."""


@dataclass(frozen=True, kw_only=True)
class TestedOn:
    """The videos, views and checkpoint of a result."""

    videos: int
    """Videos that could be decoded."""
    unusable: int
    """Videos that could not be decoded; the accuracies exclude them."""
    temporal: int
    spatial: int
    checkpoint: str
    data: str


@dataclass(frozen=True, kw_only=True)
class EvaluationResult(TestedOn):
    """Accuracies of one class per video, 0 to 1, over the videos that could be decoded."""

    top1: float
    top5: float
    mean_class: float
    """Mean of the top-1 accuracies of the classes that have videos."""


@dataclass(frozen=True, kw_only=True)
class MultiLabelResult(TestedOn):
    """Precision of several classes per video."""

    mean_average_precision: float
    """0 to 1: mean of the average precisions of the classes that have videos."""


@dataclass(frozen=True, kw_only=True)
class RegressionResult(TestedOn):
    """Error of a number per video."""

    mae: float
    """Mean absolute error, in the units of the labels."""
    r2: float
    """Coefficient of determination: 1 is exact, 0 is as good as the mean of the labels."""


Result = EvaluationResult | MultiLabelResult | RegressionResult


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
) -> Result:
    """Classifies all videos of a folder or list, and writes the results to the folder `out`.

    The result is of the kind of labels (`head.task`) that the checkpoint was trained on.

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
        if model.task != "classes":
            raise UserError(f"--recipe {recipe}: `random` needs a recipe with head.task classes, found {model.task}")
    elif recipe:
        raise UserError(f"--recipe {recipe}: only for the checkpoint `random`; {checkpoint} contains its model")
    else:
        model, config, classes = load_any_classifier(checkpoint, frames=frames, size=size, heads=heads)
    foreign = not random and find_weights(checkpoint) is None
    outputs = logits_of(model)
    if names and len(names) != outputs:
        raise UserError(f"--classes: {counted(len(names), 'name')}, but {checkpoint} has {outputs} classes")
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
        manifest = world.broadcast(lambda: _labeled_for(model, manifest, data, classes))
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
                scores=model.scores,
            )
            skipped = {entry.path: entry.reason for part in world.all_gather(loader.skipped) for entry in part}
        if not len(predictions.videos):
            raise world.error(none_decoded(data, [*manifest.skipped, *starmap(Skipped, skipped.items())]))
        places = predictions.videos.tolist()
        whole = len(manifest.videos) + len(manifest.skipped)
        tested = TestedOn(
            videos=len(places),
            unusable=whole - len(places),
            temporal=temporal,
            spatial=spatial,
            checkpoint=str(checkpoint),
            data=str(data),
        )
        judges: dict[HeadTask, Judge] = {"classes": _of_classes, "multi-label": _of_sets, "regression": _of_values}
        result, write = judges[model.task](tested, predictions.probabilities, manifest, places, classes)
        reasons = {entry.path: entry.reason for entry in manifest.skipped} | skipped

        def write_all() -> None:
            folder = Path(out)
            write_whole(folder / "results.json", json.dumps(dataclasses.asdict(result), indent=1) + "\n")
            write(folder)
            write_table(folder / "unusable.tsv", reasons.items())

        try:
            world.broadcast(write_all)
        except OSError as error:
            raise unwritable(out, error) from None
    return result


def _labeled_for(model: Classifier, manifest: Manifest, data: str | Path, classes: Sequence[str]) -> Manifest:
    """Returns the manifest with labels for the model's task. Raises UserError for labels of another kind."""
    if model.task == "classes":
        return relabeled(manifest, data, classes)
    check_labeled(manifest, data)
    if model.task == "regression":
        values_of(manifest, data)
    else:
        class_places(manifest, data, classes)
    return manifest


Write = Callable[[Path], None]
"""Writes the files that only one task has into a folder. Raises OSError."""
Judge = Callable[[TestedOn, Tensor, Manifest, list[int], Sequence[str]], tuple[Result, Write]]
"""Compares the scores [n, V] of n videos, given by their indices in a manifest, with their labels."""


def _of_classes(
    tested: TestedOn, scores: Tensor, manifest: Manifest, places: list[int], classes: Sequence[str]
) -> tuple[EvaluationResult, Write]:
    labels = torch.tensor([manifest.videos[place].label for place in places])
    counts, by_class = accuracy.class_accuracies(scores, labels)
    result = EvaluationResult(
        top1=float(accuracy.top_k(scores, labels, 1).double().mean()),
        top5=float(accuracy.top_k(scores, labels, 5).double().mean()),
        mean_class=accuracy.mean_class_accuracy(scores, labels),
        **vars(tested),
    )

    def write(folder: Path) -> None:
        paths = [manifest.videos[place].path for place in places]
        accuracy.write_predictions(folder / "predictions.tsv", paths, labels, scores, classes)
        shares = ["" if share is None else f"{share:.6f}" for share in by_class]
        rows = zip(classes, counts, shares, strict=True)
        write_table(folder / "classes.tsv", [("class", "videos", "accuracy"), *rows])
        matrix = accuracy.confusion(scores, labels)
        write_whole(folder / "confusion.png", accuracy.draw_confusion(matrix, classes))

    return result, write


def _of_sets(
    tested: TestedOn, scores: Tensor, manifest: Manifest, places: list[int], classes: Sequence[str]
) -> tuple[MultiLabelResult, Write]:
    truth = true_classes(manifest, tested.data, classes, places)
    precisions = ["" if p is None else f"{p:.6f}" for p in accuracy.average_precisions(scores, truth)]

    def write(folder: Path) -> None:
        rows = zip(classes, truth.sum(0).tolist(), precisions, strict=True)
        write_table(folder / "classes.tsv", [("class", "videos", "average_precision"), *rows])
        named = [("path", "classes", *classes)]
        for place, has, row in zip(places, truth, scores.tolist(), strict=True):
            own = SEPARATOR.join(name for name, its in zip(classes, has.tolist(), strict=True) if its)
            named.append((manifest.videos[place].path, own, *(f"{chance:.6f}" for chance in row)))
        write_table(folder / "predictions.tsv", named)

    mean = accuracy.mean_average_precision(scores, truth)
    return MultiLabelResult(mean_average_precision=mean, **vars(tested)), write


def _of_values(
    tested: TestedOn, scores: Tensor, manifest: Manifest, places: list[int], classes: Sequence[str]
) -> tuple[RegressionResult, Write]:
    values, predicted = true_values(manifest, tested.data, places), scores[:, 0]

    def write(folder: Path) -> None:
        paths = [manifest.videos[place].path for place in places]
        pairs = zip(paths, values.tolist(), predicted.tolist(), strict=True)
        rows = [(path, f"{value:.9g}", f"{found:.9g}") for path, value, found in pairs]
        write_table(folder / "predictions.tsv", [("path", "value", "predicted"), *rows])

    mae = float((predicted - values).abs().mean())
    return RegressionResult(mae=mae, r2=accuracy.r_squared(predicted, values), **vars(tested)), write
