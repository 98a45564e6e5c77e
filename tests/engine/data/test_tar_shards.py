"""Tar shards are read by offset: the same clips as from files, labels from their neighbors, damage named once."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mam2.engine.data import storage, tar_shards
from mam2.engine.data.arrays import read_frames
from mam2.engine.data.decoding import DecodeError, decode_frames
from mam2.engine.data.indexing import index
from mam2.engine.data.manifest import Manifest, read_manifest
from mam2.engine.data.outage import why_away
from mam2.engine.data.sources import Listing, read_source
from mam2.engine.data.storage import Member, absolute, as_member, open_file, status
from mam2.engine.data.tar_shards import list_members
from mam2.engine.data.transcode import transcode
from mam2.engine.data.vetting import read_vetted
from mam2.engine.data.windows import sliding_windows
from mam2.engine.errors import UserError
from tests.helpers.loaders import assert_same, take

CLASSES = ["run", "jump", "7th", "swim"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def sample(number: int, video: bytes, suffix: str = ".mp4") -> dict[str, bytes]:
    """The members of a sample as video2dataset writes them, and its label as a number and as a name."""
    key = f"{number // 5:05d}/{number:09d}"
    described = json.dumps({"label": CLASSES[number % 4], "fps": 25, "tags": ["b", "a"]}).encode()
    label = str(number % 4).encode()
    return {
        f"{key}{suffix}": video,
        f"{key}.json": described,
        f"{key}.txt": b"a caption, 3\n",
        f"{key}.cls": label if number else b"",
    }


@pytest.fixture(scope="module")
def shards(videos: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tars with the ten videos of `videos` in its order; the first has no label in its .cls."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(2):
        members: dict[str, bytes] = {}
        for number in range(5 * shard, 5 * shard + 5):
            file = Path(videos.videos[number].path)
            members |= sample(number, file.read_bytes(), file.suffix)
        write_tar(folder / f"{shard:05d}.tar", members)
    (folder / "00000_stats.json").write_text("{}")
    return folder


def names(listing: Listing) -> list[str]:
    return [os.path.basename(entry.path) for entry in listing.entries]


def test_a_pattern_a_folder_and_single_tars_are_the_same_videos(shards: Path, videos: Manifest) -> None:
    listing = read_source(shards / "{00000..00001}.tar")
    assert names(listing) == [f"{n:09d}{Path(video.path).suffix}" for n, video in enumerate(videos.videos)]
    assert listing == read_source(shards) == read_source(shards / "{00000,00001}.tar")
    one = [entry for shard in range(2) for entry in read_source(shards / f"{shard:05d}.tar").entries]
    assert one == listing.entries
    assert listing.classes == ()
    assert {entry.label for entry in listing.entries} == {-1}


def test_labels_are_read_where_they_are_asked_for(shards: Path) -> None:
    numbers = read_source(f"{shards}/{{00000..00001}}.tar:cls")
    assert [entry.label for entry in numbers.entries] == [-1, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert numbers.classes == ("0", "1", "2", "3")
    assert numbers.notes == (f"{shards}/{{00000..00001}}.tar:cls: 1 of 10 videos without a label",)
    named = read_source(f"{shards}:json.label")
    assert named.classes == tuple(sorted(CLASSES))
    assert [named.classes[entry.label] for entry in named.entries] == [CLASSES[n % 4] for n in range(10)]
    assert read_source(f"{shards}:txt").classes == ("a caption, 3",)
    assert read_source(f"{shards}:json.tags").classes == ("b;a",)
    with pytest.raises(UserError, match=r"json.genre: no video has a member .json with the text or number 'genre'"):
        read_source(f"{shards}:json.genre")


def test_clips_are_those_of_the_files(shards: Path, videos: Manifest) -> None:
    packed = read_manifest(shards / "{00000..00001}.tar", progress=False)
    for one, other in zip(packed.videos, videos.videos, strict=True):
        assert dataclasses.replace(one, path="", label=0, mtime_ns=0) == dataclasses.replace(
            other, path="", label=0, mtime_ns=0
        )
        assert np.array_equal(decode_frames(one.path, [1, 4]), decode_frames(other.path, [1, 4]))
        assert np.array_equal(read_vetted(one.path, set()), np.fromfile(other.path, np.uint8))
    unlabeled = dataclasses.replace(
        videos, videos=tuple(dataclasses.replace(video, label=-1) for video in videos.videos)
    )
    for one, other in zip(take(packed, 6), take(unlabeled, 6), strict=True):
        assert_same(one, other)
    for one, other in zip(take(packed, 6)[4:], take(packed, 2, first_step=4), strict=True):
        assert_same(one, other)
    windows = [
        list(sliding_windows(v, frames=2, size=16, window=4, hop=4)) for v in (packed.videos[9], videos.videos[9])
    ]
    assert all(torch.equal(one.clip, other.clip) for one, other in zip(*windows, strict=True))


def test_a_clip_reads_bytes_of_its_member_alone(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = read_source(shards / "00001.tar").entries[2].path
    member = as_member(path)
    assert member is not None
    ranges: list[tuple[int, int]] = []

    class Counted(io.FileIO):
        def read(self, size: int = -1) -> bytes:
            start = self.tell()
            content = super().read(size)
            ranges.append((start, start + len(content)))
            return content

    monkeypatch.setattr(storage, "_open_whole", lambda tar: Counted(tar))
    assert len(decode_frames(path, [1, 3])) == 2
    assert member.offset == min(start for start, _ in ranges)
    assert max(end for _, end in ranges) <= member.offset + member.size < os.stat(member.tar).st_size


def test_headers_are_read_once_per_tar(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar = tmp_path / "a.tar"
    tar.write_bytes((shards / "00000.tar").read_bytes())
    reads: list[str] = []
    read_headers = tar_shards._read_headers
    monkeypatch.setattr(tar_shards, "_read_headers", lambda path: reads.append(path) or read_headers(path))
    first = list_members(str(tar))
    assert list_members(str(tar)) == first
    assert reads == [str(tar)]
    os.utime(tar, ns=(1, 1))
    assert list_members(str(tar)) == first
    assert len(reads) == 2


def test_an_index_is_written_next_to_the_tars_and_used(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = shards / "{00000..00001}.tar"
    made = index(pattern, progress=False)
    assert made.path == Path(f"{pattern}.index.jsonl")
    assert (made.changes.new, made.changes.unchanged) == (10, 0)
    try:
        asked: list[str] = []
        monkeypatch.setattr("mam2.engine.data.manifest.status", lambda path: asked.append(path) or status(path))
        assert index(f"{pattern}:cls", progress=False).changes.unchanged == 10
        assert set(asked) == {f"{shards}/{shard:05d}.tar" for shard in range(2)}
        monkeypatch.setattr("mam2.engine.data.manifest.probe_file", None)  # no file may be opened
        labeled = read_manifest(f"{pattern}:cls", progress=False)
        assert [video.label for video in labeled.videos] == [-1, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    finally:
        made.path.unlink()


def test_a_damaged_member_is_named_once_and_replaced(tmp_path: Path, shards: Path) -> None:
    for shard in range(2):
        (tmp_path / f"{shard:05d}.tar").write_bytes((shards / f"{shard:05d}.tar").read_bytes())
    manifest = read_manifest(tmp_path, progress=False)
    bad = as_member(manifest.videos[3].path)
    assert bad is not None
    with open(bad.tar, "r+b") as file:
        file.seek(bad.offset)
        file.write(np.random.default_rng(0).bytes(bad.size))
    reported: list[str] = []
    whole = take(manifest, 8, on_skip=lambda skipped: reported.append(skipped.path))
    assert reported == [manifest.videos[3].path]
    assert "00000/000000003." in reported[0]
    assert not any(3 in batch.index.tolist() for batch in whole)
    for one, other in zip(whole[5:], take(manifest, 3, first_step=5), strict=True):
        assert_same(one, other)


def test_of_a_tar_cut_short_the_part_before_is_read(tmp_path: Path, shards: Path) -> None:
    content = (shards / "00000.tar").read_bytes()
    last = list_members(str(shards / "00000.tar"))[0][16]  # the fifth video
    (tmp_path / "cut.tar").write_bytes(content[: last.offset + last.size // 2])
    listing = read_source(tmp_path / "cut.tar")
    assert len(listing.entries) == 5
    assert "cut.tar: damaged, or not an uncompressed tar file (unexpected end of data); 17 members" in listing.notes[0]
    manifest = read_manifest(tmp_path / "cut.tar", progress=False)
    assert [video.path for video in manifest.videos] == [entry.path for entry in listing.entries[:4]]
    assert [skipped.path for skipped in manifest.skipped] == [listing.entries[4].path]


def test_a_drive_with_tars_that_is_gone_counts_as_unavailable(tmp_path: Path, shards: Path) -> None:
    folder = tmp_path / "drive"
    folder.mkdir()
    (folder / "a.tar").write_bytes((shards / "00000.tar").read_bytes())
    path = read_source(folder).entries[0].path
    for leave, reason in ((True, ""), (False, f"folder {folder} is missing or empty")):
        (folder / "a.tar").unlink(missing_ok=True)
        if leave:
            (folder / "b.tar").touch()
        else:
            (folder / "b.tar").unlink()
        with pytest.raises(DecodeError) as raised:
            decode_frames(path, [0])
        assert why_away(path, raised.value) == reason


def test_what_is_no_tar_or_does_not_exist_is_named(tmp_path: Path, shards: Path) -> None:
    with pytest.raises(
        UserError, match=r"1 of 3 tar files do not exist, the first is .*00002.tar; correct the pattern"
    ):
        read_source(shards / "{00000..00002}.tar")
    (tmp_path / "no.tar").write_bytes(b"not a tar" * 99)
    with pytest.raises(UserError, match=r"no.tar: no videos in 1 tar files"):
        read_source(tmp_path / "no.tar")
    write_tar(tmp_path / "json.tar", {"a.mp4": b"", "a.json": b"{"})
    with pytest.raises(UserError, match=r"json.tar/\d+\+1/a.json: expected a JSON object in UTF-8"):
        read_source(f"{tmp_path}/json.tar:json.label")
    with pytest.raises(UserError, match=r"expected video files on a local drive, found .*000000000"):
        transcode(shards, tmp_path / "out")


def test_tars_next_to_videos_are_no_shards(tmp_path: Path, shards: Path) -> None:
    (tmp_path / "all.tar").write_bytes((shards / "00000.tar").read_bytes())
    (tmp_path / "a.mp4").touch()
    assert names(read_source(tmp_path)) == ["a.mp4"]


def test_arrays_in_a_tar_are_clips(tmp_path: Path) -> None:
    array = np.arange(5 * 16 * 16 * 3, dtype=np.uint8).reshape(5, 16, 16, 3)
    buffer = io.BytesIO()
    np.save(buffer, array)
    packed = io.BytesIO()
    np.savez_compressed(packed, frames=array)
    write_tar(tmp_path / "a.tar", {"x.npy": buffer.getvalue(), "y.npz": packed.getvalue()})
    manifest = read_manifest(tmp_path, progress=False)
    for video in manifest.videos:
        assert (video.frames, video.channels) == (5, 3)
        assert np.array_equal(read_frames(video.path, [1, 4], channels=3), array[[1, 4]])


@pytest.fixture
def remote(shards: Path) -> Callable[[str, bytes], str]:
    """Stores a file in memory; returns its address."""
    system = fsspec.filesystem("memory")

    def store(name: str, content: bytes) -> str:
        system.pipe(f"/mam2/{name}", content)
        return f"memory://mam2/{name}"

    for shard in range(2):
        store(f"shards/{shard:05d}.tar", (shards / f"{shard:05d}.tar").read_bytes())
    return store


def test_addresses_are_read_like_files(
    remote: Callable[[str, bytes], str], shards: Path, videos: Manifest, tmp_path: Path
) -> None:
    address = "memory://mam2/shards/{00000..00001}.tar"
    there = read_manifest(Path(address), progress=False)  # a Path has one slash less
    assert there.videos[0].path.startswith("memory://mam2/shards/00000.tar/")
    here = read_manifest(shards, progress=False)
    for one, other in zip(take(there, 3), take(here, 3), strict=True):
        assert_same(one, other)
    assert names(read_source(Path("memory://mam2/shards:cls"))) == names(read_source(shards))
    assert read_manifest(f"file://{shards}/00000.tar", progress=False).videos[4].content == here.videos[4].content
    single = remote("one.mp4", Path(videos.videos[3].path).read_bytes())
    (tmp_path / "list.csv").write_text(f"{single} 2\n{videos.videos[0].path} 0\n")
    listed = read_manifest(tmp_path / "list.csv", progress=False)
    assert [(video.path, video.label) for video in listed.videos] == [(single, 2), (videos.videos[0].path, 0)]
    assert np.array_equal(decode_frames(single, [2]), decode_frames(videos.videos[3].path, [2]))
    with pytest.raises(UserError, match=r"an index cannot be written there; pass a file with --out"):
        index(address, progress=False)
    made = index(address, tmp_path / "there.jsonl", progress=False)
    assert read_manifest(made.path).videos == there.videos


def test_errors_of_addresses(remote: Callable[[str, bytes], str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"nowhere://a.tar: cannot be opened \(Protocol not known: nowhere"):
        read_source("nowhere://a.tar")
    with pytest.raises(UserError, match=r"1 of 1 tar files do not exist, the first is memory://mam2/none.tar"):
        read_source("memory://mam2/none.tar")
    address = remote("a.mp4", b"content")

    class ServiceError(Exception):
        pass

    def fail(*_: object, **__: object) -> None:
        raise ServiceError("slow down")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "_open", fail)
    with pytest.raises(OSError, match="ServiceError: slow down") as raised:
        open_file(address)
    assert raised.value.errno == errno.EIO
    assert why_away(address, raised.value) == os.strerror(errno.EIO)  # waits and tries again


def test_a_member_is_a_file(tmp_path: Path) -> None:
    content: NDArray[np.uint8] = np.arange(100, dtype=np.uint8)
    tar = write_tar(tmp_path / "a.tar", {"x": b"before", "sub/b.bin": content.tobytes(), "z": b"after"})
    member = list_members(str(tar))[0][1]
    assert as_member(str(member)) == member == Member(str(tar), member.offset, 100, "sub/b.bin")
    assert status(str(member)).size == 100
    assert absolute(str(member)) == str(member)
    with open_file(str(member)) as file:
        assert file.read(10) == bytes(range(10))
        assert file.seek(-5, os.SEEK_END) == 95
        assert file.read(99) == bytes(range(95, 100))
        assert file.read() == b""
        file.seek(3)
        assert file.seek(2, os.SEEK_CUR) == file.tell() == 5
        assert file.read() == bytes(range(5, 100))
        with pytest.raises(ValueError, match="negative"):
            file.seek(-1)
    (tmp_path / "a.tar").unlink()
    with pytest.raises(FileNotFoundError):
        status(str(member))
