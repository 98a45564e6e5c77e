"""What fine-tuning can be asked to learn, and how much of the model learns it."""

import json

import numpy as np
import pytest
import torch

from mam2.engine.checkpoints import run as checkpoint
from mam2.engine.data.manifest import Manifest
from mam2.engine.data.synthetic import render_clip, write_clip
from mam2.engine.data.video import Video
from mam2.engine.evaluation.classification import evaluate
from mam2.engine.runtime.log import read_log
from mam2.engine.train import augment
from mam2.engine.train import finetune as finetuning
from mam2.engine.train.finetune import ACCURACY, MEAN_CLASS, finetune
from mam2.engine.train.finetune_targets import ClassTargets, balanced_weights

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
    """The weighted targets of a mixture are the mixture of weighted targets: no class gains through smoothing."""
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
    rest = {"accuracy/validation_top5": 1.0, "loss/validation": 1.0}
    monkeypatch.setattr(finetuning._Finetuning, "_validate", lambda _: next(found) | rest)
    config = small_finetuning(augment=NOTHING_DRAWN, optim={"batch": 8, "epochs": 3.0}, test={"best": best})
    finetune(config, unbalanced, tmp_path, val=unbalanced, encoder=None, progress=False)
    assert json.loads((tmp_path / "best" / checkpoint.STATE).read_text())["step"] == step
