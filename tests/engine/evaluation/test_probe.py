"""Probes on features whose classes are known, their intervals, and the verb on small encoders."""

import json
import shutil
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from mam2.engine.checkpoints.frozen import load_frozen, load_pretrained
from mam2.engine.config.training import RunConfig
from mam2.engine.data.loader import ClipLoader
from mam2.engine.data.manifest import read_manifest
from mam2.engine.evaluation.attentive import RATES, attentive_probe
from mam2.engine.evaluation.feature_files import FeatureCache, FeatureSpec
from mam2.engine.evaluation.features import clip_features, extract_features, layer_tokens
from mam2.engine.evaluation.knn import knn
from mam2.engine.evaluation.linear_probe import bootstrap, held_out, linear_probe
from mam2.engine.train.pretrain import pretrain
from tests.helpers.commands import exit_status
from tests.helpers.paths import CLIPS
from tests.helpers.small_models import encoder as small_encoder

pytestmark = pytest.mark.usefixtures("float32")


def _clusters(count, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    centers = torch.eye(4).repeat(1, 3) * 3 + 100
    return centers[labels] + spread * torch.randn(count, 12, generator=generator), labels


def test_separable_features_are_separated():
    train, test = _clusters(200, 0.3, 0), _clusters(100, 0.3, 1)
    result = linear_probe(*train, *test)
    assert result.accuracy == 1.0
    assert result.right.all()


def test_noise_gives_chance():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1200, 16, generator=generator)
    labels = torch.randint(4, (1200,), generator=generator)
    result = linear_probe(features[:600], labels[:600], features[600:], labels[600:])
    assert result.interval[0] < 0.25 < result.interval[1] + 0.03
    assert result.accuracy < 0.35


def test_scale_of_the_features_does_not_matter():
    (train, labels), (test, test_labels) = _clusters(200, 2.0, 0), _clusters(200, 2.0, 1)
    scale = torch.logspace(-3, 3, 12)
    plain = linear_probe(train, labels, test, test_labels)
    scaled = linear_probe(train * scale, labels, test * scale, test_labels)
    assert scaled.accuracy == pytest.approx(plain.accuracy, abs=0.01)


def test_bootstrap_interval_matches_the_normal_one():
    values = (torch.arange(1000) % 10 < 3).double()
    low, high = bootstrap(values)
    half = 1.96 * (0.3 * 0.7 / 1000) ** 0.5
    assert low == pytest.approx(0.3 - half, abs=0.006)
    assert high == pytest.approx(0.3 + half, abs=0.006)


def test_bootstrap_of_a_ratio_weighs_by_the_denominator():
    low, high = bootstrap(torch.tensor([1.0, 100.0]), torch.tensor([2.0, 100.0]))
    assert low == pytest.approx(0.5)
    assert high == pytest.approx(1.0)


def test_neighbors_vote_after_the_common_part_is_taken_away():
    (train, labels), (test, test_labels) = _clusters(200, 0.3, 0), _clusters(100, 0.3, 1)
    assert torch.equal(knn(train, labels, test), test_labels)  # the cosines of these are all above 0.99
    assert torch.equal(knn(train[:8], labels[:8], test), test_labels)  # fewer than the neighbors asked for


@pytest.mark.slow
def test_attention_finds_what_the_mean_hides():
    """One of 16 cells contains the class; the others contain much larger noise that differs between videos."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 4
    cells = torch.zeros(400, 16, 12)
    cells[:, :, 4:] = 8 * torch.randn(400, 16, 8, generator=generator)
    cells[:, :, :4] = 8 * torch.randn(400, 16, 4, generator=generator)
    place = torch.randint(16, (400,), generator=generator)
    cells[torch.arange(400), place] = 0
    cells[torch.arange(400), place, labels] = 20
    cells[torch.arange(400), place, 11] = 60  # the direction that a query can attend to
    tokens = cells.half().numpy()
    answers, rate = attentive_probe(tokens[:300], labels[:300], tokens[300:], held_out(300), 4, torch.device("cpu"))
    attentive = (answers == labels[300:]).double().mean()
    mean = linear_probe(cells[:300].mean(1), labels[:300], cells[300:].mean(1), labels[300:]).accuracy
    assert attentive > 0.9
    assert mean < attentive - 0.15
    assert rate in RATES


@pytest.fixture(scope="module")
def encoders(clips, tmp_path_factory, small):
    """A run of MAM2 and one of VideoMAE on the same clips; two layers each."""
    runs = []
    for name, values in {"mam2": {}, "videomae": {"objective": "videomae"}}.items():
        run = tmp_path_factory.mktemp(name)
        config = small(model={"depth": 2, **values}, optim={"epochs": 1.0})
        pretrain(config, clips / "train", run, progress=False)
        runs.append(run)
    return runs


@pytest.fixture(scope="module")
def clips(tmp_path_factory, synthetic_clips):
    folder = tmp_path_factory.mktemp("clips")
    synthetic_clips(folder, train=32, test=16)
    return folder


@pytest.mark.slow
def test_the_verb_probes_several_checkpoints_and_layers(clips, encoders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mam2.engine.evaluation.attentive.FEWEST_STEPS", 20)  # its accuracy is not tested
    arguments = ["probe", *map(str, encoders), "--data", str(clips / "train"), "--val", str(clips / "test")]
    arguments += ["--layers", "1", "2", "--out", str(tmp_path / "p.json"), "--cache", str(tmp_path / "cache")]
    assert exit_status(*arguments) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "p.json").read_text())
    assert (found["train"], found["test"], found["both"], found["classes"]) == (32, 16, 0, 8)
    assert found["commonest"] == 1 / 8
    assert [(s["checkpoint"], s["layer"], s["probe"]) for s in found["scores"]] == [
        (str(run), layer, probe)
        for run in encoders
        for layer in (1, 2)
        for _ in ("mean", "time")
        for probe in ("linear", "attentive", "knn")
    ]
    assert [s["pool"] for s in found["scores"]] == 4 * (3 * ["mean"] + 3 * ["time"])
    for score in found["scores"]:
        assert score["interval"][0] <= score["accuracy"] <= score["interval"][1]
        assert f"{100 * score['accuracy']:.1f} % (" in printed
    reference = found["scores"][6:12]
    assert [score["gain"] for score in reference] == 6 * [0]
    for score, first in zip(found["scores"][12:18], reference, strict=True):
        assert score["gain"] == pytest.approx(score["accuracy"] - first["accuracy"])

    files = sorted((tmp_path / "cache").iterdir())
    assert len(files) == 2 * 2 * 3 * 2  # checkpoints, layers, kinds (two pools, and the cells), lists
    stamps = [file.stat().st_mtime_ns for file in files]
    assert exit_status(*arguments) == 0
    assert capsys.readouterr().out == printed
    assert [file.stat().st_mtime_ns for file in sorted((tmp_path / "cache").iterdir())] == stamps


@pytest.mark.slow
def test_kept_features_are_those_of_the_encoder(clips, encoders, tmp_path):
    frozen = load_frozen(encoders[0], torch.device("cpu"))
    manifest = read_manifest(clips / "test", progress=False)
    mean, cells = FeatureSpec(frozen, 2, "mean"), FeatureSpec(frozen, 2, "cells")
    found = FeatureCache(tmp_path).get(manifest, [mean, cells], batch=5, progress=False)
    model, _ = load_pretrained(encoders[0], torch.device("cpu"))
    with ClipLoader(manifest, frozen.data, batch=16, device="cpu", seed=0, train=False) as loader:
        tokens = torch.cat([model.encode(batch.video) for batch in loader.evaluate()])
    torch.testing.assert_close(torch.from_numpy(found[mean].copy()), tokens.mean(1), rtol=1e-4, atol=1e-5)
    # this grid has as many cells as tokens: the mean over cells is the mean over tokens
    torch.testing.assert_close(torch.from_numpy(found[cells].mean(1, dtype="f4")), tokens.mean(1), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_features_of_clips_in_memory_are_means_of_the_encoders_tokens(precision: Literal["float32", "bfloat16"]):
    encoder, run = small_encoder().train(), RunConfig(precision=precision)
    clips = torch.randint(0, 256, (5, 3, 4, 24, 24), dtype=torch.uint8)
    found = extract_features(encoder, clips.split(2), ["mean", "time", "cells"], run=run)
    assert not encoder.training
    assert not any(features.requires_grad for features in found.values())
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        tokens = torch.cat([encoder.encode(part) for part in clips.split(2)]).float()
    torch.testing.assert_close(found["mean"], tokens.mean(1))
    torch.testing.assert_close(found["time"], tokens.unflatten(1, (2, 9)).mean(2).flatten(1))
    torch.testing.assert_close(found["cells"], tokens.half())  # this grid has as many cells as tokens
    first = clip_features(encoder, clips, [(1, "mean"), (2, "mean")], run=RunConfig(precision="float32"))
    torch.testing.assert_close(first[1, "mean"], layer_tokens(encoder, clips, [1])[1].mean(1))
    assert not torch.equal(first[1, "mean"], first[2, "mean"])


@pytest.mark.slow
def test_features_are_kept_apart_by_precision(clips, encoders, tmp_path):
    frozen = load_frozen(encoders[0], torch.device("cpu"))
    manifest, want = read_manifest(clips / "test", progress=False), FeatureSpec(frozen, 2, "mean")
    precise, rounded = (
        FeatureCache(tmp_path, RunConfig(precision=precision)).get(manifest, [want], batch=16, progress=False)[want]
        for precision in ("float32", "bfloat16")
    )
    assert len(list(tmp_path.iterdir())) == 2
    difference = np.linalg.norm(precise - rounded) / np.linalg.norm(precise)
    assert 1e-5 < difference < 0.02


@pytest.mark.slow
def test_layers_are_the_blocks_outputs(encoders):
    encoder = load_frozen(encoders[0], torch.device("cpu")).encoder
    video = torch.randint(0, 256, (2, 3, 8, 32, 32), dtype=torch.uint8)
    tokens = layer_tokens(encoder, video, [1, 2])
    torch.testing.assert_close(encoder.norm(encoder.blocks[1](tokens[1])), tokens[2])
    assert not encoder.blocks[0]._forward_hooks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--layers": "3"}, "layers 1 to 2"),
        ({"--data": "list.csv"}, "no labels"),
        ({"--val": "other"}, "no training video has the label 'somersault'"),
    ],
)
def test_what_cannot_be_probed_is_said_in_a_line(clips, encoders, tmp_path, capsys, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    video = next((clips / "test" / "up").iterdir())
    Path("list.csv").write_text(f"{video}\n")
    shutil.copytree(clips / "test" / "up", "other/somersault")
    arguments = {"--data": str(clips / "train"), "--val": str(clips / "test")} | change
    assert exit_status("probe", encoders[0], *[part for pair in arguments.items() for part in pair]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_clips_of_many_formats(encoders, tmp_path, capsys):
    lists = ["--data", str(CLIPS / "train.csv"), "--val", str(CLIPS / "test.csv")]
    places = ["--out", str(tmp_path / "p.json"), "--cache", str(tmp_path)]
    assert exit_status("probe", encoders[0], *lists, *places, "--probes", "linear", "knn") == 0
    assert capsys.readouterr().out.startswith("checkpoint")
    found = json.loads((tmp_path / "p.json").read_text())
    assert (found["train"], found["test"], found["classes"]) == (20, 5, 5)
    unusable = len(read_manifest(CLIPS, progress=False).skipped)
    assert exit_status("probe", encoders[0], "--data", CLIPS, *places, "--probes", "linear", "--pools", "mean") == 0
    assert f", {unusable} left out" in capsys.readouterr().out
    assert json.loads((tmp_path / "p.json").read_text())["skipped"] == unusable > 0
