from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mam2.engine.config.training import DataConfig
from mam2.engine.data import decoding
from mam2.engine.data.dali import ClipGraph
from mam2.engine.data.decoding import DecodeError, decode_frames, decode_packet, open_video
from mam2.engine.data.manifest import probe_file
from mam2.engine.data.renderer import pinned_empty
from mam2.engine.data.sampling import View
from mam2.engine.data.video_decoders import DALI_CPU_CODECS, choose_decoder
from mam2.engine.errors import UserError
from tests.helpers.dali import needs_dali
from tests.helpers.paths import CLIPS

ROTATED = ("left/h264.mp4", "up/h264_rotated_90.mp4", "down/h264_rotated_180.mp4", "grow/h264_rotated_270.mov")
WHOLE = View(0, 0, 1, 1, False)
ENCODERS = [
    ("mp4", "libx264", {"bf": "3", "preset": "fast"}),
    ("mkv", "libx264", {"bf": "2", "x264-params": "open-gop=1"}),
    ("mp4", "libx264", {"x264-params": "intra-refresh=1"}),
    ("ts", "libx264", {"bf": "2"}),
    ("webm", "libvpx-vp9", {"deadline": "realtime", "auto-alt-ref": "1", "lag-in-frames": "10"}),
    ("webm", "libvpx", {"deadline": "good", "auto-alt-ref": "1", "lag-in-frames": "10"}),
    ("avi", "mjpeg", {}),
    ("avi", "mpeg4", {}),
    ("mp4", "mpeg4", {"bf": "2"}),
]


def decode_all(path: Path) -> np.ndarray:
    """Every frame, uint8 [T, H, W, C], decoded from first to last."""
    with open_video(str(path)) as (container, stream):
        frames = [
            frame
            for packet in container.demux(stream)
            for frame in decode_packet(stream, packet if packet.size else None)
        ]
        convert = decoding.FrameConverter(frames[0])
        return np.stack([convert(frame) for frame in frames])


def spread(start: int, count: int, stride: int) -> list[int]:
    return [start + stride * t for t in range(count)]


def expect_clip(everything: np.ndarray, frames: list[int]) -> np.ndarray:
    return everything[np.minimum(frames, len(everything) - 1)]


@pytest.mark.parametrize(
    ("codec", "device", "pixel_format", "rotation", "expected"),
    [
        ("h264", "cpu", "yuv420p", 0, "pyav"),
        ("vp9", "cpu", "yuv420p", 0, "pyav"),
        ("frames", "cuda", "yuvj420p", 0, "pyav"),
        ("h264", "cuda", "yuv420p", 0, "nvdec"),
        ("h264", "cuda:1", "yuv420p10le", 0, "pyav"),
        ("hevc", "cuda", "yuv420p10le", 0, "nvdec"),
        ("mpeg4", "cuda", "yuv420p", 0, "pyav"),
        ("h264", "cuda", "yuv420p", 180, "pyav"),
        ("av1", "cuda", "yuv420p", 0, "pyav"),
        ("vp9", "cuda", "yuv444p", 0, "pyav"),
    ],
)
def test_auto_takes_the_first_decoder_that_can(codec, device, pixel_format, rotation, expected):
    assert choose_decoder(codec, device, pixel_format=pixel_format, rotation=rotation) == expected


@pytest.mark.parametrize(
    ("codec", "forced", "rotation", "message"),
    [
        (
            "h264",
            "dali-cpu",
            0,
            r"h264 cannot be decoded by dali-cpu \(only VP8, VP9, MJPEG\): use data.decoder=pyav",
        ),
        ("vp9", "dali-cpu", 90, "rotated by 90 degrees"),
        ("h264", "nvdec", 0, "nvdec needs an NVIDIA GPU"),
        ("h264", "decord", 0, "expected auto, nvdec, dali-cpu, pyav; found decord"),
    ],
)
def test_a_forced_decoder_that_cannot_says_so(codec, forced, rotation, message):
    assert choose_decoder(codec, "cpu", "pyav", rotation=rotation) == "pyav"
    assert choose_decoder("vp9", "cpu", "dali-cpu") == "dali-cpu"
    with pytest.raises(UserError, match=message):
        choose_decoder(codec, "cpu", forced, rotation=rotation)


def test_what_dali_cannot_decode_is_not_blamed_on_its_absence():
    for decoder in ("nvdec", "dali-cpu"):
        with pytest.raises(UserError, match=f"{decoder} needs NVIDIA DALI, which is not installed: use data.decoder="):
            choose_decoder("vp9", "cuda", decoder, dali=False)
        with pytest.raises(UserError, match=f"{decoder} decodes RGB, data.channels is 1"):
            choose_decoder("vp9", "cuda", decoder, dali=False, channels=1)


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "encoder", "options"), ENCODERS)
def test_any_frame_is_the_one_sequential_decoding_gives(tmp_path, write_video, suffix, encoder, options):
    # Smooth drifting noise: all frames differ, and the encoder uses B-frames and distant references.
    generator = np.random.default_rng(0)
    texture = np.kron(generator.integers(0, 256, (12, 40, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    frames = np.stack([texture[:64, 2 * t : 2 * t + 96] for t in range(80)])
    path = write_video(tmp_path / f"a.{suffix}", frames, encoder, gop=16, **options)
    everything = decode_all(path)
    assert len(everything) == probe_file(str(path)).frames == 80
    for start in (0, 1, 15, 16, 17, 31, 33, 47, 50, 63, 64, 70, 79, 90):
        for stride in (1, 3):
            frames = spread(start, 5, stride)
            assert np.array_equal(decode_frames(str(path), frames), expect_clip(everything, frames)), frames
    for frames in ([0, 0, 1], [7, 7, 7], [3, 20, 21, 60], [40, 79, 79, 80, 95], [79]):
        assert np.array_equal(decode_frames(str(path), frames), expect_clip(everything, frames)), frames


def test_decoding_begins_at_the_last_key_frame_before_the_start(tmp_path, write_video, numbered_frames):
    path = write_video(tmp_path / "a.mp4", numbered_frames(24), gop=6)
    with open_video(str(path)) as (container, stream):
        packets, first, pts = decoding.packets_for(container.demux(stream), 14, 14)
    assert (first, len(packets)) == (12, 12)
    assert pts == packets[0].pts
    assert packets[0].is_keyframe


@pytest.mark.parametrize(
    ("packets", "first", "why"),
    [
        ("0k 1 2 3k 4 5 6k 7", 6, "closed groups"),
        ("0k 1 2 3k 5 4 6k 7", 6, "frames in another order within a group"),
        ("0k 2 1 3k 4 5 8k 6 7", 3, "frames after the last key frame are shown before it"),
        ("0k 1 5 3k 4 6 7 8", 0, "a frame before the key frame is shown after it"),
        ("0k 1 2 3k - 5 6k 7", 0, "a packet without a timestamp"),
        ("0k 1 2 3k 4 5 0k 1", 0, "a clock that starts again"),
        ("0k 1 2d 3k 4 5 6k 7", 5, "a packet whose frame is not shown"),
        ("0k 1 2 3 4 5 6 7k", 0, "no key frame between the first frame and the start"),
    ],
)
def test_only_a_clean_cut_saves_decoding(packets, first, why):
    made = [
        SimpleNamespace(
            size=1,
            pts=None if text == "-" else int(text.strip("kd")),
            is_keyframe=text.endswith("k"),
            is_discard=text.endswith("d"),
        )
        for text in packets.split()
    ]
    rest, index, pts = decoding.packets_for(made, 6, 7)
    assert index == first, why
    assert rest[-1] is made[-1]
    if first:
        assert rest[0].is_keyframe
        assert rest[0].pts == pts
    else:
        assert (len(rest), pts) == (len(made), None)


def test_of_a_long_video_only_the_last_packets_are_held(tmp_path, write_video, numbered_frames, frame_numbers):
    path = write_video(tmp_path / "a.avi", numbered_frames(24), "mjpeg")
    with open_video(str(path)) as (container, stream):
        packets, first, _ = decoding.packets_for(container.demux(stream), 20, 21)
    assert (first, len(packets)) == (20, 4)
    stamps = [*range(12), *range(6)]  # timestamps restart after the first packets have been dropped
    made = [SimpleNamespace(size=1, pts=pts, is_keyframe=True, is_discard=False) for pts in stamps]
    assert decoding.packets_for(made, 11, 17) == ([], 0, None)
    assert decoding.packets_for(made[:3] + made[12:], 2, 9) == (made[:3] + made[12:], 0, None)


def test_a_decoder_that_begins_late_is_noticed(tmp_path, write_video, numbered_frames, frame_numbers, monkeypatch):
    path = str(write_video(tmp_path / "a.avi", numbered_frames(12), "mjpeg"))
    packets_for = decoding.packets_for

    def lose_one(*arguments):
        packets, index, pts = packets_for(*arguments)
        return (packets[1:] if index else packets), index, pts

    monkeypatch.setattr(decoding, "packets_for", lose_one)
    assert frame_numbers(decode_frames(path, [6, 7, 8])) == [6, 7, 8]


@pytest.mark.parametrize(("suffix", "encoder"), [("mp4", "libx264"), ("webm", "libvpx-vp9"), ("avi", "mjpeg")])
def test_frames_are_the_ones_asked_for(tmp_path, write_video, numbered_frames, frame_numbers, suffix, encoder):
    path = str(write_video(tmp_path / f"with a space.{suffix}", numbered_frames(20), encoder))
    clip = decode_frames(path, [3, 5, 7, 9, 11, 13])
    assert (clip.dtype, clip.shape) == (np.uint8, (6, 48, 64, 3))
    assert frame_numbers(clip) == [3, 5, 7, 9, 11, 13]
    # Past the end the last frame repeats, even if the stride would have skipped it.
    assert frame_numbers(decode_frames(path, [14, 18, 22, 26, 30])) == [14, 18, 19, 19, 19]
    assert frame_numbers(decode_frames(path, [30, 31])) == [19, 19]


def test_colors_are_red_green_blue(tmp_path, write_video):
    frames = np.zeros((3, 32, 32, 3), np.uint8)
    frames[:] = (200, 120, 40)
    path = write_video(tmp_path / "a.mp4", frames)
    assert np.abs(decode_frames(str(path), [0]).mean((0, 1, 2)) - (200, 120, 40)).max() < 4


def test_frames_that_change_size_are_brought_to_the_first_ones(tmp_path, write_video, numbered_frames, frame_numbers):
    one = write_video(tmp_path / "one.ts", numbered_frames(4, 48, 64))
    two = write_video(tmp_path / "two.ts", numbered_frames(8, 96, 128)[4:])
    (tmp_path / "both.ts").write_bytes(one.read_bytes() + two.read_bytes())
    clip = decode_frames(str(tmp_path / "both.ts"), range(8))
    assert clip.shape == (8, 48, 64, 3)
    assert frame_numbers(clip) == list(range(8))


def test_a_file_without_frames_is_a_decode_error(tmp_path, write_video, numbered_frames):
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "noise.mpg").write_bytes(np.random.default_rng(0).bytes(200_000))
    content = write_video(tmp_path / "good.webm", numbered_frames(8), "libvpx-vp9").read_bytes()
    (tmp_path / "cut.webm").write_bytes(content[: content.index(b"\x1f\x43\xb6\x75")])  # up to the first cluster
    for name, reason in (
        ("empty.mp4", "empty file"),
        ("noise.mpg", "."),
        ("cut.webm", "."),
        ("gone.mp4", "No such file"),
    ):
        with pytest.raises(DecodeError, match=reason):
            decode_frames(str(tmp_path / name), range(4))


def test_absurd_sizes_are_refused(tmp_path, write_video, numbered_frames, monkeypatch):
    path = write_video(tmp_path / "a.mp4", numbered_frames(2))
    monkeypatch.setattr(decoding, "MAX_SIDE", 60)
    with pytest.raises(DecodeError, match="frames of 64x48 pixels; the limit is 60 per side"):
        decode_frames(str(path), [0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suffix", "encoder"), [("webm", "libvpx-vp9"), ("webm", "libvpx"), ("avi", "mjpeg"), ("mp4", "libvpx-vp9")]
)
@needs_dali
def test_dali_and_pyav_give_the_same_frames(tmp_path, write_video, suffix, encoder):
    generator = np.random.default_rng(0)
    texture = np.kron(generator.integers(0, 256, (8, 14, 1)), np.ones((16, 16, 3))).astype(np.uint8)
    frames = np.stack([texture[:96, 2 * t : 2 * t + 128] for t in range(40)])
    assert np.abs(np.diff(frames.astype(int), axis=0)).mean() > 8  # so that the next frame differs from this one
    path = write_video(tmp_path / f"a.{suffix}", frames, encoder)
    assert_same_frames(path, starts=(0, 7, 20, 35, 39), strides=(1, 3))


def assert_same_frames(path: Path, starts, strides) -> None:
    config = DataConfig(frames=4, size=96)
    dali, pyav = (
        ClipGraph(decoder, config, views=1, samples=len(starts), threads=1, device=torch.device("cpu"))
        for decoder in ("dali-cpu", "pyav")
    )
    views = [[WHOLE]] * len(starts)
    for stride in strides:
        frames = [spread(start, 4, stride) for start in starts]
        (from_dali,) = dali.run([np.fromfile(path, np.uint8)] * len(starts), frames, views)
        (from_pyav,) = pyav.run([decode_frames(str(path), numbers) for numbers in frames], frames, views)
        difference = (from_dali.int() - from_pyav.int()).abs()
        # The two upsample chroma differently, which shows only at sharp edges of saturated colors.
        assert difference.float().mean() < 2, (path.name, stride)
        assert (difference > 8).float().mean() < 0.02, (path.name, stride)


@pytest.mark.slow
@needs_dali
def test_dali_and_pyav_give_the_same_frames_of_every_format(clip_set):
    compared = 0
    for video in clip_set.found.videos:
        if video.codec in DALI_CPU_CODECS and video.width <= 640 and "corrupt" not in video.path:
            starts = np.random.default_rng(0).integers(0, video.frames, 3).tolist()
            assert_same_frames(Path(video.path), starts, strides=(3,))
            compared += 1
    assert compared > 4


@pytest.mark.slow
def test_random_access_is_exact_in_every_format(clip_set):
    generator = np.random.default_rng(0)
    for video in clip_set.found.videos:
        if video.codec == "frames" or "bitrot" in video.path or video.frames * video.width * video.height > 30_000_000:
            continue
        everything = decode_all(Path(video.path))
        assert len(everything) in (video.frames, video.frames - 1)
        for start in (*generator.integers(0, video.frames, 2).tolist(), video.frames - 1):
            frames = spread(start, 3, 2)
            assert np.array_equal(decode_frames(video.path, frames), expect_clip(everything, frames)), (
                video.path,
                start,
            )


def test_rotated_clips_stand_upright(clip_set):
    rotated = [video for video in clip_set.found.videos if video.rotation]
    assert {video.rotation for video in rotated} == {90, 180, 270}
    for video in rotated:
        clip = decode_frames(video.path, [0])
        assert (clip.shape[2], clip.shape[1]) == video.shown_size
        with open_video(video.path) as (container, stream):
            stored = next(container.decode(stream)).to_ndarray(format="rgb24")
        # Counter-clockwise: the stored right edge is the upper one after a quarter turn.
        corners = {90: stored[:, -1], 180: stored[-1, ::-1], 270: stored[::-1, 0]}
        assert np.array_equal(clip[0, 0], corners[video.rotation])


def test_pinned_memory_holds_the_same_frames_of_rotated_clips(monkeypatch):
    """A GPU's loader decodes to pinned memory, which this test replaces by other memory."""
    empty, asked = torch.empty, []

    def allocate(size, *, dtype, pin_memory):
        asked.append(pin_memory)
        return empty(size, dtype=dtype)

    expected = [decode_frames(str(CLIPS / name), [0, 3]) for name in ROTATED]
    monkeypatch.setattr(torch, "empty", allocate)
    for name, frames in zip(ROTATED, expected, strict=True):
        assert np.array_equal(decode_frames(str(CLIPS / name), [0, 3], empty=pinned_empty), frames), name
    assert asked == [True] * len(ROTATED)


def test_a_header_that_its_decoder_refuses_is_damage(tmp_path, write_video, numbered_frames):
    path = write_video(tmp_path / "a.mp4", numbered_frames(8), "libx265")
    content = bytearray(path.read_bytes())
    place = content.index(b"hvcC") + 4
    content[place + 22 : place + 60] = b"\xff" * 38  # its parameter sets
    path.write_bytes(content)
    with pytest.raises(DecodeError, match=r"damaged|no decodable frame"):
        decode_frames(str(path), [0, 4])
