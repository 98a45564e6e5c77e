"""The synthetic set: real files; the class is the motion; the appearance is drawn independently."""

import av
import numpy as np
import pytest

from mam2.engine.data.synthetic import FRAMES, MOTIONS, SIZE, render_clip, write_dataset

REVERSE = {"left": "right", "up": "down", "clockwise": "counterclockwise", "grow": "shrink"}


@pytest.mark.parametrize(("motion", "reverse"), REVERSE.items())
def test_paired_motions_are_each_others_reverse_in_time(motion, reverse):
    there, back = (render_clip(name, np.random.default_rng(5)) for name in (motion, reverse))
    np.testing.assert_array_equal(there, back[::-1])
    assert not np.array_equal(there, back)


def test_motion_goes_where_its_name_says():
    def center(image):
        bright = image.max(axis=-1) > 110
        y, x = (np.exp(2j * np.pi * place / SIZE).mean() for place in np.nonzero(bright))
        return x, y, bright.sum()

    def moved_by(before, after):
        """Distance in pixels on a torus: opposite edges of the frame are adjacent."""
        return np.angle(after / before) * SIZE / (2 * np.pi)

    for motion in ("right", "down", "grow"):
        for key in range(5):
            clip = render_clip(motion, np.random.default_rng(key))
            (x0, y0, area0), (x1, y1, area1) = center(clip[6]), center(clip[-7])
            moved = {"right": moved_by(x0, x1) > 10, "down": moved_by(y0, y1) > 10, "grow": area1 > 1.2 * area0}
            assert moved[motion], (motion, key)


def test_an_unknown_motion_is_refused():
    with pytest.raises(ValueError, match="expected one of clockwise"):
        render_clip("sideways", np.random.default_rng(0))


@pytest.mark.slow
def test_files_are_real_labeled_and_kept_on_a_second_call(tmp_path):
    write_dataset(tmp_path, train=16, test=8, progress=False)
    files = sorted((tmp_path / "train").glob("*/*"))
    assert len(files) == 16
    assert len(list((tmp_path / "test").glob("*/*"))) == 8
    assert {path.parent.name for path in files} == set(MOTIONS)
    assert {path.suffix for path in files} == {".mp4", ".webm"}
    for path in files[:1] + files[-1:]:
        with av.open(str(path)) as container:
            images = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert np.array(images).shape == (FRAMES, SIZE, SIZE, 3)
    before = {path: path.stat().st_mtime_ns for path in files}
    files[3].unlink()
    write_dataset(tmp_path, train=16, test=8, progress=False)
    after = {path: path.stat().st_mtime_ns for path in files}
    assert [path for path in files if before[path] != after[path]] == [files[3]]
    train = (tmp_path / "train" / "up" / files[-1].name).read_bytes()
    assert all(train != path.read_bytes() for path in (tmp_path / "test").glob("*/*"))


@pytest.mark.slow
def test_the_same_set_is_written_bit_for_bit(tmp_path):
    for name in ("one", "other"):
        write_dataset(tmp_path / name, train=64, test=0, progress=False)
    one, other = (sorted((tmp_path / name).rglob("*.*")) for name in ("one", "other"))
    assert len(one) == 64
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]
