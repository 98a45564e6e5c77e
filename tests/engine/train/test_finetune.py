"""Fine-tuning end to end: it learns, resumes exactly, keeps the best weights, and trains in several processes."""

import dataclasses
import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from mam2.engine.checkpoints import checkpoint
from mam2.engine.checkpoints.classifiers import describe_classes, load_classifier
from mam2.engine.config.finetune import FinetuneConfig
from mam2.engine.config.recipe import load_recipe
from mam2.engine.data.manifest import read_manifest, read_saved_manifest
from mam2.engine.data.sets import read_sets
from mam2.engine.errors import UserError
from mam2.engine.evaluation.classification import evaluate
from mam2.engine.runtime.log import read_log
from mam2.engine.train.classifier_step import FinetuneStep
from mam2.engine.train.finetune import finetune
from mam2.engine.train.finetune_tasks import ACCURACY
from tests.helpers.commands import exit_status, torchrun
from tests.helpers.paths import CLIPS
from tests.helpers.runs import same_tensors

EVERYTHING = {
    "data": {"views": 2, "threads": 1},
    "augment": {"operations": 2, "erase": 0.5, "mixup": 0.8, "cutmix": 1.0},
    "head": {"dropout": 0.3},
    "optim": {"batch": 16, "epochs": 4.0, "warmup_epochs": 0.5, "drop_path": 0.2, "ema": 0.8, "name": "muon"},
    "test": {"every": 1.5},
    "run": {"precision": "float32"},  # so that the order of additions makes only a small difference
}
"""Every random draw of a step, and both optimizers."""
TIMES = {"time", "data_wait", "decoded_frames_per_s", "clips_per_s", "step_ms", "mfu", "memory_gib"}
TIMES |= {"host/wait_ms", "host/prepare_ms", "host/step_ms"}


@pytest.fixture(scope="module")
def finished(motion_clips, few_clips, tmp_path_factory, small_finetuning):
    run = tmp_path_factory.mktemp("run")
    config = small_finetuning(**EVERYTHING)
    return run, finetune(config, few_clips, run, val=motion_clips / "test", encoder=None, progress=False)


def tensors(run, name=checkpoint.WEIGHTS):
    return load_file(checkpoint.newest(run) / name)


def without_times(run):
    return [{key: value for key, value in line.items() if key not in TIMES} for line in read_log(run)]


@pytest.mark.slow
def test_it_learns_what_only_motion_tells(motion_clips, tmp_path, small_finetuning):
    """From scratch, with every kind of augmentation switched on lightly: chance is one half."""
    config = small_finetuning(
        data={"views": 2, "threads": 2},
        augment={"operations": 1, "magnitude": 3.0, "erase": 0.1, "mixup": 0.1, "cutmix": 0.0},
        optim={"batch": 32, "epochs": 20.0, "warmup_epochs": 2.0, "base_lr": 8e-3},
        test={"every": 10.0, "temporal": 2, "spatial": 1},
    )
    finetune(config, motion_clips / "train", tmp_path / "run", val=motion_clips / "test", encoder=None, progress=False)
    result = evaluate(tmp_path / "run", motion_clips / "test", tmp_path / "test", progress=False)
    assert result.videos == 16
    assert result.top1 >= 0.85


@pytest.mark.slow
def test_a_run_leaves_what_it_promises(finished, small_finetuning):
    run, result = finished
    assert (result.step, result.steps, result.used, result.skipped, result.signal) == (8, 8, 16, 0, 0)
    lines = {line["step"]: line for line in read_log(run)}
    assert [step for step, line in lines.items() if ACCURACY in line] == [3, 6, 8]
    assert {"loss/training", "gradient/norm", "learning_rate", "data_wait", "epoch", "mfu"} <= lines[8].keys()
    assert {ACCURACY, "accuracy/validation_top5", "loss/validation"} <= lines[6].keys()
    model, config, classes = load_classifier(run)
    assert classes == ("left", "right")
    assert (config.model.classes, config.model.text_width) == (2, 0)
    assert dataclasses.replace(config, model=small_finetuning().model) == small_finetuning(**EVERYTHING)
    best = json.loads((run / "best" / "state.json").read_text())
    assert best[ACCURACY] == max(line[ACCURACY] for line in lines.values() if ACCURACY in line)
    assert checkpoint.why_damaged(result.checkpoint) is None
    assert same_tensors(dict(model.state_dict()), load_file(run / "best" / checkpoint.WEIGHTS))
    assert load_recipe(str(run / "config.json"), FinetuneConfig) == config
    assert (run / "log.txt").read_text().count("of their mean square; the head gets them standardized") == 1
    assert "also in the training data" not in (run / "log.txt").read_text()
    assert model.norm.weight.min() > 1.2, "the features' variance was well below 1"


@pytest.mark.slow
def test_best_is_the_average_of_the_weights_at_that_step(motion_clips, few_clips, tmp_path, small_finetuning):
    """With a moving average, RUN/best differs from the weights of the step. Only the last step is validated."""
    run, values = tmp_path, EVERYTHING | {"test": {"every": 100.0}}
    finetune(small_finetuning(**values), few_clips, run, val=motion_clips / "test", encoder=None, progress=False)
    extra = {
        name.removeprefix(checkpoint.EXTRA): tensor
        for name, tensor in tensors(run, checkpoint.OPTIMIZER).items()
        if name.startswith(checkpoint.EXTRA)
    }
    weights = tensors(run)
    assert extra.keys() == weights.keys()
    assert any(not torch.equal(extra[name], weights[name]) for name in extra)
    assert json.loads((run / "best" / "state.json").read_text())["step"] == 8
    assert same_tensors(extra, load_file(run / "best" / checkpoint.WEIGHTS))


def stop_in(monkeypatch, call):
    original, calls = FinetuneStep.__call__, []

    def step(self, *args, **options):
        calls.append(None)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **options)

    monkeypatch.setattr(FinetuneStep, "__call__", step)


@pytest.mark.slow
def test_a_stopped_run_resumes_exactly(finished, motion_clips, few_clips, tmp_path, monkeypatch, small_finetuning):
    """With every random draw: weights, moments, averages, generators, log and RUN/best are those of a run that did not
    stop; the encoder is not read again."""
    stop_in(monkeypatch, 3)
    config, val = small_finetuning(**EVERYTHING), motion_clips / "test"
    result = finetune(config, few_clips, tmp_path, val=val, encoder=None, progress=False)
    assert (result.step, result.signal) == (3, signal.SIGTERM)
    with pytest.raises(UserError, match="--resume"):
        finetune(config, few_clips, tmp_path, val=val, encoder=None, progress=False)
    result = finetune(config, few_clips, tmp_path, val=val, encoder="/nowhere", resume=True, progress=False)
    assert result.step == 8
    for name in (checkpoint.WEIGHTS, checkpoint.OPTIMIZER):
        assert same_tensors(tensors(finished[0], name), tensors(tmp_path, name)), name
    assert without_times(tmp_path) == without_times(finished[0])
    best = [load_file(run / "best" / checkpoint.WEIGHTS) for run in (finished[0], tmp_path)]
    assert same_tensors(*best)


def test_a_resumed_run_that_lost_its_list_keeps_the_classes_of_the_logits(
    motion_clips, few_clips, tmp_path, monkeypatch, small_finetuning
):
    """A list with rows in another order numbers its classes differently; other classes are refused."""
    config, val, run = small_finetuning(optim={"batch": 16, "epochs": 4.0}), motion_clips / "test", tmp_path / "run"
    rows = [f"{path},{path.parent.name}\n" for path in sorted(few_clips.rglob("*.mp4"))]
    (tmp_path / "list.csv").write_text("path,label\n" + "".join(rows))
    stop_in(monkeypatch, 2)
    finetune(config, tmp_path / "list.csv", run, val=val, encoder=None, progress=False)
    (run / "manifest.jsonl").rename(tmp_path / "before.jsonl")
    before = read_saved_manifest(tmp_path / "before.jsonl")

    (tmp_path / "other.csv").write_text("path,label\n" + "".join(rows).replace(",left", ",jump"))
    with pytest.raises(UserError, match=r"other\.csv lacks the class 'left': expected the 2 classes of"):
        finetune(config, tmp_path / "other.csv", run, val=val, encoder=None, resume=True, progress=False)
    (run / "manifest.jsonl").unlink()

    read = read_sets

    def swapped(sources, **options):
        found = read(sources, **options)
        videos = tuple(dataclasses.replace(video, label=1 - video.label) for video in found.videos)
        return dataclasses.replace(found, videos=videos, classes=found.classes[::-1])

    monkeypatch.setattr("mam2.engine.train.session.read_sets", swapped)
    result = finetune(config, tmp_path / "list.csv", run, val=val, encoder=None, resume=True, progress=False)
    assert result.step == 4
    assert load_classifier(run)[2] == before.classes
    after = read_saved_manifest(run / "manifest.jsonl")
    assert (after.classes, [video.label for video in after.videos]) == (
        before.classes,
        [video.label for video in before.videos],
    )
    assert "manifest.jsonl is missing: using the videos of" in (run / "log.txt").read_text()


@pytest.mark.slow
def test_a_validation_that_was_interrupted_is_made_up_for(
    finished, motion_clips, few_clips, tmp_path, monkeypatch, small_finetuning
):
    original, calls = FinetuneStep.__call__, []

    def step(self, *args, **options):
        calls.append(None)
        return original(self, *args, **options)

    from mam2.engine.train import finetune as module

    original_classify = module.classify_videos

    def classify_videos(model, *args, **options):
        def interrupted(video):
            if len(calls) == 3:
                calls.append(None)
                os.kill(os.getpid(), signal.SIGTERM)
            return model(video)

        return original_classify(interrupted, *args, **options)

    monkeypatch.setattr(FinetuneStep, "__call__", step)
    monkeypatch.setattr(module, "classify_videos", classify_videos)
    config, val = small_finetuning(**EVERYTHING), motion_clips / "test"
    result = finetune(config, few_clips, tmp_path, val=val, encoder=None, progress=False)
    assert (result.step, result.signal) == (3, signal.SIGTERM)
    assert not any(ACCURACY in line for line in read_log(tmp_path))
    finetune(config, few_clips, tmp_path, val=val, encoder=None, resume=True, progress=False)
    assert without_times(tmp_path) == without_times(finished[0])


@pytest.mark.slow
def test_passes_add_up_to_the_whole_batch(motion_clips, few_clips, tmp_path, small_finetuning):
    """Two passes have the clips, draws and mixing partners of one: the same weights, up to the order of additions."""
    runs = []
    for most in (0, 8):
        # AdamW: Muon's iteration in bfloat16 enlarges the differences that the order of additions makes
        optim = EVERYTHING["optim"] | {"epochs": 1.0, "micro_batch": most, "name": "adamw"}
        values = EVERYTHING | {"optim": optim}
        out = tmp_path / str(most)
        finetune(small_finetuning(**values), few_clips, out, val=motion_clips / "test", encoder=None, progress=False)
        runs.append(tensors(out))
    for name in runs[0]:
        close = torch.isclose(runs[0][name], runs[1][name], rtol=1e-3, atol=1e-5).float().mean()
        assert close > 0.97, name


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_processes_train_like_one(sharding, finished, motion_clips, few_clips, tmp_path, small_finetuning):
    values = EVERYTHING | {"run": EVERYTHING["run"] | {"sharding": sharding}}
    (tmp_path / "recipe.json").write_text(json.dumps(dataclasses.asdict(small_finetuning(**values))))
    train, val = ["--data", few_clips], ["--val", motion_clips / "test"]
    arguments = ["-m", "mam2.engine", "finetune", tmp_path / "recipe.json", *train, *val]
    done = torchrun(2, *arguments, "--scratch", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("done: 8 steps; 16 videos used, 0 unusable") == 1
    for ours, theirs in zip(read_log(tmp_path / "run"), read_log(finished[0]), strict=True):
        assert ours.keys() - TIMES == theirs.keys() - TIMES
        for name in ("loss/training", "loss/validation", "gradient/norm"):
            if name in ours:
                assert ours[name] == pytest.approx(theirs[name], rel=5e-3), (ours["step"], name)
    for name, whole in tensors(finished[0]).items():
        if name != "head.bias":  # AdamW's steps are as large for gradients that are mostly rounding errors
            close = torch.isclose(tensors(tmp_path / "run")[name], whole, rtol=2e-2, atol=2e-4).float().mean()
            assert close > 0.95, name


@pytest.mark.slow
def test_clips_of_many_formats_from_the_command_line_to_a_table(tmp_path, capsys):
    """Five classes of videos in many codecs: a few steps, then 3 × 3 views; every video is counted."""
    train, test = CLIPS / "train.csv", CLIPS / "test.csv"
    values = ["--data.size", "32", "--data.threads", "2", "--optim.batch", "4", "--optim.epochs", "3"]
    values += ["--run.no-compile", "--run.log-every", "1", "--model.width", "24", "--model.heads", "2"]
    for arguments in (
        ["finetune", "demo/finetune", "--data", train, "--val", test, "--scratch", "--out", tmp_path / "run", *values],
        ["evaluate", tmp_path / "run", "--data", test, "--out", tmp_path / "test", "--temporal", "3", "--spatial", "3"],
    ):
        assert exit_status(*arguments) == 0, capsys.readouterr()
    results = json.loads((tmp_path / "test" / "results.json").read_text())
    rows = (tmp_path / "test" / "predictions.tsv").read_text().splitlines()[1:]
    assert results["videos"] == len(rows) == 5
    assert results["unusable"] == 0
    assert "5 videos in 3 × 3 views, 0 unusable" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["classes"] == 5


@pytest.mark.slow
def test_copies_of_training_videos_in_the_validation_are_reported(few_clips, tmp_path, small_finetuning):
    """Also under another name: the hash of the content counts."""
    copies = tmp_path / "val"
    shutil.copytree(few_clips, copies)
    config = small_finetuning(optim={"epochs": 0.5})
    finetune(config, few_clips, tmp_path / "run", val=copies, encoder=None, progress=False)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "warning: 16 videos of --val also in the training data: the accuracy there is too high" in log


def test_classes_without_a_video_are_told(few_clips):
    manifest = read_manifest(few_clips, progress=False)
    assert describe_classes(manifest) == "classes 2"
    spread = tuple(dataclasses.replace(video, label=4 * video.label) for video in manifest.videos)
    message = describe_classes(dataclasses.replace(manifest, videos=spread, classes=tuple("01234")))
    assert message.startswith("warning: 5 classes, of which 3 have no training video (the first is 1)")


def test_the_laptops_classifier_is_the_encoder_of_the_laptops_pre_training():
    config, pretrained = load_recipe("laptop/finetune", FinetuneConfig), load_recipe("laptop")
    model = pretrained.model
    assert (config.data.frames, config.data.size) == (pretrained.data.frames, pretrained.data.size)
    assert (config.model.width, config.model.depth, config.model.heads) == (model.width, model.depth, model.heads)
    assert (config.model.patch, config.model.tubelet) == (model.patch, model.tubelet)
