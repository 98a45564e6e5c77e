"""The network that a config describes."""

from __future__ import annotations

from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.model.mam2 import MAM2
from mam2.engine.model.videomae import VideoMAE


def build_model(config: PretrainConfig, codebook_size: int = 0) -> MAM2 | VideoMAE:
    """Returns the model of `config.model.objective` with random weights, on the CPU.

    codebook_size: codebook size of the tokenizer whose codes MAM2 predicts; 0 if it predicts none.
    """
    return MAM2(config, codebook_size) if config.model.objective == "mam2" else VideoMAE(config)
