"""Pre-training: video files → clips (→ codes) → MAM2 or VideoMAE → checkpoints.

The clips and masks of a step are pure functions of (seed, step). Under torchrun every process handles its part of each
batch, and rank 0 writes the run folder. A run that predicts codes also stores its tokenizer there, as
`tokenizer.safetensors`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mam2.engine.checkpoints.checkpoint import read_config
from mam2.engine.config.pretrain import PretrainConfig, check
from mam2.engine.costs import step_flops
from mam2.engine.data.batch import Batch
from mam2.engine.data.manifest import Manifest
from mam2.engine.data.sets import Sources, sources_of, training_sources, with_sources
from mam2.engine.data.sources import check_source
from mam2.engine.errors import UserError
from mam2.engine.files import check_apart
from mam2.engine.model.attention_tuning import shapes_of, tune_attention
from mam2.engine.model.build import build_model
from mam2.engine.runtime.device import matmul_dtype
from mam2.engine.tokenizer.cache import CodeCache, check_cache
from mam2.engine.tokenizer.files import fingerprint, load_vqgan
from mam2.engine.tokenizer.prepare import FILE
from mam2.engine.tokenizer.source import open_cache, prepare_codes, use_recorded_clips, with_codes
from mam2.engine.tokenizer.vqgan import VQGAN
from mam2.engine.train.description import Description, describe_task
from mam2.engine.train.held_out import HeldOut
from mam2.engine.train.initial_weights import (
    InitialWeights,
    complete_config,
    describe_schedule,
    matching_weights,
    metadata_of,
    read_initial_weights,
    take_moments,
    take_weights,
)
from mam2.engine.train.loop import Loop, TrainResult
from mam2.engine.train.session import Available, RunContext, Session, Setup, open_session
from mam2.engine.train.step import PretrainStep

PROGRESS_FORMAT = {
    "loss/appearance": "codes {:.2f}",
    "loss/motion": "motion {:.4g}",
    "loss/motion_relative": "({:.0%} of no motion)",
    "loss/pixels": "pixels {:.3f}",
    "teacher/rank": "rank {:.1f}",
    "accuracy/codes": "correct codes {:.0%}",
}


def pretrain(
    config: PretrainConfig,
    data: Sources,
    out: str | Path,
    *,
    checkpoint: str | Path | None = None,
    checkpoint_options: Mapping[str, int | None] | None = None,
    checkpoint_moments: bool = False,
    val: Sources = (),
    resume: bool = False,
    progress: bool = True,
) -> TrainResult:
    """Pre-trains an encoder on the videos of a folder or list; writes checkpoints and logs to `out`.

    Args:
        config: a recipe's values; see `mam2.engine.config.pretrain`.
        data: a folder (with or without class folders) or an annotation list; or several, with their shares in
            `config.data.weights`. Empty: those of `config.data.sets`.
        out: the run folder; created if missing. A folder with a checkpoint needs `resume`. Several
            machines must share it.
        checkpoint: initial weights: a run or checkpoint of MAM2, a .pth of VideoMAE or VideoMAE v2, or a Hugging Face
            folder; None: random weights. The encoder must match the config; regressor and decoders are loaded if they
            match; positions are resampled; the schedule starts again. The log lists the loaded parts. A resumed run
            does not read it.
        checkpoint_options: frames, size, heads and decoder_heads for `load_model`, if the file does not state them.
        checkpoint_moments: also load the optimizer's moments of the loaded parameters from the checkpoint, a run of
            mam2 pretrain; otherwise they start at 0.
        val: validation videos, like `data`, or none; their losses are logged as configured in `config.validation`.
        resume: continue from the newest complete checkpoint in `out`, if there is one.
        progress: draw a progress bar (only on a terminal).

    Raises:
        UserError: data, config or checkpoint cannot be used.
        PeerFailed: another process of the run has failed; it prints the reason.
    """
    check(config)
    if checkpoint_moments and checkpoint is None and not resume:
        raise UserError("--checkpoint-moments: needs --checkpoint with the run whose moments to take")
    sources, held_out = training_sources(config.data, data), sources_of(val, "--val")
    config = dataclasses.replace(config, data=with_sources(config.data, sources))
    for source in sources:
        check_apart(source, out)
    for source in held_out:
        check_source(source)
        check_apart(source, out)
    setup = _PretrainSetup(checkpoint, checkpoint_options or {}, checkpoint_moments)
    with open_session(config, sources, out, setup=setup, resume=resume, progress=progress) as session:
        return Loop(session, _Pretraining(session, setup, held_out)).train()


class _PretrainSetup(Setup[PretrainConfig]):
    """Reads the initial weights, and opens the tokenizer and the cache of codes."""

    start: InitialWeights | None = None
    """Initial weights of a new run, if they are not random."""

    vqgan: VQGAN | None = None
    """On rank 0: the tokenizer of the config, if codes are predicted."""
    cache: CodeCache | None = None

    def __init__(self, checkpoint: str | Path | None, options: Mapping[str, int | None], moments: bool) -> None:
        self._checkpoint, self._options, self._moments = checkpoint, options, moments

    def check(self, run: RunContext[PretrainConfig]) -> None:
        options, path = run.config.tokenizer, self._checkpoint
        if path is not None and not run.saved:
            self.start = run.world.broadcast(lambda: read_initial_weights(path, self._options, moments=self._moments))
            run.world.broadcast(lambda: check(complete_config(run.config, self.start)) if self.start else None)
            same = self.start.encoder.channels == run.config.data.channels
            own = self.start.tokenizer if same else None
            if own and run.config.needs_codes and not (options.path or options.cache):
                run.log.info(f"codes   from the tokenizer that the checkpoint was trained with, {own}")
                run.world.broadcast(lambda: self._load(str(own)))
        if run.config.needs_codes and options.path:
            run.world.broadcast(lambda: self._load(options.path))
        if run.config.needs_codes and options.cache:
            run.world.broadcast(lambda: check_cache(options.cache))

    def _load(self, path: str) -> None:
        self.vqgan = load_vqgan(path)

    def complete(self, run: RunContext[PretrainConfig], manifest: Manifest) -> tuple[PretrainConfig, Manifest]:
        config = run.config
        if self.start:
            config = complete_config(config, self.start)
        elif run.saved:
            model = read_config(run.saved).model
            trained = dataclasses.replace(config.model, frames=model.frames, size=model.size)
            config = dataclasses.replace(config, model=trained)
        return config, manifest

    def available(self, run: RunContext[PretrainConfig], manifest: Manifest) -> Available | None:
        self.cache = open_cache(run.config, manifest, run.world, progress=run.progress)
        return self.cache.has if self.cache else None

    @property
    def decodes(self) -> bool:
        return not (self.cache and self.cache.clips)


class _Pretraining:
    """The task of a loop that pre-trains: its extras are the codes of a batch, or None."""

    def __init__(self, session: Session[PretrainConfig], setup: _PretrainSetup, val: Sequence[Path]) -> None:
        config, world, device = session.config, session.world, session.device
        self._session = session
        self._codes = None
        if config.needs_codes:
            self._codes = prepare_codes(
                config,
                session.loader,
                setup.cache,
                session.folder,
                device,
                world,
                session.log.info,
                named=setup.vqgan,
                progress=session.progress,
            )
        use_recorded_clips(session.loader, setup.cache, session.log.info)
        dtype, shapes = matmul_dtype(config.run, device), shapes_of(config, session.clips_per_micro_batch)
        choices, lines = tune_attention(shapes, device, dtype, run=session.folder, broadcast=world.broadcast)
        for line in lines:
            session.log.info(line)
        # Weights are drawn after the tokenizer's training, which uses the same generator.
        torch.manual_seed(config.run.seed)
        codebook_size = self._codes.codebook_size if self._codes else 0
        model = build_model(config, codebook_size)
        model.set_attention(choices)
        start = setup.start
        if start:
            same = world.broadcast(lambda: _same_tokenizer(start, session.folder))
            for line in take_weights(model, config, start, same_tokenizer=same):
                session.log.info(line)
            session.log.info(describe_schedule(config, moments=start.moments is not None))
        self._metadata = metadata_of(start, session.saved)
        match = matching_weights(model, config, start, same_tokenizer=same) if start and start.moments else None
        self.train_step = PretrainStep(config, model, device, world)
        if start and match:
            session.log.info(take_moments(model, self.train_step.optimizer, start, match.names))
        self._held_out = HeldOut(session, val, codebook_size, choices, model) if val else None

    def batches(self, first_micro_batch: int) -> Iterator[tuple[Batch, Tensor | None]]:
        session = self._session
        stream, timer = session.loader.stream(first_step=first_micro_batch), self.train_step.extras_timer
        return with_codes(stream, self._codes, session.device, timer if self._codes else None)

    def after_step(self, step: int, steps: int) -> None:
        if self._held_out:
            self._held_out.measure_if_due(step, steps)

    def describe(self) -> Description:
        config = self._session.config
        tokenizer = (self._codes.codebook_size, self._codes.tokenizer) if self._codes else ()
        formats = PROGRESS_FORMAT
        if config.loss.appearance_target == "pixels":
            formats = formats | {"loss/appearance": formats["loss/pixels"]}
        elif config.loss.appearance_target == "latents":
            formats = formats | {"loss/appearance": "features {:.3f}"}
        found = describe_task(
            "pre-training",
            self._session,
            self.train_step,
            flops_per_clip=sum(step_flops(config, *tokenizer).values()),
            progress_format=formats,
            metadata=self._metadata,
        )
        return dataclasses.replace(found, lines=(f"clip    {config.clip_sizes}", *found.lines))


def _same_tokenizer(start: InitialWeights, folder: Path) -> bool:
    """Returns whether a run predicts the codes of the tokenizer with which its initial weights were trained."""
    own = folder / FILE
    if not (start.tokenizer and own.is_file()):
        return False
    return fingerprint(load_vqgan(start.tokenizer)) == fingerprint(load_vqgan(own))
