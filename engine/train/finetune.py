"""Fine-tuning: labeled videos and a pre-trained encoder → a classifier, validated as it learns.

The clips of a step, their augmentation, their partners and dropped parts are pure functions of (seed, step). In
addition to the files of every run, RUN/best contains the classifier of the best validation.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from mam2.engine.checkpoints import checkpoint
from mam2.engine.checkpoints.classifiers import CLASSES, build_classifier
from mam2.engine.checkpoints.host_copies import copies
from mam2.engine.config.finetune import FinetuneConfig
from mam2.engine.data.batch import Batch
from mam2.engine.data.loader import ClipLoader
from mam2.engine.data.side_stream import on_side_stream
from mam2.engine.data.sources import check_source
from mam2.engine.data.unusable import none_decoded
from mam2.engine.data.video import Skipped
from mam2.engine.evaluation.views import classify_videos
from mam2.engine.files import check_apart
from mam2.engine.model.adapters import check_peft, merge_adapters
from mam2.engine.model.attention_tuning import classifier_shapes, tune_attention
from mam2.engine.model.blocks import Block
from mam2.engine.model.classifier import Classifier, pooled_features, standardize_features
from mam2.engine.runtime.device import autocast, compile_each, compiler, matmul_dtype
from mam2.engine.runtime.log import read_log
from mam2.engine.train.augment import Prepared
from mam2.engine.train.classifier_step import FinetuneStep, classifier_flops
from mam2.engine.train.description import Description, describe_task
from mam2.engine.train.finetune_setup import FinetuneSetup
from mam2.engine.train.finetune_tasks import LOSS, TASKS
from mam2.engine.train.loop import Loop, TrainResult
from mam2.engine.train.session import Session, open_session
from mam2.engine.train.validation_model import in_equal_batches, share_weights

STANDARDIZED = 256
"""Clips by which features are standardized, or a few more."""


def finetune(
    config: FinetuneConfig,
    data: str | Path,
    out: str | Path,
    *,
    val: str | Path,
    encoder: str | Path | None,
    resume: bool = False,
    progress: bool = True,
    encoder_options: Mapping[str, int | None] | None = None,
) -> TrainResult:
    """Fine-tunes an encoder to classify videos; writes checkpoints, RUN/best and logs to `out`.

    Args:
        config: a recipe's values; see `mam2.engine.config.finetune`.
        data: labeled training videos: a folder with one folder per class, or an annotation list.
        out: the run folder; created if missing. A folder with a checkpoint needs `resume`.
        val: labeled validation videos with the same class names.
        encoder: an argument of `mam2.engine.load_encoder`: a run or checkpoint of MAM2, VideoMAE or Hugging Face; None:
            random weights. A resumed run does not read it.
        resume: continue from the newest complete checkpoint in `out`, if there is one.
        progress: draw a progress bar (only on a terminal).
        encoder_options: frames, size and heads for `load_encoder`, if the encoder's file does not state them.

    Raises:
        UserError: data, config or checkpoint cannot be used.
        PeerFailed: another process of the run has failed; it prints the reason.
    """
    config.check()
    check_peft(config.adapters)
    for labeled in (data, val):
        check_apart(labeled, out)
    if not resume:
        check_source(val)  # before the training videos are opened, which can take hours
    setup = FinetuneSetup(Path(data), Path(val), encoder, encoder_options or {})
    with open_session(config, data, out, setup=setup, resume=resume, progress=progress) as session:
        return Loop(session, _Finetuning(session, setup)).train()


class _Finetuning:
    """The task of a loop that fine-tunes: its extras are what `prepare` draws for a batch."""

    def __init__(self, session: Session[FinetuneConfig], setup: FinetuneSetup) -> None:
        self._session, world, config = session, session.world, session.config
        self._metadata = {CLASSES: json.dumps(setup.classes)}
        dtype, shapes = (
            matmul_dtype(config.run, session.device),
            classifier_shapes(config, session.clips_per_micro_batch),
        )
        choices, lines = tune_attention(shapes, session.device, dtype, run=session.folder, broadcast=world.broadcast)
        for line in lines:
            session.log.info(line)
        torch.manual_seed(config.run.seed)
        model = build_classifier(config, setup.embeddings)
        model.set_attention(choices)
        if setup.encoder:
            weights = {name: t for name, t in setup.encoder.state_dict().items() if not name.startswith("norm.")}
            model.encoder.load_state_dict(weights)
        if config.head.standardize and not session.saved:
            self._standardize(model.to(session.device))
        self._task = TASKS[config.head.task](config, setup.classes)
        targets = self._task.targets(session.manifest, setup.data, session.log.info)
        self.train_step = FinetuneStep(config, model, session.device, world, targets)
        if config.optim.train_last >= 0 or config.adapters.rank:
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            parts = f"{config.optim.train_last} of {config.model.depth} blocks"
            if config.adapters.rank:
                parts = f"adapters of rank {config.adapters.rank}"
            session.log.info(
                f"trained {parts} and the head: {trained / 1e6:.2f} M "
                f"of {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, the rest is frozen"
            )
        self._measure = self._task.measure

        # a separate module for validation, so that averaged, compiled and sharded models need no special code
        self._judge = build_classifier(config).to(session.device).eval().requires_grad_(False)
        self._judge.set_attention(choices)
        self._gather_weights = share_weights(self._judge, self._trained_weights, in_place=not config.adapters.rank)
        batch = config.test.batch or session.clips_without_gradients
        self._classify = in_equal_batches(self._compiled_judge(), batch)
        self._val = setup.val_manifest
        self._val_loader = session.own(
            ClipLoader(
                self._val,
                dataclasses.replace(config.data, max_unusable=1.0),  # the log lists them
                batch=batch,
                device=session.device,
                seed=0,
                train=False,
            )
        )
        self._reported: set[str] = set()
        self._note_unusable()
        self._validated, self._best = world.broadcast(self._begin)

    def _compiled_judge(self) -> Callable[[Tensor], Tensor]:
        """Compiles the model for validation as the step's is."""
        run = self._session.config.run
        compiled = compiler(run, self._session.device)[0]
        if not (run.compile and run.compile_blocks):
            return compiled(self._judge)
        compile_each([module for module in self._judge.modules() if isinstance(module, Block)], compiled)
        return self._judge

    def _standardize(self, model: Classifier) -> None:
        """Scales the features before the head by the first clips, the same for any number of processes."""
        session = self._session
        stream = session.loader.stream()
        count = -(-STANDARDIZED // (session.clips_per_micro_batch * session.world.size))
        with autocast(session.config.run, session.device):
            size = session.clips_without_gradients
            parts = (part for batch in itertools.islice(stream, count) for part in batch.video.split(size))
            pooled = pooled_features(model, parts)
        stream.close()
        share = standardize_features(model, torch.cat(session.world.all_gather(pooled)))
        session.log.info(
            f"features the clips differ in {share:.2%} of their mean square; the head gets them standardized"
        )

    def describe(self) -> Description:
        return describe_task(
            "fine-tuning",
            self._session,
            self.train_step,
            flops_per_clip=classifier_flops(self._session.config),
            progress_format={"loss/training": "loss {:.3f}"},
            metadata=self._metadata,
        )

    def batches(self, first_micro_batch: int) -> Iterator[tuple[Batch, Prepared]]:
        timer = self.train_step.extras_timer

        def prepare(number: int, batch: Batch) -> Prepared:
            with timer or nullcontext():
                return self.train_step.prepare(number, batch.video, batch.label)

        numbered = enumerate(self._session.loader.stream(first_step=first_micro_batch), first_micro_batch)
        return on_side_stream(((batch, prepare(number, batch)) for number, batch in numbered), self._session.device)

    def after_step(self, step: int, steps: int) -> None:
        """Validates every `test.every` epochs and at the end, but no step twice."""
        every = round(self._session.config.test.every * self._session.steps_per_epoch)
        due = step % max(every, 1) == 0 or step == steps
        if not due or step in self._validated:
            return
        found = self._validate()
        self._validated.add(step)
        session = self._session
        if found[self._measure] > self._best:
            self._best = found[self._measure]
            session.world.broadcast(lambda: self._write_best(step, found))
        session.log.write(step, found)
        session.log.info(f"step {step}: validation {self._task.describe(found)}; best {self._measure} {self._best:.4f}")

    def _begin(self) -> tuple[set[int], float]:
        """Steps validated before a run was stopped, and the best measure then."""
        session, best = self._session, self._session.folder / checkpoint.BEST
        if not session.saved:
            checkpoint.remove_best(session.folder)
            return set(), -math.inf
        validated = {line["step"] for line in read_log(session.folder) if LOSS in line}
        return validated, checkpoint.read_state(best)[self._measure] if best.is_dir() else -math.inf

    def _validate(self) -> dict[str, float]:
        session, config = self._session, self._session.config
        self._gather_weights()
        # a signal may interrupt it if no other process waits for this one
        with session.stop.interruptible(session.world.size == 1):
            predictions = classify_videos(
                self._classify,
                self._val_loader,
                self._val,
                config.data,
                temporal=1,
                spatial=1,
                world=session.world,
                precision=lambda: autocast(config.run, session.device),
                progress=session.progress,
                scores=self._judge.scores,
            )
        unusable = self._note_unusable()
        if not len(predictions.videos):
            raise session.world.error(none_decoded("--val", unusable))
        return self._task.measures(predictions.probabilities, self._val, predictions.videos.tolist())

    def _trained_weights(self) -> dict[str, Tensor]:
        """Returns the weights to validate, by their names in a model without adapters."""
        weights = self.train_step.model.state_dict() | dict(self.train_step.average)
        return merge_adapters(weights, self._session.config.adapters)

    def _write_best(self, step: int, found: dict[str, float]) -> None:
        session = self._session
        try:
            weights = copies(self._judge.state_dict(), keep=True)
            checkpoint.write_best(session.folder, step, weights, session.config, dict(self._metadata), found)
        except OSError as error:
            session.log.info(f"step {step}: RUN/best cannot be written: {error}. The run continues")

    def _note_unusable(self) -> list[Skipped]:
        """Logs each unusable validation video once; returns all of them."""
        found = self._session.world.all_gather(self._val_loader.skipped)
        unusable = [*self._val.skipped, *itertools.chain.from_iterable(found)]
        for skipped in unusable:
            if skipped.path not in self._reported:
                self._reported.add(skipped.path)
                self._session.log.info(f"unusable for validation: {skipped.path}: {skipped.reason}")
        return unusable
