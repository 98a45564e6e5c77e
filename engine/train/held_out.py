"""Measures the pretext task on held-out videos during pre-training, with the same clips and masks each time.

It does not affect the training: it does not use the training's random generators, and only reads its model.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.data.batch import Batch
from mam2.engine.data.loader import ClipLoader
from mam2.engine.data.manifest import Manifest
from mam2.engine.data.sets import read_sets
from mam2.engine.data.unusable import none_decoded
from mam2.engine.data.video import Skipped
from mam2.engine.evaluation.pretext import evaluation_mask
from mam2.engine.evaluation.scores import Scores, joined, score
from mam2.engine.model.attention import Choices
from mam2.engine.model.build import build_model
from mam2.engine.model.motion_targets import motion_frames, motion_values_vary
from mam2.engine.runtime.device import autocast
from mam2.engine.runtime.log import read_log
from mam2.engine.runtime.progress import Progress
from mam2.engine.tokenizer.files import load_vqgan
from mam2.engine.tokenizer.prepare import FILE, build_tokenizer
from mam2.engine.tokenizer.tokenizer import Tokenizer
from mam2.engine.train.objective import build_objective
from mam2.engine.train.session import Session
from mam2.engine.train.validation_model import share_weights
from mam2.engine.units import counted
from mam2.kernels import TubeMask

LOSS = "validation/loss"
MOTION = "validation/motion"
SCORES = {
    "validation/motion_relative": "relative_motion",
    "validation/pixels_relative": "relative_pixels",
    "validation/latents_relative": "relative_latents",
    "validation/codes": "code_accuracy",
    "validation/commonest_code": "commonest_code",
}
"""Numbers of the log and the corresponding properties of `Scores`."""
WORDS = {
    LOSS: "loss {:.4g}",
    "validation/motion_relative": "motion {:.1%} of no motion",
    "validation/pixels_relative": "pixels {:.1%} of the mean color",
    "validation/latents_relative": "features {:.1%} of predicting 0",
    "validation/codes": "correct codes {:.1%}",
}


class HeldOut:
    """Measures the trained model on the middle clips of held-out videos."""

    def __init__(
        self,
        session: Session[PretrainConfig],
        videos: Sequence[Path],
        codebook_size: int,
        choices: Choices,
        trained: torch.nn.Module,
    ) -> None:
        """Reads the videos and builds a model with the weights of the trained one.

        videos: folders or lists. codebook_size: that of the run's tokenizer, 0 if no codes are predicted. choices: the
        trained model's attention implementations. trained: the model that is measured.

        Raises UserError if the videos cannot be read.
        """
        self._session = session
        config, world, device = session.config, session.world, session.device
        threads = config.data.threads
        manifest = world.broadcast(lambda: read_sets(videos, threads=threads, progress=session.progress))
        used = _spread(len(manifest.videos), config.validation.videos)
        self._numbers = used[world.rank :: world.size]
        """Numbers of this rank's videos; a clip's mask depends only on the number of its video."""
        own = Manifest(tuple(manifest.videos[number] for number in self._numbers))
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            model = build_model(config, codebook_size)
            self._tokenizer: Tokenizer | None = None
            if config.needs_codes:
                self._tokenizer = build_tokenizer(load_vqgan(session.folder / FILE), config, device)
        # a separate module, so that compiled and sharded models need no special code
        self._model = model.to(device).eval().requires_grad_(False)
        self._model.set_attention(choices)
        self._gather_weights = share_weights(self._model, trained.state_dict)
        self._objective = build_objective(self._model, config, lambda part: part)
        self._loader: ClipLoader | None = None
        if own.videos:
            data = dataclasses.replace(config.data, views=1, recorded=0, max_unusable=1.0)  # the log lists them
            batch = session.clips_without_gradients
            self._loader = session.own(ClipLoader(own, data, batch=batch, device=device, seed=0, train=False))
        self._named: set[str] = set()
        """Paths of videos that cannot be used."""
        self._name([(skipped.path, skipped.reason) for skipped in manifest.skipped])
        self._measured = world.broadcast(self._measured_before)
        trained_on = {video.identity for video in session.manifest.videos}
        both = sum(manifest.videos[number].identity in trained_on for number in used)
        session.log.info(
            f"val     {len(used)} of the {counted(len(manifest.videos), 'video')} of {', '.join(map(str, videos))}, "
            f"every {counted(config.validation.every, 'epoch')}"
        )
        if both:
            session.log.info(
                f"warning: {counted(both, 'video')} of --val also in the training data: the loss there is too low"
            )

    def measure_if_due(self, step: int, steps: int) -> None:
        """Logs the held-out losses of the model after `step` of `steps` steps.

        It does so every `validation.every` epochs and at the end, but not twice for one step.
        """
        session = self._session
        every = max(round(session.config.validation.every * session.steps_per_epoch), 1)
        if (step % every and step != steps) or step in self._measured:
            return
        self._gather_weights()
        # a signal may interrupt it if no other process waits for this one
        with session.stop.interruptible(session.world.size == 1):
            numbers, clips = self._measure()
        self._measured.add(step)
        session.log.write(step, numbers)
        words = ", ".join(form.format(numbers[name]) for name, form in WORDS.items() if name in numbers)
        session.log.info(f"step {step}: held out ({counted(clips, 'clip')}): {words}")

    def _measured_before(self) -> set[int]:
        """Returns the steps measured before a run was stopped."""
        session = self._session
        return {line["step"] for line in read_log(session.folder) if LOSS in line} if session.saved else set()

    @torch.no_grad()
    def _measure(self) -> tuple[dict[str, float], int]:
        """Returns the numbers for the log over the clips of all ranks, and the number of clips."""
        session = self._session
        sums: dict[str, float] = defaultdict(float)
        weights: dict[str, float] = defaultdict(float)
        parts: list[Scores] = []
        clips = 0
        if self._loader:
            total = len(self._numbers)
            with Progress(total=total, desc="held out", unit="clip", leave=False, shown=session.progress) as bar:
                for batch in self._loader.evaluate():
                    losses, scores, frames = self._of_batch(batch)
                    for name, loss in losses.items():
                        weight = frames if name == MOTION else len(batch.clip)
                        sums[name] += float(loss) * weight
                        weights[name] += weight
                    parts.append(scores)
                    clips += len(batch.clip)
                    bar.update(len(batch.clip))
        everything = session.world.all_gather((dict(sums), dict(weights), parts, clips, self._skipped()))
        for *_, skipped in everything:
            self._name(skipped)
        clips = sum(count for _, _, _, count, _ in everything)
        if not clips:
            raise session.world.error(
                none_decoded("--val", [Skipped(*entry) for *_, skipped in everything for entry in skipped])
            )
        numbers = {
            name: sum(losses.get(name, 0.0) for losses, *_ in everything)
            / sum(counts.get(name, 0.0) for _, counts, *_ in everything)
            for name in dict.fromkeys(name for losses, *_ in everything for name in losses)
        }
        if motion_values_vary(session.config):  # `_of_batch` leaves it out
            numbers[LOSS] += session.config.loss.motion * numbers[MOTION]
        scores = joined([part for _, _, found, *_ in everything for part in found])
        found = {name: getattr(scores, key) for name, key in SCORES.items()}
        return numbers | {name: value for name, value in found.items() if value is not None}, clips

    def _of_batch(self, batch: Batch) -> tuple[dict[str, Tensor], Scores, float]:
        """Returns the mean losses of a batch by their names in the log, the scores of its clips, and the weight of its
        motion loss: the number of its motion values up to a factor.

        If clips differ in this number, the motion loss is not part of the whole loss.
        """
        config, video = self._session.config, batch.video
        numbers = [int(self._numbers[place]) for place in batch.index.tolist()]
        masks = [evaluation_mask(clip[None], config, number) for clip, number in zip(batch.clip, numbers, strict=True)]
        mask = TubeMask(torch.cat([one.visible for one in masks]), torch.cat([one.masked for one in masks]))
        codes = self._tokenizer.codes(video) if self._tokenizer else None
        with autocast(config.run, self._session.device):
            total, losses, _ = self._objective(video, mask, codes)
            scores = score(self._model, self._tokenizer, batch.clip, mask, config)
        frames = float(len(batch.clip))
        if motion_values_vary(config):
            frames = float(motion_frames(mask, config))
            total = total - config.loss.motion * losses["loss/motion"]
        named = {LOSS: total} | {name.replace("loss/", "validation/"): loss for name, loss in losses.items()}
        return named, scores, frames

    def _name(self, skipped: list[tuple[str, str]]) -> None:
        """Logs each unusable video once."""
        for path, reason in skipped:
            if path not in self._named:
                self._named.add(path)
                self._session.log.info(f"unusable for validation: {path}: {reason}")

    def _skipped(self) -> list[tuple[str, str]]:
        return [(skipped.path, skipped.reason) for skipped in self._loader.skipped] if self._loader else []


def _spread(count: int, most: int) -> list[int]:
    """Returns at most `most` evenly spaced numbers below `count`; all if `most` is 0."""
    return np.unique(np.linspace(0, count - 1, min(most or count, count)).round().astype(int)).tolist()
