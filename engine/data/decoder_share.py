"""Divides videos between NVDEC and PyAV in proportion to their measured rates, so that both decode a part of a batch.

NVDEC alone leaves the CPU's cores idle, and on frames as small as Kinetics' 340x256 pixels it may be the slower one.
Which videos NVDEC decodes is a function of the share and of a video's place in the manifest. The share of a run is
measured once and stored in its folder, so that a resumed run decodes each video as before.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mam2.engine.config.training import DataConfig
from mam2.engine.data.manifest import Manifest
from mam2.engine.errors import UserError
from mam2.engine.files import write_whole

if TYPE_CHECKING:
    from mam2.engine.data.loader import ClipLoader

FILE = "decoders.json"
"""In the run folder."""
VIDEOS = 64
"""Largest number of videos that are decoded for a measurement."""
CLIPS = 32
"""Clips per batch of a measurement."""
BATCHES = 3
"""Batches that are timed, after two that build graphs and fill queues."""
LEAST = 0.05
"""PyAV gets no video if its share would be smaller: it is not worth a second group per batch. NVDEC keeps at least this
share."""


@dataclass(frozen=True)
class Rates:
    """Clips per second of each decoder alone."""

    nvdec: float
    pyav: float

    @property
    def share(self) -> float:
        """Returns NVDEC's share of the videos, above 0 and at most 1, at which both need the same time for a batch."""
        share = round(self.nvdec / (self.nvdec + self.pyav), 2)
        return 1.0 if share > 1 - LEAST else max(share, LEAST)

    def __str__(self) -> str:
        return f"{self.nvdec:.0f} clips per second of NVDEC alone, {self.pyav:.0f} of PyAV alone"


def nvdec_keeps(video: int, share: float) -> bool:
    """Returns whether NVDEC decodes a video, given by its index in the manifest, at this share of all.

    Multiples of the golden ratio spread evenly: any long run of indices has about the same share.
    """
    return (video + 1) * 2654435769 % 2**32 < share * 2**32


def measure_rates(
    manifest: Manifest, videos: list[int], config: DataConfig, device: torch.device, seed: int = 0
) -> Rates:
    """Decodes training clips of some videos with NVDEC, then with PyAV; takes a few seconds.

    Args:
        manifest: the training videos.
        videos: indices of those that NVDEC can decode.
        config: of the run.
        device: a GPU.

    Raises:
        UserError: NVDEC or PyAV decoded none of them, or the GPU failed.
    """
    chosen = [videos[place * len(videos) // VIDEOS] for place in range(VIDEOS)] if len(videos) > VIDEOS else videos
    part = dataclasses.replace(manifest, videos=tuple(manifest.videos[index] for index in chosen), skipped=(), sets=())
    rates = {name: _rate(part, name, config, device, seed) for name in ("nvdec", "pyav")}
    return Rates(**rates)


def _rate(manifest: Manifest, decoder: str, config: DataConfig, device: torch.device, seed: int) -> float:
    from mam2.engine.data.loader import ClipLoader

    changes: dict[str, Any] = {
        "decoder": decoder,
        "recorded": 0,
        "prefetch": 1,
        "max_unusable": 1.0,
        "sets": (),
        "weights": (),
    }
    data = dataclasses.replace(config, **changes)
    batch = config.views * max(CLIPS // config.views, 1)
    with ClipLoader(manifest, data, batch=batch, device=device, seed=seed, info=lambda _: None) as loader:
        stream = loader.stream()
        for _ in range(2):
            next(stream)
        start = time.perf_counter()
        for _ in range(BATCHES):
            next(stream)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return BATCHES * batch / (time.perf_counter() - start)


def divide(
    loader: ClipLoader,
    config: DataConfig,
    device: torch.device,
    run: Path,
    *,
    broadcast: Callable[[Callable[[], tuple[float, str]]], tuple[float, str]] = lambda make: make(),
) -> str:
    """Gives a part of NVDEC's videos to PyAV where `data.nvdec_share` asks for a measurement.

    Args:
        loader: of the training clips; it must not have been read from.
        config: of the run.
        device: of the run; without a GPU nothing changes.
        run: the run's folder, which stores the rates.
        broadcast: returns rank 0's share and line to all processes, see `World.broadcast`.

    Returns:
        A line for the log; empty if nothing was to be divided.

    Raises:
        UserError: RUN/decoders.json is not a measurement of a run.
    """
    videos = loader.videos_of("nvdec")
    if device.type != "cuda" or config.decoder != "auto" or config.nvdec_share or not videos:
        return ""
    share, line = broadcast(lambda: _share_of(loader.manifest, videos, config, device, run / FILE))
    loader.give_to_pyav(share)
    return line


def _share_of(
    manifest: Manifest, videos: list[int], config: DataConfig, device: torch.device, file: Path
) -> tuple[float, str]:
    """Returns the stored or measured share, and a line for the log. What cannot be measured leaves all to NVDEC."""
    if file.is_file():
        rates, how = _read(file), f"from {file}"
    else:
        try:
            rates, how = measure_rates(manifest, videos, config, device), "measured"
        except (UserError, StopIteration) as error:
            return 1.0, f"NVDEC decodes all that it can: its rate could not be measured ({error})"
        write_whole(file, json.dumps(dataclasses.asdict(rates)) + "\n")
    return rates.share, f"NVDEC decodes {100 * rates.share:.0f} % of what it can, PyAV the others ({rates}; {how})"


def _read(file: Path) -> Rates:
    try:
        rates = Rates(**{name: float(rate) for name, rate in json.loads(file.read_text(encoding="utf-8")).items()})
        if not (rates.nvdec > 0 and rates.pyav > 0):
            raise ValueError("a rate is not positive")
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file}: expected the rates of NVDEC and PyAV as a run writes them; found something else ({error}); "
            "delete it to measure again"
        ) from error
    return rates
