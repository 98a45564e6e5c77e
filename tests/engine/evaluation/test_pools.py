"""Pools of tokens: their groups of tokens, the classes that a probe of them separates, intervals over groups."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mam2.engine.evaluation import probe_run
from mam2.engine.evaluation.attentive import attentive_probe
from mam2.engine.evaluation.knn import knn
from mam2.engine.evaluation.linear_probe import bootstrap, held_out, linear_probe
from mam2.engine.evaluation.pools import pool_tokens, token_groups
from mam2.engine.train.pretrain import pretrain
from tests.helpers.commands import exit_status

pytestmark = pytest.mark.usefixtures("float32")


def numbered(grid):
    """Tokens [1, N, 3] that hold their slot, row and column."""
    slots, height, width = torch.meshgrid(*(torch.arange(count) for count in grid), indexing="ij")
    return torch.stack([slots, height, width], -1).flatten(0, 2)[None].float()


def test_each_pool_averages_the_tokens_it_names():
    grid = (2, 4, 6)
    tokens = numbered(grid)
    assert pool_tokens(tokens, grid, "mean").tolist() == [[[0.5, 1.5, 2.5]]]
    assert pool_tokens(tokens, grid, "time")[0].tolist() == [[0, 1.5, 2.5], [1, 1.5, 2.5]]
    quarters = [[0.5, 1], [0.5, 4], [2.5, 1], [2.5, 4]]
    found = pool_tokens(tokens, grid, "time-space")[0]
    torch.testing.assert_close(found, torch.tensor([[slot, *quarter] for slot in (0, 1) for quarter in quarters]))
    groups = token_groups(grid, "time-center").view(2, 2, *grid)
    assert groups[1, 1].nonzero().tolist() == [[1, row, column] for row in (1, 2) for column in (1, 2, 3, 4)]
    assert torch.equal(groups[1, 0], torch.tensor([False, True])[:, None, None].expand(grid))


@pytest.mark.parametrize("edge", [1, 2, 3, 5, 7, 14])
@pytest.mark.parametrize("pool", ["mean", "time", "time-center", "time-space"])
def test_no_group_is_empty_and_none_spans_two_slots(edge, pool):
    groups = token_groups((3, edge, edge), pool).unflatten(1, (3, -1))
    assert groups.flatten(1).any(1).all()
    assert groups.flatten(1).any(0).all()
    if pool != "mean":
        assert (groups.any(2).sum(1) == 1).all()
    if pool == "time-space":  # the same share of the frame
        assert len(set(groups.sum((1, 2)).tolist())) == 1


def test_tokens_of_another_grid_are_refused():
    with pytest.raises(ValueError, match=r"a grid of \(2, 2, 3\), found \(1, 8, 3\)"):
        pool_tokens(numbered((2, 2, 2)), (2, 2, 3), "time")


def ordered(count, seed):
    """Tokens [n, T' 4 · H' 2 · W' 2, D 12] with one slot of large values; the class is the number of that slot."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    tokens = torch.randn(count, 4, 4, 12, generator=generator)
    tokens[torch.arange(count), labels, :, :6] += 2
    return tokens.flatten(1, 2), labels


def test_only_a_pool_of_time_knows_the_order():
    (train, labels), (test, asked) = ordered(160, 0), ordered(80, 1)
    accuracies = {}
    for pool in ("mean", "time", "time-center", "time-space"):
        here, there = (pool_tokens(tokens, (4, 2, 2), pool).flatten(1) for tokens in (train, test))
        linear = linear_probe(here, labels, there, asked).accuracy
        accuracies[pool] = (linear, float((knn(here, labels, there) == asked).double().mean()))
    assert max(accuracies["mean"]) < 0.45
    assert min(value for pool in ("time", "time-center", "time-space") for value in accuracies[pool]) > 0.95


def test_more_values_than_videos_do_not_break_the_linear_probe():
    """40 videos with 400 values, 4 of which depend on the class: the chosen penalty suppresses the others."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(240) % 2
    features = torch.randn(240, 400, generator=generator)
    features[:, :4] += 2.5 * (2 * labels[:, None] - 1)
    result = linear_probe(features[:40], labels[:40], features[40:], labels[40:])
    assert result.accuracy > 0.85
    assert result.penalty > 1e-4


@pytest.mark.slow
def test_attention_over_slots_knows_the_order():
    (train, labels), (test, asked) = ordered(160, 0), ordered(80, 1)
    accuracies = {}
    for pool in ("mean", "time"):
        answers, _ = attentive_probe(
            train.half().numpy(),
            labels,
            test.half().numpy(),
            held_out(160),
            4,
            torch.device("cpu"),
            token_groups((4, 2, 2), pool),
        )
        accuracies[pool] = float((answers == asked).double().mean())
    assert accuracies["time"] > 0.95
    assert accuracies["mean"] < 0.6


def test_a_held_out_group_is_held_out_whole():
    groups = torch.arange(100) % 10
    held = held_out(100, groups)
    assert held.sum() == 20
    assert not set(groups[held].tolist()) & set(groups[~held].tolist())
    assert held_out(100, groups, least=3).sum() == 30


def test_an_interval_over_groups_counts_groups_not_clips():
    """Ten groups of 50 clips, all right or all wrong: the interval is as wide as that of ten clips."""
    of_group = (torch.arange(10) % 2).double()
    groups = torch.arange(10).repeat_interleave(50)
    values = of_group[groups]
    assert bootstrap(values, groups=groups) == bootstrap(of_group)
    low, high = bootstrap(values)
    assert high - low < 0.1
    shuffled = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    assert bootstrap(values[shuffled], groups=groups[shuffled]) == bootstrap(of_group)


@pytest.fixture(scope="module")
def run(clips, tmp_path_factory, small):
    run = tmp_path_factory.mktemp("run")
    pretrain(small(model={"objective": "videomae"}, optim={"epochs": 1.0}), clips, run, progress=False)
    return run


@pytest.fixture
def table(clips, tmp_path):
    """A list whose classes have four videos each, with a column of four speakers."""
    paths = sorted(path for path in clips.rglob("*.*") if path.parent != clips)
    lines = ["path,label,Speaker"]
    lines += [f"{path},{path.parent.name},speaker {place % 4}" for place, path in enumerate(paths)]
    path = tmp_path / "list.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.slow
def test_the_verb_tests_on_other_groups(run, table, tmp_path, capsys, monkeypatch):
    held = []

    def spied(*arguments):
        held.append(arguments[4])
        return linear_probe(*arguments)

    monkeypatch.setattr(probe_run, "linear_probe", spied)
    places = ["--out", tmp_path / "p.json", "--cache", tmp_path / "cache", "--probes", "linear", "--pools", "time"]
    assert exit_status("probe", run, "--data", table, "--group", "speaker", *places) == 0
    found = json.loads((tmp_path / "p.json").read_text())
    assert (found["train"], found["test"], found["groups"]) == (16, 16, 2)  # two of four speakers
    assert held[0].sum() == 8  # the penalty is chosen on one of the two others, with all its videos
    assert "interval over the test videos' 2 groups" in capsys.readouterr().out

    # the same column from a table of its own, for a list without a header
    plain = tmp_path / "plain.csv"
    rows = [line.split(",") for line in table.read_text().splitlines()[1:]]
    plain.write_text("".join(f"{path} {label}\n" for path, label, _ in rows))
    assert exit_status("probe", run, "--data", plain, "--group", f"{table}:speaker", *places) == 0
    again = json.loads((tmp_path / "p.json").read_text())
    assert again == found


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ("color", "no column for 'color'; its first line holds path, label, speaker"),
        ("other.csv:speaker", "no group for 31 of the videos, the first is"),
        ("one.csv:speaker", "are in one group"),
        ("none.csv:speaker", "no such file"),
    ],
)
def test_groups_that_are_not_there_are_said_in_a_line(run, table, tmp_path, capsys, monkeypatch, group, message):
    monkeypatch.chdir(tmp_path)
    lines = table.read_text().splitlines()
    Path("other.csv").write_text("\n".join(lines[:2]))
    Path("one.csv").write_text("\n".join([lines[0], *(f"{line.rpartition(',')[0]},me" for line in lines[1:])]))
    assert exit_status("probe", run, "--data", table, "--group", group) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_features_of_two_pools_are_two_files(run, clips, tmp_path):
    arguments = [run, "--data", clips, "--out", tmp_path / "p.json", "--cache", tmp_path / "cache", "--probes", "knn"]
    assert exit_status("probe", *arguments, "--pools", "mean") == 0
    first = set((tmp_path / "cache").iterdir())
    assert exit_status("probe", *arguments, "--pools", "time") == 0
    second = set((tmp_path / "cache").iterdir()) - first
    widths = [{np.load(path, mmap_mode="r").shape[1] for path in files} for files in (first, second)]
    assert widths == [{24}, {24 * 4}]
