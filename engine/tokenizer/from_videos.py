"""`train-tokenizer`: trains a VQ model on the user's videos and measures it on held-out videos."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from mam2.engine.config.limits import Limits, check_value, declared
from mam2.engine.config.training import DataConfig, RunConfig
from mam2.engine.data.loader import ClipLoader
from mam2.engine.data.manifest import Manifest, Skipped, read_manifest
from mam2.engine.data.sources import check_source
from mam2.engine.data.video import Video
from mam2.engine.errors import UserError
from mam2.engine.files import make_folder, one_line, unwritable, write_whole, written_aside
from mam2.engine.runtime.device import pick_device
from mam2.engine.tokenizer.files import save_vqgan
from mam2.engine.tokenizer.prepare import FILE, clip_frames, kept_state, train_with_progress
from mam2.engine.tokenizer.quality import Reconstruction, draw_reconstructions, draw_training, measure_reconstruction
from mam2.engine.tokenizer.vqgan import small

MOST_HELD_OUT = 64
FRAME_DISTANCE = 16
"""Distance of the two frames of a clip, in frames of the file."""


@dataclass(frozen=True, kw_only=True)
class TokenizerResult:
    path: Path
    """The tokenizer's file, for `tokenizer.path`."""
    quality: Reconstruction
    """Measured on the held-out videos."""
    held_out: int
    """Number of held-out videos."""
    kept: str
    """Which state of the training was the best on the held-out videos and is kept."""
    advice: str
    """Whether the tokenizer is fit for use, in a line."""


def train_tokenizer(
    data: str | Path,
    out: str | Path,
    *,
    codes: int = 1024,
    codes_per_patch: int = 1,
    channels: int = 32,
    factor: int = 16,
    size: int = 224,
    steps: int = 2000,
    batch: int = 16,
    gradient_weight: float = 0.0,
    flip: bool = True,
    image_channels: int = 3,
    value_range: tuple[float, float] | None = None,
    seed: int = 0,
    threads: int = 0,
    device: Literal["auto", "cuda", "cpu"] = "auto",
    progress: bool = True,
) -> TokenizerResult:
    """Trains a VQ model on frames of videos; one video in twenty, at most 64, is held out to measure it.

    Args:
        data: a folder of videos, or an annotation list.
        out: a new folder: tokenizer.safetensors, reconstructions.png, training.png, report.json and training.jsonl. It
            appears only when everything is complete.
        codes: codebook size.
        codes_per_patch: codes per patch; each further one names what those before it leave, from a codebook of its own.
        channels: base width of the network, a multiple of 8.
        factor: pixels per code along height and width, a power of two; use the patch size of pre-training.
        size: height and width of the training frames, a multiple of `factor`.
        steps: training steps.
        batch: frames per step.
        gradient_weight: weight of the error of differences between neighboring pixels, next to the squared error.
        flip: mirror half of the frames.
        image_channels: channels of the frames: 3, 1 for gray, or those of arrays.
        value_range: see `DataConfig`; None: by the type of the values.
        seed: seed of weights, frames and crops.
        threads: decoding threads; 0: one per core that this process may use.
        device: auto uses a GPU if there is one.
        progress: show a progress bar (only on a terminal).

    Raises:
        UserError: a value is invalid, the data has fewer than two usable videos, or a folder cannot be used.
    """
    out = Path(out)
    least = {"codes": 2, "channels": 8, "factor": 1, "size": 1, "steps": 2, "batch": 1, "seed": 0, "threads": 0}
    given = {"codes": codes, "codes-per-patch": codes_per_patch, "channels": channels, "factor": factor, "size": size}
    given |= {"steps": steps, "batch": batch, "seed": seed, "threads": threads}
    for flag, value in given.items():
        check_value(f"--{flag}", value, Limits(at_least=least.get(flag, 1)))
    check_value("--gradient-weight", gradient_weight, Limits(at_least=0))
    check_value("--image-channels", image_channels, declared(DataConfig, "channels"))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} already exists: choose another folder")
    check_source(data)
    make_folder(out.absolute().parent)
    try:
        architecture = small(channels, codes, factor, image_channels, codes_per_patch=codes_per_patch)
    except ValueError as error:
        raise UserError(f"--{error}") from None
    if size < factor or size % factor:
        raise UserError(f"--size {size} is not a multiple of --factor {factor}")
    sampled = DataConfig(
        frames=2,
        stride=FRAME_DISTANCE,
        size=size,
        channels=image_channels,
        value_range=value_range or (),
        flip=flip,
        threads=threads,
    )
    where = pick_device(RunConfig(device=device))
    manifest = read_manifest(data, threads=threads, progress=progress)
    if len(manifest.videos) < 2:
        raise UserError(
            f"{data}: only one usable video; expected at least two, because one is held out for the measurement"
        )
    kept, held_out = split_held_out(manifest)

    def skip(skipped: Skipped) -> None:
        tqdm.write(one_line(f"unusable: {skipped.path}: {skipped.reason}"))

    for skipped in manifest.skipped:
        skip(skipped)
    with ClipLoader(Manifest(held_out), sampled, batch=8, device=where, seed=seed, train=False, on_skip=skip) as loader:
        judged = [batch.clip for batch in loader.evaluate()]
    if not judged:
        raise UserError(f"none of the {len(held_out)} held-out videos can be decoded")
    clips = max(batch // 2, 1)
    with ClipLoader(Manifest(kept), sampled, batch=clips, device=where, seed=seed, on_skip=skip) as loader:
        trained, reports = train_with_progress(
            clip_frames(loader, batch),
            architecture,
            steps,
            where,
            seed=seed,
            gradient_weight=gradient_weight,
            held_out=[clip.flatten(0, 1) for clip in judged],
            progress=progress,
        )
    vqgan = trained.vqgan
    result = measure_reconstruction(vqgan.to(where), judged, trained.centers)

    try:
        with written_aside(out) as aside:
            aside.mkdir(parents=True)
            save_vqgan(vqgan, aside / FILE)
            draw_reconstructions(result, aside / "reconstructions.png")
            draw_training(reports, aside / "training.png")
            write_whole(aside / "training.jsonl", "".join(json.dumps(report) + "\n" for report in reports))
            numbers = {
                field.name: getattr(result, field.name)
                for field in dataclasses.fields(result)
                if not isinstance(getattr(result, field.name), torch.Tensor)
            }
            write_whole(aside / "report.json", json.dumps({**numbers, "kept_step": trained.kept}, indent=1) + "\n")
    except OSError as error:
        raise unwritable(out, error) from error
    return TokenizerResult(
        path=out / FILE,
        quality=result,
        held_out=len(held_out),
        kept=kept_state(trained, steps),
        advice=verdict(result, trained.kept, out / FILE, codes_per_patch),
    )


def split_held_out(manifest: Manifest) -> tuple[tuple[Video, ...], tuple[Video, ...]]:
    """Returns the videos to train on and the held-out ones: one in twenty, at most `MOST_HELD_OUT`."""
    step = max(20, -(-len(manifest.videos) // MOST_HELD_OUT))
    kept = tuple(video for number, video in enumerate(manifest.videos) if number % step)
    return kept, manifest.videos[::step]


def verdict(result: Reconstruction, kept: int, file: Path, codes_per_patch: int = 1) -> str:
    """Returns advice on a tokenizer with these results. kept: the step whose state it has; 0: the start."""
    flags = f"--tokenizer.path {file}"
    if codes_per_patch > 1:
        flags += f" --tokenizer.codes-per-patch {codes_per_patch}"
    if result.explained <= 0:
        return (
            "not fit for pre-training: its codes describe held-out frames worse than their mean color; use more "
            "videos, or more --steps"
        )
    if not kept:
        return (
            "weak: training found nothing better than its start, k-means of raw patches; use more --steps, more "
            f"--channels, or more videos. It can be used with {flags}"
        )
    return f"better than k-means of raw patches; use it with {flags}"
