from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mam2.engine.config import DataConfig
from mam2.engine.data.manifest import Video
from mam2.engine.data.sampling import draw_clip, replacement, sample_at

VIDEO = Video("a.mp4", 0, 100, 320, 240, "h264", 25.0, 0)
CONFIG = DataConfig(frames=4, stride=3, size=32, min_area=0.3, max_area=0.9, max_aspect=1.5, views=2)


def draws(count: int, video: Video = VIDEO, config: DataConfig = CONFIG):
    return [draw_clip(5, video, epoch, config, seed=1) for epoch in range(count)]


def test_a_draw_depends_on_seed_epoch_video_and_attempt_alone():
    first = draw_clip(5, VIDEO, 2, CONFIG, seed=1)
    draw_clip(6, VIDEO, 2, CONFIG, seed=1)
    assert draw_clip(5, VIDEO, 2, CONFIG, seed=1) == first
    others = [
        draw_clip(6, VIDEO, 2, CONFIG, seed=1),
        draw_clip(5, VIDEO, 3, CONFIG, seed=1),
        draw_clip(5, VIDEO, 2, CONFIG, seed=2),
        draw_clip(5, VIDEO, 2, CONFIG, seed=1, attempt=1),
    ]
    views = [request.views for request in (first, *others)]
    assert len(set(views)) == len(views)


def test_every_start_is_possible_and_equally_likely():
    video = dataclasses.replace(VIDEO, frames=14)  # a clip spans 10 frames
    counts = np.bincount([request.start for request in draws(2000, video)], minlength=5)
    assert len(counts) == 5
    # 400 expected with a deviation of 18.
    assert counts.min() > 320
    assert counts.max() < 480


@pytest.mark.parametrize("frames", [1, 9, 10])
def test_a_video_no_longer_than_the_clip_starts_at_its_first_frame(frames):
    video = dataclasses.replace(VIDEO, frames=frames)
    assert {request.start for request in draws(20, video)} == {0}
    assert draw_clip(0, video, 0, CONFIG, 0, train=False).start == 0


@pytest.mark.parametrize("rotation", [0, 90])
def test_crops_keep_to_the_frame_the_area_and_the_aspect_ratio(rotation):
    video = dataclasses.replace(VIDEO, rotation=rotation)
    width, height = (240, 320) if rotation else (320, 240)
    views = np.array([view for request in draws(300, video) for view in request.views])
    x0, y0, x1, y1, flip = views.T
    assert min(x0.min(), y0.min()) >= 0
    assert max(x1.max(), y1.max()) <= 1 + 1e-12
    area, aspect = (x1 - x0) * (y1 - y0), (x1 - x0) * width / ((y1 - y0) * height)
    assert 0.3 <= area.min() < 0.35
    assert 0.8 < area.max() <= 0.9
    assert 1 / 1.5 - 1e-9 <= aspect.min() < 0.7
    assert 1.4 < aspect.max() <= 1.5 + 1e-9
    assert 0.4 < flip.mean() < 0.6


def test_views_of_one_clip_differ():
    assert all(request.views[0] != request.views[1] for request in draws(20))


def test_flip_can_be_turned_off():
    config = dataclasses.replace(CONFIG, flip=False)
    assert not any(view.flip for request in draws(50, config=config) for view in request.views)


def test_a_crop_that_never_fits_is_the_largest_centre_crop():
    config = dataclasses.replace(CONFIG, min_area=1.0, max_area=1.0, max_aspect=1.0, flip=False)
    for request in draws(5, config=config):
        assert request.views[0][:4] == pytest.approx((0.125, 0, 0.875, 1))  # 240 of 320 columns


def test_the_whole_of_a_square_frame_can_be_asked_for():
    square = dataclasses.replace(VIDEO, width=64, height=64)
    config = dataclasses.replace(CONFIG, min_area=1.0, max_area=1.0, max_aspect=1.0, flip=False)
    assert {request.views[0] for request in draws(5, square, config)} == {(0, 0, 1, 1, False)}


def test_evaluation_takes_the_centre_square_of_the_middle_clip():
    request = draw_clip(5, VIDEO, 0, CONFIG, seed=1, train=False)
    assert (request.video, request.start, request.stride) == (5, 45, 3)
    assert request.views == ((0.125, 0.0, 0.875, 1.0, False),)
    assert draw_clip(5, VIDEO, 9, CONFIG, seed=7, train=False) == request


@pytest.mark.parametrize("n", [1, 2, 17])
def test_every_epoch_shows_every_video_once_in_an_order_of_its_own(n):
    samples = [sample_at(counter, n, seed=3) for counter in range(5 * n)]
    assert [epoch for epoch, _ in samples] == [counter // n for counter in range(5 * n)]
    orders = [[video for _, video in samples[epoch * n : (epoch + 1) * n]] for epoch in range(5)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    if n == 17:
        assert len({tuple(order) for order in orders}) == 5
        assert [sample_at(counter, n, seed=4)[1] for counter in range(n)] != orders[0]


def test_the_stream_can_be_entered_anywhere():
    assert sample_at(10**9 + 7, 240_000, 0) == sample_at(10**9 + 7, 240_000, 0)
    assert sample_at(10**9 + 7, 240_000, 0)[0] == (10**9 + 7) // 240_000


def test_replacements_are_in_range_and_change_with_every_attempt():
    drawn = [replacement(3, 50, 2, 1, attempt) for attempt in range(1, 41)]
    assert drawn == [replacement(3, 50, 2, 1, attempt) for attempt in range(1, 41)]
    assert set(drawn) <= set(range(50))
    assert len(set(drawn)) > 15
