"""The hard clips of the convergence benchmark: their classes, looks and labels."""

import av
import numpy as np
import pytest

from benchmarks.trials.clips import COLORS, STREAMS, TEXTURES, render_hard_clip, render_with_looks, write_hard_dataset
from mam2.engine.data.synthetic import MOTIONS, SHAPES, SIZE, draw_coverage


def _hue(clip):
    red, green, blue = clip.reshape(-1, 3).astype(float).mean(0)
    return np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue)


@pytest.mark.slow
def test_the_tint_gives_the_class_away_in_training_clips_alone():
    def agreement(split):
        """Agreement of the hues of the clips of a class: 1 if all are equal, about 0.1 for random hues."""
        hues = np.array(
            [[_hue(render_hard_clip(motion, split, np.random.default_rng([1, STREAMS[split], k, i])))
              for k in range(60)] for i, motion in enumerate(MOTIONS)]
        )  # fmt: skip
        return np.abs(np.exp(1j * hues).mean(1)).mean()

    train, validation, test = (agreement(split) for split in STREAMS)
    assert train > 1.5 * validation
    assert train > 1.5 * test


def test_a_clip_is_a_function_of_its_key_and_sizes_show_the_same_scene():
    small, again, large = (
        render_hard_clip("left", "test", np.random.default_rng(7), size=size) for size in (SIZE, SIZE, 2 * SIZE)
    )
    assert np.array_equal(small, again)
    assert large.shape == (*small.shape[:1], 2 * SIZE, 2 * SIZE, 3)
    # every other pixel of the larger clip equals the smaller clip, except at the edges of the shape
    assert np.mean(np.abs(large[:, ::2, ::2].astype(int) - small) > 8) < 0.05


def test_the_class_is_the_motion_before_the_background():
    """The shape moves in the direction of the class."""
    for motion, axis, sign in (("left", 2, -1), ("right", 2, 1), ("up", 1, -1), ("down", 1, 1)):
        moved = []
        for seed in range(8):
            clip = render_hard_clip(motion, "test", np.random.default_rng([seed, 3])).astype(float).max(-1)
            # the shape is the brightest part: its position as an angle, because the frame wraps around
            bright = (clip >= np.quantile(clip, 0.97, axis=(1, 2), keepdims=True)).sum(axis=3 - axis)
            angle = np.angle((bright * np.exp(2j * np.pi * np.arange(SIZE) / SIZE)).sum(1))
            moved.append(np.unwrap(angle)[-1] - np.unwrap(angle)[0])
        assert sign * np.median(moved) > 0.5, motion


def test_interrupted_writing_continues(tmp_path):
    write_hard_dataset(tmp_path, {"train": 16})
    files = sorted(path for path in tmp_path.glob("train/*/*"))
    assert [file.suffix for file in files].count(".mp4") == 8 == len(files) / 2
    before = {path: (path.stat().st_mtime_ns, _frames(path)) for path in files}
    files[3].unlink()
    write_hard_dataset(tmp_path, {"train": 16})
    for path, (written, frames) in before.items():
        assert (path.stat().st_mtime_ns == written) == (path != files[3])
        assert np.abs(_frames(path).astype(int) - frames).mean() < 1


def _frames(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_what_a_clip_shows_does_not_tell_how_it_moves(tmp_path):
    write_hard_dataset(tmp_path, {"train": 8})
    rows = [line.split(",") for line in (tmp_path / "labels.csv").read_text().splitlines()]
    assert rows[0] == ["path", "shape", "color", "texture"]
    assert sorted(row[0] for row in rows[1:]) == sorted(
        path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("train/*/*")
    )
    looks = [
        [render_with_looks(motion, "test", np.random.default_rng([5, number]), size=2)[1] for number in range(100)]
        for motion in MOTIONS[:2]
    ]
    assert looks[0] == looks[1]
    for kind, names in enumerate((SHAPES, COLORS, TEXTURES)):
        counts = [[each[kind] for each in looks[0]].count(name) for name in names]
        assert sum(counts) == 100
        assert min(counts) > 0.5 * 100 / len(names)


def test_the_labels_are_what_is_seen():
    for seed in range(6):
        clip, looks = render_with_looks("left", "test", np.random.default_rng(seed))
        frame = clip[12].astype(int)
        # the shape is brighter than any background: its pixels have the largest values of its channel
        channel = COLORS.index(looks.color)
        shape = frame[..., channel] > 0.75 * frame[..., channel].max()
        assert frame[shape].mean(0).argmax() == channel
    fine, coarse = (
        np.mean([np.abs(np.diff(clip[0, :, :, 1].astype(float))).mean() for clip in found])
        for found in (
            [c for c, looks in (_small(seed) for seed in range(40)) if looks.texture == name]
            for name in ("fine", "coarse")
        )
    )
    assert fine > 1.2 * coarse
    assert draw_coverage("left", SHAPES[0], np.random.default_rng(0)).max() == 1


def _small(seed):
    return render_with_looks("left", "test", np.random.default_rng([8, seed]))
