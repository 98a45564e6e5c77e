"""Heads and losses of fine-tuning, and which part of the model is trained."""

import csv
import dataclasses
import json
import os
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mam2.engine.checkpoints import checkpoint
from mam2.engine.checkpoints.classifiers import build_classifier, load_classifier
from mam2.engine.checkpoints.exporting import export
from mam2.engine.data.label_texts import class_places, values_of
from mam2.engine.data.manifest import Manifest, read_manifest
from mam2.engine.data.synthetic import render_clip, write_clip
from mam2.engine.data.video import Video
from mam2.engine.errors import UserError
from mam2.engine.evaluation.classification import evaluate
from mam2.engine.evaluation.prediction import Predictor, predict
from mam2.engine.model.blocks import Block
from mam2.engine.runtime.distributed import World
from mam2.engine.runtime.log import read_log
from mam2.engine.train import augment
from mam2.engine.train import finetune as finetuning
from mam2.engine.train.classifier_step import ClassifierObjective, FinetuneStep, classifier_flops
from mam2.engine.train.finetune import finetune
from mam2.engine.train.finetune_targets import ClassTargets, SetTargets, ValueTargets, balanced_weights
from mam2.engine.train.finetune_tasks import ACCURACY, LOSS, MAE, MAP, MEAN_CLASS, R2
from tests.helpers.commands import torchrun
from tests.helpers.runs import newest_weights, same_tensors

NOTHING_DRAWN = {"operations": 0, "erase": 0.0, "mixup": 0.0, "cutmix": 0.0}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Eight clips, six of which move to the left."""
    folder = tmp_path_factory.mktemp("clips")
    for number, motion in enumerate(("left",) * 6 + ("right",) * 2):
        write_clip(folder / f"{number}.mp4", render_clip(motion, np.random.default_rng(number)))
    return folder


@pytest.fixture(scope="module")
def unbalanced(clips):
    rows = [f"{number}.mp4,{'left' if number < 6 else 'right'}" for number in range(8)]
    (clips / "unbalanced.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    return clips / "unbalanced.csv"


def manifest(labels, classes):
    return Manifest(tuple(Video("v.mp4", label, 9, 9, 9, "h264", 25.0, 0) for label in labels), classes=classes)


def test_weights_make_classes_count_alike_and_keep_the_mean():
    labels = [0] * 6 + [1] * 2 + [3] * 4
    weights = balanced_weights(manifest(labels, ("a", "b", "c", "d")))
    assert weights == pytest.approx([12 / 18, 12 / 6, 0.0, 12 / 12])
    assert np.mean([weights[label] for label in labels]) == pytest.approx(1)


def test_the_weight_of_a_clip_is_that_of_its_label_also_when_mixed(small_finetuning):
    """The weighted targets of a mixture are the mixture of weighted targets: label smoothing favors no class."""
    values = {"model": {"classes": 2}, "augment": {**NOTHING_DRAWN, "mixup": 0.8, "label_smoothing": 0.2}}
    config = small_finetuning(**values)
    video, labels = torch.zeros(2, 3, 2, 8, 8, dtype=torch.uint8), torch.tensor([0, 1])
    key = {"step": 3, "first_sample": 0}
    plain = augment.prepare(video, labels, config, **key).targets
    share = (plain[0, 0] - 0.1) / 0.8
    assert 0 < share < 1
    found = augment.prepare(video, labels, config, ClassTargets(2, 0.2, [0.5, 3.0]), **key).targets
    first, second = 0.5 * torch.tensor([0.9, 0.1]), 3.0 * torch.tensor([0.1, 0.9])
    expected = torch.stack([share * first + (1 - share) * second, (1 - share) * first + share * second])
    torch.testing.assert_close(found, expected)


def test_a_balanced_run_logs_both_accuracies_and_evaluates_alike(unbalanced, tmp_path, small_finetuning):
    config = small_finetuning(
        head={"class_weights": "balanced"},
        augment=NOTHING_DRAWN,
        optim={"batch": 8, "epochs": 1.0},
        test={"best": "mean_class", "temporal": 1, "spatial": 1},
    )
    finetune(config, unbalanced, tmp_path / "run", val=unbalanced, encoder=None, progress=False)
    assert "class weights from 0.6667 (left) to 2 (right)" in (tmp_path / "run" / "log.txt").read_text()
    line = next(line for line in read_log(tmp_path / "run") if ACCURACY in line)
    result = evaluate(tmp_path / "run", unbalanced, tmp_path / "test", progress=False)
    assert (line[ACCURACY], line[MEAN_CLASS]) == pytest.approx((result.top1, result.mean_class))
    rows = [row.split("\t") for row in (tmp_path / "test" / "predictions.tsv").read_text().splitlines()[1:]]
    right = {name: [int(row[2]) for row in rows if row[1] == name] for name in ("left", "right")}
    assert [len(counted) for counted in right.values()] == [6, 2]
    assert result.mean_class == pytest.approx(np.mean([np.mean(counted) for counted in right.values()]))


@pytest.mark.parametrize(("best", "step"), [("top1", 1), ("mean_class", 2)])
def test_best_is_the_best_by_the_measure_asked_for(best, step, unbalanced, tmp_path, monkeypatch, small_finetuning):
    found = iter([{ACCURACY: 0.9, MEAN_CLASS: 0.5}, {ACCURACY: 0.8, MEAN_CLASS: 0.7}, {ACCURACY: 0.7, MEAN_CLASS: 0.6}])
    rest = {"accuracy/validation_top5": 1.0, LOSS: 1.0}
    monkeypatch.setattr(finetuning._Finetuning, "_validate", lambda _: next(found) | rest)
    config = small_finetuning(augment=NOTHING_DRAWN, optim={"batch": 8, "epochs": 3.0}, test={"best": best})
    finetune(config, unbalanced, tmp_path, val=unbalanced, encoder=None, progress=False)
    assert json.loads((tmp_path / "best" / checkpoint.STATE).read_text())["step"] == step


def one_step(config, last):
    """A classifier of three blocks and its step, after one step on random clips."""
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, train_last=last))
    torch.manual_seed(0)
    model = build_classifier(config)
    torch.nn.init.normal_(model.head.weight)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    step = FinetuneStep(config, model, torch.device("cpu"), World())
    kept = {}
    step.optimizer.register_step_pre_hook(
        lambda *_: kept.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    )
    video = torch.randint(0, 256, (4, 3, 4, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    values = step(0, [(video, step.prepare(0, video, torch.tensor([0, 1, 0, 1])))], 1e-2, inspect=True)
    return model, step, before, kept, values


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("last", [0, 1, 3])
def test_what_is_frozen_stays_and_the_rest_learns_as_ever(last, name, small_finetuning):
    config = small_finetuning(
        data={"frames": 4, "size": 32},
        model={"width": 24, "depth": 3, "heads": 2, "classes": 2},
        augment=NOTHING_DRAWN,
        optim={"batch": 4, "name": name, "clip_norm": 0.0, "weight_decay": 0.5, "ema": 0.5},
    )
    whole = one_step(config, -1)
    grown = []

    def note(block, _, tokens):
        grown.append(tokens.requires_grad)

    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, given, tokens: note(module, given, tokens) if isinstance(module, Block) else None
    )
    try:
        model, step, before, gradients, values = one_step(config, last)
    finally:
        hook.remove()
    assert grown == [number >= 3 - last for number in range(3)]
    frozen = [f"encoder.blocks.{number}." for number in range(3 - last)] + ["encoder.patch_embed."]
    trained = {name for name, _ in model.named_parameters() if not name.startswith(tuple(frozen))}
    assert gradients.keys() == trained == step.average.keys()
    assert all(torch.equal(gradients[name], whole[3][name]) for name in trained)
    after = model.state_dict()
    assert {name for name in after if torch.equal(after[name], before[name])} == after.keys() - trained
    assert len(step.optimizer.state) == len(trained)
    assert ("gradient/encoder" in values) == (last > 0)
    assert all(torch.equal(after[name], whole[0].state_dict()[name]) for name in trained)


def test_frozen_blocks_cost_no_backward_pass_and_drop_no_branch(small_finetuning):
    values = {"model": {"depth": 4, "classes": 2}, "augment": NOTHING_DRAWN}
    whole, half, head = (
        small_finetuning(**values, optim={"batch": 8, "drop_path": 0.9, "train_last": last}) for last in (-1, 2, 0)
    )
    flops = [classifier_flops(config) for config in (head, half, whole)]
    assert flops == sorted(set(flops))
    assert flops[0] < flops[2] / 2.8
    video, labels = torch.zeros(8, 3, 2, 8, 8, dtype=torch.uint8), torch.arange(8) % 2
    scales = [augment.prepare(video, labels, config, step=0, first_sample=0).path_scales for config in (whole, half)]
    assert torch.equal(scales[1][:2], torch.ones(2, 2, 8))
    assert not torch.equal(scales[0][:2], scales[1][:2])
    assert torch.equal(scales[0][2:], scales[1][2:])


PARTLY = {
    "augment": {"operations": 1, "mixup": 0.5},
    "head": {"dropout": 0.2},
    "optim": {"batch": 8, "epochs": 4.0, "train_last": 1, "drop_path": 0.2, "ema": 0.8, "name": "muon"},
    "test": {"every": 2.0},
}


@pytest.fixture(scope="module")
def partly_trained(unbalanced, tmp_path_factory, small_finetuning):
    run = tmp_path_factory.mktemp("partly")
    finetune(small_finetuning(**PARTLY), unbalanced, run, val=unbalanced, encoder=None, progress=False)
    return run


@pytest.mark.slow
def test_a_partly_frozen_run_resumes_bit_for_bit(partly_trained, unbalanced, tmp_path, monkeypatch, small_finetuning):
    original, calls = FinetuneStep.__call__, []

    def stopped(self, *args, **options):
        calls.append(None)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **options)

    monkeypatch.setattr(FinetuneStep, "__call__", stopped)
    config = small_finetuning(**PARTLY)
    options = {"val": unbalanced, "encoder": None, "progress": False}
    assert finetune(config, unbalanced, tmp_path, **options).step == 2
    other = dataclasses.replace(config, optim=dataclasses.replace(config.optim, train_last=2))
    with pytest.raises(UserError, match=r"optim\.train_last = 1, now it is 2"):
        finetune(other, unbalanced, tmp_path, **options, resume=True)
    finetune(config, unbalanced, tmp_path, **options, resume=True)
    for name in (checkpoint.WEIGHTS, checkpoint.OPTIMIZER):
        whole, resumed = (load_file(checkpoint.newest(run) / name) for run in (partly_trained, tmp_path))
        assert same_tensors(whole, resumed), name


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_processes_train_the_last_block_like_one(sharding, partly_trained, unbalanced, tmp_path, small_finetuning):
    run = {"compile": False, "log_every": 2, "save_every": 1000, "sharding": sharding}
    config = small_finetuning(**PARTLY, run=run)
    (tmp_path / "recipe.json").write_text(json.dumps(dataclasses.asdict(config)))
    arguments = ["finetune", tmp_path / "recipe.json", "--data", unbalanced, "--val", unbalanced, "--scratch"]
    done = torchrun(2, "-m", "mam2.engine", *arguments, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr[-3000:]
    found = newest_weights(tmp_path / "run")
    for name, whole in newest_weights(partly_trained).items():
        assert torch.isclose(found[name], whole, rtol=2e-2, atol=2e-4).float().mean() > 0.95, name


def test_more_blocks_than_there_are_is_one_clear_line(unbalanced, tmp_path, small_finetuning):
    config = small_finetuning(model={"depth": 2}, optim={"batch": 8, "train_last": 3})
    with pytest.raises(UserError, match=r"optim\.train_last 3: the encoder has 2 blocks; expected 0 to 2, or -1"):
        finetune(config, unbalanced, tmp_path, val=unbalanced, encoder=None, progress=False)


@pytest.fixture(scope="module")
def several(clips):
    """Lists of several classes per video; the validation list lacks a class and has another order."""
    labels = ["left", "left;first", "left", "left; odd", "left", "odd;left", "right", "right;odd"]
    rows = [f"{number}.mp4,{label}" for number, label in enumerate(labels)]
    (clips / "several.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    (clips / "several-val.csv").write_text("\n".join(["path,label", *rows[:1:-1]]) + "\n")
    return clips / "several.csv", clips / "several-val.csv"


@pytest.fixture(scope="module")
def numbers(clips):
    """Lists of a number per video."""
    rows = [f"{number}.mp4,{label}" for number, label in enumerate(("7", "-1.5", "3e1", "-1", "0", "2.5", "7", "12"))]
    (clips / "numbers.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    return clips / "numbers.csv"


SHORT = {"augment": NOTHING_DRAWN, "optim": {"batch": 8, "epochs": 2.0}, "test": {"temporal": 1, "spatial": 1}}


def test_several_classes_are_trained_measured_and_predicted(several, clips, tmp_path, small_finetuning):
    """Targets are rows of zeros and ones; the log's mean average precision is the one that evaluate computes."""
    train, val = several
    config = small_finetuning(**SHORT | {"head": {"task": "multi-label"}})
    finetune(config, train, tmp_path / "run", val=val, encoder=None, progress=False)
    model, _, classes = load_classifier(tmp_path / "run")
    assert (classes, model.task) == (("first", "left", "odd", "right"), "multi-label")
    result = evaluate(tmp_path / "run", val, tmp_path / "test", progress=False)
    best = json.loads((tmp_path / "run" / "best" / checkpoint.STATE).read_text())
    assert best[MAP] == pytest.approx(result.mean_average_precision)
    rows = {row["path"]: row for row in table(tmp_path / "test" / "predictions.tsv")}
    assert len(rows) == 6
    for found in Predictor(tmp_path / "run", temporal=1, spatial=1).predict(clips, progress=False):
        chances = found.probabilities
        assert 0.2 < chances.min() < chances.max() < 0.8  # sigmoids of a new head, whose sum is not 1
        assert chances.sum() > 1.1
        if found.path in rows:
            assert [float(rows[found.path][name]) for name in classes] == pytest.approx(chances, abs=1e-5)
    assert rows[str(clips / "3.mp4")]["classes"] == "left;odd"
    per_class = {row["class"]: row for row in table(tmp_path / "test" / "classes.tsv")}
    assert {name: int(row["videos"]) for name, row in per_class.items()} == {
        "first": 0, "left": 4, "odd": 3, "right": 2
    }  # fmt: skip
    assert per_class["first"]["average_precision"] == ""


def test_numbers_are_predicted_in_their_own_units_everywhere(numbers, tmp_path, small_finetuning):
    values = [7, -1.5, 30, -1, 0, 2.5, 7, 12]
    config = small_finetuning(**SHORT | {"head": {"task": "regression", "loss": "mae"}})
    finetune(config, numbers, tmp_path / "run", val=numbers, encoder=None, progress=False)
    model, resolved, classes = load_classifier(tmp_path / "run")
    assert (model.task, classes) == ("regression", ("value",))
    assert (resolved.model.target_mean, resolved.model.target_std) == pytest.approx((np.mean(values), np.std(values)))
    result = evaluate(tmp_path / "run", numbers, tmp_path / "test", progress=False)
    best = json.loads((tmp_path / "run" / "best" / checkpoint.STATE).read_text())
    assert (best[MAE], best[R2]) == pytest.approx((result.mae, result.r2), rel=1e-4, abs=1e-6)
    rows = table(tmp_path / "test" / "predictions.tsv")
    assert [float(row["value"]) for row in rows] == values
    predicted = np.array([float(row["predicted"]) for row in rows])
    assert result.mae == pytest.approx(np.abs(predicted - values).mean())
    assert abs(predicted - np.mean(values)).max() < np.std(values)  # a new head is near the mean, not near 0
    found = predict(tmp_path / "run", numbers, out=tmp_path / "found.csv", progress=False).predictions
    assert [one.probabilities[0] for one in found] == pytest.approx(predicted, rel=1e-5)
    with (tmp_path / "found.csv").open() as file:
        assert [float(row["value"]) for row in csv.DictReader(file)] == pytest.approx(predicted, abs=1e-5)
    export(tmp_path / "run", "huggingface", tmp_path / "exported")
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["problem_type"] == "regression"
    again = predict(tmp_path / "exported", numbers, temporal=1, spatial=1, progress=False).predictions
    assert [one.task for one in again] == ["regression"] * 8
    with pytest.raises(UserError, match="one class per video"):
        export(tmp_path / "run", "videomae", tmp_path / "exported.pth")


def table(file):
    with file.open() as opened:
        return list(csv.DictReader(opened, delimiter="\t"))


@pytest.mark.parametrize(("task", "loss"), [("multi-label", "mse"), ("regression", "mse"), ("regression", "mae")])
def test_the_loss_of_a_task_is_its_formula(task, loss, small_finetuning):
    config = small_finetuning(model={"classes": 3}, head={"task": task, "loss": loss})
    model = build_classifier(config)
    torch.nn.init.normal_(model.head.weight)
    video = torch.randint(0, 256, (2, 3, config.data.frames, config.data.size, config.data.size), dtype=torch.uint8)
    targets = torch.rand(2, 3)
    found, _, _ = ClassifierObjective(model, lambda part: part, loss)(video, targets, None, None)
    logits = model(video).detach().double().numpy()
    wanted = targets.double().numpy()
    chances = 1 / (1 + np.exp(-logits))
    formulas = {
        ("multi-label", "mse"): -(wanted * np.log(chances) + (1 - wanted) * np.log(1 - chances)),
        ("regression", "mse"): (logits - wanted) ** 2,
        ("regression", "mae"): np.abs(logits - wanted),
    }
    assert found.item() == pytest.approx(formulas[task, loss].mean(), rel=1e-5)


def test_targets_of_several_classes_and_of_numbers(several, numbers):
    listed = read_manifest(several[0], progress=False)
    classes = ("first", "left", "odd", "right")
    targets = SetTargets(class_places(listed, "list", classes), 4, 0.2)
    (rows,) = targets.arrays(torch.tensor([listed.videos[number].label for number in (1, 5)]))
    assert rows.tolist() == pytest.approx(np.array([[0.9, 0.9, 0.1, 0.1], [0.1, 0.9, 0.9, 0.1]]))
    listed = read_manifest(numbers, progress=False)
    (rows,) = ValueTargets(values_of(listed, "list"), 7.0, 2.0).arrays(
        torch.tensor([video.label for video in listed.videos])
    )
    assert rows[:, 0].tolist() == pytest.approx([0, -4.25, 11.5, -4, -3.5, -2.25, 0, 2.5])


def test_labels_that_are_not_of_the_task_are_one_clear_line(several, numbers, clips, tmp_path, small_finetuning):
    (clips / "unknown.csv").write_text("path,label\n0.mp4,left;up\n")
    (clips / "negative.csv").write_text("path,label\n0.mp4,-5\n1.mp4,3\n")
    sets, values = ({"head": {"task": task}} for task in ("multi-label", "regression"))
    for tables, data, val, message in (
        ({}, numbers, numbers, r"numbers\.csv: has the labels '0' and '-1'; one class per video needs"),
        (sets, several[0], clips / "unknown.csv", r"unknown\.csv: the class 'up' is not one of the 4 classes"),
        (values, several[0], numbers, r"several\.csv: the label 'left' is not a number"),
        (values, numbers, several[1], r"several-val\.csv: the label 'left' is not a number"),
        (values, clips / "negative.csv", numbers, r"with a decimal point: -5\.0"),
        (sets | {"test": {"best": "mean_class"}}, several[0], several[1], r"test\.best mean_class: needs head\.task"),
        ({"head": {"task": "regression", "class_weights": "balanced"}}, numbers, numbers, r"needs head\.task classes"),
    ):
        with pytest.raises(UserError, match=message):
            finetune(small_finetuning(**tables), data, tmp_path / "run", val=val, encoder=None, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["multi-label", "regression"])
def test_runs_of_other_tasks_resume_bit_for_bit(task, several, numbers, tmp_path, monkeypatch, small_finetuning):
    data = several[0] if task == "multi-label" else numbers
    values = {"head": {"task": task}, "augment": {"operations": 1, "mixup": 0.5}, "optim": {"batch": 8, "epochs": 4.0}}
    config, options = small_finetuning(**values), {"val": data, "encoder": None, "progress": False}
    finetune(config, data, tmp_path / "whole", **options)
    original, calls = FinetuneStep.__call__, []

    def stopped(self, *args, **given):
        calls.append(None)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **given)

    monkeypatch.setattr(FinetuneStep, "__call__", stopped)
    assert finetune(config, data, tmp_path / "run", **options).step == 2
    (tmp_path / "run" / "manifest.jsonl").unlink()  # so that the list is read again
    finetune(config, data, tmp_path / "run", **options, resume=True)
    for name in (checkpoint.WEIGHTS, checkpoint.OPTIMIZER):
        whole, resumed = (load_file(checkpoint.newest(tmp_path / run) / name) for run in ("whole", "run"))
        assert same_tensors(whole, resumed), name
