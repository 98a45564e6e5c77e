"""Fine-tuning: labelled videos and a pre-trained encoder → a classifier, validated as it learns.

The clips of a step, their augmentation, their partners and what is dropped are a pure function of (seed, step). Beside
what every run has, RUN/best holds the classifier of the best validation.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mam2.engine import costs
from mam2.engine.checkpoints import run as checkpoint
from mam2.engine.checkpoints.classifiers import CLASSES, build_classifier, check_labelled, describe_classes, relabelled
from mam2.engine.checkpoints.load import load_encoder
from mam2.engine.checkpoints.weights import find_weights
from mam2.engine.config.finetune import EncoderConfig, FinetuneConfig
from mam2.engine.config.pretrain import micro_batches_per_step
from mam2.engine.config.recipe import from_dict
from mam2.engine.data.batch import Batch
from mam2.engine.data.loader import ClipLoader
from mam2.engine.data.manifest import Manifest, read_manifest, write_manifest
from mam2.engine.data.sources import check_source
from mam2.engine.errors import UserError
from mam2.engine.evaluation.accuracy import top_k
from mam2.engine.evaluation.views import classify_videos
from mam2.engine.files import check_apart
from mam2.engine.model.attention_tuning import classifier_shapes, use_fastest
from mam2.engine.model.classifier import Classifier
from mam2.engine.model.encoder import CHANNELS, Encoder
from mam2.engine.model.text_head import embed_classes, read_text_embeddings
from mam2.engine.runtime.device import autocast, matmul_dtype
from mam2.engine.runtime.distributed import World
from mam2.engine.runtime.log import read_log
from mam2.engine.train import augment
from mam2.engine.train.augment import Prepared
from mam2.engine.train.loop import Loop, TrainResult
from mam2.engine.train.objective import Compile, Objective, Values
from mam2.engine.train.optimizer import Optimizer, build_layered_optimizer
from mam2.engine.train.session import MANIFEST, Session, open_session
from mam2.engine.train.step import Step

ACCURACY = "accuracy/validation"
SHOWN = {"loss/training": "loss {:.3f}"}


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
    """Fine-tunes an encoder to tell classes of videos apart; leaves checkpoints, RUN/best and logs in `out`.

    Args:
        config: a recipe's values; see `mam2.engine.config.finetune`.
        data: labelled training videos: a folder with a folder a class, or an annotation list.
        out: the run folder; made if missing. One that holds a checkpoint is only touched with `resume`.
        val: labelled videos to validate on, of the same classes by name.
        encoder: what `mam2.engine.load_encoder` takes: a run or checkpoint of MAM2's, VideoMAE's or Hugging Face's;
            None draws the weights at random. A resumed run does not read it.
        resume: go on from the newest whole checkpoint in `out`, if there is one.
        progress: draw a progress bar (only on a terminal).
        encoder_options: frames, size and heads for `load_encoder`, of an encoder whose file does not say them.

    Raises:
        UserError: for data, configs and checkpoints that cannot be used.
        PeerFailed: another process of the run has failed, and says why.
    """
    config.check()
    for labelled in (data, val):
        check_apart(labelled, out)
    if not resume:
        check_source(val)  # before the training videos are opened, which can take hours
    with open_session(config, out, resume=resume, progress=progress, derived_tables=("model",)) as session:
        task = _Finetuning(session, Path(data), Path(val), encoder, encoder_options or {})
        with task.val_loader:
            return Loop(session, task).train()


class _Finetuning:
    """The task of a loop that fine-tunes."""

    def __init__(
        self,
        session: Session[FinetuneConfig],
        data: Path,
        val: Path,
        encoder: str | Path | None,
        options: Mapping[str, int | None],
    ) -> None:
        self._session, world = session, session.world
        self.title, self.shown = "fine-tuning", SHOWN
        if encoder is not None and not session.saved:
            start = Path(encoder)
            world.broadcast(lambda: find_weights(start))  # before the videos are opened, which can take hours
        manifest = session.read_videos(data)
        world.broadcast(lambda: check_labelled(manifest, data))
        if session.saved:
            manifest = session.manifest = world.broadcast(lambda: _numbered_as_before(session, data))
        session.log.info(describe_classes(manifest))
        classes, threads = manifest.classes, session.config.data.threads
        self._val = world.broadcast(
            lambda: relabelled(read_manifest(val, threads=threads, progress=session.progress), val, classes)
        )
        self.metadata = {CLASSES: json.dumps(classes)}
        self.loader = session.open_loader()
        config, pretrained, embeddings = world.broadcast(lambda: _resolved(session, classes, encoder, options))
        session.config = config
        clips = config.optim.batch // (world.size * micro_batches_per_step(config, world.size))
        dtype, shapes = matmul_dtype(config.run, session.device), classifier_shapes(config, clips)
        for line in use_fastest(shapes, session.device, dtype, run=session.folder, broadcast=world.broadcast):
            session.log.info(line)
        torch.manual_seed(config.run.seed)
        model = build_classifier(config, embeddings)
        if pretrained:
            weights = {name: t for name, t in pretrained.state_dict().items() if not name.startswith("norm.")}
            model.encoder.load_state_dict(weights)
        self.train_step = FinetuneStep(config, model, session.device, world)
        self.flops = _flops(config)

        # validated apart: an averaged, compiled or sharded model needs no other way
        self._judge = build_classifier(config).to(session.device).eval().requires_grad_(False)
        batch = config.test.batch or config.optim.batch // (world.size * self.train_step.micro_batches)
        self.val_loader = ClipLoader(
            self._val,
            dataclasses.replace(config.data, max_unusable=1.0),  # the log names them
            batch=batch,
            device=session.device,
            seed=0,
            train=False,
        )
        self._told: set[str] = set()
        self._note_unusable()
        self._validated, self._best = world.broadcast(self._begin)

    def batches(self, first_pass: int) -> Iterator[tuple[Batch, Prepared]]:
        prepared = (
            (batch, self.train_step.prepare(number, batch.video, batch.label))
            for number, batch in enumerate(self.loader.stream(first_step=first_pass), first_pass)
        )
        return _on_side_stream(prepared, self._session.device)

    def after_step(self, step: int, steps: int) -> None:
        """Validates each `test.every` epochs and at the end, but no step twice."""
        per_epoch = self.loader.steps_per_epoch / self.train_step.micro_batches
        due = step % max(round(self._session.config.test.every * per_epoch), 1) == 0 or step == steps
        if not due or step in self._validated:
            return
        found = self._validate()
        self._validated.add(step)
        session = self._session
        if found[ACCURACY] > self._best:
            self._best = found[ACCURACY]
            session.world.broadcast(lambda: self._write_best(step, found))
        session.log.write(step, found)
        session.log.info(
            f"step {step}: validation top-1 {found[ACCURACY]:.2%}, top-5 {found['accuracy/validation_top5']:.2%}, "
            f"best {self._best:.2%}"
        )

    def _begin(self) -> tuple[set[int], float]:
        """Steps validated before a run was stopped, and the best accuracy then."""
        session, best = self._session, self._session.folder / checkpoint.BEST
        if not session.saved:
            checkpoint.remove_best(session.folder)
            return set(), -1.0
        validated = {line["step"] for line in read_log(session.folder) if ACCURACY in line}
        return validated, checkpoint.read_state(best)[ACCURACY] if best.is_dir() else -1.0

    def _validate(self) -> dict[str, float]:
        session, config = self._session, self._session.config
        with torch.no_grad():
            whole = checkpoint.copies(self.train_step.model.state_dict() | dict(self.train_step.average), keep=True)
            self._judge.load_state_dict(whole)
        # a signal need not wait for the whole of it, where no other process waits for this one
        with session.stop.interruptible(session.world.size == 1):
            predictions = classify_videos(
                self._judge,
                self.val_loader,
                self._val,
                config.data,
                temporal=1,
                spatial=1,
                world=session.world,
                precision=lambda: autocast(config.run, session.device),
                progress=session.progress,
            )
        self._note_unusable()
        labels = torch.tensor([self._val.videos[place].label for place in predictions.videos.tolist()])
        if not len(labels):
            raise session.world.error("none of the validation videos can be decoded")
        own = predictions.probabilities.gather(1, labels[:, None])
        return {
            ACCURACY: float(top_k(predictions.probabilities, labels, 1).double().mean()),
            "accuracy/validation_top5": float(top_k(predictions.probabilities, labels, 5).double().mean()),
            "loss/validation": float(-own.clamp_min(1e-30).log().mean()),
        }

    def _write_best(self, step: int, found: dict[str, float]) -> None:
        session = self._session
        try:
            weights = checkpoint.copies(self._judge.state_dict(), keep=True)
            checkpoint.write_best(session.folder, step, weights, session.config, dict(self.metadata), found)
        except OSError as error:
            session.log.info(f"step {step}: RUN/best cannot be written: {error}. The run goes on")

    def _note_unusable(self) -> None:
        """Names validation videos that cannot be used, once, in the log."""
        loader = self.val_loader
        for skipped in [
            *self._val.skipped,
            *(s for part in self._session.world.all_gather(loader.skipped) for s in part),
        ]:
            if skipped.path not in self._told:
                self._told.add(skipped.path)
                self._session.log.info(f"unusable for validation: {skipped.path}: {skipped.reason}")


def _numbered_as_before(session: Session[FinetuneConfig], data: Path) -> Manifest:
    """The videos with labels in the order of the checkpoint's logits, also where RUN/manifest.jsonl was made anew.

    Raises UserError where the classes are others than the checkpoint's.
    """
    assert session.saved
    before = tuple(json.loads(checkpoint.read_metadata(session.saved)[CLASSES]))
    now = session.manifest.classes
    if now == before:
        return session.manifest
    others = [name for name in (*before, *now) if name not in before or name not in now]
    if others:
        lacking = "lacks the class" if others[0] in before else "has the class"
        raise UserError(
            f"--data {data} {lacking} {others[0]!r}: expected the {len(before)} classes of {session.saved}; "
            "name the data that the run was started with, or start a new run"
        )
    manifest = relabelled(session.manifest, data, before)
    write_manifest(manifest, session.folder / MANIFEST)
    return manifest


def _resolved(
    session: Session[FinetuneConfig],
    classes: tuple[str, ...],
    path: str | Path | None,
    options: Mapping[str, int | None],
) -> tuple[FinetuneConfig, Encoder | None, Tensor | None]:
    """The config with what data and files decide, the encoder to start from, and the embeddings of the classes.

    A resumed run has the last two in its checkpoint.
    """
    config, info = session.config, session.log.info
    if session.saved:
        saved = checkpoint.read_state(session.saved)["config"]["model"]
        return dataclasses.replace(config, model=from_dict(EncoderConfig, saved)), None, None
    encoder, model = None, config.model
    if path is not None:
        encoder = load_encoder(path, frames=options.get("frames"), size=options.get("size"), heads=options.get("heads"))
        model = _described(encoder)
        info(f"encoder from {path}")
    else:
        info("encoder drawn at random (--scratch)")
    embeddings = None
    if config.head.text_embeddings:
        embeddings = read_text_embeddings(config.head.text_embeddings, classes)
    elif config.head.text_encoder:
        embeddings = embed_classes(config.head.text_encoder, classes, config.head.prompt)
    text_width = 0 if embeddings is None else embeddings.shape[1]
    config = dataclasses.replace(config, model=dataclasses.replace(model, classes=len(classes), text_width=text_width))
    try:
        config.check()
    except UserError as error:
        raise UserError(f"{error} (the encoder of {path} decides [model])") from None
    return config, encoder, embeddings


def _described(encoder: Encoder) -> EncoderConfig:
    tubelet, patch, _ = encoder.patch_size
    block: Any = encoder.blocks[0]
    return EncoderConfig(
        patch=patch,
        tubelet=tubelet,
        width=encoder.width,
        depth=len(encoder.blocks),
        heads=block.attn.heads,
        mlp_ratio=block.mlp.fc1.out_features / encoder.width,
        layer_scale=0.0 if block.gamma_1 is None else 1.0,
        frames=encoder.grid[0] * tubelet,
        size=encoder.grid[1] * patch,
    )


def _on_side_stream(
    prepared: Iterator[tuple[Batch, Prepared]], device: torch.device
) -> Iterator[tuple[Batch, Prepared]]:
    """The same pairs. On a GPU they are made on a side stream, which does not wait for the step before: while
    that one runs, the next batch is augmented."""
    if device.type != "cuda":
        yield from prepared
        return
    side_stream = torch.cuda.Stream(device)
    while True:
        step = torch.cuda.current_stream(device)
        with torch.cuda.stream(side_stream):
            # The loader notes the current stream as a user of the clip's memory.
            taken = next(prepared, None)
        if taken is None:
            return
        step.wait_stream(side_stream)
        # Allocated on other streams, which must not reuse the memory before the step is done with it.
        for tensor in (taken[0].clip, *taken[1]):
            if tensor is not None:
                tensor.record_stream(step)
        yield taken


def _flops(config: FinetuneConfig) -> float:
    """FLOPs of a clip in a step: all tokens through the encoder, forward and backward; the head is next to nothing."""
    model, (slots, rows, columns) = config.model, config.grid
    tokens = slots * rows * columns
    pixels = model.tubelet * model.patch**2 * CHANNELS
    embedding = costs.linear(tokens, pixels, model.width, costs.SINGLE, input_gradient=False)
    block = costs.block(tokens, model.width, model.mlp_ratio, costs.SINGLE, layer_scale=model.layer_scale)
    return embedding.flops + model.depth * block.flops


class ClassifierObjective(Objective):
    """Cross-entropy with soft targets. Called with a video [B, C, T, H, W] uint8, targets [B, V], what is dropped."""

    def __init__(self, model: Classifier, compiled: Compile) -> None:
        super().__init__()
        self.model = model
        self._loss = compiled(self._cross_entropy)

    def forward(
        self,
        video: Tensor,
        targets: Tensor,
        path_scales: Tensor | None,
        feature_scales: Tensor | None,
        *,
        inspect: bool = False,
    ) -> tuple[Tensor, Values, Values]:
        loss = self._loss(video, targets, path_scales, feature_scales)
        return loss, {"loss/training": loss.detach()}, {}

    def _cross_entropy(
        self, video: Tensor, targets: Tensor, path_scales: Tensor | None, feature_scales: Tensor | None
    ) -> Tensor:
        logits = self.model(video, path_scales, feature_scales)
        return -(targets * logits.log_softmax(-1)).sum(-1).mean()


class FinetuneStep(Step):
    """A step of fine-tuning: what goes with a video is what `prepare` made of it and its labels."""

    config: FinetuneConfig
    model: Classifier

    def __init__(self, config: FinetuneConfig, model: Classifier, device: torch.device, world: World) -> None:
        super().__init__(config, model, device, world)
        self._blend: Callable[..., None] = get_ema_multi_avg_fn(config.optim.ema)
        self.average: dict[str, Tensor] = {}
        """Moving average of the trained parameters; empty without `optim.ema`."""
        if config.optim.ema:
            self.average = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def build_objective(self, compiled: Compile) -> Objective:
        return ClassifierObjective(self.model, compiled)

    def build_optimizer(self) -> Optimizer:
        dtype = matmul_dtype(self.config.run, self.device)
        return build_layered_optimizer(self.model, self.config.model.depth, self.config.optim, dtype)

    def prepare(self, number: int, video: Tensor, labels: Tensor) -> Prepared:
        """What goes with the video [B, C, T, H, W] uint8 of pass `number`, from 0; labels: int64 [B] on the CPU."""
        step, index = divmod(number, self.micro_batches)
        first_sample = (index * self.world.size + self.world.rank) * len(video)
        return augment.prepare(video, labels, self.config, step=step, first_sample=first_sample)

    def arguments(self, step: int, first_sample: int, video: Tensor, extras: Prepared) -> tuple[Any, ...]:
        return tuple(extras)

    def extra_state(self) -> Mapping[str, Tensor]:
        return self.average

    def __call__(self, *args: Any, **options: Any) -> dict[str, Tensor]:
        values = super().__call__(*args, **options)
        if self.average:
            trained = dict(self.model.named_parameters())
            self._blend(list(self.average.values()), [trained[name].detach() for name in self.average], None)
        return values
