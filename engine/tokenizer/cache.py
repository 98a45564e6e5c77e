"""Cached codes on disk, which replace a tokenizer: those of every recorded augmentation of every video.

    CODES/cache.json              what the codes depend on, codebook size, precision
          manifest.jsonl          the videos, in the order of the codes
          tokenizer.safetensors   the tokenizer that computed them
          shards/a000-000000.npy  codes [videos of the shard, views, N] of one augmentation, read by memory map;
                                  [videos of the shard, views, N, tubelet] where all frames have codes
          clips/                  the clips themselves, if asked for: see `mam2.engine.tokenizer.clip_files`
          shards.json             the finished shards and indices of clips, each with its SHA-256

A clip is (index in manifest.videos, augmentation, view); `draw_clip` returns the same frames, crop and mirroring for it
in every run with the same key. A clip that could not be decoded is absent: its codes are the largest number of their
type.

A shard is written to a temporary file, synced, renamed and then listed; an interrupted call continues there. Opening a
cache reads all codes once for the checksums, so that damage is reported at startup and not days into a run. Of the
clips, which may be terabytes, it compares the sizes; each has its own checksum, which is compared when it is read.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.data.manifest import Manifest
from mam2.engine.errors import UserError
from mam2.engine.files import write_whole
from mam2.engine.tokenizer.cache_files import (
    HEADER,
    SHARDS,
    clip_format,
    clip_index_name,
    finished_shards,
    read_digests,
    read_header,
    shard_name,
    shard_places,
    shard_stem,
    videos_in,
)
from mam2.engine.tokenizer.cache_key import cache_key, check_key
from mam2.engine.tokenizer.clip_files import CLIPS, ClipFormat, ClipShard, ClipShardWriter
from mam2.engine.tokenizer.tokenizer import numbered

SHARD_VIDEOS = 1024
"""Videos per shard: the most that a killed `mam2 tokenize` loses."""


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
        header = read_header(self.folder)
        if header is None:
            raise UserError(f"{self.folder}: not a cache of codes; write one with mam2 tokenize")
        self.header = header
        finished = finished_shards(self.folder, header, verify=verify, progress=progress)
        self._shards = {}
        for place in shard_places(header):
            if place not in finished:
                raise UserError(
                    f"{self.folder}: {shard_name(*place)} is missing or damaged; run mam2 tokenize with the same "
                    "values to write it"
                )
            try:
                self._shards[place] = _mapped(self.folder / "shards" / shard_name(*place))
            except (OSError, ValueError, RuntimeError) as error:
                raise UserError(
                    f"{self.folder}: {shard_name(*place)} cannot be read ({error}); run mam2 tokenize again"
                ) from None
        form = clip_format(header)
        self.clips = RecordedClips(self.folder, header, form) if form else None
        """The clips of the codes; None for a cache of codes alone."""

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
        check_key(self.folder, self.header["key"], cache_key(manifest, config, tokenizer), manifest)

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
        """Returns how often each code of each of the D codebooks occurs, int64 [D·V]."""
        size, codebooks = self.codebook_size, self.codes_per_patch
        counts = torch.zeros(codebooks * size, dtype=torch.int64)
        for shard in self._shards.values():
            present = torch.from_numpy(shard[_firsts(shard) != _absent(size)].astype(np.int64))
            counts += numbered(present, size, codebooks).bincount(minlength=codebooks * size)
        return counts

    @property
    def codes_per_patch(self) -> int:
        """D, the number of codebooks; 1 in caches of earlier versions, which do not name it."""
        found: int = self.header["key"].get("tokenizer.codes_per_patch", 1)
        return found

    def _row(self, video: int, augmentation: int) -> NDArray[Any]:
        number, row = divmod(video, self.header["shard_videos"])
        return self._shards[augmentation, number][row]


class RecordedClips:
    """The clips of a complete cache, open for reading; implements `mam2.engine.data.renderer.ClipSource`."""

    def __init__(self, folder: Path, header: dict[str, Any], form: ClipFormat) -> None:
        self.form, self._videos = form, header["shard_videos"]
        self._shards = {place: ClipShard(folder, shard_stem(*place), form) for place in shard_places(header)}

    @property
    def paths(self) -> list[str]:
        """Paths of all files with frames."""
        return [str(shard.path) for shard in self._shards.values()]

    @property
    def bytes(self) -> int:
        """Bytes of all frames."""
        return sum(shard.bytes for shard in self._shards.values())

    def path_of(self, video: int, augmentation: int) -> str:
        """Returns the path of the file with the frames of a clip. video: its index in manifest.videos."""
        return str(self._shards[augmentation, video // self._videos].path)

    def read(self, video: int, augmentation: int, out: NDArray[Any]) -> None:
        """Writes all views of a clip to `out` [R, T, H, W, C]. Raises UserError if it is damaged; OSError."""
        number, row = divmod(video, self._videos)
        self._shards[augmentation, number].read(row, out)


class CodeCacheWriter:
    """Writes a cache, or its missing part. Add clips in the order of `missing`; skipped clips are absent.

    Use it in a `with` block, which removes the unfinished file of an error.
    """

    def __init__(
        self,
        folder: str | Path,
        manifest: Manifest,
        config: PretrainConfig,
        *,
        tokenizer: str,
        codebook_size: int,
        precision: str,
        clips: ClipFormat | None = None,
        progress: bool = True,
    ) -> None:
        """Raises UserError if the folder contains a cache with other settings; the error names the difference.

        clips: how the clips are stored with the codes; None: codes alone.
        """
        self.folder = Path(folder)
        if clips:
            clips.check()
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
            **({CLIPS: clips._asdict()} if clips else {}),
        }
        before = read_header(self.folder)
        if before is None:
            (self.folder / "shards").mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / HEADER, (json.dumps(header, indent=1) + "\n").encode())
        else:
            check_key(self.folder, before["key"], header["key"], manifest)
            if before["precision"] != precision:
                raise UserError(
                    f"{self.folder}: contains codes in {before['precision']}, this run computes in {precision}"
                )
            there = clip_format(before)
            if there != clips:
                raise UserError(
                    f"{self.folder}: contains codes {_with(there)}, this call writes them {_with(clips)}; "
                    "use the same value of --clips, or another folder"
                )
            header = before
        self._header = header
        self._form = clips
        self._code_shape = config.code_shape
        self._finished = finished_shards(self.folder, header, verify=True, every_clip=True, progress=progress)
        self._digests = read_digests(self.folder)
        self._place: tuple[int, int] | None = None
        self._shard: NDArray[Any] = np.empty(0)
        self._clips: ClipShardWriter | None = None

    def __enter__(self) -> CodeCacheWriter:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error and self._clips:
            self._clips.discard(error)

    def missing(self) -> Iterator[tuple[int, int]]:
        """Yields augmentation and index in manifest.videos of the clips that are not in a finished shard."""
        for augmentation, number in shard_places(self._header):
            if (augmentation, number) not in self._finished:
                first = number * self._header["shard_videos"]
                for video in range(first, first + videos_in(self._header, number)):
                    yield augmentation, video

    @property
    def total(self) -> int:
        """Returns the number of clips of the finished cache, not counting views."""
        return self._header["videos"] * self._header["augmentations"]

    def add(
        self,
        video: Tensor,
        augmentation: Tensor,
        view: Tensor,
        codes: Tensor,
        images: Sequence[list[bytes]] | None = None,
    ) -> None:
        """Adds codes int64 [B, N] or [B, N, tubelet] of clips given by int64 [B], all on the CPU.

        images: frames of each clip from `ClipFormat.encode`, if the cache has clips.

        Raises:
            ValueError: a clip belongs to a finished shard.
        """
        stored = images if self._form and images is not None else [[]] * len(codes)
        clips = zip(video.tolist(), augmentation.tolist(), view.tolist(), codes.numpy(), stored, strict=True)
        for place, number, shown, row, frames in clips:
            shard, line = divmod(place, self._header["shard_videos"])
            self._open((number, shard))
            self._shard[line, shown] = row
            if self._clips:
                self._clips.add(line, shown, frames)

    def finish(self) -> None:
        """Finishes the cache; call it only after the last clip of `missing`. Clips that were not added are absent."""
        for place in shard_places(self._header):
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
        shape = videos_in(header, place[1]), header["views"], header["tokens"], *self._code_shape
        self._place = place
        self._shard = np.full(shape, _absent(header["codebook_size"]), _dtype(header["codebook_size"]))
        if self._form:
            videos, views = shape[:2]
            self._clips = ClipShardWriter(self.folder, shard_stem(*place), videos=videos, views=views, form=self._form)

    def _close(self) -> None:
        if self._place is None:
            return
        if self._clips:
            self._digests[clip_index_name(*self._place)] = self._clips.finish()
            self._clips = None
        buffer = io.BytesIO()
        np.save(buffer, self._shard)
        name = shard_name(*self._place)
        write_whole(self.folder / "shards" / name, buffer.getvalue())
        self._digests[name] = hashlib.sha256(buffer.getvalue()).hexdigest()
        self._finished.add(self._place)
        write_whole(self.folder / SHARDS, (json.dumps(self._digests, indent=1, sort_keys=True) + "\n").encode())
        self._place = None


def _with(form: ClipFormat | None) -> str:
    return f"with clips ({form.coding}, {form.dtype})" if form else "without clips"


def _mapped(path: Path) -> NDArray[Any]:
    """Maps the array of a .npy file. NumPy's own map would hold the file open, and there may be thousands of shards."""
    with path.open("rb") as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("not an array of this cache")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        start, size = file.tell(), path.stat().st_size
    values = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
    return values[start:].view(dtype).reshape(shape)


def _firsts(shard: NDArray[Any]) -> NDArray[Any]:
    """Returns the first code of each video of a shard."""
    return shard.reshape(len(shard), -1)[:, 0]


def _dtype(codebook_size: int) -> type[np.unsignedinteger[Any]]:
    return np.uint16 if codebook_size <= np.iinfo(np.uint16).max else np.uint32


def _absent(codebook_size: int) -> int:
    return int(np.iinfo(_dtype(codebook_size)).max)
