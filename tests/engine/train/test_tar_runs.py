"""A pre-training on tar shards: the bits of one on files, also resumed after the tars have moved."""

from __future__ import annotations

import os
import shutil
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.data.manifest import Manifest
from mam2.engine.train.pretrain import pretrain
from mam2.engine.train.step import PretrainStep
from tests.helpers.runs import same_weights


@pytest.mark.slow
def test_tars_train_to_the_bits_of_files_and_may_move(
    videos: Manifest,
    small: Callable[..., PretrainConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = small(
        loss={"appearance_target": "none", "balance": "fixed"}, optim={"batch": 4, "epochs": 2.0, "warmup_epochs": 0.5}
    )
    files = [Path(video.path) for video in videos.videos]
    (tmp_path / "list.csv").write_text("".join(f"{file}\n" for file in files))
    (tmp_path / "shards").mkdir()
    for shard in range(2):
        with tarfile.open(tmp_path / "shards" / f"{shard:02d}.tar", "w") as archive:
            for file in files[5 * shard : 5 * shard + 5]:
                archive.add(file, file.name)
    pattern = "shards/{00..01}.tar"
    whole = pretrain(config, tmp_path / "list.csv", tmp_path / "files", progress=False).step
    assert whole == 10

    calls: list[None] = []
    step = PretrainStep.__call__

    def stopped(self: PretrainStep, *args: object, **options: object) -> object:
        calls.append(None)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **options)

    monkeypatch.setattr(PretrainStep, "__call__", stopped)
    assert pretrain(config, tmp_path / pattern, tmp_path / "tars", progress=False).step == 3
    (tmp_path / "moved").mkdir()
    shutil.move(tmp_path / "shards", tmp_path / "moved")
    resumed = pretrain(config, tmp_path / "moved" / pattern, tmp_path / "tars", resume=True, progress=False)
    assert resumed.step == whole
    assert same_weights(tmp_path / "files", tmp_path / "tars")
    assert "10 of 10 videos found at other paths" in (tmp_path / "tars" / "log.txt").read_text()
