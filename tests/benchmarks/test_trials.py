"""Probes of the benchmarks' trainings, on clips in memory."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks import defaults
from benchmarks.trials import prepared, real, trial
from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.config.training import RunConfig
from tests.helpers import small_models


def test_probes_of_clips_in_memory_tell_dark_from_bright():
    """Odd clips are bright: a linear probe of any encoder is correct."""
    generator = torch.Generator().manual_seed(0)
    encoder = small_models.encoder()
    shape = (40, 1, 1, 4, 24, 24, 3)
    labels = torch.arange(40) % 2
    clips = torch.randint(0, 64, shape, dtype=torch.uint8, generator=generator)
    clips += (128 * labels).to(torch.uint8).view(-1, 1, 1, 1, 1, 1, 1)
    split = prepared.Split(clips.numpy(), labels, {"dark": 1 - labels})
    data = prepared.Prepared({"train": split, "test": split}, np.empty(0), 16, 2, {})
    config = PretrainConfig(run=RunConfig(precision="float32"))
    found = trial.probe(encoder, data, config)
    assert found == {"test": {"probe": 1, "dark": 1}}
    assert defaults.accuracies(encoder, data) == (1, 1)

    rows = torch.arange(20), labels[:20], torch.arange(20, 40), labels[20:], torch.arange(20), torch.arange(20, 40)
    asked = real.RealClips(clips.numpy(), {"bright": real.Question(*rows)})
    answers = real.ask(encoder, asked, config)["bright"]
    assert {pool: answer.right for pool, answer in answers.items()} == dict.fromkeys(real.POOLS, 20 * "1")
    assert real.judge(encoder, asked, config) == 1
