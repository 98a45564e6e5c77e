"""One training from prepared clips: pre-train an encoder, probe it frozen, fine-tune it.

Step, losses, masks, optimizer and schedule are the engine's own; only the loader is replaced by arrays, so that a
training costs no decoding. The clips of a step are a pure function of (seed, step), the same for every variant.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.trials.prepared import Prepared, as_video
from mam2.engine.checkpoints.classifiers import build_classifier
from mam2.engine.config.finetune import FinetuneConfig
from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.data.sampling import sample_at
from mam2.engine.evaluation.features import extract_features
from mam2.engine.evaluation.linear_probe import linear_probe
from mam2.engine.model.build import build_model
from mam2.engine.model.classifier import pooled_features, standardize_features
from mam2.engine.model.encoder import Encoder
from mam2.engine.runtime.device import autocast, pick_device
from mam2.engine.runtime.distributed import World
from mam2.engine.train.classifier_step import FinetuneStep
from mam2.engine.train.finetune import STANDARDIZED
from mam2.engine.train.optimizer import learning_rate
from mam2.engine.train.step import PretrainStep

EVALUATED = 200
"""Clips that go through an encoder at once where nothing is learned."""


@dataclass(frozen=True)
class Pretrained:
    encoder: Encoder
    steps: int
    losses: dict[str, float]
    """Means over the last tenth of the steps."""


def pretraining(config: PretrainConfig, prepared: Prepared) -> PretrainStep:
    """A new model with its step."""
    torch.manual_seed(config.run.seed)
    model = build_model(config, prepared.codebook_size)
    return PretrainStep(config, model, pick_device(config.run), World())


def batches(config: PretrainConfig, prepared: Prepared) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Endless steps' clips and codes. The views of a video lie next to each other, as the engine's loader has them."""
    train, views, device = prepared.splits["train"], config.data.views, pick_device(config.run)
    count, recorded, crops = train.clips.shape[:3]
    samples = config.optim.batch // views
    sample = 0
    while True:
        drawn = np.array([sample_at(sample + place, count, config.run.seed) for place in range(samples)])
        sample += samples
        epoch, video = drawn[:, 0].repeat(views), drawn[:, 1].repeat(views)
        view = (epoch // recorded * views + np.tile(np.arange(views), samples)) % crops
        clips = as_video(train.clips[video, epoch % recorded, view]).to(device)
        codes = None
        if config.needs_codes:
            found = torch.from_numpy(prepared.codes[video, epoch % recorded, view].astype(np.int64))
            # the codes of a token's first frame come first
            codes = found[..., : math.prod(config.code_shape)].reshape(*found.shape[:-1], *config.code_shape).to(device)
        yield clips, codes


def pretrain(config: PretrainConfig, prepared: Prepared) -> Pretrained:
    """Trains for `config.optim.epochs` passes over the training videos."""
    take = pretraining(config, prepared)
    per_epoch = len(prepared.splits["train"].labels) * config.data.views / config.optim.batch
    steps = max(round(config.optim.epochs * per_epoch), 1)
    stream = batches(config, prepared)
    last: list[dict[str, Tensor]] = []
    end = min(int(0.9 * steps), steps - 1)
    for step in range(steps):
        rate = learning_rate(step, steps, per_epoch, config.optim, global_batch=config.optim.batch)
        inspect = step >= end and (step - end) % 10 == 0
        values = take(step, [next(stream)], rate, inspect=inspect, progress=step / steps)
        if step >= end:
            last.append(values)
    names = sorted({name for values in last for name in values if not name.startswith("gradient/")})
    losses = {name: float(torch.stack([v[name] for v in last if name in v]).mean()) for name in names}
    encoder: Any = take.model.encoder
    return Pretrained(encoder, steps, losses)


def probe(encoder: Encoder, prepared: Prepared, config: PretrainConfig) -> dict[str, dict[str, float]]:
    """Accuracy of linear probes of the mean token: for each split but `train`, by question.

    "probe" asks for the videos' labels; the other questions are those of the splits. All are asked of the same
    features.
    """
    splits = prepared.splits
    found = {
        name: extract_features(encoder, split.videos(EVALUATED), ["mean"], run=config.run)["mean"]
        for name, split in splits.items()
    }
    judged = [name for name in splits if name != "train"]
    asked = {name: {"probe": split.labels, **split.questions} for name, split in splits.items()}
    result: dict[str, dict[str, float]] = {name: {} for name in judged}
    for question, labels in asked["train"].items():
        answers = linear_probe(
            found["train"],
            labels,
            torch.cat([found[name] for name in judged]),
            torch.cat([asked[name][question] for name in judged]),
        )
        right = answers.right.double().split([len(splits[name].labels) for name in judged])
        for name, part in zip(judged, right, strict=True):
            result[name][question] = float(part.mean())
    return result


def finetune(encoder: Encoder, prepared: Prepared, config: FinetuneConfig, *, labelled: int) -> float:
    """Test accuracy after all weights were trained on `labelled` of the training videos; see `labeled_videos`."""
    torch.manual_seed(config.run.seed)
    device = pick_device(config.run)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, classes=prepared.classes))
    model = build_classifier(config)
    model.encoder.load_state_dict({n: t for n, t in encoder.state_dict().items() if not n.startswith("norm.")})
    train, batch = prepared.splits["train"], config.optim.batch
    recorded, crops = train.clips.shape[1:3]
    chosen = labeled_videos(train.labels, labelled)
    count = len(chosen)
    if config.head.standardize:
        some = chosen[:: -(-count // STANDARDIZED)]
        with autocast(config.run, device):
            pooled = pooled_features(model.to(device), [as_video(train.clips[some, 0, 0]).to(device)])
        standardize_features(model, pooled)
    take = FinetuneStep(config, model, device, World())
    steps = max(round(config.optim.epochs * count / batch), 1)
    for step in range(steps):
        drawn = np.array([sample_at(step * batch + place, count, config.run.seed) for place in range(batch)])
        epoch, video = drawn[:, 0], chosen[drawn[:, 1]]
        clips = as_video(train.clips[video, epoch % recorded, epoch // recorded % crops]).to(device)
        rate = learning_rate(step, steps, count / batch, config.optim, global_batch=batch)
        prepared_batch = take.prepare(step * take.micro_batches, clips, train.labels[torch.from_numpy(video)])
        take(step, [(clips, prepared_batch)], rate, inspect=False)
    model.eval()
    test = prepared.splits["test"]
    with torch.no_grad(), autocast(config.run, device):
        answers = [model(part.to(device)).argmax(-1).cpu() for part in test.videos(EVALUATED)]
    return float((torch.cat(answers) == test.labels).double().mean())


def labeled_videos(labels: Tensor, count: int) -> np.ndarray:
    """Places of about `count` videos, as many of each class and the same for every training: int64, ascending."""
    generator = np.random.default_rng(0)
    classes = labels.unique().tolist()
    share = max(count // len(classes), 1)
    chosen = [generator.permutation(np.flatnonzero(labels.numpy() == label))[:share] for label in classes]
    return np.sort(np.concatenate(chosen))
