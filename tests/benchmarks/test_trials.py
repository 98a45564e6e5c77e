"""Probes of the benchmarks' trainings, on clips in memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import defaults, early_stage
from benchmarks.trials import prepared, real, trial, worker
from benchmarks.trials.jobs import Job
from benchmarks.trials.settings import QUICK
from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.config.training import RunConfig
from mam2.engine.evaluation.attentive import attentive_probe
from mam2.engine.model.pixel_encoder import PixelEncoder
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
    assert {kind: answer.right for kind, answer in answers.items()} == dict.fromkeys(real.KINDS, 20 * "1")
    pixels = real.pixel_answers(asked)["bright"]
    assert {kind: answer.right for kind, answer in pixels.items()} == dict.fromkeys(["pixels", "tokens"], 20 * "1")
    assert real.judge(encoder, asked, config) == 1


def test_components_of_tokens_see_what_averages_lose():
    """Every clip has one bright patch; the class is its side. The mean over tokens of raw pixels says nothing of it."""
    generator = torch.Generator().manual_seed(0)
    count = 60
    labels = torch.arange(count) % 2
    clips = torch.randint(0, 64, (count, 1, 1, 2, 16, 16, 1), dtype=torch.uint8, generator=generator)
    for clip, label in zip(clips, labels.tolist(), strict=True):
        column = 8 * label
        clip[0, 0, :, :8, column : column + 8] += 128
    rows = torch.arange(40), labels[:40], torch.arange(40, count), labels[40:]
    asked = real.RealClips(clips.numpy(), {"side": real.Question(*rows, torch.arange(40), torch.arange(40, count))})
    encoder = PixelEncoder((1, 2, 2), (2, 8, 8), channels=1)
    answers = real.ask(encoder, asked, PretrainConfig(run=RunConfig(precision="float32")))["side"]
    assert answers["tokens"].accuracy == 1
    assert answers["mean"].accuracy < 0.8
    assert answers["tokens"].right == real.pixel_answers(asked)["side"]["tokens"].right


def test_attentive_probes_keep_time_and_choose_their_setting_on_other_groups(monkeypatch):
    """Every clip is bright in one of two time slots, which is its class; raw pixels have no positions."""
    count = 60
    labels, groups = torch.arange(count) % 2, torch.arange(count) // 4
    clips = torch.randint(
        0, 64, (count, 1, 1, 4, 16, 16, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    for clip, label in zip(clips, labels.tolist(), strict=True):
        clip[0, 0, 2 * label : 2 * label + 2] += 128
    question = real.Question(
        torch.arange(40), labels[:40], torch.arange(40, count), labels[40:], groups[:40], groups[40:]
    )
    held = []

    def fit(train, train_labels, test, held_out, *more):
        held.append(held_out)
        return attentive_probe(train, train_labels, test, held_out, *more)

    monkeypatch.setattr(real, "attentive_probe", fit)
    encoder = PixelEncoder((2, 2, 2), (2, 8, 8), channels=1)
    config = PretrainConfig(run=RunConfig(precision="float32"))
    kinds = ["mean", "attentive", "attentive-time"]
    answers = real.ask(encoder, real.RealClips(clips.numpy(), {"when": question}), config, kinds)["when"]
    assert list(answers) == kinds, "only the kinds that were asked for"
    assert answers["attentive-time"] == real.Answer(1.0, 20 * "1")
    assert max(answers["mean"].accuracy, answers["attentive"].accuracy) < 0.8
    for part in held:
        assert set(groups[:40][part].tolist()).isdisjoint(groups[:40][~part].tolist())
        assert 0 < part.sum() < 40


@pytest.mark.parametrize("group", ["real", "real sweep"])
def test_encoders_of_reported_trainings_on_real_clips_are_kept(group, tmp_path, monkeypatch):
    """So that they can be asked again; the encoders of a sweep over learning rates are not kept."""
    encoder = small_models.encoder()
    monkeypatch.setattr(worker.prepared, "load", lambda folder, codes_per_patch: None)
    monkeypatch.setattr(worker.trial, "pretrain", lambda config, clips: trial.Pretrained(encoder, 3, {}))
    monkeypatch.setattr(worker.real, "load_questions", lambda folder: None)
    monkeypatch.setattr(worker.real, "ask", lambda *_: {"words": {"time": real.Answer(0.5, "10")}})
    monkeypatch.setattr(worker.real, "judge", lambda *_: 0.5)
    job = Job(group, "mam2-muon", (), 1.0, 1e-3, 0, data="real")
    found = worker.run_job(QUICK, tmp_path, job)
    assert found["steps"] == 3
    kept = {file.name: load_file(file) for file in tmp_path.rglob("*.safetensors")}
    assert list(kept) == ([worker.encoder_file(tmp_path, job).name] if group == "real" else [])
    for state in kept.values():
        assert all(torch.equal(tensor, encoder.state_dict()[name]) for name, tensor in state.items())


def test_patch_embeddings_are_exchanged_between_encoders():
    """A row per encoder; each mixture has the other's patch embedding, and a lower rate changes it less."""
    generator = np.random.default_rng(0)
    labels = torch.arange(32) % 2
    train = generator.integers(0, 256, (32, 1, 1, 8, 40, 40, 3), dtype=np.uint8)
    splits = {"train": prepared.Split(train, labels), "test": prepared.Split(train[:20], labels[:20])}
    data = prepared.Prepared(splits, generator.integers(0, 16, (32, 1, 1, 100, 2)), 16, 2, {})
    found = list(early_stage.rows(QUICK, data, epochs=3, base_lr=0.5, muon_rate=4.0, seed=0))
    assert [row[:2] for row in found] == [
        ("random", "its own"),
        ("3 epochs, base lr 0.5", "its own"),
        ("3 epochs, base lr 0.5", "random"),
        ("random", "of 3 epochs, base lr 0.5"),
        ("3 epochs, base lr 0.125, muon_rate 4", "its own"),
    ]
    largest = [row[2] for row in found]
    assert (largest[2], largest[3]) == (largest[0], largest[1])
    assert float(largest[0]) < float(largest[4]) < float(largest[1])
