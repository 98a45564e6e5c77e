"""The files of a cache of codes: its header, its shards, and the list of the finished ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mam2.engine.errors import UserError
from mam2.engine.runtime.progress import Progress
from mam2.engine.tokenizer.clip_files import CLIPS, ClipFormat, ClipShard, is_listed

HEADER, SHARDS = "cache.json", "shards.json"


def read_header(folder: Path) -> dict[str, Any] | None:
    """Returns the header of a cache; None if there is none. Raises UserError for another file."""
    try:
        return json.loads((folder / HEADER).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / HEADER}: not the header of a cache of codes ({error})") from None


def read_digests(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of each listed file."""
    try:
        return dict(json.loads((folder / SHARDS).read_text(encoding="ascii")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / SHARDS}: not a list of shards ({error})") from None


def finished_shards(
    folder: Path, header: dict[str, Any], *, verify: bool, every_clip: bool = False, progress: bool
) -> set[tuple[int, int]]:
    """Returns the listed shards; with `verify` only those whose files match, with `every_clip` down to each clip."""
    listed = read_digests(folder)
    form = clip_format(header)
    finished = {place for place in shard_places(header) if shard_name(*place) in listed}
    if form:
        finished &= {place for place in finished if clip_index_name(*place) in listed}
    if not verify:
        return finished
    sound = set()
    for place in Progress(sorted(finished), "checking codes", len(finished), unit="shard", shown=progress):
        name = shard_name(*place)
        try:
            content = (folder / "shards" / name).read_bytes()
        except FileNotFoundError:
            continue
        if hashlib.sha256(content).hexdigest() != listed[name]:
            continue
        if form and not is_listed(folder, shard_stem(*place), listed[clip_index_name(*place)]):
            continue
        if form and every_clip and not ClipShard(folder, shard_stem(*place), form).is_sound():
            continue
        sound.add(place)
    return sound


def clip_format(header: dict[str, Any]) -> ClipFormat | None:
    """Returns how the clips of a cache are stored; None for a cache of codes alone."""
    if CLIPS not in header:
        return None
    found = header[CLIPS]
    return ClipFormat(found["coding"], tuple(found["shape"]), found["dtype"])


def shard_places(header: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """Yields augmentation and number of every shard."""
    for augmentation in range(header["augmentations"]):
        for number in range(-(-header["videos"] // header["shard_videos"])):
            yield augmentation, number


def videos_in(header: dict[str, Any], number: int) -> int:
    """Returns the number of videos of a shard."""
    return min(header["shard_videos"], header["videos"] - number * header["shard_videos"])


def shard_stem(augmentation: int, number: int) -> str:
    """Returns the name of a shard without a suffix."""
    return f"a{augmentation:03d}-{number:06d}"


def shard_name(augmentation: int, number: int) -> str:
    """Returns the file name of a shard's codes."""
    return f"{shard_stem(augmentation, number)}.npy"


def clip_index_name(augmentation: int, number: int) -> str:
    """Returns the name of the index of a shard's clips in the list of files."""
    return f"{CLIPS}/{shard_name(augmentation, number)}"
