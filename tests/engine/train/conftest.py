"""Clips for the tests of training."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from mam2.engine.data.synthetic import render_clip, write_clip


@pytest.fixture(scope="session")
def motion_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of motion that differ only in the order of the frames: 64 clips in train/, 16 in test/."""
    folder = tmp_path_factory.mktemp("clips")
    for stream, (split, count) in enumerate((("train", 32), ("test", 8))):
        for motion in ("left", "right"):
            (folder / split / motion).mkdir(parents=True)
            for number in range(count):
                look = np.random.default_rng([stream, number, motion == "left"])
                write_clip(folder / split / motion / f"{number:02d}.mp4", render_clip(motion, look))
    return folder


@pytest.fixture(scope="session")
def few_clips(motion_clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 of the training clips of `motion_clips`. Read only; copy to change."""
    folder = tmp_path_factory.mktemp("few")
    for motion in ("left", "right"):
        (folder / motion).mkdir()
        for file in sorted((motion_clips / "train" / motion).iterdir())[:8]:
            shutil.copy(file, folder / motion)
    return folder
