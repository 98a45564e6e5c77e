"""Small video files for the tests, written on the spot: no footage is part of the repository."""

from __future__ import annotations

import dataclasses
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mam2.engine.config.finetune import FinetuneConfig
from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.config.recipe import load_recipe
from mam2.engine.data.manifest import Manifest, read_manifest


if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    # Under nohup. A handler ignores it as well here, but unlike SIG_IGN the processes that the tests start do not
    # inherit it: the tests send them this signal.
    signal.signal(signal.SIGHUP, lambda *_: None)


def _write_video(
    path: Path, frames: NDArray[np.uint8], codec: str = "libx264", *, gop: int = 12, **options: str
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    full_range = codec == "mjpeg"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuvj420p" if full_range else "yuv420p"
        stream.codec_context.gop_size = gop
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def float32_on_cpus() -> Iterator[None]:
    """Precision `auto` is float32 in this module whatever the CPU: for comparisons closer than bfloat16 allows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
        yield


@pytest.fixture
def full_disk() -> Callable[[int], AbstractContextManager[None]]:
    """`with full_disk(n)`: no file can grow beyond n bytes; writing then fails as on a full disk, with EFBIG."""

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
            with av.open(str(folder / f"img_{number:05d}.jpg"), "w", format="image2") as container:
                stream = container.add_stream("mjpeg", rate=1, options={"qscale": "2"})
                stream.height, stream.width = image.shape[:2]
                stream.pix_fmt = "yuvj420p"
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
                container.mux(stream.encode())
        return folder

    return write


@pytest.fixture(scope="session")
def numbered_frames() -> Callable[..., NDArray[np.uint8]]:
    """numbered_frames(n, height, width): frame t is grey, 10·t + 5 bright, so that it is known after any codec."""

    def make(n: int, height: int = 48, width: int = 64) -> NDArray[np.uint8]:
        levels = 10 * np.arange(n, dtype=np.uint8) + 5
        return np.broadcast_to(levels[:, None, None, None], (n, height, width, 3)).copy()

    return make


@pytest.fixture(scope="session")
def frame_numbers() -> Callable[[NDArray[np.uint8]], list[int]]:
    """The numbers of numbered frames [..., H, W, 3], from their mean brightness."""

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
    """Ten labelled videos of 6 to 24 frames in three codecs and sizes."""
    folder = tmp_path_factory.mktemp("videos")
    kinds = [("mp4", "libx264"), ("webm", "libvpx-vp9"), ("avi", "mpeg4")]
    for number in range(10):
        suffix, encoder = kinds[number % 3]
        frames = numbered_frames(6 + 2 * number, 48 + 16 * (number % 2), 64)
        write_video(folder / f"class {number % 4}" / f"{number}.{suffix}", frames, encoder)
    return read_manifest(folder, progress=False)


def _small_config(**tables: dict[str, Any]) -> PretrainConfig:
    """The demo's recipe cut down to seconds."""
    defaults = {
        "model": {"width": 24, "depth": 1, "heads": 2},
        "tokenizer": {"steps": 6, "codes": 16, "channels": 8, "batch": 16},
        "optim": {"batch": 16, "epochs": 2.0, "warmup_epochs": 0.5},
        "run": {"compile": False, "log_every": 2, "save_every": 1000},
        "data": {"views": 2, "threads": 1},
    }
    config = load_recipe("demo")
    tables = {table: defaults.get(table, {}) | tables.get(table, {}) for table in defaults.keys() | tables.keys()}
    return dataclasses.replace(
        config, **{table: dataclasses.replace(getattr(config, table), **values) for table, values in tables.items()}
    )


@pytest.fixture(scope="session")
def small() -> Callable[..., PretrainConfig]:
    """small(table={field: value}, …): the demo's recipe cut down to seconds, with values of your own."""
    return _small_config


def _small_finetuning(**tables: dict[str, Any]) -> FinetuneConfig:
    """The demo's fine-tuning recipe cut down to seconds."""
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
    """small_finetuning(table={field: value}, …): the demo's fine-tuning recipe cut down to seconds."""
    return _small_finetuning
