"""Several views: their positions; their mean equals a plain loop's, on any number of processes; the reports."""

import csv
import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from mam2.engine.checkpoints import checkpoint
from mam2.engine.checkpoints.classifiers import CLASSES, build_classifier, load_classifier, relabeled
from mam2.engine.checkpoints.export import write_hugging_face, write_videomae
from mam2.engine.checkpoints.load import load_encoder
from mam2.engine.config.training import DataConfig
from mam2.engine.data.decoding import decode_frames
from mam2.engine.data.manifest import Manifest, read_manifest
from mam2.engine.data.sampling import draw_clip
from mam2.engine.data.video import Video
from mam2.engine.errors import UserError
from mam2.engine.evaluation import accuracy
from mam2.engine.evaluation.classification import evaluate
from mam2.engine.evaluation.views import view_clip
from tests.helpers.commands import torchrun

pytestmark = pytest.mark.usefixtures("float32", "on_a_cpu")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "3000"}
NAMES = ("archery", "juggling", "wave")


def video(frames=100, width=320, height=240, *, rotation=0, label=0):
    return Video("v.mp4", label, frames, width, height, "h264", 25.0, rotation)


def clip(video, number, data, temporal, spatial):
    return view_clip(0, video, number, data, temporal=temporal, spatial=spatial)


def test_dense_clips_reach_from_the_first_frame_to_the_last():
    data = DataConfig(frames=16, stride=4)
    clips = [clip(video(100), number, data, 5, 3).frames for number in range(5)]
    assert clips[0] == tuple(range(0, 61, 4))
    assert clips[4][-1] == 99
    starts = [frames[0] for frames in clips]
    assert starts == [0, 9, 19, 29, 39]
    assert all(np.diff(frames).tolist() == [4] * 15 for frames in clips)


def test_a_short_video_is_seen_from_its_start_each_time():
    data = DataConfig(frames=16, stride=4)
    assert {clip(video(20), number, data, 5, 1).frames for number in range(5)} == {tuple(range(0, 61, 4))}


def test_two_uniform_clips_are_interleaved():
    data = DataConfig(frames=4, sampling="uniform")
    clips = [clip(video(40), number, data, 2, 3).frames for number in range(2)]
    assert clips == [(0, 10, 20, 30), (5, 15, 25, 35)]


@pytest.mark.parametrize("sampling", ["dense", "uniform"])
@pytest.mark.parametrize("frames", [5, 33, 100, 101])
@pytest.mark.parametrize("size", [(320, 240), (240, 320), (100, 100)])
def test_one_view_is_the_middle_one_that_validation_shows(sampling, frames, size):
    data = DataConfig(frames=8, stride=3, sampling=sampling)
    shown = video(frames, *size)
    ours, theirs = clip(shown, 0, data, 1, 1), draw_clip(0, shown, 0, data, 0, train=False)
    assert ours.frames == theirs.frames
    assert ours.views[0] == pytest.approx(theirs.views[0])


@pytest.mark.parametrize(("size", "rotation"), [((320, 240), 0), ((240, 320), 0), ((240, 320), 90)])
def test_three_crops_cover_the_longer_side_at_full_short_side(size, rotation):
    shown = video(100, *size, rotation=rotation)
    width, height = shown.shown_size
    crops = clip(shown, 0, DataConfig(), 1, 3).views
    for crop in crops:
        wide, high = (crop.x1 - crop.x0) * width, (crop.y1 - crop.y0) * height
        assert (wide, high) == pytest.approx((240, 240))
        assert not crop.flip
    low, high = ("x0", "x1") if width > height else ("y0", "y1")
    assert [getattr(crop, low) for crop in crops] == pytest.approx([0, 0.125, 0.25])
    assert getattr(crops[2], high) == pytest.approx(1)


@pytest.fixture(scope="module")
def clips(tmp_path_factory, write_video):
    """Five videos of three classes, moving noise of 32×48 pixels, with a seventh of garbage in between."""
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    rows = ["path,label"]
    for number, name in enumerate((*NAMES, "wave", "archery")):
        small = rng.integers(0, 256, (24, 4, 6, 3), dtype=np.uint8)
        frames = small.repeat(8, 1).repeat(8, 2)
        if number % 2:
            frames = frames.transpose(0, 2, 1, 3)
        path = write_video(folder / f"{number}.mp4", np.ascontiguousarray(frames))
        rows.append(f"{path.name},{name}")
        if number == 2:
            (folder / "broken.mp4").write_bytes(b"no video")
            rows.append("broken.mp4,archery")
    (folder / "list.csv").write_text("\n".join(rows) + "\n")
    return folder / "list.csv"


@pytest.fixture(scope="module")
def saved(tmp_path_factory, small_finetuning):
    """A classifier with random weights for clips at their own size, saved like that of a run."""
    config = small_finetuning(
        data={"frames": 4, "stride": 3, "size": 32, "threads": 1},
        model={"width": 24, "depth": 1, "heads": 2, "classes": 3},
        test={"temporal": 3, "spatial": 3, "batch": 8},
    )
    torch.manual_seed(0)
    model = build_classifier(config)
    torch.nn.init.normal_(model.head.weight)
    run = tmp_path_factory.mktemp("run")
    checkpoint.write_best(run, 1, model.state_dict(), config, {CLASSES: json.dumps(NAMES)}, {})
    return run


@pytest.fixture(scope="module")
def result(saved, clips, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return evaluate(saved, clips, out, progress=False), out


def plain_probabilities(model, path):
    """The mean softmax over 3×3 views, from frames sliced by hand."""
    found = []
    for start in (0, 7, 14):
        frames = torch.from_numpy(decode_frames(str(path), [start, start + 3, start + 6, start + 9]))
        for offset in (0, 8, 16):
            crop = frames[:, :, offset : offset + 32] if frames.shape[2] > 32 else frames[:, offset : offset + 32]
            with torch.no_grad():
                found.append(model(crop.permute(3, 0, 1, 2)[None]).double().softmax(-1)[0])
    return torch.stack(found).mean(0)


def predictions(out):
    with (out / "predictions.tsv").open() as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_evaluation_is_the_mean_of_a_plain_loop_over_views(result, saved, clips):
    model, _, classes = load_classifier(saved)
    found, out = result
    right, rows = 0, predictions(out)
    assert [Path(row["path"]).stem for row in rows] == ["0", "1", "2", "3", "4"]
    for row, label in zip(rows, ("archery", "juggling", "wave", "wave", "archery"), strict=True):
        expected = plain_probabilities(model.eval(), row["path"])
        order = expected.argsort(descending=True)
        assert row["class"] == label
        assert [row[f"class{k}"] for k in (1, 2, 3)] == [classes[k] for k in order.tolist()]
        ours = [float(row[f"probability{k}"]) for k in (1, 2, 3)]
        assert ours == pytest.approx(expected[order].tolist(), abs=2e-5)
        right += classes[int(order[0])] == label
        assert row["right"] == str(int(classes[int(order[0])] == label))
    assert found.top1 == pytest.approx(right / 5)
    assert (found.top5, found.videos, found.unusable, found.temporal, found.spatial) == (1.0, 5, 1, 3, 3)


def test_evaluation_leaves_what_it_promises(result):
    found, out = result
    assert json.loads((out / "results.json").read_text()) == dataclasses.asdict(found)
    assert (out / "confusion.png").read_bytes().startswith(b"\x89PNG")
    assert "broken.mp4" in (out / "unusable.tsv").read_text()
    with (out / "classes.tsv").open() as file:
        rows = {row["class"]: row for row in csv.DictReader(file, delimiter="\t")}
    assert {name: int(row["videos"]) for name, row in rows.items()} == {"archery": 2, "juggling": 1, "wave": 2}
    assert np.mean([float(row["accuracy"]) for row in rows.values()]) == pytest.approx(found.mean_class, abs=1e-6)


@pytest.mark.slow
def test_two_processes_count_every_video_once(result, saved, clips, tmp_path):
    """Five videos on two ranks: no video is repeated as padding, none is left out."""
    arguments = ["-m", "mam2.engine", "evaluate", saved, "--data", clips, "--out", tmp_path, "--device", "cpu"]
    done = torchrun(2, *arguments, "--precision", "float32")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("top-1") == 1
    assert (tmp_path / "predictions.tsv").read_text() == (result[1] / "predictions.tsv").read_text()
    assert (tmp_path / "unusable.tsv").read_text().count("broken.mp4") == 1
    ours, theirs = (json.loads((folder / "results.json").read_text()) for folder in (tmp_path, result[1]))
    assert ours == theirs


def exported(saved, folder, names):
    """The same classifier as a Hugging Face folder and as a .pth without metadata."""
    model, _, _ = load_classifier(saved)
    (folder / "hf").mkdir()
    write_hugging_face(model, folder / "hf", names)
    write_videomae(model, folder / "said.pth")
    torch.save({"model": torch.load(folder / "said.pth")["model"]}, folder / "bare.pth")
    return folder / "hf", folder / "bare.pth"


@pytest.mark.slow
def test_classifiers_of_others_are_evaluated(result, saved, clips, tmp_path):
    """Classes by name, by number, and by a list of names; other values of the recipe as passed."""
    views = {"temporal": 3, "spatial": 3, "progress": False}
    folder, bare = exported(saved, tmp_path, NAMES)
    numbered = tmp_path / "numbers.csv"
    rows = clips.read_text().splitlines()
    numbers = {name: str(number) for number, name in enumerate(NAMES)}
    lines = [rows[0], *(f"{clips.parent / row.split(',')[0]},{numbers[row.split(',')[1]]}" for row in rows[1:])]
    numbered.write_text("\n".join(lines) + "\n")
    said = {"frames": 4, "size": 32, "heads": 2}
    found = [
        evaluate(folder, clips, tmp_path / "names", **views),
        evaluate(folder, numbered, tmp_path / "numbers", **views),
        evaluate(bare, numbered, tmp_path / "bare", **views, **said),
        evaluate(bare, clips, tmp_path / "told", **views, **said, names=NAMES),
    ]
    for one in found:
        assert (one.videos, one.unusable, one.temporal, one.spatial) == (5, 1, 3, 3)
        assert 0 <= one.top1 <= one.top5 == 1
    # the same model and views have the same accuracy (the files state no stride: the default of 4)
    assert {one.top1 for one in found} == {found[0].top1}
    assert [row["class"] for row in predictions(tmp_path / "told")] == [row["class"] for row in predictions(result[1])]
    assert [row["class"] for row in predictions(tmp_path / "bare")] == ["0", "1", "2", "2", "0"]
    with pytest.raises(UserError, match="the class 'archery' is not one of the classifier's 3"):
        evaluate(bare, clips, tmp_path / "none", **views, **said)
    with pytest.raises(UserError, match=r"--classes: 2 names, but .* has 3 classes"):
        evaluate(bare, clips, tmp_path / "none", **views, **said, names=NAMES[:2])
    write_videomae(load_encoder(saved), tmp_path / "encoder.pth")
    with pytest.raises(UserError, match="contains no classifier"):
        evaluate(tmp_path / "encoder.pth", clips, tmp_path / "none", **views, **said)


def test_labels_go_by_name_in_lists_that_lack_a_class(clips, tmp_path):
    (tmp_path / "part.csv").write_text(
        f"path,label\n{clips.parent / '2.mp4'},wave\n{clips.parent / '1.mp4'},juggling\n"
    )
    part = read_manifest(tmp_path / "part.csv", progress=False)
    assert [video.label for video in part.videos] == [1, 0]
    again = relabeled(part, "part.csv", NAMES)
    assert [video.label for video in again.videos] == [2, 1]
    with pytest.raises(UserError, match="the class 'wave' is not one of the classifier's 2"):
        relabeled(part, "part.csv", NAMES[:2])
    with pytest.raises(UserError, match="no label for"):
        relabeled(Manifest((video(label=-1),)), "folder", NAMES)


def test_a_run_that_is_no_classifiers_is_refused(tmp_path, small):
    config = small()
    checkpoint.write(tmp_path, 1, {"a": torch.zeros(1)}, {"a": torch.zeros(1)}, config, {})
    with pytest.raises(UserError, match="contains no classifier"):
        load_classifier(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        load_classifier(tmp_path / "nothing")


def test_accuracies_of_a_table_counted_by_hand():
    chances = torch.tensor([[0.7, 0.2, 0.1, 0], [0.1, 0.2, 0.3, 0.4], [0.6, 0.3, 0.1, 0], [0.1, 0.8, 0.1, 0]])
    labels = torch.tensor([0, 2, 1, 1])
    assert accuracy.top_k(chances, labels, 1).tolist() == [True, False, False, True]
    assert accuracy.top_k(chances, labels, 2).tolist() == [True, True, True, True]
    assert accuracy.top_k(chances, labels, 9).all()
    matrix = accuracy.confusion(chances, labels)
    assert matrix.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert accuracy.class_accuracies(chances, labels) == ([1, 2, 1, 0], [1.0, 0.5, 0.0, None])


@pytest.mark.slow
def test_the_confusion_of_very_many_classes_takes_little_memory():
    chances = torch.zeros(3, 60_001)
    chances[[0, 1, 2], [0, 60_000, 59_999]] = 1
    labels = torch.tensor([0, 60_000, 1])
    matrix = accuracy.confusion(chances, labels)
    assert matrix.shape == (accuracy.DRAWN_CLASSES, accuracy.DRAWN_CLASSES)
    assert matrix.nonzero().tolist() == [[0, 0], [0, 999], [999, 999]]
    counts, shares = accuracy.class_accuracies(chances, labels)
    assert (counts[0], counts[1], counts[60_000], sum(counts)) == (1, 1, 1, 3)
    assert (shares[0], shares[1], shares[2], shares[60_000]) == (1.0, 0.0, None, 1.0)
    picture = accuracy.draw_confusion(matrix, [str(number) for number in range(60_001)])
    assert picture.startswith(b"\x89PNG")


def test_tables_hold_names_with_tabs_line_ends_and_bytes(tmp_path):
    odd = os.fsdecode(b'caf\xe9\t"a"\r\n$x_.mp4')
    chances = torch.tensor([[0.25, 0.75]])
    accuracy.write_predictions(tmp_path / "p.tsv", [odd], torch.tensor([1]), chances, ["plain", odd])
    with (tmp_path / "p.tsv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        (row,) = csv.DictReader(file, delimiter="\t")
    assert (row["path"], row["class"], row["class1"], row["class2"], row["right"]) == (odd, odd, odd, "plain", "1")
    matrix = accuracy.confusion(chances, torch.tensor([1]))
    assert accuracy.draw_confusion(matrix, ["plain", odd]).startswith(b"\x89PNG")
