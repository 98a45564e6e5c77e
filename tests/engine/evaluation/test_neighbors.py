"""Retrieval and mask propagation on features whose answers are known, and the verb on random encoders."""

import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch
from matplotlib import image

from mam2.engine.config.training import RunConfig
from mam2.engine.evaluation.features import layer_tokens
from mam2.engine.evaluation.mask_clips import CLIP_FRAMES, OBJECTS, render_mask_clip
from mam2.engine.evaluation.mask_propagation import frame_features
from mam2.engine.evaluation.propagation import boundary_accuracy, propagate_masks, region_similarity, score_masks
from mam2.engine.evaluation.retrieval import chance, hits, nearest
from tests.helpers.commands import exit_status
from tests.helpers.small_models import encoder

pytestmark = pytest.mark.usefixtures("float32")

PATCH, ROWS = 8, 12


def moving_tokens(frames=8):
    """Two 4×3 objects that move by whole tokens, and the identity of each token: ids [T, H', W'], masks [T, H', W']."""
    ids = torch.arange(ROWS * ROWS).view(ROWS, ROWS).repeat(frames, 1, 1)
    masks = torch.zeros_like(ids)
    for frame in range(frames):
        for number, (top, left) in enumerate([(1 + frame // 2, 1 + frame), (8, 8 - frame)], 1):
            own = 1000 * number + torch.arange(12).view(3, 4)
            ids[frame, top : top + 3, left : left + 4] = own
            masks[frame, top : top + 3, left : left + 4] = number
    return ids, masks


def to_pixels(masks):
    return masks.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)


def test_features_that_tell_every_token_carry_the_masks_exactly():
    ids, masks = moving_tokens()
    identities, places = ids.unique(return_inverse=True)
    features = torch.eye(len(identities))[places]
    true = to_pixels(masks)
    found = propagate_masks(features, true[0], 2, top_k=1)
    # between the tokens' centers a mask is interpolated, which rounds the corners of an object
    centers = slice(PATCH // 2, None, PATCH)
    assert torch.equal(found[:, centers, centers], masks)
    region, boundary = score_masks(found, true, 2)
    assert region > 0.95
    assert boundary > 0.97


def test_random_features_lose_the_masks():
    _, masks = moving_tokens()
    true = to_pixels(masks)
    features = torch.randn(8, ROWS, ROWS, 64, generator=torch.Generator().manual_seed(0))
    region, _ = score_masks(propagate_masks(features, true[0], 2), true, 2)
    assert region < 0.25


def test_masks_are_taken_from_near_tokens_and_the_frames_in_reach():
    """All features are equal: the label is that of the only token within the radius, or the mean of all within it."""
    mask = torch.zeros(4 * PATCH, 4 * PATCH, dtype=torch.int64)
    mask[:PATCH, :PATCH] = 1
    same = torch.ones(3, 4, 4, 5)
    near = propagate_masks(same, mask, 1, radius=0, top_k=1)
    assert torch.equal(near[1], near[2])
    assert (near[2] == 1).sum() > 0.7 * PATCH**2  # nothing moved
    assert near[2][PATCH:, PATCH:].sum() == 0
    # an object that is hidden in frame 1 is found again because the first frame is always searched
    ids = torch.arange(16).view(4, 4).repeat(3, 1, 1)
    ids[1, 0, 0] = 99
    features = torch.eye(100)[ids]
    assert (propagate_masks(features, mask, 1, context=1, top_k=1)[2][:PATCH, :PATCH] == 1).float().mean() > 0.7


def square(top, left, edge, size=40):
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[top : top + edge, left : left + edge] = True
    return mask


def test_region_similarity_is_intersection_over_union():
    assert float(region_similarity(square(0, 0, 10), square(0, 5, 10))) == pytest.approx(50 / 150)
    empty = torch.zeros(40, 40, dtype=torch.bool)
    pairs = [(empty, empty), (empty, square(0, 0, 4)), (square(0, 0, 4), square(9, 9, 4))]
    assert [float(region_similarity(*pair)) for pair in pairs] == [1, 0, 0]


def edge_pixels(mask):
    """A pixel is on the edge where the one to its right, below it or diagonally below it differs."""
    found = set()
    height, width = mask.shape
    for y, x in itertools.product(range(height), range(width)):
        others = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
        if any(j < height and i < width and mask[y, x] != mask[j, i] for j, i in others):
            found.add((y, x))
    return found


def boundary_by_hand(found, true):
    reach = math.ceil(0.008 * math.hypot(*true.shape))
    ours, theirs = edge_pixels(found), edge_pixels(true)
    if not ours or not theirs:
        return float(not ours and not theirs)

    def share(edge, other):
        return sum(any(math.hypot(y - j, x - i) <= reach for j, i in other) for y, x in edge) / len(edge)

    precision, recall = share(ours, theirs), share(theirs, ours)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize(
    ("found", "true"),
    [
        (square(10, 10, 12), square(10, 10, 12)),
        (square(10, 11, 12), square(10, 10, 12)),
        (square(10, 13, 12), square(12, 10, 9)),
        (square(0, 0, 12), square(28, 28, 12)),
        (square(0, 0, 40), square(5, 5, 20)),
        (square(0, 0, 0), square(5, 5, 20)),
        (square(5, 5, 20), square(0, 0, 0)),
        (square(0, 0, 0), square(0, 0, 0)),
    ],
)
def test_boundary_accuracy_is_what_counting_gives(found, true):
    assert float(boundary_accuracy(found, true)) == pytest.approx(boundary_by_hand(found, true), abs=1e-9)


def test_the_first_and_the_last_frame_do_not_count():
    _, masks = moving_tokens()
    true = to_pixels(masks)
    wrong = true.clone()
    wrong[0], wrong[-1] = 0, 0
    assert score_masks(wrong, true, 2) == (1, 1)
    wrong[3] = 0
    region, boundary = score_masks(wrong, true, 2)
    assert region == boundary == pytest.approx(5 / 6)


def test_mask_clips_show_their_objects_and_are_the_same_each_time():
    for number in range(12):
        clip = render_mask_clip(number, 48)
        assert (clip.frames.shape, clip.frames.dtype) == ((CLIP_FRAMES, 48, 48, 3), torch.uint8)
        shares = torch.stack([(clip.masks == one).float().mean((1, 2)) for one in range(1, OBJECTS + 1)])
        assert shares[:, 0].min() > 0.02  # only objects of the first frame are propagated
        assert shares.max() < 0.5
        kept = score_masks(clip.masks[:1].expand_as(clip.masks), clip.masks, OBJECTS)
        assert kept[0] < 0.75  # at least one object moves
    again = render_mask_clip(11, 48)
    assert torch.equal(again.frames, clip.frames)
    assert torch.equal(again.masks, clip.masks)
    assert not torch.equal(render_mask_clip(10, 48).frames, clip.frames)
    # the same clip at another size
    small, large = render_mask_clip(3, 32).masks, render_mask_clip(3, 96).masks
    assert (large[:, 1::3, 1::3] == small).float().mean() > 0.98


def test_a_frame_is_read_among_its_neighbors_or_as_a_still():
    model = encoder().eval()  # 2 slots of 2 frames, 3×3 tokens of 8² pixels
    frames = torch.randint(0, 256, (5, 24, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    run = RunConfig(precision="float32")

    def tokens(places):
        video = frames[torch.tensor(places)].permute(3, 0, 1, 2)[None]
        with torch.no_grad():
            return layer_tokens(model, video, [1])[1].view(2, 3, 3, -1)

    window = frame_features(model, frames, 1, "window", batch=2, run=run)
    assert window.shape == (5, 3, 3, 48)
    for frame, places in {0: [0, 0, 0, 1], 2: [0, 1, 2, 3], 4: [2, 3, 4, 4]}.items():
        torch.testing.assert_close(window[frame], tokens(places)[1], rtol=1e-4, atol=1e-5)
    still = frame_features(model, frames, 1, "still", batch=2, run=run)
    torch.testing.assert_close(still[3], tokens([3, 3, 3, 3]).mean(0), rtol=1e-4, atol=1e-5)


def test_neighbors_are_the_nearest_and_never_the_video_itself():
    gallery = torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1], [0.1, 0.9], [-1, -1]])
    ids = torch.arange(5)
    found = nearest(gallery, gallery, 2, query_ids=ids, gallery_ids=ids)
    assert found[:4, 0].tolist() == [1, 0, 3, 2]
    assert not (found == ids[:, None]).any()
    copies = torch.tensor([7, 7, 8, 9, 10])  # the first two are one video
    assert nearest(gallery, gallery, 5, query_ids=copies, gallery_ids=copies)[0].tolist()[3:] == [-1, -1]


def test_recall_counts_labels():
    neighbors = torch.tensor([[1, 2, 3], [0, 2, 3], [3, 0, -1]])
    labels = torch.tensor([0, 1, 1, 0])
    right = hits(neighbors, torch.tensor([0, 1, 1]), labels, ranks=(1, 2, 3))
    assert right.tolist() == [[False, False, True], [False, True, True], [False, False, False]]


def test_chance_is_that_of_drawing():
    labels, ids = torch.tensor([0, 0, 0, 1, 1, 2]), torch.arange(6)
    expected = []
    for rank in (1, 2, 4, 20):
        shares = []
        for query in range(6):
            others = [place for place in range(6) if place != query]
            draws = list(itertools.combinations(others, min(rank, len(others))))
            shares.append(sum(any(labels[one] == labels[query] for one in draw) for draw in draws) / len(draws))
        expected.append(np.mean(shares))
    assert chance(labels, labels, ids, ids, ranks=(1, 2, 4, 20)) == pytest.approx(expected)


@pytest.fixture(scope="module")
def clips(tmp_path_factory, synthetic_clips):
    folder = tmp_path_factory.mktemp("clips")
    synthetic_clips(folder, train=32, test=16)
    return folder


@pytest.mark.slow
def test_the_verb_writes_scores_and_pictures(clips, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["random", "--recipe", "demo", "--data", clips / "train", "--val", clips / "test", "--out", out]
    arguments += ["--cache", tmp_path / "cache", "--masks", "2", "--mask-size", "64", "--pool", "time"]
    assert exit_status("neighbors", *arguments) == 0
    found = json.loads((out / "neighbors.json").read_text())
    retrieval = found["retrieval"]
    assert (retrieval["gallery"], retrieval["queries"]) == (32, 16)
    assert retrieval["chance"]["1"] == pytest.approx(1 / 8)
    (score,) = retrieval["scores"]
    recall = [score["recall"][rank] for rank in ("1", "5", "10", "20")]
    assert recall == sorted(recall)
    kept, still, window = found["propagation"]
    assert [(one["checkpoint"], one["context"], one["size"]) for one in (kept, still, window)] == [
        ("", "", 64),
        ("random", "still", 64),
        ("random", "window", 64),
    ]
    assert still["region"] > kept["region"]  # even random features see color
    printed = capsys.readouterr().out
    assert f"{100 * recall[0]:.1f} (" in printed
    assert f"{100 * window['region']:.1f}  " in printed
    for name in ("retrieval.png", "masks.png"):
        assert image.imread(out / name)[..., :3].std() > 0.05


@pytest.mark.slow
def test_a_copy_of_the_query_is_no_hit(clips, tmp_path, capsys):
    """Every query is also in the gallery, under another name; a file that is no video is counted as left out."""
    gallery = tmp_path / "gallery"
    shutil.copytree(clips / "train", gallery)
    for path in (clips / "test").rglob("*.*"):
        shutil.copy(path, gallery / path.parent.name / f"copy {path.name}")
    (gallery / "left" / "noise.mp4").write_bytes(bytes(3000))
    for name, data in {"apart": clips / "train", "together": gallery}.items():
        places = ["--out", tmp_path / name, "--cache", tmp_path / "cache", "--masks", "0"]
        assert (
            exit_status("neighbors", "random", "--recipe", "demo", "--data", data, "--val", clips / "test", *places)
            == 0
        )
    apart, together = (
        json.loads((tmp_path / name / "neighbors.json").read_text())["retrieval"] for name in ("apart", "together")
    )
    assert together["scores"][0]["recall"]["1"] < 1
    assert apart["gallery"] + 16 == together["gallery"]
    assert (apart["left_out"], together["left_out"]) == (0, 1)
    assert " Left out: 1 file." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mask-size", "60"], "a multiple of 8, the patch of random"),
        (["--layer", "4"], "layers 1 to 3"),
        (["--masks", "0"], "nothing to compare"),
        (["--val", "."], "nothing to compare"),
        (["--data", "nowhere"], "no such file"),
    ],
)
def test_what_cannot_be_compared_is_said_in_a_line(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert exit_status("neighbors", "random", "--recipe", "demo", "--out", "out", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
