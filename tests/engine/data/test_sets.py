"""Several data sets: one manifest, shares in the loader, sources that cannot be used."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from pathlib import Path

import pytest
import torch

from mam2.engine.config.finetune import FinetuneConfig
from mam2.engine.config.pretrain import PretrainConfig, check
from mam2.engine.config.recipe import from_dict, load_recipe, shareable, to_dict
from mam2.engine.config.training import DataConfig
from mam2.engine.data.manifest import Manifest, VideoSet, read_manifest, read_saved_manifest, write_manifest
from mam2.engine.data.moved import follow_sets
from mam2.engine.data.sets import (
    join_sets,
    parts_of,
    read_sets,
    set_names,
    sources_of,
    training_sources,
    with_sources,
)
from mam2.engine.errors import UserError
from tests.helpers.commands import outcome
from tests.helpers.loaders import CONFIG, assert_same, damaged, open_loader, take


@pytest.fixture(scope="module")
def halves(videos: Manifest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The ten videos in two folders: seven and three."""
    folder = tmp_path_factory.mktemp("halves")
    for number, video in enumerate(videos.videos):
        target = folder / ("large" if number < 7 else "small") / Path(video.path).name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(video.path, target)
    return folder / "large", folder / "small"


def test_a_manifest_of_two_sets_survives_its_file_and_can_be_split(halves, tmp_path):
    (halves[1] / "broken.mp4").write_bytes(b"no video")
    both = read_sets(halves, progress=False)
    (halves[1] / "broken.mp4").unlink()
    assert both.sets == (VideoSet(str(halves[0]), 7, 0), VideoSet(str(halves[1]), 3, 1))
    assert [Path(video.path).parent for video in both.videos] == [halves[0]] * 7 + [halves[1]] * 3
    write_manifest(both, tmp_path / "manifest.jsonl")
    assert read_saved_manifest(tmp_path / "manifest.jsonl") == both
    assert [(len(part.videos), len(part.skipped)) for part in parts_of(both)] == [(7, 0), (3, 1)]
    assert join_sets(parts_of(both), halves) == both
    assert set_names(both) == ["large", "small"]
    other = dataclasses.replace(both, sets=(VideoSet("a/train", 7, 0), VideoSet("b/train", 3, 1)))
    assert set_names(other) == ["a/train", "b/train"]


def test_one_set_stays_what_it_was(halves, tmp_path):
    alone = read_sets(halves[:1], progress=False)
    assert alone == read_manifest(halves[0], progress=False)
    write_manifest(alone, tmp_path / "manifest.jsonl")
    assert (tmp_path / "manifest.jsonl").read_text().splitlines()[0] == '{"classes": []}'


def test_labels_are_kept_only_where_all_sets_have_the_same_classes(videos):
    same = join_sets([videos, videos], [Path("a"), Path("b")])
    assert (same.classes, [video.label for video in same.videos]) == (
        videos.classes,
        2 * [video.label for video in videos.videos],
    )
    other = join_sets([videos, dataclasses.replace(videos, classes=("x", "y"))], [Path("a"), Path("b")])
    assert (other.classes, {video.label for video in other.videos}) == ((), {-1})


def test_the_loader_shows_the_shares_on_any_number_of_ranks(halves):
    both, config = read_sets(halves, progress=False), dataclasses.replace(CONFIG, weights=(1.0, 3.0), views=2)
    alone = take(both, 6, config, batch=8)
    for step in alone:
        assert (step.index >= 7).sum() == 6  # three quarters of the batch, in two views each
    ranks = [take(both, 6, config, batch=4, rank=rank, world=2) for rank in range(2)]
    for number, step in enumerate(alone):
        halves_of_step = [ranks[rank][number] for rank in range(2)]
        assert torch.equal(step.clip, torch.cat([part.clip for part in halves_of_step]))
        assert torch.equal(step.index, torch.cat([part.index for part in halves_of_step]))
    for step, again in zip(alone[3:], take(both, 3, dataclasses.replace(config, threads=1), batch=8, first_step=3),
                           strict=True):  # fmt: skip
        assert_same(step, again)


def test_a_set_of_weight_one_is_the_set_alone(halves):
    """In a mixture the videos of a set have the order and the clips that they have alone."""
    alone = take(read_manifest(halves[0], progress=False), 7, batch=1)
    mixed = take(read_sets(halves, progress=False), 14, dataclasses.replace(CONFIG, weights=(1.0, 1.0)), batch=1)
    own = [batch for batch in mixed if batch.index < 7]
    for one, other in itertools.zip_longest(alone, own):
        assert_same(one, other)


def test_a_broken_video_is_replaced_by_one_of_its_set(halves, tmp_path):
    both = damaged(read_sets(halves, progress=False), tmp_path, 8)
    config = dataclasses.replace(CONFIG, weights=(1.0, 1.0))
    with open_loader(both, config, batch=2) as loader:
        shown = [batch.index.tolist() for batch in itertools.islice(loader.stream(), 12)]
        assert [sum(index >= 7 for index in indices) for indices in shown] == [1] * 12
        assert loader.order.seen(24) == [12, 12]
        assert [Path(skipped.path).name for skipped in loader.skipped] == ["damaged 8.mp4"]
    assert 8 not in itertools.chain(*shown)


def test_a_set_of_which_nothing_can_be_decoded_is_named(videos):
    unknown = dataclasses.replace(videos, videos=tuple(dataclasses.replace(v, fps=0.0) for v in videos.videos))
    both = join_sets([videos, unknown], [Path("good"), Path("bad")])
    with pytest.raises(UserError, match=r"^bad: none of its videos can be decoded here"):
        open_loader(both, dataclasses.replace(CONFIG, stride=0, fps=5.0, weights=(1.0, 1.0)))


def test_moved_sets_are_found_again_one_by_one(halves, tmp_path):
    both = read_sets(halves, progress=False)
    for half in halves:
        shutil.copytree(half, tmp_path / half.name)
    moved = [tmp_path / half.name for half in halves]
    found, line = follow_sets(both, moved, progress=False)
    assert [video.content for video in found.videos] == [video.content for video in both.videos]
    assert {Path(video.path).parent for video in found.videos[7:]} == {tmp_path / "small"}
    assert [each.source for each in found.sets] == list(map(str, moved))
    assert line.startswith("7 of 7 videos found")
    assert follow_sets(both, halves, progress=False) == (both, "")
    with pytest.raises(UserError, match=r"expected the 2 data sets \(large, small\).*found 1"):
        follow_sets(both, halves[:1], progress=False)
    with pytest.raises(UserError, match=r"lacks 7 of the 7 videos"):
        follow_sets(both, halves[::-1], progress=False)


@pytest.mark.parametrize(
    ("values", "paths", "message"),
    [
        ({"weights": (3.0,)}, ("a", "b"), r"data\.weights: expected one number per data set, 2 for a, b; found 1"),
        ({"weights": (1.0, 1.0)}, ("a",), r"data\.weights: expected one number per data set, 1 for a; found 2"),
        ({}, ("a", "./a"), r"--data a: the same data set as --data a"),
        ({"sets": ("b", "b")}, (), r"data\.sets b: the same data set"),
        ({}, (), r"no data set: pass --data PATH, or set data\.sets"),
    ],
)
def test_sets_that_do_not_fit_are_one_line(values, paths, message):
    with pytest.raises(UserError, match=message):
        training_sources(DataConfig(**values), paths)


def test_splits_of_one_list_are_two_sets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("list.csv").write_text("path,split\na.mp4,train\nb.mp4,val\n")
    assert len(sources_of(("list.csv:train", "list.csv:val"))) == 2
    with pytest.raises(UserError, match="same data set"):
        sources_of(("list.csv:val", tmp_path / "list.csv:val"))


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_a_weight_must_be_above_zero(weight):
    with pytest.raises(UserError, match=r"data\.weights .*: expected .*above 0"):
        check(dataclasses.replace(PretrainConfig(), data=DataConfig(weights=(1.0, weight))))


def test_sets_and_weights_of_a_recipe(tmp_path):
    (tmp_path / "mine.toml").write_text('[data]\nsets = ["a", "b"]\nweights = [3, 1]\n')
    config = load_recipe(tmp_path / "mine.toml")
    assert (config.data.sets, config.data.weights) == (("a", "b"), (3.0, 1.0))
    assert from_dict(PretrainConfig, to_dict(config)) == config
    assert shareable(to_dict(config))["data"]["sets"] == []
    assert training_sources(config.data, ()) == (Path("a"), Path("b"))
    assert training_sources(config.data, ("c", "d")) == (Path("c"), Path("d"))
    assert with_sources(config.data, (Path("c"), Path("d"))).sets == ("c", "d")
    assert with_sources(DataConfig(), (Path("c"),)) == DataConfig()
    for wrong in ('weights = "3 1"', "weights = [true]", "sets = [1]"):
        (tmp_path / "wrong.toml").write_text(f"[data]\n{wrong}\n")
        with pytest.raises(UserError, match="expects a list of"):
            load_recipe(tmp_path / "wrong.toml")


def test_fine_tuning_and_other_verbs_take_one_set(capsys):
    with pytest.raises(UserError, match=r"only pre-training takes several data sets"):
        dataclasses.replace(load_recipe("demo/finetune", FinetuneConfig), data=DataConfig(weights=(1.0, 1.0))).check()
    for verb in ("finetune", "probe", "train-tokenizer"):
        status, _, error = outcome(capsys, verb, "demo/finetune", "--data", "a", "--data=b", "--out", "c")
        assert (status, error.count("\n")) == (2, 1)
        assert f"--data: expected one data set for mam2 {verb}, found 2" in error


def test_plan_and_index_know_several_sets(halves, capsys):
    given = ("plan", "mam2-fast", "--gpu", "h200", "--videos", "240000", "20000", "--data-weights", "3", "1")
    status, out, _ = outcome(capsys, *given)
    assert status == 0
    assert "400 epochs of 260,000 videos" in out or "epochs of 260,000 videos" in out
    assert "set 1    240,000 videos, 75.00% of clips: 0.812 passes per epoch" in out
    assert "set 2    20,000 videos, 25.00% of clips: 3.25 passes per epoch" in out
    assert outcome(capsys, "plan", "mam2-fast", "--videos", "9", "--data.weights", "3", "1")[0] == 2
    status, out, _ = outcome(capsys, "index", *halves)
    assert status == 0
    assert "10 usable videos in 2 data sets" in out
    for half in halves:
        Path(f"{half}.index.jsonl").unlink()
    assert outcome(capsys, "index", *halves, "--out", "x.jsonl")[0] == 2
