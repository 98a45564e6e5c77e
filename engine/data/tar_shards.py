"""Tar shards in WebDataset's layout, as video2dataset writes them; read by offset, never unpacked.

A source is a tar file, a folder of them, or a pattern such as shards/{000000..000123}.tar; each may be an address
(s3://bucket/…). Members with the same name up to the first dot of their last component form a sample: a video
(key.mp4), and what describes it (key.cls, key.txt, key.json). SOURCE:cls, SOURCE:txt and SOURCE:json.NAME read labels
from these; without them the videos have no labels.

The offsets of the members of each tar are kept in a cache of the user, so that only the first call reads all headers.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

from mam2.engine.data.folders import CLIP_SUFFIXES
from mam2.engine.data.storage import Member, absolute, addresses_in, as_address, open_file, status
from mam2.engine.errors import UserError
from mam2.engine.files import write_whole
from mam2.engine.units import counted

TAR = ".tar"
CACHE_VERSION = 1
MOST_NAMED = 5
"""Members that an error lists."""
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_FIELD = re.compile(r"cls|txt|json\.[^:/]+")


class TarSource(NamedTuple):
    pattern: str
    """A tar file, or a pattern of several."""
    field: str
    """Where labels are: cls, txt, json.NAME; empty for none."""


class Sample(NamedTuple):
    path: str
    """Path of the video in its tar; see `mam2.engine.data.storage`."""
    label: str
    """Label as text; empty without one."""


def as_tar_source(source: str | Path) -> TarSource | None:
    """Returns a source of tar shards; None for any other source. Opens no tar."""
    text = as_address(source) or str(source)
    before, colon, field = text.rpartition(":")
    if colon and _FIELD.fullmatch(field) and not os.path.lexists(text):
        text = before
    else:
        field = ""
    if text.lower().endswith(TAR) and not os.path.isdir(text):
        return TarSource(text, field)
    if as_address(text):
        return TarSource(text, field)
    return TarSource(text, field) if os.path.isdir(text) and _holds_only_tars(text) else None


def tar_files(source: TarSource) -> list[str]:
    """Returns the paths of the tar files of a source, in order. Raises UserError for one that does not exist."""
    text = source.pattern
    if not text.lower().endswith(TAR):
        found = addresses_in(text, TAR) if as_address(text) else _tars_in(text)
        if not found:
            raise UserError(f"{text}: expected tar files (…{TAR}) in this folder, found none")
        return found
    paths = [absolute(path) for path in _expanded(text)]
    missing = [path for path in paths if not _exists(path)]
    if missing:
        raise UserError(
            f"{text}: {len(missing)} of {len(paths)} tar files do not exist, the first is {missing[0]}; correct the "
            "pattern, or pass their folder"
        )
    return paths


def read_samples(source: TarSource, notes: list[str]) -> list[Sample]:
    """Returns the videos of all tar files in order. notes: receives remarks for the user.

    Raises UserError if there is no video, or labels are asked for and none is found.
    """
    samples: list[Sample] = []
    tars = tar_files(source)
    for tar in tars:
        samples += _samples_of(tar, source.field, notes)
    if not samples:
        raise UserError(f"{source.pattern}: no videos in {len(tars)} tar files (expected members such as 0001.mp4)")
    if source.field and not any(sample.label for sample in samples):
        suffix, _, key = source.field.partition(".")
        what = f"with the text or number {key!r}" if key else ""
        raise UserError(
            f"{source.pattern}:{source.field}: no video has a member .{suffix} {what}".rstrip()
            + f" with the name of {samples[0].path}"
        )
    return samples


def _samples_of(tar: str, field: str, notes: list[str]) -> Iterator[Sample]:
    members, problem = list_members(tar)
    if problem:
        notes.append(f"{tar}: {problem}; {counted(len(members), 'member')} before it can be read")
    suffix, _, key = field.partition(".")
    labels = {_key(member.name): member for member in members if suffix and member.name.endswith(f".{suffix}")}
    with open_file(tar) if labels else nullcontext() as file:
        for member in members:
            if member.name.lower().endswith(CLIP_SUFFIXES):
                described = labels.get(_key(member.name))
                yield Sample(str(member), _label(file, described, key) if described else "")


def _key(name: str) -> str:
    """Returns the name that the members of a sample share: up to the first dot of its last component."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


def _label(file: Any, member: Member, key: str) -> str:
    """Returns the text of a member, or of one key of a JSON member. Raises UserError if it is not readable."""
    file.seek(member.offset)
    content = file.read(member.size)
    try:
        text = content.decode("utf-8").strip()
        value = json.loads(text).get(key) if key else text
    except (ValueError, AttributeError) as error:
        raise UserError(f"{member}: expected {'a JSON object' if key else 'text'} in UTF-8 ({error})") from None
    if isinstance(value, list):
        return ";".join(map(str, value))
    return "" if value is None else str(value)


def list_members(tar: str) -> tuple[list[Member], str]:
    """Returns the files in a tar with their offsets, and why the rest cannot be read, or "".

    Reads the headers only at the first call for this file, size and time. Raises UserError if it cannot be opened.
    """
    try:
        size, mtime_ns = status(tar)
        place = _cache_file(tar, size, mtime_ns)
        with suppress(OSError, ValueError):
            known = json.loads(place.read_text(encoding="ascii"))
            return [Member(tar, *member) for member in known["members"]], known["problem"]
        members, problem = _read_headers(tar)
    except OSError as error:
        raise UserError(f"{tar}: cannot be read ({error.strerror or error})") from error
    content = {"tar": tar, "problem": problem, "members": [member[1:] for member in members]}
    with suppress(OSError):  # a full or read-only home folder makes the next start slower, nothing else
        place.parent.mkdir(parents=True, exist_ok=True)
        write_whole(place, json.dumps(content).encode("ascii"))
    return members, problem


def _cache_file(tar: str, size: int, mtime_ns: int) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mam2" / "tar"
    name = hashlib.sha256(repr((CACHE_VERSION, tar, size, mtime_ns)).encode("utf-8", "surrogateescape")).hexdigest()
    return folder / f"{name[:32]}.json"


def _read_headers(tar: str) -> tuple[list[Member], str]:
    members: list[Member] = []
    with open_file(tar) as file:
        length = file.seek(0, io.SEEK_END)
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for info in archive:
                    if info.isreg():
                        members.append(Member(tar, info.offset_data, info.size, info.name))
        except tarfile.TarError as error:
            if length == 0:
                return members, "damaged: an empty file"
            return members, f"damaged, or not an uncompressed tar file ({error})"
    return members, ""


def _tars_in(folder: str) -> list[str]:
    """Returns the tar files directly in a local folder, sorted, absolute."""
    names = [name for name in os.listdir(folder) if name.lower().endswith(TAR) and not name.startswith(".")]
    return [os.path.join(os.path.abspath(folder), name) for name in sorted(names)]


def _holds_only_tars(folder: str) -> bool:
    """Returns whether a folder has tars but no videos and no folders: next to videos, tars may be their archives."""
    with os.scandir(folder) as entries:
        shown = [entry for entry in entries if not entry.name.startswith(".")]
    names = [entry.name.lower() for entry in shown]
    others = any(entry.is_dir() for entry in shown) or any(name.endswith(CLIP_SUFFIXES) for name in names)
    return not others and any(name.endswith(TAR) for name in names)


def _exists(path: str) -> bool:
    if as_address(path):
        try:
            status(path)
        except FileNotFoundError:
            return False
        return True
    return os.path.isfile(path)


def _expanded(pattern: str) -> list[str]:
    """Returns the paths of a pattern: {000000..000123} counts, {a,b} lists."""
    parts = _BRACES.split(pattern)  # text and insides of braces in turns
    choices = [[part] if place % 2 == 0 else _choices(part) for place, part in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _choices(inside: str) -> Sequence[str]:
    counted = _RANGE.fullmatch(inside)
    if not counted:
        return inside.split(",")
    first, last = counted[1], counted[2]
    width = len(first) if first.startswith("0") and len(first) > 1 else 0
    return [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
