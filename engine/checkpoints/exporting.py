"""`export`: writes a checkpoint as a Hugging Face folder, a file for VideoMAE's code, or a graph for any program."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError

from mam2.engine.checkpoints import hub
from mam2.engine.checkpoints.export import decoder_is_videomaes, write_hugging_face, write_mam2, write_videomae
from mam2.engine.checkpoints.load import class_names, encoder_of, load_model
from mam2.engine.checkpoints.model_card import check_license, model_card
from mam2.engine.checkpoints.traced import write_onnx, write_torch
from mam2.engine.config.limits import COUNT, check_flags
from mam2.engine.errors import UserError
from mam2.engine.files import files_written_aside, make_folder, write_whole, written_aside
from mam2.engine.model.classifier import Classifier
from mam2.engine.model.videomae import VideoMAE

Format = Literal["huggingface", "mam2", "videomae", "torch", "onnx"]
FOLDERS = ("huggingface", "mam2")
"""Formats that are a folder; these can have a model card and be pushed."""


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    path: Path | None
    """The written folder or file; None if it was only pushed."""
    model: str
    """Name of the class in the other project, or in MAM2."""
    clip: tuple[int, int, int]
    """Frames, height and width of the model's clips."""
    channels: int
    """Channels of these clips."""
    classes: tuple[str, ...]
    """Names of a classifier's classes in the order of its logits; empty for other models."""
    decoder_left_out: str
    """Why a decoder was not exported; empty if it was, or if there is none."""
    address: str
    """Address of the repository if it was pushed, else empty."""


def export(
    checkpoint: str | Path,
    to: Format,
    out: str | Path | None = None,
    *,
    push: str = "",
    private: bool = False,
    license: str = "",
    scores: Sequence[str | Path] = (),
    frames: int | None = None,
    size: int | None = None,
    heads: int | None = None,
    decoder_heads: int | None = None,
) -> ExportResult:
    """Exports a model: a classifier, VideoMAE with its decoder if the format supports it, or an encoder.

    Args:
        checkpoint: a run or checkpoint of MAM2, a checkpoint of VideoMAE's code, or a Hugging Face folder.
        to: `huggingface` writes a folder for from_pretrained of transformers' VideoMAE classes and its image processor;
            `mam2` a folder with all contents of a MAM2 checkpoint, including the tokenizer; `videomae` a .pth for the
            --finetune option of VideoMAE's code; `torch` (.pt2, of torch.export) and `onnx` a graph that maps uint8
            clips [B, C, T, H, W] to tokens [B, N, D], or to a classifier's logits.
        out: output folder or file; must not exist. None only with `push`.
        push: OWNER/NAME of a repository on the hub, to which the folder is uploaded with a model card (`huggingface`
            and `mam2`). `load_encoder("hub:OWNER/NAME")` reads it. The user must be logged in to the hub as its owner.
        private: make a new repository visible only to its owner.
        license: identifier of the license, such as apache-2.0; with it the folder gets a model card, README.md, written
            from the files of the run. `push` needs it.
        scores: result files of `mam2 probe` and `mam2 evaluate` for the card; those in the run folder are found.
        frames, size: clip size, if the checkpoint does not state it; height and width in pixels.
        heads, decoder_heads: attention heads, for a checkpoint of VideoMAE's code whose width was never published.

    Raises:
        UserError: the checkpoint cannot be read or does not fit the format, the output cannot be written, or the hub
            refuses the upload.
    """
    check_flags(frames=(frames, COUNT), size=(size, COUNT), heads=(heads, COUNT), decoder_heads=(decoder_heads, COUNT))
    _check_sharing(to, out, push, license)
    if out is None:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "model"
            result = _export(checkpoint, to, place, push, license, scores, frames, size, heads, decoder_heads)
            address = hub.push(place, push, private=private, message=f"mam2 export --to {to}")
        return dataclasses.replace(result, path=None, address=address)
    out = Path(out)
    if out.exists():
        raise UserError(f"--out {out} already exists: choose another path")
    # Checked before the model is read and traced, which takes minutes.
    make_folder(out.absolute().parent)
    result = _export(checkpoint, to, out, push, license, scores, frames, size, heads, decoder_heads)
    if push:
        address = hub.push(out, push, private=private, message=f"mam2 export --to {to}")
        result = dataclasses.replace(result, address=address)
    return result


def _check_sharing(to: Format, out: str | Path | None, push: str, license: str) -> None:
    if (push or license) and to not in FOLDERS:
        raise UserError(f"--to {to}: a model card and --push are for the folders of {' and '.join(FOLDERS)}")
    if push and not license:
        raise UserError(f"--push {push}: expected the license of the weights, such as --license apache-2.0 (or other)")
    if license:
        check_license(license)
    if push:
        hub.check_push(push)
    if out is None and not push:
        raise UserError("export: expected --out with a folder or file, or --push with a repository")


def _export(
    checkpoint: str | Path,
    to: Format,
    out: Path,
    push: str,
    license: str,
    scores: Sequence[str | Path],
    frames: int | None,
    size: int | None,
    heads: int | None,
    decoder_heads: int | None,
) -> ExportResult:
    model = load_model(checkpoint, frames=frames, size=size, heads=heads, decoder_heads=decoder_heads)
    classes = class_names(checkpoint) if isinstance(model, Classifier) else ()
    if isinstance(model, Classifier) and model.task != "classes" and to == "videomae":
        raise UserError(
            f"--to videomae: its code has one class per video, {checkpoint} has {model.task}; use --to huggingface"
        )
    encoder = encoder_of(model)
    graph = model if isinstance(model, Classifier) else encoder
    weights = model if isinstance(model, VideoMAE) else graph
    try:
        if to in FOLDERS:
            with written_aside(out) as aside:
                aside.mkdir(parents=True)
                if to == "huggingface":
                    written = write_hugging_face(weights, aside, classes)
                else:
                    write_mam2(checkpoint, aside)
                    written = type(model).__name__
                if license:
                    name, files = push or out.name, [Path(file) for file in scores]
                    card = model_card(
                        checkpoint, model, name=name, license=license, to=to, classes=classes, scores=files
                    )
                    write_whole(aside / "README.md", card)
        else:
            with files_written_aside(out) as aside:  # ONNX's weights may be a separate file
                if to == "videomae":
                    written = write_videomae(weights, aside / out.name, classes)
                else:
                    {"torch": write_torch, "onnx": write_onnx}[to](graph, aside / out.name, classes)
                    written = type(graph).__name__
    except (OSError, SafetensorError) as error:  # the library converts an OSError to the latter
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"--out {out}: cannot be written: {reason}") from None
    left_out = ""
    if isinstance(model, VideoMAE) and to in ("huggingface", "videomae") and not decoder_is_videomaes(model):
        left_out = (
            f"it does not predict VideoMAE's pixels (target {model.target}, "
            f"pixel_normalize {model.normalize or 'none'})"
        )
    (slots, rows, columns), (tubelet, height, width) = encoder.grid, encoder.patch_size
    return ExportResult(
        path=out,
        model=written,
        clip=(slots * tubelet, rows * height, columns * width),
        channels=encoder.channels,
        classes=classes,
        decoder_left_out=left_out,
        address="",
    )
