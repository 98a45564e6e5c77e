"""Clips from arrays and from files of more than 8 bits: reading, value ranges, crops, folders, lists and the index."""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mam2.engine.config.training import DataConfig, check_data
from mam2.engine.data import arrays
from mam2.engine.data.decoding import DecodeError, decode_frames
from mam2.engine.data.encoding import encode_frames
from mam2.engine.data.indexing import index
from mam2.engine.data.loader import ClipLoader
from mam2.engine.data.manifest import read_manifest, read_saved_manifest
from mam2.engine.data.transcode import transcode
from mam2.engine.data.values import PixelValues
from mam2.engine.data.video import Skipped, Video, probe_file
from mam2.engine.data.windows import sliding_windows
from mam2.engine.errors import UserError
from tests.helpers.loaders import assert_same, take

CONFIG = DataConfig(frames=4, stride=2, size=16, channels=1, threads=1)


def video_of(path: Path) -> Video:
    found = probe_file(str(path))
    assert isinstance(found, Video), found
    return found


def reason_of(path: Path) -> str:
    found = probe_file(str(path))
    assert isinstance(found, Skipped)
    return found.reason


def random_array(dtype: str, shape: tuple[int, ...] = (12, 20, 24), seed: int = 0) -> NDArray[Any]:
    generator = np.random.default_rng(seed)
    if dtype == "float32":
        return generator.random(shape, np.float32)
    return generator.integers(0, np.iinfo(dtype).max + 1, shape, dtype)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("dtype", ["uint8", ">u2", "uint16", "float32"])
@pytest.mark.parametrize("channels", [None, 5])
def test_frames_are_those_of_the_array(tmp_path: Path, suffix: str, dtype: str, channels: int | None) -> None:
    native = np.dtype(dtype).newbyteorder("=")
    array = random_array(str(native), (7, 10, 12) if channels is None else (7, 10, 12, channels)).astype(dtype)
    path = tmp_path / f"a{suffix}"
    if suffix == ".npy":
        np.save(path, array)
    else:
        np.savez_compressed(path, frames=array, fps=12.5)
    found = video_of(path)
    assert (found.frames, found.width, found.height, found.channels) == (7, 12, 10, channels or 1)
    assert (found.codec, found.pixel_format, found.decoders) == (suffix[1:], str(native), ("array",))
    assert found.fps == (12.5 if suffix == ".npz" else 0)
    frames = arrays.read_frames(str(path), [1, 4, 4, 6, 30], channels=channels or 1)
    assert frames.dtype == native
    expected = array if channels else array[..., None]
    np.testing.assert_array_equal(frames, expected[[1, 4, 4, 6, 6]])


def test_only_the_frames_of_a_clip_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse file of 8 GB, of which a clip reads four frames and the header."""
    path = tmp_path / "huge.npy"
    with path.open("wb") as file:
        header = {"descr": "<u2", "fortran_order": False, "shape": (16384, 512, 512)}
        np.lib.format.write_array_header_1_0(file, header)
        begin, length = file.tell(), 512 * 512 * 2
        file.seek(begin + 9000 * length)
        file.write(b"\x07\x01" * (512 * 512))
        file.truncate(begin + 16384 * length)
    read: list[int] = []

    class Counted:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def read(self, count: int) -> bytes:
            read.append(count)
            return self.file.read(count)

    original = arrays.FrameArray
    monkeypatch.setattr(arrays, "FrameArray", lambda file, *rest: original(Counted(file), *rest))
    frames = arrays.read_frames(str(path), [8998, 9000, 9002, 9004], channels=1)
    assert frames[:, 0, 0, 0].tolist() == [0, 263, 0, 0]
    assert 4 * length <= sum(read) < 4 * length + 2000


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((4, 5), np.uint8), r"shape \[4, 5\]; expected \[frames, height, width\] or "),
        (np.zeros((2, 3, 4, 5, 6), np.uint8), r"shape \[2, 3, 4, 5, 6\]; expected"),
        (np.zeros((0, 4, 5), np.uint8), r"shape \[0, 4, 5\]; expected"),
        (np.zeros((2, 3, 8, 100), np.uint8), r"at most 64 channels"),
        (np.zeros((3, 4, 5), np.float64), r"values of type float64; expected uint8, uint16, float32"),
        (np.zeros((3, 4, 5), object), r"values of type object; expected"),
        (np.asfortranarray(np.zeros((3, 4, 5), np.uint8)), r"ascontiguousarray"),
        (np.full((3, 4, 5), np.nan, np.float32), r"frame 0 has values that are not finite"),
        (np.zeros((2, 4, 9000), np.uint8), r"frames of 9000x4 pixels; the limit is 8192"),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, array: NDArray[Any], reason: str) -> None:
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match=rf"a\.npy: .*{reason}"):
        read_manifest(tmp_path, progress=False)


def test_damaged_arrays_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "cut.npy", np.zeros((9, 8, 8), np.uint16))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-7])
    assert reason_of(tmp_path / "cut.npy").startswith("damaged: 1273 bytes, expected 1280")
    (tmp_path / "noise.npy").write_bytes(b"no array at all")
    assert "damaged, or not a NumPy array" in reason_of(tmp_path / "noise.npy")
    (tmp_path / "noise.npz").write_bytes(b"no archive at all")
    assert "damaged, or not a NumPy array" in reason_of(tmp_path / "noise.npz")
    (tmp_path / "empty.npy").touch()
    assert "damaged, or not a NumPy array" in reason_of(tmp_path / "empty.npy")
    np.savez(tmp_path / "two.npz", a=np.zeros((2, 4, 4), np.uint8), b=np.zeros((2, 4, 4), np.uint8))
    assert "2 arrays of frames (found a, b); expected one" in reason_of(tmp_path / "two.npz")
    np.savez(tmp_path / "rate.npz", a=np.zeros((2, 4, 4), np.uint8), fps=np.float64("nan"))
    assert "fps nan; expected frames per second" in reason_of(tmp_path / "rate.npz")


def test_a_value_that_is_not_finite_replaces_the_clip(tmp_path: Path) -> None:
    """The bad value is in a later frame, which the scan does not read."""
    for name in "abc":
        np.save(tmp_path / f"{name}.npy", random_array("float32"))
    array = random_array("float32")
    array[1:] = np.inf
    np.save(tmp_path / "d.npy", array)
    videos = read_manifest(tmp_path, progress=False)
    with ClipLoader(videos, CONFIG, batch=8, device="cpu", seed=1) as loader:
        batch = next(loader.stream())
    assert batch.clip.isfinite().all()
    assert [Path(skipped.path).name for skipped in loader.skipped] == ["d.npy"]
    assert "not finite" in loader.skipped[0].reason


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_a_clip_has_the_precision_of_the_file(tmp_path: Path, dtype: str) -> None:
    """The center square of the middle clip at its own size: not resized, so that every value is known."""
    array = random_array(dtype, (7, 16, 16))
    np.save(tmp_path / "a.npy", array)
    videos = read_manifest(tmp_path, progress=False)
    with ClipLoader(videos, CONFIG, batch=1, device="cpu", seed=0, train=False) as loader:
        (batch,) = loader.evaluate()
    expected = torch.from_numpy(array[[0, 2, 4, 6], ..., None].astype(np.float64))
    if dtype == "uint8":
        assert batch.clip.dtype == torch.uint8
        assert torch.equal(batch.clip[0], expected.byte())
        return
    top = {"uint16": 65535, "float32": 1}[dtype]
    assert batch.clip.dtype == torch.float32
    torch.testing.assert_close(batch.clip[0].double() * top, expected, rtol=0, atol=top * 1e-6)


def test_a_value_range_is_scaled_and_clipped(tmp_path: Path) -> None:
    array = np.zeros((7, 16, 16), np.uint16)
    array[:, :, :4], array[:, :, 4:8], array[:, :, 8:12], array[:, :, 12:] = 20000, 30000, 30010, 40000
    np.save(tmp_path / "a.npy", array)
    config = dataclasses.replace(CONFIG, value_range=(25000.0, 35000.0))
    with ClipLoader(
        read_manifest(tmp_path, progress=False), config, batch=1, device="cpu", seed=0, train=False
    ) as loader:
        (batch,) = loader.evaluate()
    found = batch.clip[0, 0, 0, ::4, 0].tolist()
    assert found == pytest.approx([0.0, 0.5, 0.501, 1.0], abs=1e-6)


def test_floats_outside_0_to_1_need_a_value_range(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", 300 * random_array("float32", (7, 16, 16)))
    videos = read_manifest(tmp_path, progress=False)
    with (
        pytest.raises(UserError, match=r"a.npy: values from .* to 299\.\d+; expected 0 to 1, or a data.value_range"),
        ClipLoader(videos, CONFIG, batch=1, device="cpu", seed=0) as loader,
    ):
        next(loader.stream())
    for wrong in ((1.0,), (2.0, 1.0), (1.0, 1.0), (0.0, 1.0, 2.0)):
        with pytest.raises(UserError, match=r"data.value_range: expected two numbers, the lower one first"):
            check_data(dataclasses.replace(CONFIG, value_range=wrong))


def test_an_array_of_other_channels_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", random_array("uint8"))
    videos = read_manifest(tmp_path, progress=False)
    with pytest.raises(UserError, match=r"a.npy: 1 channel, data.channels is 3; set --data.channels 1"):
        ClipLoader(videos, dataclasses.replace(CONFIG, channels=3), batch=1, device="cpu", seed=0)


def test_an_array_has_the_draws_of_a_video(tmp_path: Path, write_video: Callable[..., Path]) -> None:
    """Lossless gray: the array of a video's frames gives the video's clips, crops and flips included."""
    generator = np.random.default_rng(3)
    for folder in ("videos", "arrays"):
        (tmp_path / folder).mkdir()
    for name in "abc":
        frames = generator.integers(0, 256, (14, 20, 24), np.uint8)
        _write_gray(tmp_path / "videos" / f"{name}.mkv", frames, "gray")
        np.save(tmp_path / "arrays" / f"{name}.npy", frames)
    config = dataclasses.replace(CONFIG, size=12)
    one, other = (take(read_manifest(tmp_path / folder, progress=False), 3, config) for folder in ("videos", "arrays"))
    assert any(bool(batch.flip.any()) for batch in one)
    for first, second in zip(one, other, strict=True):
        assert_same(first, second)
    (resumed,) = take(read_manifest(tmp_path / "arrays", progress=False), 1, config, first_step=2)
    assert_same(resumed, other[2])


def _write_gray(path: Path, frames: NDArray[Any], pixel_format: str) -> None:
    height, width = frames.shape[1:]
    encode_frames(path, frames, "ffv1", (width, height), rate=10, pixel_format=pixel_format, frame_format=pixel_format)


def test_16_bits_of_videos_and_images_are_kept(tmp_path: Path) -> None:
    frames = random_array("uint16", (6, 16, 16))
    _write_gray(tmp_path / "a.mkv", frames, "gray16le")
    folder = tmp_path / "b"
    folder.mkdir()
    from PIL import Image

    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"img_{number:03d}.png")
    for path in (tmp_path / "a.mkv", folder):
        found = video_of(path)
        assert found.value_type(1) == "uint16"
        assert found.value_type(3) == "uint8"
        deep = decode_frames(str(path), [0, 3, 5], channels=1)
        np.testing.assert_array_equal(deep[..., 0], frames[[0, 3, 5]])
        assert decode_frames(str(path), [0]).dtype == np.uint8
        values = PixelValues.of(CONFIG, [found])
        assert values.floats
        (window,) = sliding_windows(found, frames=3, size=16, window=6, hop=6, values=values)
        expected = torch.from_numpy(frames[[0, 2, 4]].astype(np.float32)) / 65535
        torch.testing.assert_close(window.clip[..., 0], expected, rtol=0, atol=1e-6)


def test_windows_of_an_array_are_its_frames(tmp_path: Path) -> None:
    array = random_array("uint8", (10, 16, 16))
    np.savez(tmp_path / "a.npz", clip=array, fps=5)
    windows = list(
        sliding_windows(video_of(tmp_path / "a.npz"), frames=2, size=16, window=4, hop=4, values=PixelValues(1))
    )
    assert [window.clip[:, 0, 0, 0].tolist() for window in windows] == [
        array[places, 0, 0].tolist() for places in ([0, 2], [4, 6], [8, 9])
    ]
    assert [window.end_s for window in windows] == pytest.approx([0.8, 1.6, 2.0])


def test_arrays_stand_beside_videos_in_folders_and_lists(
    tmp_path: Path, write_video: Callable[..., Path], numbered_frames: Callable[..., NDArray[np.uint8]]
) -> None:
    write_video(tmp_path / "x" / "a.mp4", numbered_frames(8), "libx264")
    np.save(tmp_path / "x" / "a.npy", np.zeros((3, 4), np.float32))  # the video's features
    np.save(tmp_path / "x" / "b.npy", random_array("uint16"))
    (tmp_path / "y").mkdir()
    np.savez(tmp_path / "y" / "c 1.npz", random_array("uint16"))
    found = read_manifest(tmp_path, progress=False)
    assert [Path(video.path).name for video in found.videos] == ["a.mp4", "b.npy", "c 1.npz"]
    assert found.classes == ("x", "y")
    assert not found.skipped
    (tmp_path / "list.txt").write_text("x/a.mp4 walk\ny/c 1.npz run\nx/b.npy run\n")
    listed = read_manifest(tmp_path / "list.txt", progress=False)
    assert [video.label for video in listed.videos] == [1, 0, 0]
    with ClipLoader(found, CONFIG, batch=3, device="cpu", seed=0, train=False) as loader:
        assert loader.decoders == {"pyav": 1, "array": 2}
        assert loader.cropper == "PyTorch (DALI's graph is for 8-bit RGB)"
        (batch,) = loader.evaluate()
    assert batch.clip.dtype == torch.float32
    assert batch.clip[0].mean().item() == pytest.approx(np.arange(5, 76, 20).mean() / 255, abs=0.02)
    assert (read_manifest(tmp_path / "x" / "b.npy", progress=False).videos[0]).channels == 1


def test_the_index_describes_arrays(tmp_path: Path) -> None:
    for name in "ab":
        np.save(tmp_path / f"{name}.npy", random_array("uint16", (80, 8, 8)))
    found = index(tmp_path, tmp_path.parent / f"{tmp_path.name}.index.jsonl", progress=False)
    assert "arrays      uint16 of 1 channel 2; needs --data.channels" in found.summary()
    assert "transcode" not in found.summary()
    saved = read_saved_manifest(found.path)
    assert [video.channels for video in saved.videos] == [1, 1]
    again = index(tmp_path, found.path, progress=False)
    assert again.changes.unchanged == 2
    result = transcode(tmp_path, tmp_path.parent / f"{tmp_path.name}-out", progress=False)
    assert all("an array" in failed.reason for failed in result.failed)


def test_a_read_past_the_end_of_a_cut_member_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, frames=random_array("uint8", (50, 64, 64)))
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        place = archive.infolist()[0].header_offset
    content[place + 9000] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DecodeError, match=r"damaged"):
        arrays.read_frames(str(path), list(range(50)), channels=1)
