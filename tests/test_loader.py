from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from mam2.engine.config import DataConfig, UserError
from mam2.engine.data import decoding, graph, loader, manifest, renderer
from mam2.engine.data.graph import ClipGraph
from mam2.engine.data.loader import ClipLoader
from mam2.engine.data.manifest import Manifest, Skipped, read_manifest
from mam2.engine.data.sampling import View, draw_clip, replacement, sample_at

CLIPS = Path(__file__).resolve().parents[2] / "shared" / "clips"
CONFIG = DataConfig(frames=4, stride=2, size=32, threads=2)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def videos(tmp_path_factory, write_video, numbered_frames) -> Manifest:
    """Ten labelled videos of 6 to 24 frames in three codecs and sizes."""
    folder = tmp_path_factory.mktemp("videos")
    kinds = [("mp4", "libx264"), ("webm", "libvpx-vp9"), ("avi", "mpeg4")]
    for number in range(10):
        suffix, encoder = kinds[number % 3]
        frames = numbered_frames(6 + 2 * number, 48 + 16 * (number % 2), 64)
        write_video(folder / f"class {number % 4}" / f"{number}.{suffix}", frames, encoder)
    return read_manifest(folder, progress=False)


def open_loader(videos: Manifest, config: DataConfig = CONFIG, batch: int = 4, **options) -> ClipLoader:
    return ClipLoader(videos, config, **{"batch": batch, "device": "cpu", "seed": 5, **options})


def take(videos: Manifest, steps: int, config: DataConfig = CONFIG, *, first_step: int = 0, **options):
    with open_loader(videos, config, **options) as clips:
        return list(itertools.islice(clips.stream(first_step), steps))


def assert_same(one, other) -> None:
    for name, value in one._asdict().items():
        if name != "step":
            assert torch.equal(value, getattr(other, name)), name


def damaged(videos: Manifest, folder: Path, *numbers: int) -> Manifest:
    """The manifest with some of its files replaced by noise, which was found to be sound before."""
    changed = list(videos.videos)
    for number in numbers:
        path = folder / f"damaged {number}.mp4"
        path.write_bytes(np.random.default_rng(number).bytes(3000))
        changed[number] = dataclasses.replace(changed[number], path=str(path))
    return dataclasses.replace(videos, videos=tuple(changed))


def test_a_batch_is_what_it_says(videos, frame_numbers):
    batches = take(videos, 3)
    assert [batch.step for batch in batches] == [0, 1, 2]
    for batch in batches:
        assert (batch.clip.shape, batch.clip.dtype) == ((4, 4, 32, 32, 3), torch.uint8)
        assert batch.clip.is_contiguous()
        assert batch.label.tolist() == [videos.videos[video].label for video in batch.video]
    place = 0
    for batch in batches:
        for video, clip in zip(batch.video.tolist(), batch.clip, strict=True):
            epoch, drawn = sample_at(place, 10, 5)
            assert video == drawn
            frames = draw_clip(video, videos.videos[video], epoch, CONFIG, 5).frames
            last = videos.videos[video].frames - 1
            assert frame_numbers(clip.numpy()) == [min(frame, last) for frame in frames]
            place += 1


def test_two_passes_show_every_video_twice(videos):
    seen = torch.cat([batch.video for batch in take(videos, 5)])
    assert sorted(seen.tolist()) == sorted([*range(10), *range(10)])
    with open_loader(videos, batch=4, world=2) as clips:
        assert clips.steps_per_epoch == 10 / 8


def test_a_batch_may_be_larger_than_the_data_set(videos):
    (batch,) = take(videos, 1, batch=24)
    assert sorted(batch.video.tolist()[:20]) == sorted([*range(10), *range(10)])


def test_any_number_of_threads_gives_the_same_bits(videos, monkeypatch):
    alone = take(videos, 4, dataclasses.replace(CONFIG, threads=1, prefetch=1))
    monkeypatch.setattr(loader, "CHUNK_BYTES", 1)  # every sample on its own
    for one, other in zip(alone, take(videos, 4, dataclasses.replace(CONFIG, threads=4, prefetch=3)), strict=True):
        assert_same(one, other)


def test_a_run_goes_on_where_it_stopped(videos):
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
        rows = zip(batch.video.tolist(), batch.augmentation.tolist(), batch.view.tolist(), strict=True)
        for row, (video, augmentation, view) in enumerate(rows):
            drawn = draw_clip(video, videos.videos[video], augmentation, config, 5).views[view]
            assert torch.equal(batch.box[row], torch.tensor(drawn[:4]))
            assert batch.flip[row] == drawn.flip
            # The same augmentation is the same clip, also where it stands in for a file that cannot be decoded.
            assert torch.equal(seen.setdefault((video, augmentation, view), batch.clip[row]), batch.clip[row])
    assert len(seen) <= 9 * 3 * 2
    plain = torch.cat([batch.augmentation for batch in take(videos, 6)])
    assert plain.tolist() == [place // 10 for place in range(24)]


def test_frames_a_second_and_uniform_frames_take_the_place_of_a_stride(videos, frame_numbers):
    """At 12.5 of 25 frames a second clips are those of stride 2; uniform ones span the video."""
    by_rate = take(videos, 2, dataclasses.replace(CONFIG, stride=0, fps=12.5))
    for one, other in zip(take(videos, 2), by_rate, strict=True):
        assert torch.equal(one.clip, other.clip)
    (batch,) = take(videos, 1, dataclasses.replace(CONFIG, stride=0, sampling="uniform"))
    for clip, place in zip(batch.clip, batch.video.tolist(), strict=True):
        numbers = frame_numbers(clip.numpy())
        assert numbers == sorted(numbers)
        assert numbers[-1] >= videos.videos[place].frames * 3 // 4


def test_views_are_crops_of_one_clip(videos):
    config = dataclasses.replace(CONFIG, views=3, flip=False)
    (batch,) = take(videos, 1, config, batch=6)
    single = take(videos, 1, dataclasses.replace(config, views=1), batch=2)[0]
    assert batch.video.tolist() == [video for video in single.video.tolist() for _ in range(3)]
    assert torch.equal(batch.clip[::3], single.clip)  # further views do not change the first
    with open_loader(videos, config, batch=6) as clips:
        assert clips.steps_per_epoch == 5


def test_evaluation_shows_every_video_once_in_order(videos, frame_numbers):
    with open_loader(videos, dataclasses.replace(CONFIG, views=2)) as clips:
        batches = list(clips.evaluate())
        again = list(clips.evaluate())
    assert [len(batch.clip) for batch in batches] == [4, 4, 2]
    assert torch.cat([batch.video for batch in batches]).tolist() == list(range(10))
    for batch, other in zip(batches, again, strict=True):
        assert_same(batch, other)
    for video, clip in zip(videos.videos, torch.cat([batch.clip for batch in batches]), strict=True):
        start = max(video.frames - 7, 0) // 2
        assert frame_numbers(clip.numpy()) == [min(start + 2 * t, video.frames - 1) for t in range(4)]


def test_training_goes_on_while_another_pass_evaluates(videos):
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
        assert clips.front_ends == {"pyav": 10}
        stream = clips.stream()
        for _ in range(3):
            next(stream)
        assert clips.wait_s > 0
        assert clips.decoded_frames >= 3 * 4 * 4
        assert clips.decoded_frames % 16 == 0


def test_a_damaged_video_is_replaced_the_same_way_by_any_thread_and_named_once(videos, tmp_path, frame_numbers):
    broken = damaged(videos, tmp_path, 0, 1)
    told: list[Skipped] = []
    batches = take(broken, 10, on_skip=told.append)
    assert sorted(Path(entry.path).name for entry in told) == ["damaged 0.mp4", "damaged 1.mp4"]
    sound = take(videos, 10)
    replaced = 0
    for batch, before in zip(batches, sound, strict=True):
        for row, video in enumerate(before.video.tolist()):
            if video in (0, 1):
                epoch = (before.step * 4 + row) // 10
                drawn = ((replacement(video, 10, epoch, 5, attempt), attempt) for attempt in itertools.count(1))
                other, attempt = next((place, attempt) for place, attempt in drawn if place not in (0, 1))
                first = draw_clip(other, videos.videos[other], epoch, CONFIG, 5, attempt=attempt).frames[0]
                assert batch.video[row] == other
                assert frame_numbers(batch.clip[row].numpy())[0] == first
                replaced += 1
            else:
                assert batch.video[row] == video
                assert torch.equal(batch.clip[row], before.clip[row])
    assert replaced == 8
    threads = dataclasses.replace(CONFIG, threads=1)
    for one, other in zip(batches[5:], take(broken, 5, threads, first_step=5), strict=True):
        assert_same(one, other)


def test_what_dali_cannot_decode_goes_to_pyav(videos, monkeypatch):
    run = ClipGraph.run

    def fail_late(self: ClipGraph, payloads, frames, views):
        if self._front_end != "pyav" and max(numbers[0] for numbers in frames) > 2:
            raise decoding.DecodeError("damage in the middle")
        return run(self, payloads, frames, views)

    expected = take(videos, 5)
    monkeypatch.setattr(ClipGraph, "run", fail_late)
    monkeypatch.setattr(loader, "choose_front_end", lambda codec, *_, **__: "dali-cpu" if codec == "vp9" else "pyav")
    with open_loader(videos) as clips:
        got = list(itertools.islice(clips.stream(), 5))
        assert clips.skipped == []
        assert clips.front_ends == {"pyav": 7, "dali-cpu": 3}
    for one, other in zip(expected, got, strict=True):
        assert torch.equal(one.video, other.video)
        difference = (one.clip.int() - other.clip.int()).abs()
        assert difference.max() <= 3


def test_nvdec_is_not_asked_twice_for_a_file_it_failed_on(videos, monkeypatch):
    run = ClipGraph.run
    asked: list[int] = []

    def no_gpu(self: ClipGraph, payloads, frames, views):
        if self._front_end == "nvdec":
            asked.append(len(payloads))
            raise decoding.DecodeError("unsupported profile")
        return run(self, payloads, frames, views)

    expected = take(videos, 8)
    monkeypatch.setattr(ClipGraph, "run", no_gpu)
    monkeypatch.setattr(loader, "choose_front_end", lambda codec, *_, **__: "nvdec" if codec == "vp9" else "pyav")
    with open_loader(videos) as clips:
        for one, other in zip(expected, clips.stream(), strict=False):
            assert_same(one, other)
        assert clips.front_ends == {"pyav": 10}
    assert 3 <= len(asked) < 12


def test_evaluation_leaves_a_damaged_video_out(videos, tmp_path):
    with open_loader(damaged(videos, tmp_path, 2, 9)) as clips:
        batches = list(clips.evaluate())
        assert [Path(entry.path).name for entry in clips.skipped] == ["damaged 2.mp4", "damaged 9.mp4"]
    assert torch.cat([batch.video for batch in batches]).tolist() == [0, 1, 3, 4, 5, 6, 7, 8]
    assert torch.cat([batch.label for batch in batches]).tolist() == [
        videos.videos[video].label for video in (0, 1, 3, 4, 5, 6, 7, 8)
    ]


def test_too_many_damaged_videos_end_the_run(videos, tmp_path):
    with open_loader(damaged(videos, tmp_path, *range(6))) as clips, pytest.raises(UserError, match="6 of 10 videos"):
        for _ in clips.stream():
            pass
    skipped = tuple(Skipped(f"{number}.mp4", "empty file") for number in range(11))
    with pytest.raises(UserError, match=r"11 of 21 videos cannot be used.*10\.mp4: empty file"):
        open_loader(dataclasses.replace(videos, skipped=skipped))


def test_a_forced_front_end_decodes_what_it_can(videos):
    config = dataclasses.replace(CONFIG, front_end="dali-cpu", max_unusable=1.0)
    told: list[Skipped] = []
    (batch,) = take(videos, 1, config, on_skip=told.append)
    assert {videos.videos[video].codec for video in batch.video} == {"vp9"}
    assert len(told) == 7
    assert "codec h264 cannot be decoded by dali-cpu" in told[0].reason
    with pytest.raises(UserError, match="7 of 10 videos cannot be used"):
        open_loader(videos, dataclasses.replace(config, max_unusable=0.5))
    avc = dataclasses.replace(videos, videos=tuple(video for video in videos.videos if video.codec == "h264"))
    with pytest.raises(UserError, match="use front_end=pyav"):
        open_loader(avc, config)


def test_an_error_in_a_thread_reaches_the_consumer(videos, tmp_path, monkeypatch):
    def fail(_: Skipped) -> None:
        raise RuntimeError("the log is full")

    with open_loader(damaged(videos, tmp_path, 0), on_skip=fail) as clips:
        stream = clips.stream()
        with pytest.raises(RuntimeError, match="the log is full"):
            list(itertools.islice(stream, 20))
        with pytest.raises(RuntimeError, match="the log is full"):
            next(stream)
    monkeypatch.setattr(loader, "draw_clip", None)
    with open_loader(videos) as clips, pytest.raises(TypeError):
        next(clips.stream())


def test_a_strange_error_of_one_file_is_a_skip(videos, monkeypatch):
    def strange(path: str, *arguments, **keywords) -> np.ndarray:
        if path.endswith("0.mp4"):
            raise OverflowError("a header from the future")
        return decoding.decode_frames(path, *arguments, **keywords)

    monkeypatch.setattr(renderer, "decode_frames", strange)
    told: list[Skipped] = []
    take(videos, 5, on_skip=told.append)
    assert [entry.reason for entry in told] == ["OverflowError: a header from the future"]


def test_close_and_neglect_end_all_threads(videos):
    before = threading.active_count()
    with open_loader(videos) as clips:
        stream = clips.stream()
        next(stream)
        other = clips.stream()
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(other)
    clips = open_loader(videos)
    stream = clips.stream()
    next(stream)
    del stream
    clips.close()
    assert threading.active_count() == before


def test_a_program_that_never_closes_its_loader_ends(videos, tmp_path):
    manifest.write_manifest(videos, tmp_path / "manifest")
    program = (
        "import sys\n"
        "from mam2.engine.config import DataConfig\n"
        "from mam2.engine.data.loader import ClipLoader\n"
        "from mam2.engine.data.manifest import read_saved_manifest\n"
        "config = DataConfig(frames=4, stride=2, size=32)\n"
        "clips = ClipLoader(read_saved_manifest(sys.argv[1]), config, batch=4, device='cpu', seed=0)\n"
        "stream = clips.stream()\n"
        "print(next(stream).clip.shape[0])\n"
        "raise KeyboardInterrupt\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "manifest")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "4\n"
    assert done.stderr.strip().endswith("KeyboardInterrupt")


@pytest.mark.parametrize(
    ("changes", "batch", "told"),
    [
        ({"views": 3}, 4, "data.views that divides the batch of 4; found 3"),
        ({"frames": 0}, 4, r"data.frames and data.size of at least 1; found \(0, 32\)"),
        ({"fps": 8.0}, 4, r"data.stride or data.fps, not both; found 2 and 8"),
        ({"min_area": 0.8, "max_area": 0.5}, 4, "data.min_area <= data.max_area"),
        ({"max_aspect": 0.5}, 4, "data.max_aspect of at least 1; found 0.5"),
        ({"prefetch": 0}, 4, "data.prefetch of at least 1"),
    ],
)
def test_values_that_do_not_fit_together_are_one_line(videos, changes, batch, told):
    with pytest.raises(UserError, match=told):
        open_loader(videos, dataclasses.replace(CONFIG, **changes), batch=batch)


def test_without_dali_the_remedy_is_named(videos, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali.fn", None)
    with pytest.raises(UserError, match=r"pip install '\.\[cpu\]'"):
        open_loader(videos)


def resize(frames: np.ndarray, size: int, *views: View) -> list[torch.Tensor]:
    config = DataConfig(frames=len(frames), stride=1, size=size)
    clips = ClipGraph("pyav", config, views=len(views), samples=1, threads=1, device=CPU)
    return [view[0].clone() for view in clips.run([frames], [range(len(frames))], [views])]


def test_crops_and_flips_are_numpys():
    frames = np.random.default_rng(0).integers(0, 256, (3, 40, 60, 3), dtype=np.uint8)
    crop, mirrored = resize(
        frames, 20, View(15 / 60, 10 / 40, 35 / 60, 30 / 40, False), View(15 / 60, 10 / 40, 35 / 60, 30 / 40, True)
    )
    expected = torch.from_numpy(frames[:, 10:30, 15:35])
    assert (crop.int() - expected.int()).abs().max() <= 1
    assert (mirrored.int() - expected.flip(2).int()).abs().max() <= 1


def test_a_whole_frame_of_the_right_size_stays_bit_for_bit():
    frames = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    assert np.array_equal(resize(frames, 32, View(0, 0, 1, 1, False))[0], frames)


def test_shrinking_is_antialiased_as_in_pytorch():
    frames = np.random.default_rng(0).integers(0, 256, (2, 96, 128, 3), dtype=np.uint8)
    (small,) = resize(frames, 24, View(0, 0, 1, 1, False))
    planes = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    expected = torch.nn.functional.interpolate(planes, (24, 24), mode="bilinear", antialias=True).permute(0, 2, 3, 1)
    # At the border DALI repeats the edge, PyTorch leaves out what is not there.
    assert (small.float() - expected)[:, 1:-1, 1:-1].abs().max() <= 1


def test_dali_goes_on_after_a_file_it_cannot_decode(videos):
    path = next(video.path for video in videos.videos if video.codec == "vp9")
    config = DataConfig(frames=2, stride=1, size=16)
    clips = ClipGraph("dali-cpu", config, views=1, samples=2, threads=1, device=CPU)
    good, whole = np.fromfile(path, np.uint8), [View(0, 0, 1, 1, False)]
    (before,) = (view.clone() for view in clips.run([good], [[1, 2]], [whole]))
    with pytest.raises(decoding.DecodeError, match=r"DALI: Failed to create video decoder") as caught:
        clips.run([good, good[:50]], [[0, 1]] * 2, [whole, whole])
    assert "\n" not in str(caught.value)
    assert torch.equal(before, clips.run([good], [[1, 2]], [whole])[0])
    assert graph.import_dali().__name__ == "nvidia.dali"


@pytest.mark.skipif(not CLIPS.is_dir(), reason="the real clips are not here")
def test_every_real_clip_gives_a_clip_and_every_broken_file_is_named():
    found = read_manifest(CLIPS, progress=False)
    small = tuple(video for video in found.videos if video.width * video.height <= 500_000)
    config = DataConfig(frames=4, stride=4, size=48, threads=2)
    told: list[Skipped] = []
    with open_loader(dataclasses.replace(found, videos=small), config, batch=16, on_skip=told.append) as clips:
        batches = list(clips.evaluate())
        stream = itertools.islice(clips.stream(), 3)
        assert all(batch.clip.shape == (16, 4, 48, 48, 3) for batch in stream)
        assert clips.front_ends == {"pyav": len(small)}
    assert told == []
    assert torch.cat([batch.video for batch in batches]).tolist() == list(range(len(small)))
    assert len(found.skipped) == 7
    moving = torch.cat([batch.clip for batch in batches]).float()
    assert (moving.std((1, 2, 3, 4)) > 1).float().mean() > 0.95  # pictures, not blanks
