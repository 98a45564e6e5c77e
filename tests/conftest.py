"""Fixtures of all tests: small video files, synthetic clips, small configurations, a finished run."""

from __future__ import annotations

import dataclasses
import os
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

# Before torch is imported, and for the processes that tests start: models this small gain nothing from a second
# thread, and threads of several processes that wait for each other take minutes on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Also before torch: tests that compile write neither to the user's folder nor to one that other machines share.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"mam2-tests-{os.getuid()}"))

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mam2.engine.config.finetune import FinetuneConfig
from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.config.recipe import load_recipe
from mam2.engine.data.encoding import encode_frames
from mam2.engine.data.manifest import Manifest, read_manifest
from mam2.engine.data.synthetic import write_dataset
from mam2.engine.runtime import device
from mam2.engine.train.loop import TrainResult
from mam2.engine.train.pretrain import pretrain
from tests.helpers.clip_sets import ClipSet
from tests.helpers.order import slow_files_first
from tests.helpers.paths import CLIPS, REAL_CLIPS, needs_real_clips

if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    # Under nohup. A handler ignores it as well here, but unlike SIG_IGN the processes that the tests start do not
    # inherit it: the tests send them this signal.
    signal.signal(signal.SIGHUP, lambda *_: None)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In the processes of pytest-xdist; a single process keeps the order of the command line."""
    if hasattr(config, "workerinput"):
        items[:] = slow_files_first(items)


def _write_video(
    path: Path, frames: NDArray[np.uint8], codec: str = "libx264", *, gop: int = 12, **options: str
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    full_range = codec == "mjpeg"
    height, width = frames.shape[1:3]
    pixels = "yuvj420p" if full_range else "yuv420p"
    encode_frames(path, frames, codec, (width, height), gop=gop, pixel_format=pixels, options=options)
    return path


@pytest.fixture(scope="module", autouse=True)
def _nothing_compiled_is_left() -> Iterator[None]:
    """Resets torch.compile after each test file, so that its shapes and recompilations do not affect the next file."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(scope="module")
def float32() -> Iterator[None]:
    """Makes precision `auto` float32 on every CPU and GPU, for comparisons closer than bfloat16 allows."""
    with pytest.MonkeyPatch.context() as patch:
        # a plan asks about a GPU without a number, which is no device of this machine
        patch.setattr(device, "multiplies_bfloat16", lambda where: where == torch.device("cuda"))
        yield


@pytest.fixture(scope="module")
def on_a_cpu() -> Iterator[None]:
    """Hides the GPUs, for comparisons with frames that PyAV decodes: those of NVDEC differ by up to a gray level."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture
def full_disk() -> Callable[[int], AbstractContextManager[None]]:
    """`with full_disk(n)`: no file can exceed n bytes; writing then fails with EFBIG, similar to a full disk."""

    @contextmanager
    def limited(most: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture(scope="session")
def write_video() -> Callable[..., Path]:
    """write_video(path, frames uint8 [T, H, W, 3], codec, gop=…, **encoder options) -> path."""
    return _write_video


@pytest.fixture(scope="session")
def write_frames() -> Callable[[Path, NDArray[np.uint8]], Path]:
    """write_frames(folder, frames uint8 [T, H, W, 3]) -> folder, with img_00001.jpg and so on in it."""

    def write(folder: Path, frames: NDArray[np.uint8]) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(frames, 1):
            encode_frames(
                folder / f"img_{number:05d}.jpg",
                [image],
                "mjpeg",
                (image.shape[1], image.shape[0]),
                rate=1,
                pixel_format="yuvj420p",
                options={"qscale": "2"},
                container_format="image2",
            )
        return folder

    return write


@pytest.fixture(scope="session")
def numbered_frames() -> Callable[..., NDArray[np.uint8]]:
    """numbered_frames(n, height, width): frame t is gray with brightness 10·t + 5, so that any codec keeps it."""

    def make(n: int, height: int = 48, width: int = 64) -> NDArray[np.uint8]:
        levels = 10 * np.arange(n, dtype=np.uint8) + 5
        return np.broadcast_to(levels[:, None, None, None], (n, height, width, 3)).copy()

    return make


@pytest.fixture(scope="session")
def frame_numbers() -> Callable[[NDArray[np.uint8]], list[int]]:
    """Returns the numbers of numbered frames [..., H, W, 3], from their mean brightness."""

    def read(frames: NDArray[np.uint8]) -> list[int]:
        levels = np.asarray(frames, np.float64).mean((-3, -2, -1))
        return np.rint((levels - 5) / 10).astype(int).ravel().tolist()

    return read


@pytest.fixture(scope="session")
def videos(
    tmp_path_factory: pytest.TempPathFactory,
    write_video: Callable[..., Path],
    numbered_frames: Callable[..., NDArray[np.uint8]],
) -> Manifest:
    """Ten labeled videos of 6 to 24 frames in three codecs and sizes."""
    folder = tmp_path_factory.mktemp("videos")
    kinds = [("mp4", "libx264"), ("webm", "libvpx-vp9"), ("avi", "mpeg4")]
    for number in range(10):
        suffix, encoder = kinds[number % 3]
        frames = numbered_frames(6 + 2 * number, 48 + 16 * (number % 2), 64)
        write_video(folder / f"class {number % 4}" / f"{number}.{suffix}", frames, encoder)
    return read_manifest(folder, progress=False)


@pytest.fixture(scope="session", params=[CLIPS, pytest.param(REAL_CLIPS, marks=needs_real_clips)], ids=["made", "real"])
def clip_set(request: pytest.FixtureRequest) -> ClipSet:
    """Clips in many formats: those of the repository, then real ones. Read only; copy to change."""
    return ClipSet(request.param)


@pytest.fixture(scope="session")
def rendered_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The synthetic set of `write_dataset`: train/ with 32 clips, test/ with 16. Read only; copy to change."""
    folder = tmp_path_factory.mktemp("rendered")
    write_dataset(folder, train=32, test=16, progress=False)
    return folder


@pytest.fixture(scope="session")
def synthetic_clips(rendered_clips: Path) -> Callable[..., None]:
    """synthetic_clips(folder, train=…, test=…): the set of `write_dataset`, copied from clips rendered once."""

    def copy(folder: Path, *, train: int, test: int = 0) -> None:
        for split, count in (("train", train), ("test", test)):
            files = [path for path in (rendered_clips / split).rglob("*.*") if int(path.stem) < count]
            assert len(files) == count, f"{split}: {len(files)} clips are rendered, {count} are asked for"
            for path in files:
                target = folder / path.relative_to(rendered_clips)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)

    return copy


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory, synthetic_clips: Callable[..., None]) -> Path:
    """A folder of 32 synthetic clips with labels. Read only; copy to change."""
    folder = tmp_path_factory.mktemp("clips")
    synthetic_clips(folder, train=32)
    return folder / "train"


@pytest.fixture(scope="session")
def finished_result(
    clips: Path, tmp_path_factory: pytest.TempPathFactory, small: Callable[..., PretrainConfig]
) -> TrainResult:
    """The result of a complete pre-training of small() on `clips`."""
    return pretrain(small(), clips, tmp_path_factory.mktemp("finished"), progress=False)


@pytest.fixture(scope="session")
def finished(finished_result: TrainResult) -> Path:
    """The run folder of `finished_result`: 8 steps. Read only; copy to change."""
    assert finished_result.checkpoint is not None
    return finished_result.checkpoint.parents[1]


def _small_config(**tables: dict[str, Any]) -> PretrainConfig:
    """The demo's recipe, reduced to seconds."""
    defaults = {
        "model": {"width": 24, "depth": 1, "heads": 2},
        "tokenizer": {"steps": 6, "codes": 16, "channels": 8, "batch": 16},
        "mask": {"kind": "tube"},
        "optim": {"name": "adamw", "batch": 16, "epochs": 2.0, "warmup_epochs": 0.5, "base_lr": 1.6e-2, "min_lr": 8e-5},
        "run": {"compile": False, "log_every": 2, "save_every": 1000},
        "data": {"stride": 2, "views": 2, "threads": 1},
    }
    config = load_recipe("demo")
    tables = {table: defaults.get(table, {}) | tables.get(table, {}) for table in defaults.keys() | tables.keys()}
    return dataclasses.replace(
        config, **{table: dataclasses.replace(getattr(config, table), **values) for table, values in tables.items()}
    )


@pytest.fixture(scope="session")
def small() -> Callable[..., PretrainConfig]:
    """small(table={field: value}, …): the demo's recipe reduced to seconds, with the passed values."""
    return _small_config


def _small_finetuning(**tables: dict[str, Any]) -> FinetuneConfig:
    """The demo's fine-tuning recipe, reduced to seconds."""
    defaults = {
        "model": {"width": 48, "depth": 2, "heads": 3},
        "optim": {"batch": 16, "epochs": 2.0, "warmup_epochs": 0.5},
        "run": {"compile": False, "log_every": 2, "save_every": 1000},
        "data": {"threads": 1},
    }
    config = load_recipe("demo/finetune", FinetuneConfig)
    tables = {table: defaults.get(table, {}) | tables.get(table, {}) for table in defaults.keys() | tables.keys()}
    return dataclasses.replace(
        config, **{table: dataclasses.replace(getattr(config, table), **values) for table, values in tables.items()}
    )


@pytest.fixture(scope="session")
def small_finetuning() -> Callable[..., FinetuneConfig]:
    """small_finetuning(table={field: value}, …): the demo's fine-tuning recipe, reduced, with the passed values."""
    return _small_finetuning
