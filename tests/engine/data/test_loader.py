"""The loader's batches: their content, which is the same from any start, for any rank and any number of threads."""

from __future__ import annotations

import dataclasses
import itertools
import threading

import pytest
import torch

from mam2.engine.config.training import DataConfig
from mam2.engine.data import loader
from mam2.engine.data.manifest import Skipped
from mam2.engine.data.sampling import draw_clip, sample_at
from tests.helpers.loaders import CONFIG, assert_same, damaged, open_loader, take


def test_a_batch_is_what_it_says(videos, frame_numbers):
    batches = take(videos, 3)
    assert [batch.step for batch in batches] == [0, 1, 2]
    for batch in batches:
        assert (batch.clip.shape, batch.clip.dtype) == ((4, 4, 32, 32, 3), torch.uint8)
        assert batch.clip.is_contiguous()
        assert batch.label.tolist() == [videos.videos[video].label for video in batch.index]
    place = 0
    for batch in batches:
        for video, clip in zip(batch.index.tolist(), batch.clip, strict=True):
            epoch, drawn = sample_at(place, 10, 5)
            assert video == drawn
            frames = draw_clip(video, videos.videos[video], epoch, CONFIG, 5).frames
            last = videos.videos[video].frames - 1
            assert frame_numbers(clip.numpy()) == [min(frame, last) for frame in frames]
            place += 1


def test_two_passes_show_every_video_twice(videos):
    seen = torch.cat([batch.index for batch in take(videos, 5)])
    assert sorted(seen.tolist()) == sorted([*range(10), *range(10)])
    with open_loader(videos, batch=4, world=2) as clips:
        assert clips.steps_per_epoch == 10 / 8


def test_a_batch_may_be_larger_than_the_data_set(videos):
    (batch,) = take(videos, 1, batch=24)
    assert sorted(batch.index.tolist()[:20]) == sorted([*range(10), *range(10)])


def test_any_number_of_threads_gives_the_same_bits(videos, monkeypatch):
    alone = take(videos, 4, dataclasses.replace(CONFIG, threads=1, prefetch=1))
    monkeypatch.setattr(loader, "CHUNK_BYTES", 1)  # every sample in a chunk of its own
    for one, other in zip(alone, take(videos, 4, dataclasses.replace(CONFIG, threads=4, prefetch=3)), strict=True):
        assert_same(one, other)


def test_a_run_continues_where_it_stopped(videos):
    whole = take(videos, 6)
    for one, other in zip(whole[3:], take(videos, 3, first_step=3), strict=True):
        assert one.step == other.step
        assert_same(one, other)
    assert not torch.equal(whole[0].clip, take(videos, 1, seed=6)[0].clip)


@pytest.mark.parametrize("views", [1, 2])
def test_ranks_share_the_batches_of_one_process(videos, views):
    config = dataclasses.replace(CONFIG, views=views)
    whole = take(videos, 3, config, batch=6 * views)
    ranks = [take(videos, 3, config, batch=3 * views, rank=rank, world=2) for rank in range(2)]
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert torch.equal(batch.clip, torch.cat([part.clip for part in parts]))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"views": 2, "recorded": 2}], ids=["one view", "recorded views"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_any_position_of_any_rank_comes_again_though_files_are_replaced(videos, tmp_path, world, changes):
    broken = damaged(videos, tmp_path, 0, 4, 7)
    config = dataclasses.replace(CONFIG, **changes)
    views = config.views
    whole = take(broken, 9, config, batch=2 * world * views)
    for rank in range(world):
        ranked = {"batch": 2 * views, "rank": rank, "world": world}
        parts = take(broken, 9, config, **ranked)
        for batch, part in zip(whole, parts, strict=True):
            for name in ("clip", "video", "augmentation", "box"):
                assert torch.equal(getattr(batch, name).chunk(world)[rank], getattr(part, name)), name
        for first, threads in ((1, 1), (5, 3), (8, 2)):
            again = take(broken, 9 - first, dataclasses.replace(config, threads=threads), first_step=first, **ranked)
            assert [batch.step for batch in again] == list(range(first, 9))
            for one, other in zip(parts[first:], again, strict=True):
                assert_same(one, other)


def test_a_batch_tells_which_crops_it_shows(videos, tmp_path):
    config = dataclasses.replace(CONFIG, views=2, recorded=3)
    broken = damaged(videos, tmp_path, 3)
    batches = take(broken, 20, config, batch=8)
    assert torch.cat([batch.augmentation for batch in batches]).unique().tolist() == [0, 1, 2]
    seen: dict[tuple[int, int, int], torch.Tensor] = {}
    for batch in batches:
        assert batch.view.tolist() == [0, 1] * 4
        rows = zip(batch.index.tolist(), batch.augmentation.tolist(), batch.view.tolist(), strict=True)
        for row, (video, augmentation, view) in enumerate(rows):
            drawn = draw_clip(video, videos.videos[video], augmentation, config, 5).views[view]
            assert torch.equal(batch.box[row], torch.tensor(drawn[:4]))
            assert batch.flip[row] == drawn.flip
            # The same augmentation is the same clip, also where it stands in for a file that cannot be decoded.
            assert torch.equal(seen.setdefault((video, augmentation, view), batch.clip[row]), batch.clip[row])
    assert len(seen) <= 9 * 3 * 2
    plain = torch.cat([batch.augmentation for batch in take(videos, 6)])
    assert plain.tolist() == [place // 10 for place in range(24)]


def test_frames_per_second_and_uniform_frames_replace_a_stride(videos, frame_numbers):
    """At 12.5 of 25 frames per second clips are those of stride 2; uniform ones span the video."""
    by_rate = take(videos, 2, dataclasses.replace(CONFIG, stride=0, fps=12.5))
    for one, other in zip(take(videos, 2), by_rate, strict=True):
        assert torch.equal(one.clip, other.clip)
    (batch,) = take(videos, 1, dataclasses.replace(CONFIG, stride=0, sampling="uniform"))
    for clip, place in zip(batch.clip, batch.index.tolist(), strict=True):
        numbers = frame_numbers(clip.numpy())
        assert numbers == sorted(numbers)
        assert numbers[-1] >= videos.videos[place].frames * 3 // 4


def test_views_are_crops_of_one_clip(videos):
    config = dataclasses.replace(CONFIG, views=3, flip=False)
    (batch,) = take(videos, 1, config, batch=6)
    single = take(videos, 1, dataclasses.replace(config, views=1), batch=2)[0]
    assert batch.index.tolist() == [video for video in single.index.tolist() for _ in range(3)]
    assert torch.equal(batch.clip[::3], single.clip)  # further views do not change the first
    with open_loader(videos, config, batch=6) as clips:
        assert clips.steps_per_epoch == 5


def test_evaluation_shows_every_video_once_in_order(videos, frame_numbers):
    with open_loader(videos, dataclasses.replace(CONFIG, views=2)) as clips:
        batches = list(clips.evaluate())
        again = list(clips.evaluate())
    assert [len(batch.clip) for batch in batches] == [4, 4, 2]
    assert torch.cat([batch.index for batch in batches]).tolist() == list(range(10))
    for batch, other in zip(batches, again, strict=True):
        assert_same(batch, other)
    for video, clip in zip(videos.videos, torch.cat([batch.clip for batch in batches]), strict=True):
        start = max(video.frames - 7, 0) // 2
        assert frame_numbers(clip.numpy()) == [min(start + 2 * t, video.frames - 1) for t in range(4)]


def test_training_continues_while_another_pass_evaluates(videos):
    expected = take(videos, 4)
    with open_loader(videos) as clips:
        stream = clips.stream()
        got = [next(stream), next(stream)]
        assert sum(len(batch.clip) for batch in clips.evaluate()) == 10
        got += [next(stream), next(stream)]
    for one, other in zip(expected, got, strict=True):
        assert_same(one, other)


def test_the_log_can_tell_which_decoder_and_how_much(videos):
    with open_loader(videos) as clips:
        assert clips.decoders == {"pyav": 10}
        stream = clips.stream()
        for _ in range(3):
            next(stream)
        assert clips.wait_s > 0
        assert clips.decoded_frames >= 3 * 4 * 4
        assert clips.decoded_frames % 16 == 0


@pytest.mark.slow
def test_every_format_gives_a_clip_and_every_broken_file_is_named(clip_set):
    found = clip_set.found
    small = tuple(video for video in found.videos if video.width * video.height <= 500_000)
    config = DataConfig(frames=4, stride=4, size=48, threads=2)
    messages: list[Skipped] = []
    with open_loader(dataclasses.replace(found, videos=small), config, batch=16, on_skip=messages.append) as clips:
        batches = list(clips.evaluate())
        stream = itertools.islice(clips.stream(), 3)
        assert all(batch.clip.shape == (16, 4, 48, 48, 3) for batch in stream)
        assert clips.decoders == {"pyav": len(small)}
    assert messages == []
    assert torch.cat([batch.index for batch in batches]).tolist() == list(range(len(small)))
    assert {clip_set.name(entry.path) for entry in found.skipped} == clip_set.broken
    moving = torch.cat([batch.clip for batch in batches]).float()
    assert (moving.std((1, 2, 3, 4)) > 1).float().mean() > 0.95  # not blank


def test_a_loader_thread_fetches_the_codes_of_recorded_clips(videos):
    config = dataclasses.replace(CONFIG, views=2, recorded=3)
    fetched_by: set[str] = set()

    def codes(video: torch.Tensor, augmentation: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
        fetched_by.add(threading.current_thread().name)
        return torch.stack([video, augmentation, view], 1)

    with open_loader(videos, config, batch=8) as clips:
        assert next(clips.stream()).codes is None
        clips.fetch_codes(codes)
        for batch in itertools.islice(clips.stream(), 4):
            assert torch.equal(batch.codes, torch.stack([batch.index, batch.augmentation, batch.view], 1))
        assert next(clips.evaluate()).codes is None  # middle clips are not recorded
    assert fetched_by == {"prefetch"}
