from __future__ import annotations

import random

import pytest

from mam2.engine.data.frame_folders import AmbiguousFrames, frame_names, holds_frames


def numbered(pattern: str, count: int) -> list[str]:
    return [pattern.format(number) for number in range(1, count + 1)]


@pytest.mark.parametrize(
    ("frames", "others"),
    [
        (numbered("img_{:05d}.jpg", 12), [*numbered("flow_x_{:05d}.jpg", 12), *numbered("flow_y_{:05d}.jpg", 12)]),
        (numbered("img_{}.jpg", 12), [*numbered("x_{}.jpg", 12), *numbered("y_{}.jpg", 12)]),
        (numbered("{:06d}.png", 5), [*numbered("thumb_{:06d}.png", 9), "cover.jpg", "thumbnail.png"]),
        (numbered("img_{:05d}.jpg", 3), [*numbered("img_{:05d}_thumb.jpg", 3), "poster.jpg"]),
        (numbered("frame ({}).jpg", 11), ["contact sheet.jpg", "folder1.jpg"]),
        (numbered("v_Wave_g01_c02_{}.jpeg", 4), [".img_1.jpg", "notes1.txt"]),
        (numbered("flow_x_{}.jpg", 4), []),
        (numbered("a 1.{:02d}s.webp", 3) + numbered("a 2.{:02d}s.webp", 3), []),
        (["a.jpg", "b.jpg", "c.JPG"], []),
        (["1.jpg", "2.JPEG", "10.jpg"], ["1.png"]),
    ],
)
def test_the_frames_are_the_longest_series_that_is_not_made_of_something_else(frames, others):
    names = [*frames, *others]
    random.Random(0).shuffle(names)
    assert frame_names(names) == frames


@pytest.mark.parametrize("second", ["b_{}.jpg", "a_{}.png"])
def test_two_series_of_one_length_are_refused(second):
    with pytest.raises(AmbiguousFrames, match="3 each: a folder must hold only one series"):
        frame_names([*numbered("a_{}.jpg", 3), *numbered(second, 3)])


def test_one_image_is_a_poster_and_several_of_a_series_are_a_video():
    assert not holds_frames(["cover1.jpg", "front.png", "back.png"])
    assert not holds_frames(["a1.jpg", "b2.jpg"])
    assert holds_frames(["a1.jpg", "a2.jpg"])
