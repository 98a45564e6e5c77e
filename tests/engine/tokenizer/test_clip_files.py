"""Recorded clips: a pre-training reads them instead of videos, with the same draws; damage is refused."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.data import renderer
from mam2.engine.data.loader import ClipLoader
from mam2.engine.data.manifest import Manifest, write_manifest
from mam2.engine.errors import UserError
from mam2.engine.tokenizer import cache as code_cache
from mam2.engine.tokenizer.cache import CodeCache, CodeCacheWriter
from mam2.engine.tokenizer.clip_files import ClipFormat
from mam2.engine.tokenizer.files import save_vqgan
from mam2.engine.tokenizer.precompute import tokenize
from mam2.engine.tokenizer.vqgan import VQGAN
from mam2.engine.tokenizer.vqgan import small as small_vqgan
from tests.helpers.loaders import assert_same

TOKENIZER = "0123456789abcdef" * 4
RAW, JPEG = (ClipFormat(coding, (8, 32, 32, 3), "uint8") for coding in ("raw", "jpeg"))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_cache, "SHARD_VIDEOS", 4)


@pytest.fixture
def config(small: Callable[..., PretrainConfig]) -> PretrainConfig:
    return small(data={"recorded": 2, "views": 2, "flip": True, "decoder": "pyav"})


def loader(videos: Manifest, config: PretrainConfig, cache: CodeCache | None = None) -> ClipLoader:
    made = ClipLoader(videos, config.data, batch=4, device="cpu", seed=0, available=cache.has if cache else None)
    if cache and cache.clips:
        made.fetch_clips(cache.clips)
    return made


def record(folder: Path, videos: Manifest, config: PretrainConfig, form: ClipFormat | None) -> int:
    """Writes what a cache of random codes and their clips lacks; returns the number of batches."""
    options = {"tokenizer": TOKENIZER, "codebook_size": 9, "precision": "float32", "clips": form, "progress": False}
    batches = 0
    with CodeCacheWriter(folder, videos, config, **options) as writer, loader(videos, config) as clips:
        write_manifest(videos, folder / "manifest.jsonl")
        for batch in clips.recorded(writer.missing()):
            batches += 1
            codes = torch.zeros(len(batch.clip), np.prod(config.grid), dtype=torch.int64)
            images = [form.encode(clip) for clip in batch.clip.numpy()] if form else None
            writer.add(batch.index, batch.augmentation, batch.view, codes, images)
        writer.finish()
    return batches


def stream(videos: Manifest, config: PretrainConfig, cache: CodeCache | None = None, first: int = 0, count: int = 8):
    with loader(videos, config, cache) as clips:
        return list(itertools.islice(clips.stream(first), count))


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("no video may be decoded")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_raw_clips_are_those_of_the_videos_and_no_video_is_read(
    tmp_path: Path, videos: Manifest, config: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = stream(videos, config)
    record(tmp_path, videos, config, RAW)
    cache = CodeCache(tmp_path, progress=False)
    assert cache.clips is not None
    assert cache.clips.bytes == 10 * 2 * 2 * RAW.raw_bytes
    monkeypatch.setattr(renderer, "decode_frames", refuse)
    read = stream(videos, config, cache)
    for one, other in zip(decoded, read, strict=True):
        assert_same(one, other)
    for one, other in zip(decoded[5:], stream(videos, config, cache, first=5, count=3), strict=True):
        assert_same(one, other)


def test_jpeg_clips_are_close_and_the_same_in_every_epoch(
    tmp_path: Path, videos: Manifest, config: PretrainConfig
) -> None:
    record(tmp_path, videos, config, JPEG)
    cache = CodeCache(tmp_path, progress=False)
    assert cache.clips is not None
    assert cache.clips.bytes < 10 * 2 * 2 * RAW.raw_bytes / 4
    seen: dict[tuple[int, ...], torch.Tensor] = {}
    epochs = stream(videos, config, cache, count=24)  # two samples per batch: almost five epochs
    for one, other in zip(stream(videos, config, count=24), epochs, strict=True):
        assert torch.equal(one.box, other.box)
        assert torch.equal(one.flip, other.flip)
        assert (one.clip.float() - other.clip.float()).abs().mean() < 1.5
        for row, clip in enumerate(other.clip):
            name = int(other.index[row]), int(other.augmentation[row]), int(other.view[row])
            assert torch.equal(seen.setdefault(name, clip), clip)
    assert len(seen) == 10 * 2 * 2


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("coding", ["raw", "jpeg"])
def test_values_come_back(coding: str, dtype: str, channels: int) -> None:
    form = ClipFormat(coding, (3, 16, 16, channels), dtype)
    ramp = np.linspace(0, 255, 3 * 16 * 16 * channels).reshape(form.shape).astype(dtype)
    if coding == "jpeg" and (channels == 5 or dtype == "float32"):
        with pytest.raises(UserError, match=rf"--clips jpeg: expected 8-bit .*found {dtype} of {channels} channels"):
            form.check()
        return
    form.check()
    images = form.encode(ramp)
    out = np.empty_like(ramp)
    form.decode(b"".join(images), np.cumsum([len(image) for image in images]), out)
    if coding == "raw":
        assert np.array_equal(out, ramp)
    else:
        assert np.abs(out.astype(float) - ramp).mean() < 1.5


def test_a_damaged_clip_ends_the_run_and_is_written_again(
    tmp_path: Path, videos: Manifest, config: PretrainConfig
) -> None:
    record(tmp_path, videos, config, JPEG)
    before = contents(tmp_path)
    damaged = tmp_path / "clips" / "a001-000001.bin"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    cache = CodeCache(tmp_path, progress=False)
    with pytest.raises(UserError, match=r"a001-000001.bin: damaged; run mam2 tokenize"):
        stream(videos, config, cache, count=12)
    assert record(tmp_path, videos, config, JPEG) == 2  # four videos in two views, four clips per batch
    assert contents(tmp_path) == before
    assert record(tmp_path, videos, config, JPEG) == 0


@pytest.mark.parametrize("name", ["a001-000001.bin", "a001-000001.npy"])
@pytest.mark.parametrize("change", ["shorter", "gone"])
def test_a_file_that_is_gone_or_shorter_is_named_before_the_run(
    tmp_path: Path, videos: Manifest, config: PretrainConfig, name: str, change: str
) -> None:
    record(tmp_path, videos, config, RAW)
    path = tmp_path / "clips" / name
    content = path.read_bytes()
    path.unlink()
    if change == "shorter":
        path.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"a001-000001.npy is missing or damaged; run mam2 tokenize"):
        CodeCache(tmp_path, progress=False)


def test_a_file_that_vanishes_during_the_run_ends_it(tmp_path: Path, videos: Manifest, config: PretrainConfig) -> None:
    """Another video in its place would make the run depend on the outage."""
    record(tmp_path, videos, config, RAW)
    cache = CodeCache(tmp_path, progress=False)
    (tmp_path / "clips" / "a000-000001.bin").unlink()
    with pytest.raises(UserError, match=r"a000-000001.bin: cannot be read \(No such file or directory\); restore it"):
        stream(videos, config, cache, count=6)


def test_an_error_leaves_no_unfinished_file(tmp_path: Path, videos: Manifest, config: PretrainConfig) -> None:
    class Full(Exception):
        pass

    options = {"tokenizer": TOKENIZER, "codebook_size": 9, "precision": "float32", "clips": RAW, "progress": False}

    def write_a_clip_and_stop() -> None:
        with CodeCacheWriter(tmp_path, videos, config, **options) as writer:
            row = torch.tensor([1])
            images = [RAW.encode(np.zeros(RAW.shape, np.uint8))]
            writer.add(row, row - 1, row - 1, torch.zeros(1, np.prod(config.grid), dtype=torch.int64), images)
            assert list((tmp_path / "clips").iterdir())
            raise Full

    with pytest.raises(Full):
        write_a_clip_and_stop()
    assert not list((tmp_path / "clips").iterdir())


def test_a_cache_keeps_its_way_of_storing_clips(tmp_path: Path, videos: Manifest, config: PretrainConfig) -> None:
    record(tmp_path / "none", videos, config, None)
    assert CodeCache(tmp_path / "none", progress=False).clips is None
    with pytest.raises(UserError, match=r"contains codes without clips, this call writes them with clips \(raw, uint8"):
        record(tmp_path / "none", videos, config, RAW)
    record(tmp_path / "jpeg", videos, config, JPEG)
    with pytest.raises(UserError, match=r"contains codes with clips \(jpeg, uint8\), this call writes them without"):
        record(tmp_path / "jpeg", videos, config, None)


def test_many_shards_hold_no_file_open(tmp_path: Path, videos: Manifest, config: PretrainConfig) -> None:
    record(tmp_path, videos, config, RAW)
    open_files = Path("/proc/self/fd")
    before = len(list(open_files.iterdir()))
    cache = CodeCache(tmp_path, progress=False)
    assert len(list(open_files.iterdir())) == before
    assert cache.codes(*torch.tensor([[9, 1, 1]]).T).tolist() == [[0] * int(np.prod(config.grid))]


def test_the_space_is_predicted_before_anything_is_written(
    tmp_path: Path,
    videos: Manifest,
    config: PretrainConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    index = tmp_path / "index.jsonl"
    write_manifest(videos, index)
    save_vqgan(VQGAN(small_vqgan(8, 16, 8)), tmp_path / "vqgan.safetensors")
    path = str(tmp_path / "vqgan.safetensors")
    config = dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, path=path))
    form = ClipFormat("raw", (config.data.frames, config.data.size, config.data.size, 3), "uint8")
    needed = 10 * 2 * 2 * form.raw_bytes

    def free(count: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=count))

    free(needed - 1)
    with pytest.raises(UserError, match=r"the clips need about 983 kB, 983 kB are free; use another drive, a"):
        tokenize(config, index, tmp_path / "codes", clips="raw", progress=False)
    assert not (tmp_path / "codes" / "clips").exists()
    free(needed)
    made = tokenize(config, index, tmp_path / "codes", clips="raw", progress=False)
    assert made.cache.clips is not None
    assert made.cache.clips.bytes == needed
    assert f"40 clips of {form.raw_bytes / 1e3:.0f} kB, the mean of the first" in capsys.readouterr().out
