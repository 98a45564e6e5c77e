"""The code cache: codes are read as written, also after a kill; damaged or unsuitable caches raise errors."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.data.manifest import Manifest, Video, write_manifest
from mam2.engine.errors import UserError
from mam2.engine.tokenizer import cache as code_cache
from mam2.engine.tokenizer import cache_key as keys
from mam2.engine.tokenizer.cache import CodeCache, CodeCacheWriter
from mam2.engine.tokenizer.cache_key import cache_key

CODES = 100
TOKENIZER = "0123456789abcdef" * 4


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_cache, "SHARD_VIDEOS", 4)


@pytest.fixture
def config(small: Callable[..., PretrainConfig]) -> PretrainConfig:
    return small(data={"recorded": 2, "views": 3})


def manifest(count: int = 10, folder: str = "/clips") -> Manifest:
    return Manifest(tuple(Video(f"{folder}/{n:02d}.mp4", n % 2, 20 + n, 64, 48, "h264", 25.0, 0) for n in range(count)))


def codes_of(video: int, augmentation: int, view: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(video * 100 + augmentation * 10 + view)
    return torch.randint(CODES, (tokens,), generator=generator)


def writer(folder: Path, config: PretrainConfig, videos: Manifest | None = None, **options: object) -> CodeCacheWriter:
    values = {"tokenizer": TOKENIZER, "codebook_size": CODES, "precision": "float32", "progress": False} | options
    made = CodeCacheWriter(folder, videos or manifest(), config, **values)
    write_manifest(videos or manifest(), folder / "manifest.jsonl")
    return made


def fill(cache: CodeCacheWriter, config: PretrainConfig, *, absent: tuple = (), clips: int | None = None) -> int:
    """Adds missing clips except `absent` (augmentation, video), in batches of 5, at most `clips`."""
    tokens = config.grid[0] * config.grid[1] * config.grid[2]
    missing = list(cache.missing())[:clips]
    present = [clip for clip in missing if clip not in absent]
    for start in range(0, len(present), 5):
        rows = [(v, a, view) for a, v in present[start : start + 5] for view in range(config.data.views)]
        codes = torch.stack([codes_of(*row, tokens) for row in rows])
        cache.add(*torch.tensor(rows).T, codes)
    return len(missing)


def written(folder: Path, config: PretrainConfig, **options: object) -> CodeCache:
    cache = writer(folder, config)
    fill(cache, config, **options)
    cache.finish()
    return CodeCache(folder, progress=False)


def test_codes_come_back(tmp_path: Path, config: PretrainConfig) -> None:
    cache = written(tmp_path, config)
    tokens = config.grid[0] * config.grid[1] * config.grid[2]
    rows = [(9, 1, 2), (0, 0, 0), (9, 0, 1), (4, 1, 1)]
    found = cache.codes(*torch.tensor(rows).T)
    assert found.dtype == torch.int64
    assert torch.equal(found, torch.stack([codes_of(*row, tokens) for row in rows]))
    assert (cache.codebook_size, cache.precision, cache.tokenizer) == (CODES, "float32", TOKENIZER)
    assert cache.count_absent() == 0
    assert cache.bytes == 10 * 2 * 3 * tokens * 2
    every = torch.cat([codes_of(v, a, view, tokens) for v in range(10) for a in range(2) for view in range(3)])
    assert torch.equal(cache.histogram(), every.bincount(minlength=CODES))
    cache.check(manifest(), config, TOKENIZER)


def test_codes_of_all_frames_come_back(tmp_path: Path, config: PretrainConfig) -> None:
    every = dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, frames="all"))
    cache = writer(tmp_path, every)
    rows = torch.tensor([(1, 0, view) for view in range(3)] + [(7, 0, view) for view in range(3)])
    codes = torch.randint(CODES, (6, 64, 2), generator=torch.Generator().manual_seed(0))
    cache.add(*rows[:3].T, codes[:3])
    cache.add(*rows[3:].T, codes[3:])
    cache.finish()
    opened = CodeCache(tmp_path, progress=False)
    assert torch.equal(opened.codes(*rows.T), codes)
    assert torch.equal(opened.histogram(), codes.flatten().bincount(minlength=CODES))
    assert opened.count_absent() == 18
    assert [opened.has(1, 0), opened.has(7, 0), opened.has(2, 0), opened.has(1, 1)] == [True, True, False, False]
    with pytest.raises(UserError, match=r"made with tokenizer.frames = 'all', this run has 'first'"):
        opened.check(manifest(), config, TOKENIZER)


def test_codes_of_several_codebooks_come_back_and_are_counted_apart(tmp_path: Path, config: PretrainConfig) -> None:
    two = dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, codes_per_patch=2))
    cache = writer(tmp_path, two)
    rows = torch.tensor([(1, 0, view) for view in range(3)])
    codes = torch.randint(CODES, (3, 64, 2), generator=torch.Generator().manual_seed(0))
    cache.add(*rows.T, codes)
    cache.finish()
    opened = CodeCache(tmp_path, progress=False)
    assert torch.equal(opened.codes(*rows.T), codes)
    counts = [codes[..., codebook].flatten().bincount(minlength=CODES) for codebook in range(2)]
    assert torch.equal(opened.histogram(), torch.cat(counts))
    with pytest.raises(UserError, match=r"made with tokenizer.codes_per_patch = 2, this run has 1"):
        opened.check(manifest(), config, TOKENIZER)


def test_a_cache_that_does_not_say_which_frames_has_the_first_ones(tmp_path: Path, config: PretrainConfig) -> None:
    written(tmp_path, config)
    header = json.loads((tmp_path / "cache.json").read_text())
    del header["key"]["tokenizer.frames"], header["key"]["tokenizer.codes_per_patch"]
    (tmp_path / "cache.json").write_text(json.dumps(header))
    CodeCache(tmp_path, progress=False).check(manifest(), config, TOKENIZER)
    every = dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, frames="all"))
    with pytest.raises(UserError, match=r"made with tokenizer.frames = 'first', this run has 'all'"):
        writer(tmp_path, every)


def test_a_clip_that_could_not_be_decoded_is_absent_and_never_read(tmp_path: Path, config: PretrainConfig) -> None:
    whole_shard = tuple((1, video) for video in range(4, 8))
    cache = written(tmp_path, config, absent=((0, 3), (0, 9), *whole_shard))
    assert cache.count_absent() == 6
    assert [cache.has(3, 0), cache.has(9, 0), cache.has(5, 1)] == [False] * 3
    assert [cache.has(3, 1), cache.has(9, 1), cache.has(5, 0)] == [True] * 3
    assert int(cache.histogram().sum()) == (20 - 6) * 3 * 64
    with pytest.raises(ValueError, match="could not be decoded"):
        cache.codes(torch.tensor([2, 3]), torch.tensor([0, 0]), torch.tensor([0, 0]))


@pytest.mark.parametrize("stopped_after", [0, 1, 4, 9, 13, 19])
def test_a_killed_writing_continues_to_the_same_bytes(
    tmp_path: Path, config: PretrainConfig, stopped_after: int
) -> None:
    absent = ((0, 3), (1, 8))
    written(tmp_path / "whole", config, absent=absent)
    fill(writer(tmp_path / "resumed", config), config, absent=absent, clips=stopped_after)
    (tmp_path / "resumed" / "shards" / ".part-a001-000000.npy").write_bytes(b"half")
    with pytest.raises(UserError, match=r"a00\d-00000\d.npy is missing"):
        CodeCache(tmp_path / "resumed", progress=False)
    rest = writer(tmp_path / "resumed", config)
    left = fill(rest, config, absent=absent)
    # A shard is closed when a clip of a later shard is added; the nineteenth clip is absent.
    assert left == 20 - {0: 0, 1: 0, 4: 0, 9: 8, 13: 10, 19: 14}[stopped_after]
    rest.finish()
    files = sorted(path.name for path in (tmp_path / "whole" / "shards").iterdir())
    assert len(files) == 6
    for name in files:
        whole, resumed = ((tmp_path / part / "shards" / name).read_bytes() for part in ("whole", "resumed"))
        assert whole == resumed, name
    assert (tmp_path / "whole" / "shards.json").read_text() == (tmp_path / "resumed" / "shards.json").read_text()


def test_a_damaged_shard_is_named_and_rewritten(tmp_path: Path, config: PretrainConfig) -> None:
    written(tmp_path, config)
    shard = tmp_path / "shards" / "a001-000001.npy"
    content = shard.read_bytes()
    shard.write_bytes(content[:-7] + b"\x01" + content[-6:])
    with pytest.raises(UserError, match=r"a001-000001.npy is missing or damaged; run mam2 tokenize"):
        CodeCache(tmp_path, progress=False)
    rest = writer(tmp_path, config)
    assert list(rest.missing()) == [(1, video) for video in range(4, 8)]
    fill(rest, config)
    rest.finish()
    assert shard.read_bytes() == content
    shard.unlink()
    with pytest.raises(UserError, match=r"a001-000001.npy is missing"):
        CodeCache(tmp_path, progress=False)


MISMATCHES = {
    r"data.size = 32, this run has 64": {"data": {"size": 64}},
    r"data.stride = 2, this run has 3": {"data": {"stride": 3}},
    r"data.frames = 8, this run has 16": {"data": {"frames": 16}},
    r"data.fps = 0.0, this run has 5.0": {"data": {"fps": 5.0}},
    r"data.sampling = 'dense', this run has 'uniform'": {"data": {"sampling": "uniform"}},
    r"data.crop = 'random-resized', this run has 'multi-scale'": {"data": {"crop": "multi-scale"}},
    r"data.min_area = 0.7, this run has 0.8": {"data": {"min_area": 0.8}},
    r"data.max_area = 1.0, this run has 0.9": {"data": {"max_area": 0.9}},
    r"data.max_aspect = 1.1, this run has 1.2": {"data": {"max_aspect": 1.2}},
    r"data.flip = False, this run has True": {"data": {"flip": True}},
    r"data.views = 3, this run has 2": {"data": {"views": 2}},
    r"data.recorded = 2, this run has 4": {"data": {"recorded": 4}},
    r"run.seed = 0, this run has 1": {"run": {"seed": 1}},
    r"model.patch = 8, this run has 16": {"model": {"patch": 16}},
    r"model.tubelet = 2, this run has 4": {"model": {"tubelet": 4}},
    r"tokenizer.frames = 'first', this run has 'all'": {"tokenizer": {"frames": "all"}},
}


@pytest.mark.parametrize("message", MISMATCHES)
def test_another_config_is_an_error_that_names_the_value(tmp_path: Path, config: PretrainConfig, message: str) -> None:
    cache = written(tmp_path, config)
    tables = {
        table: dataclasses.replace(getattr(config, table), **values) for table, values in MISMATCHES[message].items()
    }
    other = dataclasses.replace(config, **tables)
    with pytest.raises(UserError, match=message):
        cache.check(manifest(), other, TOKENIZER)
    with pytest.raises(UserError, match=message):
        writer(tmp_path, other)


def test_every_field_that_decides_a_clip_is_in_the_key(config: PretrainConfig) -> None:
    """A new field of the data config is part of the key unless it is declared resumable."""
    fields = {field.name for field in dataclasses.fields(config.data)}
    key = cache_key(manifest(), config, TOKENIZER)
    named = {name.removeprefix("data.") for name in key if name.startswith("data.")}
    assert fields - named == set(keys.IGNORED_IN_KEY)


def test_how_files_are_read_does_not_matter(tmp_path: Path, config: PretrainConfig) -> None:
    cache = written(tmp_path, config)
    data = dataclasses.replace(config.data, threads=7, prefetch=3, decoder="pyav", timeout_s=1.0, max_unusable=0.1)
    cache.check(manifest(folder="/elsewhere"), dataclasses.replace(config, data=data), TOKENIZER)


def test_other_videos_are_named(tmp_path: Path, config: PretrainConfig) -> None:
    cache = written(tmp_path, config)
    videos = manifest().videos
    changed = dataclasses.replace(videos[4], frames=99)
    with pytest.raises(UserError, match=r"video 4 is /clips/04.mp4 there and /clips/04.mp4 here, or that file has"):
        cache.check(Manifest((*videos[:4], changed, *videos[5:])), config, TOKENIZER)
    with pytest.raises(UserError, match=r"video 0 is /clips/00.mp4 there and /clips/01.mp4 here"):
        cache.check(Manifest((videos[1], videos[0], *videos[2:])), config, TOKENIZER)
    with pytest.raises(UserError, match="10 there, 9 here"):
        cache.check(Manifest(videos[:9]), config, TOKENIZER)
    rehashed = dataclasses.replace(videos[4], content="other bytes of the same shape")
    with pytest.raises(UserError, match="video 4"):
        cache.check(Manifest((*videos[:4], rehashed, *videos[5:])), config, TOKENIZER)


def test_other_draws_are_an_error(tmp_path: Path, config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = written(tmp_path, config)
    draw = keys.draw_clip

    def otherwise(*args: object) -> object:
        drawn = draw(*args)
        return dataclasses.replace(drawn, frames=tuple(frame + 1 for frame in drawn.frames))

    monkeypatch.setattr(keys, "draw_clip", otherwise)
    with pytest.raises(UserError, match="drawn by another version of MAM2 or NumPy"):
        cache.check(manifest(), config, TOKENIZER)


def test_another_tokenizer_is_an_error(tmp_path: Path, config: PretrainConfig) -> None:
    cache = written(tmp_path, config)
    with pytest.raises(UserError, match=r"tokenizer 0123456789ab, this run's is ffffffffffff"):
        cache.check(manifest(), config, "f" * 64)
    with pytest.raises(UserError, match="contains codes in float32, this run computes in bfloat16"):
        writer(tmp_path, config, precision="bfloat16")


def test_clips_out_of_order_are_refused(tmp_path: Path, config: PretrainConfig) -> None:
    """A shard that was closed would be overwritten."""
    cache = writer(tmp_path, config)
    fill(cache, config, clips=9)
    with pytest.raises(ValueError, match="order of `missing`"):
        cache.add(torch.tensor([0]), torch.tensor([0]), torch.tensor([0]), torch.zeros(1, 64, dtype=torch.int64))


def test_what_is_no_cache_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing: not a cache of codes; write one with mam2 tokenize"):
        CodeCache(tmp_path / "nothing", progress=False)
    (tmp_path / "cache.json").write_text("{")
    with pytest.raises(UserError, match=r"cache.json: not the header of a cache"):
        CodeCache(tmp_path, progress=False)


def test_a_large_codebook_has_its_own_type(tmp_path: Path, config: PretrainConfig) -> None:
    for size, itemsize in ((65535, 2), (65536, 4)):
        cache = writer(tmp_path / str(size), config, codebook_size=size)
        cache.add(torch.tensor([1]), torch.tensor([1]), torch.tensor([0]), torch.full((1, 64), size - 1))
        cache.finish()
        opened = CodeCache(tmp_path / str(size), progress=False)
        assert opened.bytes == 20 * 3 * 64 * itemsize
        assert opened.count_absent() == 19
        assert int(opened.codes(torch.tensor([1]), torch.tensor([1]), torch.tensor([0])).max()) == size - 1
        assert json.loads((tmp_path / str(size) / "cache.json").read_text())["codebook_size"] == size
