"""Cached codes on disk, which replace a tokenizer: those of every recorded augmentation of every video.

    CODES/cache.json              what the codes depend on, codebook size, precision
          manifest.jsonl          the videos, in the order of the codes
          tokenizer.safetensors   the tokenizer that computed them
          shards/a000-000000.npy  codes [videos of the shard, views, N] of one augmentation, read by memory map;
                                  [videos of the shard, views, N, tubelet] where all frames have codes
          shards.json             the finished shards, each with its SHA-256

A clip is (index in manifest.videos, augmentation, view); `draw_clip` returns the same frames, crop and mirroring for it
in every run with the same key. A clip that could not be decoded is absent: its codes are the largest number of their
type.

A shard is written to a temporary file, synced, renamed and then listed; an interrupted call continues there. Opening a
cache reads all of it once for the checksums, so that damage is reported at startup and not days into a run.
"""

from __future__ import annotations

import contextlib
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
from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.config.recipe import to_dict
from mam2.engine.config.training import DataConfig
from mam2.engine.data.manifest import MANIFEST, Manifest, Video, read_saved_manifest
from mam2.engine.data.sampling import draw_clip
from mam2.engine.errors import UserError
from mam2.engine.files import write_whole
from mam2.engine.runtime.progress import Progress

HEADER, SHARDS = "cache.json", "shards.json"
SHARD_VIDEOS = 1024
"""Videos per shard: the most that a killed `mam2 tokenize` loses."""
DRAWN_VIDEOS = 16
"""Number of videos whose draws are stored in the key, since other versions of MAM2 or NumPy may draw differently."""
IGNORED_IN_KEY = {*resumable_fields(DataConfig), "decoder", "weights"}
"""Fields of the data config that affect how a clip is read, and which clips are chosen, but not a clip's content."""


def cache_key(manifest: Manifest, config: PretrainConfig, tokenizer: str) -> dict[str, Any]:
    """Returns everything that determines the codes, by the names of the user's keys. tokenizer: its fingerprint."""
    data = to_dict(config.data)
    videos, draws = hashlib.sha256(), hashlib.sha256()
    for video in manifest.videos:
        videos.update(repr(_identity(video)).encode("utf-8", "surrogateescape"))
    for place, video in enumerate(manifest.videos[:DRAWN_VIDEOS]):
        with contextlib.suppress(UserError):  # with data.fps, a video of unknown frame rate has no clips
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
    """Raises UserError if a cache is missing or unfinished; reads no codes, so that this check is fast."""
    CodeCache(folder, verify=False)


class CodeCache:
    """A complete cache, open for reading. Threads may share it."""

    def __init__(self, folder: str | Path, *, verify: bool = True, progress: bool = True) -> None:
        """Raises UserError if the cache is missing, unfinished or damaged.

        verify: read all of it once and compare the checksums.
        """
        self.folder = Path(folder)
        header = _read_header(self.folder)
        if header is None:
            raise UserError(f"{self.folder}: not a cache of codes; write one with mam2 tokenize")
        self.header = header
        finished = _finished_shards(self.folder, header, verify=verify, progress=progress)
        self._shards = {}
        for place in _places(header):
            if place not in finished:
                raise UserError(
                    f"{self.folder}: {_shard_name(*place)} is missing or damaged; run mam2 tokenize with the same "
                    "values to write it"
                )
            try:
                self._shards[place] = np.load(self.folder / "shards" / _shard_name(*place), mmap_mode="r")
            except (OSError, ValueError) as error:
                raise UserError(
                    f"{self.folder}: {_shard_name(*place)} cannot be read ({error}); run mam2 tokenize again"
                ) from None

    @property
    def codebook_size(self) -> int:
        """V: codes are 0 to V - 1."""
        return self.header["codebook_size"]

    @property
    def precision(self) -> str:
        """Precision of the tokenizer's convolutions: float32 or bfloat16."""
        return self.header["precision"]

    @property
    def bytes(self) -> int:
        """Bytes of all codes."""
        return sum(shard.nbytes for shard in self._shards.values())

    @property
    def tokenizer(self) -> str:
        """Fingerprint of the tokenizer that computed the codes."""
        return self.header["key"]["tokenizer"]

    def check(self, manifest: Manifest, config: PretrainConfig, tokenizer: str) -> None:
        """Raises UserError for the first setting in which a run differs from that of the codes."""
        _check_key(self.folder, self.header["key"], cache_key(manifest, config, tokenizer), manifest)

    def has(self, video: int, augmentation: int) -> bool:
        """Returns whether a clip could be decoded. video: its index in manifest.videos."""
        return self._row(video, augmentation).flat[0] != _absent(self.codebook_size)

    def codes(self, video: Tensor, augmentation: Tensor, view: Tensor) -> Tensor:
        """Returns int64 [B, N] or [B, N, tubelet] of clips given by int64 [B] on the CPU.

        Raises:
            ValueError: the codes of a clip are absent.
        """
        clips = zip(video.tolist(), augmentation.tolist(), view.tolist(), strict=True)
        codes = np.stack([self._row(place, number)[shown] for place, number, shown in clips]).astype(np.int64)
        if (codes == _absent(self.codebook_size)).any():
            raise ValueError("video: expected clips with codes in the cache, found one that could not be decoded")
        return torch.from_numpy(codes)

    def count_absent(self) -> int:
        """Returns the number of clips (not counting views) that could not be decoded."""
        absent = _absent(self.codebook_size)
        return sum(int((_firsts(shard) == absent).sum()) for shard in self._shards.values())

    def histogram(self) -> Tensor:
        """Returns how often each code occurs, int64 [V]."""
        counts = np.zeros(self.codebook_size, np.int64)
        for shard in self._shards.values():
            present = shard[_firsts(shard) != _absent(self.codebook_size)]
            counts += np.bincount(present.ravel(), minlength=self.codebook_size)
        return torch.from_numpy(counts)

    def _row(self, video: int, augmentation: int) -> NDArray[Any]:
        number, row = divmod(video, self.header["shard_videos"])
        return self._shards[augmentation, number][row]


class CodeCacheWriter:
    """Writes a cache, or its missing part. Add clips in the order of `missing`; skipped clips are absent."""

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
        """Raises UserError if the folder contains a cache with other settings; the error names the difference."""
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
                raise UserError(
                    f"{self.folder}: contains codes in {before['precision']}, this run computes in {precision}"
                )
            header = before
        self._header = header
        self._code_shape = config.code_shape
        self._finished = _finished_shards(self.folder, header, verify=True, progress=progress)
        self._place: tuple[int, int] | None = None
        self._shard: NDArray[Any] = np.empty(0)

    def missing(self) -> Iterator[tuple[int, int]]:
        """Yields augmentation and index in manifest.videos of the clips that are not in a finished shard."""
        for augmentation, number in _places(self._header):
            if (augmentation, number) not in self._finished:
                first = number * self._header["shard_videos"]
                for video in range(first, first + _videos_in(self._header, number)):
                    yield augmentation, video

    @property
    def total(self) -> int:
        """Returns the number of clips of the finished cache, not counting views."""
        return self._header["videos"] * self._header["augmentations"]

    def add(self, video: Tensor, augmentation: Tensor, view: Tensor, codes: Tensor) -> None:
        """Adds codes int64 [B, N] or [B, N, tubelet] of clips given by int64 [B], all on the CPU.

        Raises:
            ValueError: a clip belongs to a finished shard.
        """
        clips = zip(video.tolist(), augmentation.tolist(), view.tolist(), codes.numpy(), strict=True)
        for place, number, shown, row in clips:
            shard, line = divmod(place, self._header["shard_videos"])
            self._open((number, shard))
            self._shard[line, shown] = row

    def finish(self) -> None:
        """Finishes the cache; call it only after the last clip of `missing`. Clips that were not added are absent."""
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
    """Returns the properties of a video that determine its clips; not its folder or its label."""
    size = video.frames, video.width, video.height, video.rotation, video.fps
    return os.path.basename(video.path), *size, video.codec, video.pixel_format, video.content


def _check_key(folder: Path, there: dict[str, Any], here: dict[str, Any], manifest: Manifest) -> None:
    defaults = {f"data.{name}": value for name, value in to_dict(DataConfig()).items() if name not in IGNORED_IN_KEY}
    there = {"tokenizer.frames": "first"} | defaults | there  # missing in caches of earlier versions
    for name in (name for name in [*here, *there] if there.get(name) != here.get(name)):
        if name == "videos":
            raise UserError(f"{folder}: contains codes of other videos: {_first_difference(folder, manifest)}")
        if name == "tokenizer":
            raise UserError(
                f"{folder}: contains codes of the tokenizer {there[name][:12]}, this run's is {here[name][:12]}; "
                "leave tokenizer.path empty to use the cache's tokenizer"
            )
        if name == "draws":
            raise UserError(
                f"{folder}: contains codes of clips drawn by another version of MAM2 or NumPy; run mam2 tokenize again"
            )
        raise UserError(
            f"{folder}: contains codes made with {name} = {there.get(name)!r}, this run has {here.get(name)!r}; "
            "use the same value, or run mam2 tokenize with another folder"
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
        raise UserError(f"{folder / HEADER}: not the header of a cache of codes ({error})") from None


def _finished_shards(
    folder: Path, header: dict[str, Any], *, verify: bool, progress: bool
) -> dict[tuple[int, int], str]:
    """Returns the listed shards with their SHA-256; with `verify` only those whose file matches."""
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
    """Yields augmentation and number of every shard."""
    for augmentation in range(header["augmentations"]):
        for number in range(-(-header["videos"] // header["shard_videos"])):
            yield augmentation, number


def _videos_in(header: dict[str, Any], number: int) -> int:
    return min(header["shard_videos"], header["videos"] - number * header["shard_videos"])


def _shard_name(augmentation: int, number: int) -> str:
    return f"a{augmentation:03d}-{number:06d}.npy"


def _firsts(shard: NDArray[Any]) -> NDArray[Any]:
    """Returns the first code of each video of a shard."""
    return shard.reshape(len(shard), -1)[:, 0]


def _dtype(codebook_size: int) -> type[np.unsignedinteger[Any]]:
    return np.uint16 if codebook_size <= np.iinfo(np.uint16).max else np.uint32


def _absent(codebook_size: int) -> int:
    return int(np.iinfo(_dtype(codebook_size)).max)
