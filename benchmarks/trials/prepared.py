"""A data set as arrays: clips decoded, cropped and tokenized once by the engine, so that many trainings can share them.

FOLDER/videos/<split>/<class>/*       files; FOLDER/tokenizer.safetensors   trained on the training clips
FOLDER/<split>.npy                    uint8 [videos, augmentations, views, T, H, W, C]; one of each but for training
FOLDER/<split>-labels.npy             int64 [videos]; -1 where the videos have none
FOLDER/<split>-questions.npz          int64 [videos] by name: what else is known of each
FOLDER/codes.npy                      int16 [videos, augmentations, views, N, K]: K codes per token, for each frame of a
                                      tubelet D codes per patch
FOLDER/prepared.json                  what the tokenizer and its codes cost

These are of D = 1. Another D has a tokenizer of its own: tokenizer-D.safetensors, codes-D.npy and codes-D.json.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mam2.engine.checkpoints.classifiers import relabeled
from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.data.loader import ClipLoader
from mam2.engine.data.manifest import Manifest, read_manifest
from mam2.engine.errors import UserError
from mam2.engine.files import whole_file, write_whole
from mam2.engine.layer_costs import SINGLE, tokenizer_image
from mam2.engine.runtime.device import pick_device
from mam2.engine.tokenizer.files import save_vqgan
from mam2.engine.tokenizer.prepare import FILE, build_tokenizer, clip_frames, own_architecture, train_with_progress
from mam2.engine.tokenizer.training import CROP_CODES

PREPARED = "prepared.json"
BATCH = 64


@dataclass(frozen=True)
class Split:
    """Clips that are held as arrays."""

    clips: np.ndarray
    """uint8 [videos, augmentations, views, T, H, W, C]"""
    labels: Tensor
    """int64 [videos]"""
    questions: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    """int64 [videos] by name: what else is known of each video."""

    def videos(self, count: int) -> Iterator[Tensor]:
        """The first clip of each, `count` at a time: uint8 [count or fewer, 3, T, H, W]."""
        for first in range(0, len(self.clips), count):
            yield as_video(self.clips[first : first + count, 0, 0])


@dataclass(frozen=True)
class Prepared:
    splits: dict[str, Split]
    codes: np.ndarray
    """int16 [videos, augmentations, views, N, K], of the training clips"""
    codebook_size: int
    classes: int
    facts: dict[str, Any]
    """See `read_facts`."""


def as_video(clips: np.ndarray) -> Tensor:
    """uint8 [B, T, H, W, C] -> [B, C, T, H, W], which lies in memory as the loader's clips do."""
    return torch.from_numpy(np.array(clips)).permute(0, 4, 1, 2, 3)


def read_facts(folder: Path, codes_per_patch: int = 1) -> dict[str, Any]:
    """Returns the numbers of videos, classes and codes, and what the tokenizer and its codes cost."""
    facts: dict[str, Any] = json.loads((folder / PREPARED).read_text(encoding="utf-8"))
    if codes_per_patch > 1:
        facts |= json.loads((folder / _named("codes.json", codes_per_patch)).read_text(encoding="utf-8"))
    return facts


def _named(file: str, codes_per_patch: int) -> str:
    """Returns the file's name for a tokenizer with this number of codes per patch."""
    stem, dot, ending = file.partition(".")
    return file if codes_per_patch == 1 else f"{stem}-{codes_per_patch}{dot}{ending}"


def load(folder: Path, codes_per_patch: int = 1) -> Prepared:
    facts = read_facts(folder, codes_per_patch)
    splits = {}
    for name in facts["videos"]:
        table = folder / f"{name}-questions.npz"
        splits[name] = Split(
            np.load(folder / f"{name}.npy", mmap_mode="r"),
            torch.from_numpy(np.load(folder / f"{name}-labels.npy")),
            {key: torch.from_numpy(found) for key, found in np.load(table).items()} if table.is_file() else {},
        )
    codes = np.load(folder / _named("codes.npy", codes_per_patch), mmap_mode="r")
    return Prepared(splits, codes, facts["codebook_size"], facts["classes"], facts)


def prepare(
    data: Mapping[str, Path],
    folder: Path,
    config: PretrainConfig,
    *,
    recorded: int,
    views: int,
    questions: Path | None = None,
) -> Prepared:
    """Renders the videos of each split, trains a tokenizer on the training clips and computes their codes.

    Args:
        data: folders or lists of the splits, `train` among them. Where that has no labels, none are needed.
        folder: is made; what is there already is kept.
        recorded, views: clips of each training video, and crops of each clip.
        questions: table of what else is known of the videos: a column `path`, and one for each question.

    Raises:
        UserError: videos without a label, of a class that the training videos lack, or that cannot be decoded.
    """
    if (folder / PREPARED).is_file():
        return load(folder)
    folder.mkdir(parents=True, exist_ok=True)
    manifests = {name: read_manifest(path) for name, path in data.items()}
    classes = manifests["train"].classes
    if classes:
        manifests = {name: relabeled(manifest, data[name], classes) for name, manifest in manifests.items()}
    for name, manifest in manifests.items():
        train = name == "train"
        data_config = dataclasses.replace(config.data, recorded=recorded if train else 1, views=views if train else 1)
        if not (folder / f"{name}-labels.npy").is_file():
            render(name, manifest, folder, dataclasses.replace(config, data=data_config), train=train)
        if questions:
            with whole_file(folder / f"{name}-questions.npz") as file:
                np.savez(file, **answers(questions, [video.path for video in manifest.videos]))
    facts = {
        "videos": {name: len(manifest.videos) for name, manifest in manifests.items()},
        "classes": len(classes),
        "codebook_size": config.tokenizer.codes,
    }
    facts |= _tokenize(manifests["train"], folder, config)
    write_whole(folder / PREPARED, json.dumps(facts, indent=1))
    return load(folder)


def add_codes(train: Path, folder: Path, config: PretrainConfig) -> None:
    """Trains a tokenizer with `config.tokenizer.codes_per_patch` above 1 and computes its codes of the training clips.

    train, config: those of `prepare`, which made the folder; what is there already is kept.
    """
    costs = folder / _named("codes.json", config.tokenizer.codes_per_patch)
    if not costs.is_file():
        write_whole(costs, json.dumps(_tokenize(read_manifest(train), folder, config), indent=1))


def answers(table: Path, paths: Sequence[str]) -> dict[str, np.ndarray]:
    """The columns of a table with a column `path`, for each path: int64 [paths] by name, a column's values numbered in
    alphabetical order. Raises UserError for a path that the table lacks."""
    with table.open(encoding="utf-8", newline="") as file:
        rows = {os.path.abspath(table.parent / row.pop("path")): row for row in csv.DictReader(file)}
    if missing := next((path for path in paths if path not in rows), None):
        raise UserError(f"{table}: no line for {missing}; the table must name every video")
    found = {}
    for name in next(iter(rows.values())):
        numbers = {value: number for number, value in enumerate(sorted({row[name] for row in rows.values()}))}
        found[name] = np.array([numbers[rows[path][name]] for path in paths])
    return found


def render(name: str, manifest: Manifest, folder: Path, config: PretrainConfig, *, train: bool) -> None:
    """Writes FOLDER/NAME.npy and FOLDER/NAME-labels.npy. UserError for a video that cannot be decoded."""
    data, device = config.data, pick_device(config.run)
    shape = (len(manifest.videos), data.recorded, data.views, data.frames, data.size, data.size, 3)
    clips = np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=np.uint8, shape=shape)
    with ClipLoader(manifest, data, batch=BATCH, device=device, seed=config.run.seed, train=train) as loader:
        wanted = list(itertools.product(range(data.recorded), range(len(manifest.videos))))
        batches = loader.recorded(wanted) if train else loader.evaluate()
        for batch in tqdm(batches, desc=f"decoding {name}", total=-(-math.prod(shape[:3]) // BATCH), unit="batch"):
            clips[batch.index, batch.augmentation, batch.view] = batch.clip.cpu().numpy()
        if loader.skipped:
            path, reason = loader.skipped[0]
            raise UserError(f"{path}: cannot be decoded: {reason}; take it out of the data")
    clips.flush()
    with whole_file(folder / f"{name}-labels.npy") as file:
        np.save(file, np.array([video.label for video in manifest.videos]))


def _tokenize(manifest: Manifest, folder: Path, config: PretrainConfig) -> dict[str, float]:
    """Trains the tokenizer, writes its codes; returns seconds (on a CPU of the processor) and FLOPs of both."""
    options, device = config.tokenizer, pick_device(config.run)
    architecture, depth = own_architecture(config), options.codes_per_patch
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    start = clock()
    with ClipLoader(manifest, config.data, batch=BATCH, device=device, seed=config.run.seed) as loader:
        frames = clip_frames(loader, options.batch)
        trained, _ = train_with_progress(frames, architecture, options.steps, device, seed=config.run.seed)
    trained_s = clock() - start
    save_vqgan(trained.vqgan, folder / _named(FILE, depth))
    every_frame = dataclasses.replace(config, tokenizer=dataclasses.replace(options, frames="all"))
    tokenizer = build_tokenizer(trained.vqgan, every_frame, device)
    clips = np.load(folder / "train.npy", mmap_mode="r")
    tubelet, tokens = config.model.tubelet, math.prod(config.grid)
    shape = (*clips.shape[:3], tokens, tubelet * depth)
    file = folder / _named("codes.npy", depth)
    codes = np.lib.format.open_memmap(file, mode="w+", dtype=np.int16, shape=shape)
    share = max(BATCH // math.prod(clips.shape[1:3]), 1)
    start = clock()
    for first in tqdm(range(0, len(clips), share), desc="tokenizing", unit="batch"):
        part = clips[first : first + share]
        found = tokenizer.codes(as_video(part.reshape(-1, *part.shape[3:])).to(device))
        codes[first : first + share] = found.cpu().numpy().reshape(*part.shape[:3], *shape[3:])
    tokenized_s = (clock() - start) / tubelet  # MAM2's default needs one frame's
    codes.flush()
    image = tokenizer_image(architecture, config.grid[1:], SINGLE).forward_flops
    crop = tokenizer_image(architecture, tuple(min(side, CROP_CODES) for side in config.grid[1:]), SINGLE)
    return {
        "tokenizer_s": trained_s,
        "tokenize_s": tokenized_s,
        # its decoder costs about as much as its encoder, a backward pass twice a forward one
        "tokenizer_flops": float(6 * crop.forward_flops * options.steps * options.batch),
        "tokenize_flops": float(image * math.prod(clips.shape[:3]) * config.grid[0]),
    }
