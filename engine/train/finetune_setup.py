"""What a fine-tuning run reads before its loader opens: classes, initial encoder, embeddings, validation videos."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mam2.engine.checkpoints import checkpoint
from mam2.engine.checkpoints.channels import GRAY, becomes_gray, data_for, gray_encoder
from mam2.engine.checkpoints.classifiers import CLASSES, check_labeled, describe_classes, relabeled
from mam2.engine.checkpoints.load import load_encoder
from mam2.engine.checkpoints.weights import find_weights
from mam2.engine.config.finetune import EncoderConfig, FinetuneConfig
from mam2.engine.config.recipe import from_dict
from mam2.engine.data.label_texts import check_one_class, class_places, names_of_all, values_of
from mam2.engine.data.manifest import MANIFEST, Manifest, read_manifest, write_manifest
from mam2.engine.errors import UserError
from mam2.engine.model.encoder import Encoder
from mam2.engine.model.text_head import embed_classes, read_text_embeddings
from mam2.engine.train.finetune_tasks import VALUE, standard
from mam2.engine.train.session import RunContext, Setup
from mam2.engine.units import counted


class FinetuneSetup(Setup[FinetuneConfig]):
    """Reads the classes, the initial encoder and the validation videos."""

    def __init__(self, data: Path, val: Path, encoder: str | Path | None, options: Mapping[str, int | None]) -> None:
        self.data, self._val, self._path, self._options = data, val, encoder, options
        self.classes: tuple[str, ...] = ()
        """Names in the order of the logits."""
        self.encoder: Encoder | None = None
        self.embeddings: Tensor | None = None
        """Text embeddings of the classes; a resumed run reads both from its checkpoint."""
        self.val_manifest = Manifest(())

    def check(self, run: RunContext[FinetuneConfig]) -> None:
        path = self._path
        if path is not None and not run.saved:
            run.world.broadcast(lambda: find_weights(path))

    def complete(self, run: RunContext[FinetuneConfig], manifest: Manifest) -> tuple[FinetuneConfig, Manifest]:
        world, threads = run.world, run.config.data.threads
        world.broadcast(lambda: check_labeled(manifest, self.data))
        if run.saved and run.config.head.task == "classes":
            manifest = world.broadcast(lambda: _numbered_as_before(run, manifest, self.data))
        self.classes = world.broadcast(lambda: _classes(run, manifest, self.data))
        val = world.broadcast(lambda: read_manifest(self._val, threads=threads, progress=run.progress))
        self.val_manifest = world.broadcast(lambda: _checked(val, self._val, run.config, self.classes))
        trained_on = {video.identity for video in manifest.videos}
        if both := sum(video.identity in trained_on for video in self.val_manifest.videos):
            run.log.info(
                f"warning: {counted(both, 'video')} of --val also in the training data: the accuracy there is too high"
            )
        if run.config.head.task == "classes":
            run.log.info(describe_classes(manifest))
        config, self.encoder, self.embeddings = world.broadcast(
            lambda: _resolved(run, manifest, self.data, self.classes, self._path, self._options)
        )
        return config, manifest


def _classes(run: RunContext[FinetuneConfig], manifest: Manifest, data: Path) -> tuple[str, ...]:
    """Returns the names of the head's outputs: those of the checkpoint, or of the training videos.

    Raises UserError for labels that are not of the task.
    """
    task = run.config.head.task
    if task == "regression":
        values_of(manifest, data)
        return (VALUE,)
    if task == "classes":
        check_one_class(manifest, data)
        return manifest.classes
    classes = tuple(json.loads(checkpoint.read_metadata(run.saved)[CLASSES])) if run.saved else names_of_all(manifest)
    class_places(manifest, data, classes)
    if not run.saved:
        run.log.info(f"classes {len(classes)}, any number of them per video")
    return classes


def _checked(manifest: Manifest, source: Path, config: FinetuneConfig, classes: tuple[str, ...]) -> Manifest:
    """Returns the validation videos with labels numbered as in `classes` where a video has one class.

    Raises UserError for labels that do not fit the training's.
    """
    if config.head.task == "classes":
        return relabeled(manifest, source, classes)
    check_labeled(manifest, source)
    if config.head.task == "regression":
        values_of(manifest, source)
    else:
        class_places(manifest, source, classes)
    return manifest


def _numbered_as_before(run: RunContext[FinetuneConfig], manifest: Manifest, data: Path) -> Manifest:
    """Returns the videos with labels in the order of the checkpoint's logits, also with a new RUN/manifest.jsonl.

    Raises UserError if the classes differ from the checkpoint's.
    """
    assert run.saved
    before = tuple(json.loads(checkpoint.read_metadata(run.saved)[CLASSES]))
    now = manifest.classes
    if now == before:
        return manifest
    others = [name for name in (*before, *now) if name not in before or name not in now]
    if others:
        lacking = "lacks the class" if others[0] in before else "has the class"
        raise UserError(
            f"--data {data} {lacking} {others[0]!r}: expected the {len(before)} classes of {run.saved}; "
            "pass the data of the original run, or start a new run"
        )
    manifest = relabeled(manifest, data, before)
    write_manifest(manifest, run.folder / MANIFEST)
    return manifest


def _resolved(
    run: RunContext[FinetuneConfig],
    manifest: Manifest,
    data: Path,
    classes: tuple[str, ...],
    path: str | Path | None,
    options: Mapping[str, int | None],
) -> tuple[FinetuneConfig, Encoder | None, Tensor | None]:
    """Returns the config completed from data and files, the initial encoder, and the embeddings of the classes.

    A resumed run has the last two in its checkpoint.
    """
    config, info = run.config, run.log.info
    if run.saved:
        saved = checkpoint.read_state(run.saved)["config"]["model"]
        return dataclasses.replace(config, model=from_dict(EncoderConfig, saved)), None, None
    encoder, model = None, config.model
    if path is not None:
        encoder = load_encoder(path, frames=options.get("frames"), size=options.get("size"), heads=options.get("heads"))
        model = _described(encoder)
        info(f"encoder from {path}")
        config = dataclasses.replace(config, data=data_for(config.data, encoder, path))
        if becomes_gray(config.data, encoder):
            encoder = gray_encoder(encoder, config.data)
            info(GRAY)
    else:
        info("encoder with random weights (--scratch)")
    embeddings = None
    if config.head.text_embeddings:
        embeddings = read_text_embeddings(config.head.text_embeddings, classes)
    elif config.head.text_encoder:
        embeddings = embed_classes(config.head.text_encoder, classes, config.head.prompt)
    text_width = 0 if embeddings is None else embeddings.shape[1]
    mean, std = standard(manifest, data) if config.head.task == "regression" else (0.0, 1.0)
    model = dataclasses.replace(model, classes=len(classes), text_width=text_width, target_mean=mean, target_std=std)
    config = dataclasses.replace(config, model=model)
    try:
        config.check()
    except UserError as error:
        raise UserError(f"{error} (the encoder of {path} decides [model])") from None
    if config.optim.train_last > config.model.depth:
        raise UserError(
            f"optim.train_last {config.optim.train_last}: the encoder has {config.model.depth} blocks; "
            f"expected 0 to {config.model.depth}, or -1 for the whole encoder"
        )
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
        frames=encoder.trained_grid[0] * tubelet,
        size=encoder.trained_grid[1] * patch,
    )
