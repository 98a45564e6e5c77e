"""`mam2 tokenize` and a pre-training on its codes: the same bits as a run that tokenizes in its steps."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.config.recipe import to_dict
from mam2.engine.data import renderer
from mam2.engine.data.manifest import read_manifest, write_manifest
from mam2.engine.errors import UserError
from mam2.engine.runtime.log import read_log
from mam2.engine.tokenizer import cache as code_cache
from mam2.engine.tokenizer.cache import CodeCache, CodeCacheWriter
from mam2.engine.tokenizer.files import fingerprint, load_vqgan, save_vqgan
from mam2.engine.tokenizer.precompute import tokenize
from mam2.engine.tokenizer.tokenizer import Tokenizer
from mam2.engine.train.pretrain import pretrain
from tests.helpers.commands import exit_status
from tests.helpers.runs import newest_weights, same_weights


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory, synthetic_clips: Callable[..., None]) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    synthetic_clips(folder, train=16)
    return folder / "train"


@pytest.fixture
def config(small: Callable[..., PretrainConfig]) -> PretrainConfig:
    """Three epochs over two recorded augmentations, so that the first one repeats."""
    return small(data={"recorded": 2, "views": 2}, optim={"batch": 8, "epochs": 3.0})


@pytest.fixture(scope="module")
def codes(clips: Path, tmp_path_factory: pytest.TempPathFactory, small: Callable[..., PretrainConfig]) -> Path:
    """A complete cache of `clips`."""
    out = tmp_path_factory.mktemp("codes")
    values = small(data={"recorded": 2, "views": 2}, optim={"batch": 8, "epochs": 3.0})
    result = tokenize(values, clips, out, progress=False)
    assert result.clips == 32
    return out


def with_tokenizer(config: PretrainConfig, **values: str) -> PretrainConfig:
    return dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, **values))


def assert_same_run(first: Path, second: Path) -> None:
    """Equal weights, and equal losses in every line of the log."""
    one, two = newest_weights(first), newest_weights(second)
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name
    lines = [
        [{name: value for name, value in line.items() if name.startswith("loss/")} for line in read_log(run)]
        for run in (first, second)
    ]
    assert lines[0] == lines[1]
    assert "loss/appearance" in lines[0][0]


@pytest.mark.slow
def test_cached_and_online_codes_train_to_the_same_bits(
    clips: Path, codes: Path, config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(codes / "tokenizer.safetensors")
    pretrain(with_tokenizer(config, path=path), clips, tmp_path / "online", progress=False)

    def refuse(*_: object) -> None:
        raise AssertionError("a run with a cache has no use for a tokenizer")

    monkeypatch.setattr(Tokenizer, "codes", refuse)
    pretrain(with_tokenizer(config, cache=str(codes)), clips, tmp_path / "cached", progress=False)
    assert_same_run(tmp_path / "online", tmp_path / "cached")
    log = (tmp_path / "cached" / "log.txt").read_text()
    assert re.search(r"16 codes from the cache .*: 2 augmentations of each video, .* in \w+; 0 clips absent", log)
    kept = [load_vqgan(run / "tokenizer.safetensors") for run in (tmp_path / "online", tmp_path / "cached")]
    assert fingerprint(kept[0]) == fingerprint(kept[1]), "evaluation needs the tokenizer also where the run did not"


@pytest.mark.slow
def test_a_run_on_recorded_clips_has_the_bits_of_a_run_on_videos(
    clips: Path, codes: Path, config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = with_tokenizer(config, path=str(codes / "tokenizer.safetensors"))
    tokenize(named, clips, tmp_path / "codes", clips="raw", progress=False)
    pretrain(with_tokenizer(config, cache=str(codes)), clips, tmp_path / "videos", progress=False)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a run on recorded clips decodes no video")

    monkeypatch.setattr(renderer, "decode_frames", refuse)
    recorded = with_tokenizer(config, cache=str(tmp_path / "codes"))
    pretrain(recorded, clips, tmp_path / "recorded", progress=False)
    assert_same_run(tmp_path / "videos", tmp_path / "recorded")
    log = (tmp_path / "recorded" / "log.txt").read_text()
    assert re.search(r"clips   from the cache .*, 1.57 MB as raw; no video is decoded for training", log)
    # A run without codes reads the clips too.
    loss = dataclasses.replace(config.loss, appearance_target="none", balance="fixed")
    motion = dataclasses.replace(recorded, loss=loss)
    pretrain(motion, clips, tmp_path / "motion", progress=False)
    monkeypatch.undo()
    pretrain(with_tokenizer(motion, cache=""), clips, tmp_path / "motion on videos", progress=False)
    assert same_weights(tmp_path / "motion", tmp_path / "motion on videos")


@pytest.mark.slow
def test_files_that_were_lost_meanwhile_are_replaced_as_without_a_cache(
    clips: Path, codes: Path, config: PretrainConfig, tmp_path: Path
) -> None:
    """Three runs replace the same videos: online, cached, and cached with readable files without codes."""
    data, index = tmp_path / "clips", tmp_path / "index.jsonl"
    shutil.copytree(clips, data)
    manifest = read_manifest(data, progress=False)
    write_manifest(manifest, index)
    lost = [Path(manifest.videos[place].path) for place in (3, 8)]
    for video in lost:
        video.rename(video.with_suffix(".gone"))
    config = with_tokenizer(config, path=str(codes / "tokenizer.safetensors"))
    made = tokenize(config, index, tmp_path / "codes", progress=False)
    assert (made.clips, made.cache.count_absent()) == (28, 4)
    named = [line.split("\t")[0] for line in (tmp_path / "codes" / "skipped.tsv").read_text().splitlines()]
    assert sorted(named) == sorted(map(str, lost))
    pretrain(config, index, tmp_path / "online", progress=False)
    cached = with_tokenizer(config, cache=str(tmp_path / "codes"))
    pretrain(cached, index, tmp_path / "cached", progress=False)
    assert_same_run(tmp_path / "online", tmp_path / "cached")
    for video in lost:
        video.with_suffix(".gone").rename(video)
    result = pretrain(cached, index, tmp_path / "back", progress=False)
    assert_same_run(tmp_path / "online", tmp_path / "back")
    assert result.skipped == 2
    assert "no codes in the cache" in (tmp_path / "back" / "skipped.tsv").read_text()


@pytest.mark.slow
def test_a_stopped_tokenizing_continues_to_the_same_bytes(
    clips: Path, config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code_cache, "SHARD_VIDEOS", 5)
    whole = tokenize(config, clips, tmp_path / "whole", progress=False)
    assert whole.clips == 32
    shutil.copytree(tmp_path / "whole", tmp_path / "part", ignore=shutil.ignore_patterns("shards*", "cache.json"))
    add, calls = CodeCacheWriter.add, []

    def stopped(self: CodeCacheWriter, *args: torch.Tensor) -> None:
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        add(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(CodeCacheWriter, "add", stopped)
        with pytest.raises(KeyboardInterrupt):
            tokenize(config, clips, tmp_path / "part", progress=False)
    with pytest.raises(UserError, match=r"is missing or damaged; run mam2 tokenize"):
        pretrain(with_tokenizer(config, cache=str(tmp_path / "part")), clips, tmp_path / "run", progress=False)
    assert tokenize(config, clips, tmp_path / "part", progress=False).clips == 32 - 10  # two shards were complete
    assert tokenize(config, clips, tmp_path / "part", progress=False).clips == 0
    for name in ("cache.json", "shards.json", *(f"shards/a{a:03d}-{n:06d}.npy" for a in range(2) for n in range(4))):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.slow
def test_a_cache_that_does_not_fit_is_an_error_before_anything_is_trained(
    clips: Path, codes: Path, config: PretrainConfig, tmp_path: Path
) -> None:
    cached = with_tokenizer(config, cache=str(codes))
    other = dataclasses.replace(cached, data=dataclasses.replace(cached.data, min_area=0.5))
    with pytest.raises(UserError, match=r"data.min_area = 0.7, this run has 0.5"):
        pretrain(other, clips, tmp_path / "run", progress=False)
    less = tmp_path / "less"
    shutil.copytree(clips, less)
    next(less.rglob("*.mp4")).unlink()
    with pytest.raises(UserError, match="contains codes of other videos"):
        pretrain(cached, less, tmp_path / "run", progress=False)
    another = load_vqgan(codes / "tokenizer.safetensors")
    another.quantize.embedding.weight.data[0] += 1
    save_vqgan(another, tmp_path / "another.safetensors")
    with pytest.raises(UserError, match="contains codes of the tokenizer"):
        pretrain(
            with_tokenizer(cached, path=str(tmp_path / "another.safetensors")), clips, tmp_path / "run", progress=False
        )
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_a_cache_whose_tokenizer_was_exchanged_is_an_error(
    clips: Path, codes: Path, config: PretrainConfig, tmp_path: Path
) -> None:
    shutil.copytree(codes, tmp_path / "codes")
    vqgan = load_vqgan(codes / "tokenizer.safetensors")
    vqgan.quantize.embedding.weight.data[0] += 1
    save_vqgan(vqgan, tmp_path / "codes" / "tokenizer.safetensors")
    with pytest.raises(UserError, match="not the tokenizer of the codes in this folder"):
        pretrain(with_tokenizer(config, cache=str(tmp_path / "codes")), clips, tmp_path / "run", progress=False)


@pytest.mark.slow
def test_a_resumed_run_may_take_a_cache_and_not_another_tokenizer(
    clips: Path, codes: Path, config: PretrainConfig, tmp_path: Path
) -> None:
    path = str(codes / "tokenizer.safetensors")
    pretrain(with_tokenizer(config, path=path), clips, tmp_path, progress=False)
    cached = with_tokenizer(config, path=path, cache=str(codes))
    assert pretrain(cached, clips, tmp_path, resume=True, progress=False).step == 12
    vqgan = load_vqgan(tmp_path / "tokenizer.safetensors")
    vqgan.quantize.embedding.weight.data[0] += 1
    save_vqgan(vqgan, tmp_path / "tokenizer.safetensors")
    with pytest.raises(UserError, match="the run's tokenizer differs from"):
        pretrain(cached, clips, tmp_path, resume=True, progress=False)


@pytest.mark.slow
def test_codes_that_bfloat16_changes_are_counted_in_the_log(
    clips: Path, codes: Path, config: PretrainConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, precision="bfloat16"))
    config = with_tokenizer(config, path=str(codes / "tokenizer.safetensors"))
    pretrain(config, clips, tmp_path, progress=False)
    found = re.findall(
        r"bfloat16 changes (\S+)% of them against float32 \(8 clips\)", (tmp_path / "log.txt").read_text()
    )
    assert len(found) == 1
    assert 0 <= float(found[0]) < 50


def test_what_cannot_be_tokenized_is_named(
    clips: Path, config: PretrainConfig, tmp_path: Path, small: Callable[..., PretrainConfig]
) -> None:
    with pytest.raises(UserError, match=r"data.recorded is 0: set it"):
        tokenize(small(), clips, tmp_path, progress=False)
    with pytest.raises(UserError, match="'videomae' has no codes"):
        tokenize(small(model={"objective": "videomae"}), clips, tmp_path, progress=False)
    with pytest.raises(UserError, match="the cache to read; set the cache to write with --out"):
        tokenize(with_tokenizer(config, cache=str(tmp_path)), clips, tmp_path, progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        tokenize(config, clips, tmp_path / "file", progress=False)


@pytest.mark.slow
def test_the_verb_says_what_it_did(
    clips: Path, codes: Path, config: PretrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(to_dict(config)))
    arguments = ["tokenize", str(tmp_path / "recipe.json"), "--data", str(clips), "--out", str(codes)]
    assert exit_status(*arguments) == 0
    out = capsys.readouterr().out
    assert "0 clips tokenized" in out
    used = re.search(r"(\d+) of 16 codes used, perplexity", out)
    assert used is not None
    assert int(used[1]) == int((CodeCache(codes, progress=False).histogram() > 0).sum())
    assert f"--tokenizer.cache {codes} --data.recorded 2" in out
    assert exit_status(*arguments, "--data.size", "64") == 2
    assert "data.size = 32, this run has 64" in capsys.readouterr().err
