"""Codes on disk, in the place of a tokenizer: those of every recorded augmentation of every video of a data set.

    CODES/cache.json              what the codes depend on, codebook size, precision
          manifest.jsonl          the videos, in the order that the codes have
          tokenizer.safetensors   the tokenizer that they come from
          shards/a000-000000.npy  codes [videos of the shard, views, N] of one augmentation, read by memory map;
                                  [videos of the shard, views, N, tubelet] where all frames have codes
          shards.json             the finished shards, each with its SHA-256

A clip is (place in manifest.videos, augmentation, view); `draw_clip` gives it the same frames, crop and mirroring in
every run whose key is equal. One that could not be decoded is absent: its codes are the largest number of their type.

A shard is written aside, synced, renamed and then listed; writing goes on where it stopped. Opening a cache reads all
of it once for the checksums, as fast as the disk gives it: a run of days cannot meet a damaged shard on its third.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mam2.engine.config.limits import resumable_fields
from mam2.engine.config.pretrain import DataConfig, PretrainConfig
from mam2.engine.data.manifest import MANIFEST, Manifest, Video, read_saved_manifest
from mam2.engine.data.sampling import draw_clip
from mam2.engine.errors import UserError
from mam2.engine.files import write_whole
from mam2.engine.runtime.progress import Progress

HEADER, SHARDS = "cache.json", "shards.json"
SHARD_VIDEOS = 1024
"""Videos of a shard: what a killed `mam2 tokenize` loses at most."""
DRAWN_VIDEOS = 16
"""Of which the key holds what is drawn, since another version of this program or of NumPy might draw otherwise."""
IGNORED_IN_KEY = {*resumable_fields(DataConfig), "decoder"}
"""Fields of the data config that decide how a clip is read, and not which clip it is."""


def cache_key(manifest: Manifest, config: PretrainConfig, tokenizer: str) -> dict[str, Any]:
    """All that codes depend on, by the names that a user knows. tokenizer: its fingerprint."""
    data = dataclasses.asdict(config.data)
    videos, draws = hashlib.sha256(), hashlib.sha256()
    for video in manifest.videos:
        videos.update(repr(_identity(video)).encode("utf-8", "surrogateescape"))
    for place, video in enumerate(manifest.videos[:DRAWN_VIDEOS]):
        with contextlib.suppress(UserError):  # a video of unknown frame rate under data.fps: no clip is drawn of it
            draws.update(repr(draw_clip(place, video, 0, config.data, config.run.seed)).encode())
    return {
        **{f"data.{name}": value for name, value in data.items() if name not in IGNORED_IN_KEY},
        "run.seed": config.run.seed,
        "model.patch": config.model.patch,
        "model.tubelet": config.model.tubelet,
        "tokenizer.frames": config.tokenizer.frames,
        "tokenizer": tokenizer,
        "videos": videos.hexdigest(),
        "draws": draws.hexdigest(),
    }


def check_cache(folder: str | Path) -> None:
    """Raises UserError where a cache is not there or unfinished; reads no codes, so that it can be asked first."""
    CodeCache(folder, verify=False)


class CodeCache:
    """A finished cache, open for reading. Threads may share it."""

    def __init__(self, folder: str | Path, *, verify: bool = True, progress: bool = True) -> None:
        """Raises UserError where the cache is not there, unfinished or damaged.

        verify: read all of it once and compare the checksums.
        """
        self.folder = Path(folder)
        header = _read_header(self.folder)
        if header is None:
            raise UserError(f"{self.folder}: no cache of codes; mam2 tokenize writes one")
        self.header = header
        finished = _finished_shards(self.folder, header, verify=verify, progress=progress)
        self._shards = {}
        for place in _places(header):
            if place not in finished:
                raise UserError(
                    f"{self.folder}: {_shard_name(*place)} is missing or damaged; mam2 tokenize with the same values "
                    "writes what is not there"
                )
            try:
                self._shards[place] = np.load(self.folder / "shards" / _shard_name(*place), mmap_mode="r")
            except (OSError, ValueError) as error:
                raise UserError(
                    f"{self.folder}: {_shard_name(*place)} cannot be read ({error}); tokenize anew"
                ) from None

    @property
    def codebook_size(self) -> int:
        """V: codes are 0 to V - 1."""
        return self.header["codebook_size"]

    @property
    def precision(self) -> str:
        """Of the tokenizer's convolutions: float32 or bfloat16."""
        return self.header["precision"]

    @property
    def bytes(self) -> int:
        """Of all codes."""
        return sum(shard.nbytes for shard in self._shards.values())

    @property
    def tokenizer(self) -> str:
        """Fingerprint of the tokenizer that the codes come from."""
        return self.header["key"]["tokenizer"]

    def check(self, manifest: Manifest, config: PretrainConfig, tokenizer: str) -> None:
        """Raises UserError naming the first thing in which a run differs from what the codes were made for."""
        _check_key(self.folder, self.header["key"], cache_key(manifest, config, tokenizer), manifest)

    def has(self, video: int, augmentation: int) -> bool:
        """Whether a clip could be decoded. video: its place in manifest.videos."""
        return self._row(video, augmentation).flat[0] != _absent(self.codebook_size)

    def codes(self, video: Tensor, augmentation: Tensor, view: Tensor) -> Tensor:
        """int64 [B, N] or [B, N, tubelet] of clips given by int64 [B] on the CPU.

        Raises:
            ValueError: the codes of a clip are absent.
        """
        clips = zip(video.tolist(), augmentation.tolist(), view.tolist(), strict=True)
        codes = np.stack([self._row(place, number)[shown] for place, number, shown in clips]).astype(np.int64)
        if (codes == _absent(self.codebook_size)).any():
            raise ValueError("video: expected clips that the cache has codes of, found one that could not be decoded")
        return torch.from_numpy(codes)

    def count_absent(self) -> int:
        """Clips (views not counted) that could not be decoded."""
        absent = _absent(self.codebook_size)
        return sum(int((_firsts(shard) == absent).sum()) for shard in self._shards.values())

    def histogram(self) -> Tensor:
        """How often each code occurs, int64 [V]."""
        counts = np.zeros(self.codebook_size, np.int64)
        for shard in self._shards.values():
            present = shard[_firsts(shard) != _absent(self.codebook_size)]
            counts += np.bincount(present.ravel(), minlength=self.codebook_size)
        return torch.from_numpy(counts)

    def _row(self, video: int, augmentation: int) -> NDArray[Any]:
        number, row = divmod(video, self.header["shard_videos"])
        return self._shards[augmentation, number][row]


class CodeCacheWriter:
    """Writes a cache, or the rest of one. Clips come in the order of `missing`; the ones left out are absent."""

    def __init__(
        self,
        folder: str | Path,
        manifest: Manifest,
        config: PretrainConfig,
        *,
        tokenizer: str,
        codebook_size: int,
        precision: str,
        progress: bool = True,
    ) -> None:
        """Raises UserError where the folder holds a cache of something else, naming what differs."""
        self.folder = Path(folder)
        slots, rows, columns = config.grid
        header: dict[str, Any] = {
            "key": cache_key(manifest, config, tokenizer),
            "videos": len(manifest.videos),
            "shard_videos": SHARD_VIDEOS,
            "augmentations": config.data.recorded,
            "views": config.data.views,
            "tokens": slots * rows * columns,
            "codebook_size": codebook_size,
            "precision": precision,
        }
        before = _read_header(self.folder)
        if before is None:
            (self.folder / "shards").mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / HEADER, (json.dumps(header, indent=1) + "\n").encode())
        else:
            _check_key(self.folder, before["key"], header["key"], manifest)
            if before["precision"] != precision:
                raise UserError(f"{self.folder}: holds codes in {before['precision']}, this run computes {precision}")
            header = before
        self._header = header
        self._code_shape = config.code_shape
        self._finished = _finished_shards(self.folder, header, verify=True, progress=progress)
        self._place: tuple[int, int] | None = None
        self._shard: NDArray[Any] = np.empty(0)

    def missing(self) -> Iterator[tuple[int, int]]:
        """Augmentation and place in manifest.videos of the clips that are not in a finished shard."""
        for augmentation, number in _places(self._header):
            if (augmentation, number) not in self._finished:
                first = number * self._header["shard_videos"]
                for video in range(first, first + _videos_in(self._header, number)):
                    yield augmentation, video

    @property
    def total(self) -> int:
        """Clips of the finished cache, views not counted."""
        return self._header["videos"] * self._header["augmentations"]

    def add(self, video: Tensor, augmentation: Tensor, view: Tensor, codes: Tensor) -> None:
        """Codes int64 [B, N] or [B, N, tubelet] of clips given by int64 [B], all on the CPU.

        Raises:
            ValueError: a clip of a shard that is finished already.
        """
        clips = zip(video.tolist(), augmentation.tolist(), view.tolist(), codes.numpy(), strict=True)
        for place, number, shown, row in clips:
            shard, line = divmod(place, self._header["shard_videos"])
            self._open((number, shard))
            self._shard[line, shown] = row

    def finish(self) -> None:
        """To be called after the last clip of `missing`, and only then: what has not come is absent."""
        for place in _places(self._header):
            if place not in self._finished:
                self._open(place)
        self._close()

    def _open(self, place: tuple[int, int]) -> None:
        if place == self._place:
            return
        if place in self._finished:
            raise ValueError(f"video: expected clips in the order of `missing`, found one of finished shard {place}")
        self._close()
        header = self._header
        shape = _videos_in(header, place[1]), header["views"], header["tokens"], *self._code_shape
        self._place = place
        self._shard = np.full(shape, _absent(header["codebook_size"]), _dtype(header["codebook_size"]))

    def _close(self) -> None:
        if self._place is None:
            return
        buffer = io.BytesIO()
        np.save(buffer, self._shard)
        name = _shard_name(*self._place)
        write_whole(self.folder / "shards" / name, buffer.getvalue())
        self._finished[self._place] = hashlib.sha256(buffer.getvalue()).hexdigest()
        listed = {_shard_name(*place): digest for place, digest in sorted(self._finished.items())}
        write_whole(self.folder / SHARDS, (json.dumps(listed, indent=1) + "\n").encode())
        self._place = None


def _identity(video: Video) -> tuple[Any, ...]:
    """What of a video decides its clips; not the folder it lies in, nor its label."""
    size = video.frames, video.width, video.height, video.rotation, video.fps
    return os.path.basename(video.path), *size, video.codec, video.pixel_format, video.content


def _check_key(folder: Path, there: dict[str, Any], here: dict[str, Any], manifest: Manifest) -> None:
    there = {"tokenizer.frames": "first"} | there  # which caches of earlier versions do not say
    for name in (name for name in [*here, *there] if there.get(name) != here.get(name)):
        if name == "videos":
            raise UserError(f"{folder}: holds codes of other videos: {_first_difference(folder, manifest)}")
        if name == "tokenizer":
            raise UserError(
                f"{folder}: holds codes of the tokenizer {there[name][:12]}, this run's is {here[name][:12]}; "
                "leave tokenizer.path empty to use the cache's own"
            )
        if name == "draws":
            raise UserError(
                f"{folder}: holds codes of clips that another version of this program or of NumPy drew; tokenize anew"
            )
        raise UserError(
            f"{folder}: holds codes made with {name} = {there.get(name)!r}, this run says {here.get(name)!r}; "
            "use the same value, or mam2 tokenize into another folder"
        )


def _first_difference(folder: Path, manifest: Manifest) -> str:
    there, here = read_saved_manifest(folder / MANIFEST).videos, manifest.videos
    for place, (theirs, ours) in enumerate(zip(there, here, strict=False)):
        if _identity(theirs) != _identity(ours):
            return f"video {place} is {theirs.path} there and {ours.path} here, or that file has changed"
    return f"{len(there)} there, {len(here)} here"


def _read_header(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / HEADER).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / HEADER}: not the head of a cache of codes ({error})") from None


def _finished_shards(
    folder: Path, header: dict[str, Any], *, verify: bool, progress: bool
) -> dict[tuple[int, int], str]:
    """The shards that are listed, and the SHA-256 each is listed with; with `verify` only those that have it."""
    try:
        listed = json.loads((folder / SHARDS).read_text(encoding="ascii"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / SHARDS}: not a list of shards ({error})") from None
    finished = {place: listed[_shard_name(*place)] for place in _places(header) if _shard_name(*place) in listed}
    if not verify:
        return finished
    sound = {}
    for place, digest in Progress(finished.items(), "checking codes", len(finished), unit="shard", shown=progress):
        with contextlib.suppress(FileNotFoundError):
            if hashlib.sha256((folder / "shards" / _shard_name(*place)).read_bytes()).hexdigest() == digest:
                sound[place] = digest
    return sound


def _places(header: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """Augmentation and number of every shard."""
    for augmentation in range(header["augmentations"]):
        for number in range(-(-header["videos"] // header["shard_videos"])):
            yield augmentation, number


def _videos_in(header: dict[str, Any], number: int) -> int:
    return min(header["shard_videos"], header["videos"] - number * header["shard_videos"])


def _shard_name(augmentation: int, number: int) -> str:
    return f"a{augmentation:03d}-{number:06d}.npy"


def _firsts(shard: NDArray[Any]) -> NDArray[Any]:
    """The first code of each video of a shard."""
    return shard.reshape(len(shard), -1)[:, 0]


def _dtype(codebook_size: int) -> type[np.unsignedinteger[Any]]:
    return np.uint16 if codebook_size <= np.iinfo(np.uint16).max else np.uint32


def _absent(codebook_size: int) -> int:
    return int(np.iinfo(_dtype(codebook_size)).max)
