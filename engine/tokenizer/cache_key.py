"""What the codes of a cache depend on; stored with them, so that a run with other clips or codes is refused."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

from mam2.engine.config.limits import resumable_fields
from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.config.recipe import to_dict
from mam2.engine.config.training import DataConfig
from mam2.engine.data.manifest import MANIFEST, Manifest, Video, read_saved_manifest
from mam2.engine.data.sampling import draw_clip
from mam2.engine.errors import UserError

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
        "tokenizer.codes_per_patch": config.tokenizer.codes_per_patch,
        "tokenizer": tokenizer,
        "videos": videos.hexdigest(),
        "draws": draws.hexdigest(),
    }


def _identity(video: Video) -> tuple[Any, ...]:
    """Returns the properties of a video that determine its clips; not its folder or its label."""
    size = video.frames, video.width, video.height, video.rotation, video.fps
    return os.path.basename(video.path), *size, video.codec, video.pixel_format, video.content


def check_key(folder: Path, there: dict[str, Any], here: dict[str, Any], manifest: Manifest) -> None:
    defaults = {f"data.{name}": value for name, value in to_dict(DataConfig()).items() if name not in IGNORED_IN_KEY}
    missing: dict[str, Any] = {"tokenizer.frames": "first", "tokenizer.codes_per_patch": 1}  # in earlier versions
    there = missing | defaults | there
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
