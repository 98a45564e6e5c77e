"""Pre-training: video files → clips (→ codes) → MAM2 or VideoMAE → checkpoints.

The clips and masks of a step are a pure function of (seed, step). Started by torchrun, every process works on its part
of each batch; rank 0 writes the run folder, in which the tokenizer of a run that predicts codes lies beside what every
run has, as `tokenizer.safetensors`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mam2.engine.config.pretrain import PretrainConfig, check, micro_batches_per_step
from mam2.engine.costs import step_flops
from mam2.engine.data.batch import Batch
from mam2.engine.files import check_apart
from mam2.engine.model.attention_tuning import shapes_of, use_fastest
from mam2.engine.model.mam2 import MAM2
from mam2.engine.model.videomae import VideoMAE
from mam2.engine.runtime.device import matmul_dtype
from mam2.engine.tokenizer.cache import check_cache
from mam2.engine.tokenizer.files import load_vqgan
from mam2.engine.tokenizer.source import open_cache, prepare_codes, with_codes
from mam2.engine.tokenizer.vqgan import VQGAN
from mam2.engine.train.loop import Loop, TrainResult
from mam2.engine.train.session import Session, open_session
from mam2.engine.train.step import TrainStep

SHOWN = {
    "loss/appearance": "codes {:.2f}",
    "loss/motion": "motion {:.4g}",
    "loss/motion_relative": "({:.0%} of no motion)",
    "loss/pixels": "pixels {:.3f}",
    "accuracy/codes": "right codes {:.0%}",
}


def pretrain(
    config: PretrainConfig, data: str | Path, out: str | Path, *, resume: bool = False, progress: bool = True
) -> TrainResult:
    """Pre-trains an encoder on the videos of a folder or list and leaves checkpoints and logs in `out`.

    Args:
        config: a recipe's values; see `mam2.engine.config.pretrain`.
        data: a folder (with or without class folders) or an annotation list.
        out: the run folder; made if missing. One that holds a checkpoint is only touched with `resume`. Several
            machines must share it.
        resume: go on from the newest whole checkpoint in `out`, if there is one.
        progress: draw a progress bar (only on a terminal).

    Raises:
        UserError: for data, configs and checkpoints that cannot be used.
        PeerFailed: another process of the run has failed, and says why.
    """
    check(config)
    check_apart(data, out)
    with open_session(config, out, resume=resume, progress=progress) as session:
        return Loop(session, _Pretraining(session, Path(data))).train()


class _Pretraining:
    """The task of a loop that pre-trains."""

    def __init__(self, session: Session[PretrainConfig], data: Path) -> None:
        config, world, device = session.config, session.world, session.device
        self.title, self.shown = "pre-training", SHOWN
        if config.loss.appearance_target == "pixels":
            self.shown = SHOWN | {"loss/appearance": SHOWN["loss/pixels"]}
        self.metadata: dict[str, str] = {}
        named: list[VQGAN] = []  # of rank 0, before the videos are opened, which can take hours
        if config.tokenizer.path and config.needs_codes:
            world.broadcast(lambda: named.append(load_vqgan(config.tokenizer.path)))
        if config.tokenizer.cache and config.needs_codes:
            world.broadcast(lambda: check_cache(config.tokenizer.cache))
        manifest = session.read_videos(data)
        cache = open_cache(config, manifest, world, progress=session.progress)
        self.loader = session.open_loader(cache.has if cache else None)
        self._device = device
        self._codes = None
        if config.needs_codes:
            self._codes = prepare_codes(
                config,
                self.loader,
                cache,
                session.folder,
                device,
                world,
                session.log.info,
                named=named[0] if named else None,
                progress=session.progress,
            )
        source = (self._codes.codebook_size, self._codes.tokenizer) if self._codes else ()
        self.flops = sum(step_flops(config, *source).values())
        clips = config.optim.batch // (world.size * micro_batches_per_step(config, world.size))
        dtype, shapes = matmul_dtype(config.run, device), shapes_of(config, clips)
        for line in use_fastest(shapes, device, dtype, run=session.folder, broadcast=world.broadcast):
            session.log.info(line)
        # Weights are drawn after the tokenizer's training, which uses the generator as well.
        torch.manual_seed(config.run.seed)
        codes = self._codes.codebook_size if self._codes else 0
        model = MAM2(config, codes) if config.model.objective == "mam2" else VideoMAE(config)
        self.train_step = TrainStep(config, model, device, world)

    def batches(self, first_pass: int) -> Iterator[tuple[Batch, Tensor | None]]:
        return with_codes(self.loader.stream(first_step=first_pass), self._codes, self._device)

    def after_step(self, step: int, steps: int) -> None:
        pass
