"""Questions about real clips: what an encoder that was pre-trained on some of them tells about others.

A question is a pair of labeled lists, to fit a probe on and to test it. The clips of all questions are decoded once,
the middle clip of each video; where a table says what belongs together (a speaker), so do the intervals.

FOLDER/clips.npy        uint8 [videos, 1, 1, T, H, W, C]
FOLDER/questions.npz    NAME/train, NAME/test: places in clips.npy; NAME/train-labels, NAME/test-labels;
                        NAME/train-groups, NAME/test-groups: the group of each clip; all int64
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.trials.prepared import Split, render
from benchmarks.trials.trial import EVALUATED
from mam2.engine.checkpoints.classifiers import relabeled
from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.data.lists import read_column
from mam2.engine.data.manifest import Manifest, scan
from mam2.engine.errors import UserError
from mam2.engine.evaluation.attentive import attentive_probe
from mam2.engine.evaluation.components import principal_components, probe_components
from mam2.engine.evaluation.features import extract_features
from mam2.engine.evaluation.linear_probe import folds, held_out, linear_probe
from mam2.engine.evaluation.pools import Pool, token_groups
from mam2.engine.evaluation.probe_run import digits
from mam2.engine.files import whole_file
from mam2.engine.model.encoder import Encoder

CLIPS, QUESTIONS = "clips", "questions.npz"
COMPONENTS = 80
"""Principal components of the pixel baseline with a fixed number of them."""
POOLS: tuple[Pool, ...] = ("mean", "time", "time-center")
"""Pools of the tokens of a clip, see `mam2.engine.evaluation.pools`: the usual one, and those that keep the order."""
TOKENS: Literal["tokens"] = "tokens"
"""Not a pool: principal components of all tokens, as many as cross-validation on the fitted clips chooses."""
ATTENTIVE: Mapping[str, Pool] = {"attentive": "mean", "attentive-time": "time"}
"""Attentive probes of all tokens: by name, the pool each of whose groups has a learned query."""
KINDS: tuple[str, ...] = (*POOLS, TOKENS, *ATTENTIVE)
"""All kinds of answers of an encoder."""

JUDGED_POOL: Pool = "time"
"""The pool by which learning rates are chosen: it keeps time."""


class Lists(NamedTuple):
    """A question as the command line gives it."""

    train: Path
    test: Path
    shots: int = 0
    """Clips of each class that are fitted on; 0: all."""

    @property
    def name(self) -> str:
        """Name of the list that is fitted on, without its ending."""
        return self.train.stem.removesuffix("_train").removesuffix("-train")


class Question(NamedTuple):
    """Rows of the clips, with their labels from 0."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    train_groups: Tensor
    """Each clip is a group of its own where no table says what belongs together."""
    test_groups: Tensor


class RealClips(NamedTuple):
    clips: np.ndarray
    questions: Mapping[str, Question]


class Answer(NamedTuple):
    accuracy: float
    """Share of right answers on the test clips, 0 to 1."""
    right: str
    """A digit per test clip, in their order: 1 for a right answer."""


def prepare_questions(asked: Sequence[Lists], groups: str, folder: Path, config: PretrainConfig) -> None:
    """Decodes the videos of all questions; what is there already is kept.

    groups: TABLE:COLUMN, a table with a column `path` and the column that names what a video belongs to; empty: none.
    Raises UserError for lists or a table that cannot be used.
    """
    if (folder / QUESTIONS).is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    known, places, videos = Manifest(()), {}, []
    parts: dict[str, np.ndarray] = {}
    for lists in asked:
        classes: tuple[str, ...] = ()
        for part, source in (("train", lists.train), ("test", lists.test)):
            manifest, _ = scan(source, known)
            classes = classes or manifest.classes
            manifest = relabeled(manifest, source, classes)
            if part == "train" and lists.shots:
                manifest = some_of_each_class(manifest, lists.shots)
            for video in manifest.videos:
                if video.path not in places:
                    places[video.path] = len(videos)
                    videos.append(video)
            known = Manifest(tuple(videos))
            paths = [video.path for video in manifest.videos]
            parts[f"{lists.name}/{part}"] = np.array([places[path] for path in paths])
            parts[f"{lists.name}/{part}-labels"] = np.array([video.label for video in manifest.videos])
            parts[f"{lists.name}/{part}-groups"] = read_groups(groups, paths) if groups else np.arange(len(paths))
    data = dataclasses.replace(config.data, recorded=1, views=1)
    render(CLIPS, Manifest(tuple(videos)), folder, dataclasses.replace(config, data=data), train=False)
    with whole_file(folder / QUESTIONS) as file:
        np.savez(file, **parts)


def some_of_each_class(manifest: Manifest, count: int) -> Manifest:
    """Returns at most `count` videos per class, evenly spaced in the list."""
    chosen: list[int] = []
    for label in range(len(manifest.classes)):
        places = [place for place, video in enumerate(manifest.videos) if video.label == label]
        taken = min(count, len(places))
        chosen += [places[number * len(places) // taken] for number in range(taken)]
    return dataclasses.replace(manifest, videos=tuple(manifest.videos[place] for place in sorted(chosen)))


def read_groups(groups: str, paths: Sequence[str]) -> np.ndarray:
    """The group of each path, numbered in alphabetical order: int64. UserError where the table does not tell."""
    table, _, column = groups.rpartition(":")
    if not table:
        raise UserError(f"--real-group {groups}: expected TABLE:COLUMN, a table with a column of paths")
    names = read_column(Path(table), column)
    if missing := next((path for path in paths if not names.get(path)), None):
        raise UserError(f"--real-group {groups}: no group for {missing}; the table must name every video")
    numbers = {name: number for number, name in enumerate(sorted(set(names.values())))}
    return np.array([numbers[names[path]] for path in paths])


def load_questions(folder: Path) -> RealClips:
    parts = {name: torch.from_numpy(found) for name, found in np.load(folder / QUESTIONS).items()}
    names = dict.fromkeys(name.partition("/")[0] for name in parts)
    fields = {field: field.replace("_", "-") for field in Question._fields}
    questions = {name: Question(**{field: parts[f"{name}/{key}"] for field, key in fields.items()}) for name in names}
    return RealClips(np.load(folder / f"{CLIPS}.npy", mmap_mode="r"), questions)


def ask(
    encoder: Encoder, real: RealClips, config: PretrainConfig, kinds: Collection[str] = KINDS
) -> dict[str, dict[str, Answer]]:
    """Returns the answers to every question, by kind. kinds: those of `KINDS` that are wanted."""
    pools = [pool for pool in POOLS if pool in kinds]
    clips = Split(real.clips, torch.empty(0))
    found = extract_features(encoder, clips.videos(EVALUATED), [*pools, TOKENS], run=config.run)
    flat = found[TOKENS].numpy()
    tokens = flat.reshape(len(flat), -1, encoder.width)
    queries = {kind: token_groups(encoder.grid, pool) for kind, pool in ATTENTIVE.items() if kind in kinds}
    answers: dict[str, dict[str, Answer]] = {}
    for name, asked in real.questions.items():
        answers[name] = {pool: _answer(found[pool][asked.train], found[pool][asked.test], asked) for pool in pools}
        if TOKENS in kinds:
            answers[name][TOKENS] = _answer_of_components(flat, asked)
        for kind, groups in queries.items():
            answers[name][kind] = _attentive_answer(tokens, groups, asked, encoder.positions.device)
    return answers


def judge(encoder: Encoder, real: RealClips, config: PretrainConfig) -> float:
    """The accuracy by which learning rates are chosen: of the first question, with the pool `JUDGED_POOL`."""
    asked = next(iter(real.questions.values()))
    clips = Split(real.clips, torch.empty(0)).videos(EVALUATED)
    pooled = extract_features(encoder, clips, [JUDGED_POOL], run=config.run)[JUDGED_POOL]
    return _answer(pooled[asked.train], pooled[asked.test], asked).accuracy


def pixel_answers(real: RealClips) -> dict[str, dict[str, Answer]]:
    """Those of the gray pixels of all frames, without any encoder, by question.

    "pixels": of `COMPONENTS` principal components; `TOKENS`: of as many as are chosen, like those of an encoder.
    """
    gray = np.asarray(real.clips[:, 0, 0], np.float32).mean(-1).reshape(len(real.clips), -1)
    found = {}
    for name, asked in real.questions.items():
        rows = asked.train.numpy(), asked.test.numpy()
        train, test = principal_components(gray, rows[0], gray, rows[1], count=COMPONENTS)
        found[name] = {"pixels": _answer(train, test, asked), TOKENS: _answer_of_components(gray, asked)}
    return found


def _answer(train: Tensor, test: Tensor, asked: Question) -> Answer:
    held = held_out(len(train), _groups_to_hold_out(asked))
    return _as_answer(linear_probe(train, asked.train_labels, test, asked.test_labels, held).right)


def _answer_of_components(features: np.ndarray, asked: Question) -> Answer:
    """features: [clips, values], of all clips of all questions."""
    parts = principal_components(features, asked.train.numpy(), features, asked.test.numpy())
    held = folds(len(asked.train), _groups_to_hold_out(asked))
    result, _ = probe_components([parts], asked.train_labels, asked.test_labels, held, torch.device("cpu"))
    return _as_answer(result.right)


def _attentive_answer(tokens: np.ndarray, groups: Tensor, asked: Question, device: torch.device) -> Answer:
    """tokens: [clips, N, D], of all clips of all questions. groups: bool [R, N], each with a learned query."""
    train, test = tokens[asked.train.numpy()], tokens[asked.test.numpy()]
    held = held_out(len(train), _groups_to_hold_out(asked))
    classes = int(asked.train_labels.max()) + 1
    found, _ = attentive_probe(train, asked.train_labels, test, held, classes, device, groups)
    return _as_answer(found == asked.test_labels)


def _groups_to_hold_out(asked: Question) -> Tensor | None:
    """Where the test clips' groups are new to the probe, its setting is chosen on groups that are new to it, too."""
    return asked.train_groups if set(asked.train_groups.tolist()).isdisjoint(asked.test_groups.tolist()) else None


def _as_answer(right: Tensor) -> Answer:
    """right: bool [test clips]."""
    return Answer(float(right.double().mean()), digits(right))
