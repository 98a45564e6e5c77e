"""`predict`: classifies videos without labels, all of a folder at once or those of a stream one by one.

Shapes: V classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mam2.engine.checkpoints.load import load_any_classifier
from mam2.engine.checkpoints.weights import find_weights
from mam2.engine.config.finetune import HeadTask
from mam2.engine.config.limits import BATCH_OR_NONE, COUNT, COUNT_OR_NONE, check_flags
from mam2.engine.config.training import RunConfig
from mam2.engine.data.loader import ClipLoader
from mam2.engine.data.manifest import Manifest, read_manifest
from mam2.engine.data.video import Skipped, Video, probe_file
from mam2.engine.errors import UserError
from mam2.engine.evaluation.prediction_files import PredictionFiles
from mam2.engine.evaluation.views import classify_views
from mam2.engine.model.classifier import logits_of
from mam2.engine.runtime.device import autocast, pick_device
from mam2.engine.runtime.progress import Progress
from mam2.engine.units import counted

BATCH = 32
"""Default number of clips per forward pass."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """A classifier's prediction for one video."""

    path: str
    """Absolute path of the video."""
    task: HeadTask
    """What the checkpoint predicts: one class per video, several, or a number."""
    probabilities: NDArray[np.float64]
    """[V], the mean over the views; in regression the only value, not a probability."""
    classes: tuple[str, ...]
    """Names of the classes."""
    views: int
    """Number of evaluated clips and crops; smaller than requested if some could not be decoded."""

    def top(self, count: int = 5) -> list[tuple[str, float]]:
        """Returns the `count` most probable classes with their probabilities, in descending order; 0: all classes."""
        order = np.argsort(-self.probabilities, kind="stable")[: count or None]
        return [(self.classes[place], float(self.probabilities[place])) for place in order]


@dataclass(frozen=True, kw_only=True)
class PredictResult:
    predictions: tuple[Prediction, ...]
    """Predictions in the order of the videos."""
    skipped: tuple[Skipped, ...]
    """Videos that cannot be decoded, with the reasons."""
    classes: tuple[str, ...]
    """Names of the classes in the order of `Prediction.probabilities`."""


class Predictor:
    """A classifier that is loaded once and classifies any number of videos.

    predictor = Predictor("runs/ft")
    for found in predictor.stream(paths):       # any iterable of paths, also an endless one
        if isinstance(found, Prediction):       # otherwise a Skipped: a video that cannot be decoded
            print(found.path, found.top(1))
    """

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        temporal: int = 0,
        spatial: int = 0,
        batch: int = 0,
        frames: int | None = None,
        size: int | None = None,
        heads: int | None = None,
        names: Sequence[str] = (),
        threads: int = 0,
        device: Literal["auto", "cuda", "cpu"] = "auto",
        precision: Literal["auto", "bfloat16", "float32"] = "auto",
    ) -> None:
        """Takes the arguments of `predict` and raises the same errors."""
        check_flags(
            temporal=(temporal, COUNT_OR_NONE),
            spatial=(spatial, COUNT_OR_NONE),
            batch=(batch, BATCH_OR_NONE),
            frames=(frames, COUNT),
            size=(size, COUNT),
            heads=(heads, COUNT),
            threads=(threads, COUNT_OR_NONE),
        )
        model, config, classes = load_any_classifier(checkpoint, frames=frames, size=size, heads=heads)
        if names and len(names) != logits_of(model):
            raise UserError(
                f"--classes: {counted(len(names), 'name')}, but {checkpoint} has {logits_of(model)} classes"
            )
        self.classes = tuple(names) or classes or tuple(map(str, range(logits_of(model))))
        """Names of the classes in the order of the probabilities; numbers if the names are unknown."""
        self.checkpoint, self.weights = Path(checkpoint), find_weights(checkpoint) or Path(checkpoint)
        """The checkpoint as passed by the caller, and the file or folder that was read."""
        self.temporal, self.spatial = temporal or config.test.temporal, spatial or config.test.spatial
        """Clips per video, and crops per clip."""
        self._run = RunConfig(device=device, precision=precision)
        self._device = pick_device(self._run)
        self._model = model.to(self._device).eval()
        self.task = model.task
        """What the checkpoint predicts: one class per video, several, or a number."""
        self._data = dataclasses.replace(config.data, threads=threads, max_unusable=1.0)
        self._batch = max(batch or config.test.batch or BATCH, self.spatial)

    def predict(self, data: str | Path, *, progress: bool = True) -> Iterator[Prediction | Skipped]:
        """Yields the results of a folder or list in order, each as soon as available; Skipped for undecodable videos.

        data: a folder of videos, an annotation list, whose labels are ignored, or a video. progress: draw a bar (only
        on a terminal). Raises UserError if no video is usable.
        """
        manifest = read_manifest(data, threads=self._data.threads, progress=progress)
        yield from manifest.skipped
        with Progress(total=len(manifest.videos), desc="predicting", unit="video", leave=False, shown=progress) as bar:
            for found in self._classified(manifest.videos):
                yield found
                bar.update()

    def stream(self, paths: Iterable[str | Path], *, group: int = 1) -> Iterator[Prediction | Skipped]:
        """Yields the results of an iterable in order; Skipped for videos that cannot be opened or decoded.

        group: number of paths to take from the iterable before the first of them is decoded. Larger groups use more
        cores and fill the batches; a group of one returns each result immediately.
        """
        if group < 1:
            raise ValueError(f"group: expected at least 1, found {group}")
        waiting = iter(paths)
        with ThreadPoolExecutor(min(group, 8)) as pool:
            while taken := list(islice(waiting, group)):
                looked_at = list(pool.map(lambda path: probe_file(str(Path(path).absolute())), taken))
                found = self._classified(tuple(video for video in looked_at if isinstance(video, Video)))
                for one in looked_at:
                    yield one if isinstance(one, Skipped) else next(found)

    def _classified(self, videos: tuple[Video, ...]) -> Iterator[Prediction | Skipped]:
        """Yields one result per video, in order."""
        if not videos:
            return
        reasons: dict[str, str] = {}

        def skip(skipped: Skipped) -> None:
            reasons[skipped.path] = skipped.reason

        manifest = Manifest(videos)
        try:
            loader = ClipLoader(
                manifest, self._data, batch=self._batch, device=self._device, seed=0, train=False, on_skip=skip
            )
        except UserError:
            if any(video.path not in reasons for video in videos):
                raise
            yield from (Skipped(video.path, reasons[video.path]) for video in videos)
            return
        done = 0
        with loader:
            views = classify_views(
                self._model,
                loader,
                range(len(videos)),
                self._data,
                temporal=self.temporal,
                spatial=self.spatial,
                precision=lambda: autocast(self._run, self._device),
                scores=self._model.scores,
            )
            for place, total, count in views:
                yield from (Skipped(video.path, reasons[video.path]) for video in videos[done:place])
                yield Prediction(
                    path=videos[place].path,
                    task=self.task,
                    probabilities=(total / count).numpy(),
                    classes=self.classes,
                    views=count,
                )
                done = place + 1
        yield from (Skipped(video.path, reasons[video.path]) for video in videos[done:])


def predict(
    checkpoint: str | Path,
    data: str | Path | Iterable[str | Path],
    *,
    out: str | Path | None = None,
    draw: str | Path | None = None,
    top: int = 5,
    temporal: int = 0,
    spatial: int = 0,
    batch: int = 0,
    frames: int | None = None,
    size: int | None = None,
    heads: int | None = None,
    names: Sequence[str] = (),
    threads: int = 0,
    device: Literal["auto", "cuda", "cpu"] = "auto",
    precision: Literal["auto", "bfloat16", "float32"] = "auto",
    on_result: Callable[[Prediction | Skipped], None] | None = None,
    progress: bool = True,
) -> PredictResult:
    """Classifies videos that need no labels.

    Args:
        checkpoint: a run of `mam2 finetune` (its best checkpoint), one of its checkpoints, a fine-tuned checkpoint of
            VideoMAE's or VideoMAE v2's code (.pth), or a Hugging Face folder of VideoMAEForVideoClassification.
        data: a folder of videos, an annotation list, whose labels are ignored, or a video; or an iterable of videos: a
            list or tuple is classified as a whole, any other iterable one video after the other.
        out: output file: .json contains everything, .csv one row per class and video, .jsonl one line per video,
            written as soon as the video is classified.
        draw: folder for a picture of every video: four frames and its most probable classes.
        top: classes per video to write and draw, the most probable first; 0: all.
        temporal, spatial: clips per video and crops per clip, whose probabilities are averaged; 0: as in the recipe.
        batch: maximum clips per forward pass; 0: as in the recipe, or 32.
        frames, size, heads: for a checkpoint that does not state them, see `load_encoder`.
        names: names of the classes in the order of the logits, for a checkpoint without names.
        threads: decoding threads; 0: one per core that this process may use.
        device: auto uses a GPU if there is one.
        precision: auto is bfloat16 autocast on a GPU and on x86 CPUs with bfloat16 instructions, else float32.
        on_result: called with every prediction and every skipped video as soon as it is known.
        progress: draw a progress bar (only on a terminal).

    Raises:
        UserError: checkpoint, data or output cannot be used. A single video that cannot be decoded does not raise; it
            is listed in `skipped` and in the file.
    """
    check_flags(top=(top, COUNT_OR_NONE))
    predictor = Predictor(
        checkpoint,
        temporal=temporal,
        spatial=spatial,
        batch=batch,
        frames=frames,
        size=size,
        heads=heads,
        names=names,
        threads=threads,
        device=device,
        precision=precision,
    )
    if isinstance(data, str | Path):
        results = predictor.predict(data, progress=progress)
    else:
        results = predictor.stream(data, group=max(len(data), 1) if isinstance(data, list | tuple) else 1)
    about = {
        "checkpoint": str(checkpoint),
        "weights": str(predictor.weights),
        "temporal": predictor.temporal,
        "spatial": predictor.spatial,
        "classes": predictor.classes,
        "task": predictor.task,
    }
    predictions: list[Prediction] = []
    skipped: list[Skipped] = []
    source = data if isinstance(data, str | Path) else None
    if draw and predictor.task == "regression":
        raise UserError(f"--draw {draw}: draws classes, and {checkpoint} predicts a number; use --out")
    with PredictionFiles(out, draw, about, top=top, source=source) as files:
        for found in results:
            if isinstance(found, Skipped):
                skipped.append(found)
                files.add_skipped(found)
            else:
                predictions.append(found)
                files.add(found.path, found.top(top), found.views)
            if on_result:
                on_result(found)
    return PredictResult(predictions=tuple(predictions), skipped=tuple(skipped), classes=predictor.classes)
