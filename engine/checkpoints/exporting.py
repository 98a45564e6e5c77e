"""`export`: a checkpoint as a folder for Hugging Face, a file for VideoMAE's code, or a graph for any program."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError

from mam2.engine.checkpoints.export import decoder_is_videomaes, write_hugging_face, write_videomae
from mam2.engine.checkpoints.load import class_names, encoder_of, load_model
from mam2.engine.checkpoints.traced import write_onnx, write_torch
from mam2.engine.config.limits import COUNT, check_flags
from mam2.engine.errors import UserError
from mam2.engine.files import make_folder
from mam2.engine.model.classifier import Classifier
from mam2.engine.model.videomae import VideoMAE

Format = Literal["huggingface", "videomae", "torch", "onnx"]


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    path: Path
    """The folder or file that was written."""
    model: str
    """Name of the class in the other project, or of ours where the format is a graph."""
    clip: tuple[int, int, int]
    """Frames, height and width of the clips that it takes."""
    classes: tuple[str, ...]
    """Names of a classifier's classes in the order of its logits; empty for other models."""
    decoder_left_out: str
    """Why a decoder is not in what was written; empty where it is, and where there is none."""


def export(
    checkpoint: str | Path,
    to: Format,
    out: str | Path,
    *,
    frames: int | None = None,
    size: int | None = None,
    heads: int | None = None,
    decoder_heads: int | None = None,
) -> ExportResult:
    """Writes a model for other programs: a classifier, VideoMAE with its decoder where that has a place, or an encoder.

    Args:
        checkpoint: a run or checkpoint of MAM2, a checkpoint of VideoMAE's code, or a folder of Hugging Face.
        to: `huggingface` writes a folder for from_pretrained of transformers' VideoMAE classes and its image processor;
            `videomae` a .pth for the --finetune option of VideoMAE's code; `torch` (.pt2, of torch.export) and `onnx` a
            graph that takes uint8 clips [B, 3, T, H, W] and returns tokens [B, N, D], or a classifier's logits.
        out: the folder or file to write; must not exist.
        frames, size: of the clips that it takes, where the checkpoint does not say them; height and width in pixels.
        heads, decoder_heads: attention heads, of a checkpoint of VideoMAE's code of a width that it never published.

    Raises:
        UserError: for a checkpoint that cannot be read or has no place in the format, and a place that cannot be
            written.
    """
    check_flags(frames=(frames, COUNT), size=(size, COUNT), heads=(heads, COUNT), decoder_heads=(decoder_heads, COUNT))
    out = Path(out)
    if out.exists():
        raise UserError(f"--out {out}: is there already; name another one")
    # Before the model is read and traced, which takes minutes.
    make_folder(out.absolute().parent)
    model = load_model(checkpoint, frames=frames, size=size, heads=heads, decoder_heads=decoder_heads)
    classes = class_names(checkpoint) if isinstance(model, Classifier) else ()
    encoder = encoder_of(model)
    graph = model if isinstance(model, Classifier) else encoder
    weights = model if isinstance(model, VideoMAE) else graph
    aside = out.with_name(f".part-{out.name}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        if to == "huggingface":
            written = write_hugging_face(weights, aside, classes)
            aside.rename(out)
        else:
            if to == "videomae":
                written = write_videomae(weights, aside / out.name, classes)
            else:
                {"torch": write_torch, "onnx": write_onnx}[to](graph, aside / out.name, classes)
                written = type(graph).__name__
            for file in aside.iterdir():  # ONNX's weights may be a file of their own
                file.rename(out.with_name(file.name))
    except (OSError, SafetensorError) as error:  # the latter is the library's word for the former
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"--out {out}: cannot be written: {reason}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
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
        classes=classes,
        decoder_left_out=left_out,
    )
