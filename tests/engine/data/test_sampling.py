from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mam2.engine.config.training import DataConfig
from mam2.engine.data.manifest import Video
from mam2.engine.data.sampling import CROP_PLACES, CROP_SCALES, draw_clip, replacement, sample_at
from mam2.engine.errors import UserError

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
    requests = draws(2000, video)
    assert all(np.diff(request.frames).tolist() == [3, 3, 3] for request in requests)
    counts = np.bincount([request.frames[0] for request in requests], minlength=5)
    assert len(counts) == 5
    # 400 expected with a deviation of 18.
    assert counts.min() > 320
    assert counts.max() < 480


@pytest.mark.parametrize("frames", [1, 9, 10])
def test_a_video_no_longer_than_the_clip_starts_at_its_first_frame(frames):
    video = dataclasses.replace(VIDEO, frames=frames)
    assert {request.frames for request in draws(20, video)} == {(0, 3, 6, 9)}
    assert draw_clip(0, video, 0, CONFIG, 0, train=False).frames == (0, 3, 6, 9)


@pytest.mark.parametrize(
    ("file_fps", "fps", "frames"),
    [
        (25.0, 25.0, (0, 1, 2, 3)),
        (25.0, 12.5, (0, 2, 4, 6)),
        (30.0, 12.0, (0, 2, 5, 8)),  # 2.5 and 7.5 round to the even number
        (29.97, 7.5, (0, 4, 8, 12)),
        (10.0, 25.0, (0, 0, 1, 1)),  # frames repeat where the file has fewer
    ],
)
def test_a_rate_picks_the_frames_nearest_to_its_times(file_fps, fps, frames):
    config = dataclasses.replace(CONFIG, stride=0, fps=fps)
    video = dataclasses.replace(VIDEO, fps=file_fps, frames=frames[-1] + 10)
    for request in draws(50, video, config):
        start = request.frames[0]
        assert tuple(frame - start for frame in request.frames) == frames
        assert request.frames[-1] < video.frames
    assert {request.frames[0] for request in draws(200, video, config)} == set(range(10))


def test_the_same_rate_spans_the_same_time_in_files_of_any_rate():
    config = dataclasses.replace(CONFIG, frames=16, stride=0, fps=8.0)
    for fps in (10.0, 15.0, 23.976, 25.0, 29.97, 50.0, 60.0):
        frames = draw_clip(0, dataclasses.replace(VIDEO, fps=fps, frames=1000), 0, config, 0).frames
        assert (frames[-1] - frames[0]) / fps == pytest.approx(15 / 8, abs=0.5 / fps + 1e-9)


def test_a_rate_needs_one_in_the_file():
    with pytest.raises(UserError, match=r"a\.mp4: no frame rate is known.*data\.stride"):
        draw_clip(0, dataclasses.replace(VIDEO, fps=0.0), 0, dataclasses.replace(CONFIG, stride=0, fps=8.0), 0)


@pytest.mark.parametrize("frames", [1, 3, 4, 10, 101])
def test_uniform_sampling_takes_a_frame_of_each_part(frames):
    config = dataclasses.replace(CONFIG, sampling="uniform")
    video = dataclasses.replace(VIDEO, frames=frames)
    bounds = np.arange(5) * frames / 4
    seen = [set() for _ in range(4)]
    for request in draws(600, video, config):
        assert list(request.frames) == sorted(request.frames)
        for part, frame in enumerate(request.frames):
            seen[part].add(frame)
    for part in range(4):
        first = int(bounds[part])
        assert seen[part] == set(range(first, max(int(bounds[part + 1]), first + 1)))
    middle = draw_clip(5, video, 0, config, seed=1, train=False).frames
    assert middle == tuple(int((bounds[part] + bounds[part + 1]) / 2) for part in range(4))


def test_recorded_augmentations_come_again():
    config = dataclasses.replace(CONFIG, recorded=3)
    requests = draws(9, config=config)
    assert requests[:3] == requests[3:6] == requests[6:]
    assert len(set(requests)) == 3
    # A video that replaces a broken one has its own clip.
    assert draw_clip(5, VIDEO, 7, config, seed=1, attempt=4) == requests[1]


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


@pytest.mark.parametrize("rotation", [0, 90])
def test_multi_scale_crops_are_videomaes(rotation):
    config = dataclasses.replace(CONFIG, crop="multi-scale", views=4)
    video = dataclasses.replace(VIDEO, rotation=rotation)
    width, height = (240, 320) if rotation else (320, 240)
    seen = set()
    for request in draws(1500, video, config):
        for x0, y0, x1, y1, _ in request.views:
            wide, high = (x1 - x0) * width / 240, (y1 - y0) * height / 240
            places = [
                start / (1 - share) if share < 1 - 1e-9 else None for start, share in ((x0, x1 - x0), (y0, y1 - y0))
            ]
            seen.add(
                (round(wide, 9), round(high, 9), *(None if place is None else round(place, 9) for place in places))
            )
    scales = {1.0, 0.875, 0.75, 0.66}
    order = sorted(scales)
    assert {crop[:2] for crop in seen} == {
        (wide, high) for wide in scales for high in scales if abs(order.index(wide) - order.index(high)) <= 1
    }
    corners = {(x, y) for x in (0.0, 0.5, 1.0) for y in (0.0, 0.5, 1.0)}
    quarters = {(x, y) for x in (0.25, 0.75) for y in (0.25, 0.75)}
    assert {crop[2:] for crop in seen if None not in crop} == corners | quarters
    assert (len(CROP_SCALES), len(CROP_PLACES)) == (10, 13)


def test_views_of_one_clip_differ():
    assert all(request.views[0] != request.views[1] for request in draws(20))


def test_flip_can_be_turned_off():
    config = dataclasses.replace(CONFIG, flip=False)
    assert not any(view.flip for request in draws(50, config=config) for view in request.views)


def test_a_crop_that_never_fits_is_the_largest_center_crop():
    config = dataclasses.replace(CONFIG, min_area=1.0, max_area=1.0, max_aspect=1.0, flip=False)
    for request in draws(5, config=config):
        assert request.views[0][:4] == pytest.approx((0.125, 0, 0.875, 1))  # 240 of 320 columns


def test_the_whole_of_a_square_frame_can_be_asked_for():
    square = dataclasses.replace(VIDEO, width=64, height=64)
    config = dataclasses.replace(CONFIG, min_area=1.0, max_area=1.0, max_aspect=1.0, flip=False)
    assert {request.views[0] for request in draws(5, square, config)} == {(0, 0, 1, 1, False)}


def test_evaluation_takes_the_center_square_of_the_middle_clip():
    request = draw_clip(5, VIDEO, 0, CONFIG, seed=1, train=False)
    assert (request.video, request.frames) == (5, (45, 48, 51, 54))
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
    """A draw does not depend on earlier draws; also at steps far beyond those of a run."""
    forward = [sample_at(counter, 17, 3) for counter in range(60)]
    assert [sample_at(counter, 17, 3) for counter in reversed(range(60))] == forward[::-1]
    assert sample_at(10**9 + 7, 240_000, 0)[0] == (10**9 + 7) // 240_000


def test_replacements_are_in_range_and_change_with_every_attempt():
    drawn = [replacement(3, 50, 2, 1, attempt) for attempt in range(1, 41)]
    assert drawn == [replacement(3, 50, 2, 1, attempt) for attempt in range(1, 41)]
    assert set(drawn) <= set(range(50))
    assert len(set(drawn)) > 15
