"""Principal components of all tokens, `pixels` as a checkpoint, and both in the verb."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mam2.engine.checkpoints.untrained import is_pixels, load_all_frozen
from mam2.engine.config.training import RunConfig
from mam2.engine.errors import UserError
from mam2.engine.evaluation import components
from mam2.engine.evaluation.components import Components, principal_components, probe_components
from mam2.engine.evaluation.features import extract_features
from mam2.engine.evaluation.linear_probe import folds, linear_probe
from mam2.engine.model.pixel_encoder import PixelEncoder
from tests.helpers.commands import exit_status
from tests.helpers.small_models import encoder as small_encoder

pytestmark = pytest.mark.usefixtures("float32")


def correlated(count, seed):
    """float16 [count, 300] with the variance of few directions, around a mean far from 0."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.randn(12, 300, generator=torch.Generator().manual_seed(9)) * torch.logspace(1, -1, 12)[:, None]
    return (torch.randn(count, 12, generator=generator) @ axes + 5).half().numpy()


@pytest.mark.parametrize("most", [4096, 20])
def test_components_are_those_of_the_singular_vectors(monkeypatch, most):
    monkeypatch.setattr(components, "MOST_VIDEOS", most)
    monkeypatch.setattr(components, "CHUNK_BYTES", 4 * 20 * 37)  # 37 columns of 20 videos: not a divisor of 300
    read = []
    original = components._part
    monkeypatch.setattr(components, "_part", lambda *given: read.append(original(*given)) or read[-1])
    train, test = correlated(45, 0), correlated(31, 1)
    rows, asked = np.flatnonzero(np.arange(45) % 9 != 3), np.arange(30, 10, -1)
    found = principal_components(train, rows, test, asked, count=8)
    assert max(part.numel() for part in read) * 4 <= components.CHUNK_BYTES

    known = torch.from_numpy(train[rows]).double()
    if most < len(rows):
        known = known[np.linspace(0, len(rows) - 1, most).round().astype(int)]
    axes = torch.linalg.svd(known - known.mean(0), full_matrices=False).Vh[:8]
    for features, got in ((train[rows], found.train), (test[asked], found.test)):
        expected = (torch.from_numpy(features).double() - known.mean(0)) @ axes.T
        signs = torch.sign((expected * got).sum(0))
        torch.testing.assert_close(got.double() * signs, expected, rtol=1e-3, atol=2e-2)


def test_no_more_components_than_the_features_have():
    features = np.zeros((30, 50), np.float32)
    features[:, :3] = np.random.default_rng(0).normal(size=(30, 3))
    found = principal_components(features, np.arange(25), features, np.arange(25, 30))
    assert [part.shape for part in found] == [(25, 3), (5, 3)]
    constant = np.ones((30, 50), np.float32)  # of an encoder that tells nothing apart
    found = principal_components(constant, np.arange(25), constant, np.arange(25, 30))
    assert [part.tolist() for part in found] == [25 * [[0.0]], 5 * [[0.0]]]


def test_number_of_components_is_the_one_that_answers_held_out_videos():
    """The class is in component 60: 40 are too few, and at 320 noise is most of the 200 videos' features."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 2
    features = torch.randn(400, 320, generator=generator)
    features[:, 60] += 4 * labels
    part = Components(features[:200], features[200:])
    result, count = probe_components([part], labels[:200], labels[200:], folds(200), torch.device("cpu"))
    assert count in (80, 160)
    alone = linear_probe(part.train[:, :count], labels[:200], part.test[:, :count], labels[200:], folds(200))
    assert torch.equal(result.right, alone.right)
    assert result.accuracy > 0.85


def test_every_video_is_held_out_once_and_groups_stay_whole():
    assert torch.equal(torch.stack(folds(23)).sum(0), torch.ones(23, dtype=torch.int64))
    assert [int(part.sum()) for part in folds(23)] == [5, 5, 5, 4, 4]
    groups = torch.tensor([7, 9, 11])[torch.arange(60) % 3]
    parts = folds(60, groups)
    assert sorted(groups[part].unique().tolist() for part in parts) == [[7], [9], [11]]
    assert len(folds(23, torch.zeros(23, dtype=torch.int64))) == 5


def test_several_held_out_parts_choose_by_their_mean():
    """One part alone, whose labels are wrong, prefers the strongest penalty; together with the others it does not."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(100) % 2
    features = torch.randn(100, 4, generator=generator)
    features[:, 0] += 6 * labels
    seen = labels.clone()
    parts = [torch.arange(100) // 20 == place for place in range(5)]
    seen[parts[0]] = 1 - labels[parts[0]]
    all_parts = linear_probe(features, seen, features, labels, parts)
    alone = [linear_probe(features, seen, features, labels, part) for part in parts]
    assert alone[0].validated < 0.1 < 0.6 < all_parts.validated
    mean = sum(linear_probe(features, seen, features, labels, [part]).validated for part in parts) / 5
    assert all_parts.validated <= mean + 1e-9  # each part alone chooses its own penalty


def test_two_parts_answer_what_neither_can():
    """Each part tells one of the two bits of the class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 4
    noise = [torch.randn(300, 30, generator=generator) for _ in range(2)]
    noise[0][:, 0] += 6 * (labels % 2)
    noise[1][:, 0] += 6 * (labels // 2)
    parts = [Components(rows[:200], rows[200:]) for rows in noise]
    held, cpu = folds(200), torch.device("cpu")
    alone = [probe_components([part], labels[:200], labels[200:], held, cpu)[0].accuracy for part in parts]
    both, count = probe_components(parts, labels[:200], labels[200:], held, cpu)
    assert max(alone) < 0.7
    assert both.accuracy > 0.9
    assert count in (20, 30)


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_the_gray_values_of_each_token_in_its_order(channels):
    encoder = PixelEncoder((2, 3, 2), (2, 4, 4), channels=channels)
    video = torch.randint(0, 256, (2, channels, 4, 12, 8), dtype=torch.uint8)
    tokens = encoder.encode(video)
    assert tokens.shape == (2, 12, 32)
    gray = (video.float().mean(1) / 255 - 0.449) / 0.226
    torch.testing.assert_close(tokens[1, 7].view(2, 4, 4), gray[1, 2:4, 0:4, 4:8])  # slot 1, row 0, column 1
    torch.testing.assert_close(encoder.encode(video / 255), tokens)
    found = extract_features(encoder, video.split(1), ["tokens", "time"], run=RunConfig())
    torch.testing.assert_close(found["tokens"], tokens.flatten(1).half())
    torch.testing.assert_close(found["time"], tokens.view(2, 2, 6, 32).mean(2).flatten(1))


def test_all_tokens_of_an_encoder_are_features():
    encoder = small_encoder()
    clips = torch.randint(0, 256, (3, 3, 4, 24, 24), dtype=torch.uint8)
    found = extract_features(encoder, [clips], ["tokens"], run=RunConfig())["tokens"]
    assert found.dtype == torch.float16
    with torch.no_grad():
        torch.testing.assert_close(found, encoder.encode(clips).flatten(1).half(), rtol=1e-3, atol=1e-3)


def test_pixels_have_the_clips_of_the_recipe_or_of_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cpu = torch.device("cpu")
    pixels, random = load_all_frozen([Path("pixels"), Path("random")], cpu, recipe="demo")
    assert (pixels.name, pixels.depth, pixels.encoder.grid) == ("pixels", 1, random.encoder.grid)
    assert pixels.data == random.data
    assert pixels.digest != random.digest
    with pytest.raises(UserError, match="pixels of which clips"):
        load_all_frozen([Path("pixels")], cpu)
    Path("pixels").mkdir()
    with pytest.raises(UserError, match="means the pixels of the clips"):
        is_pixels("pixels")


@pytest.fixture(scope="module")
def clips(tmp_path_factory, synthetic_clips):
    folder = tmp_path_factory.mktemp("clips")
    synthetic_clips(folder, train=32, test=16)
    return folder


def test_the_verb_compares_encoders_with_pixels_and_both_together(clips, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["probe", "pixels", "random", "--recipe", "demo", "--data", clips / "train", "--val", clips / "test"]
    arguments += ["--out", "p.json", "--cache", "cache"]
    assert exit_status(*arguments, "--probes", "linear", "knn", "--pools", "mean", "tokens") == 0
    scores = json.loads(Path("p.json").read_text())["scores"]
    assert [(s["checkpoint"], s["layer"], s["pool"], s["probe"]) for s in scores] == [
        ("pixels", 1, "mean", "linear"),
        ("pixels", 1, "mean", "knn"),
        ("pixels", 1, "tokens", "linear"),
        ("random", 3, "mean", "linear"),
        ("random", 3, "mean", "knn"),
        ("random", 3, "tokens", "linear"),
        ("random + pixels", 3, "tokens", "linear"),
    ]
    for score in scores:
        assert len(score["right"]) == json.loads(Path("p.json").read_text())["test"]
        assert score["accuracy"] == pytest.approx(score["right"].count("1") / len(score["right"]))
    assert [s["components"] > 0 for s in scores] == [s["pool"] == "tokens" for s in scores]
    assert scores[6]["gain"] == pytest.approx(scores[6]["accuracy"] - scores[2]["accuracy"])
    rows = capsys.readouterr().out.splitlines()
    (row,) = [row.split() for row in rows if row.startswith("random + pixels")]
    assert row[3:5] == ["3", "tokens"]
    assert row[-1] == "-"  # no k-NN of components

    assert exit_status(*arguments, "--probes", "knn", "--pools", "tokens") == 2
    assert "--pools tokens: only for the linear probe, found --probes knn; add linear" in capsys.readouterr().err
