"""`mam2 export`: weights for Hugging Face, for VideoMAE's code, and graphs for any program."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

import tyro

from mam2.engine.errors import UserError
from mam2.engine.files import make_folder

SHOWN = 10
"""Classes that are printed; the file has all of them."""


def run(arguments: list[str]) -> int:
    def export(
        checkpoint: tyro.conf.Positional[Path],
        to: Literal["huggingface", "videomae", "torch", "onnx"],
        out: Path,
        frames: int | None = None,
        size: int | None = None,
        heads: int | None = None,
        decoder_heads: int | None = None,
    ) -> int:
        """Write a model for elsewhere: a classifier, VideoMAE with its decoder where that has a place, or an encoder.

        Args:
            checkpoint: a run or checkpoint of MAM2, a checkpoint of VideoMAE's code, or a folder of Hugging Face.
            to: `huggingface`: a folder for from_pretrained of transformers' VideoMAE classes and its image processor;
                `videomae`: a .pth for the --finetune of VideoMAE's code; `torch` (.pt2, of torch.export) and `onnx`:
                a graph that takes uint8 clips [B, 3, T, H, W] and gives tokens [B, N, D], or a classifier's logits.
            out: the folder or file to write.
            frames: frames of the clips that it takes, where the checkpoint does not say them.
            size: height and width of these clips, pixels.
            heads: attention heads, of a checkpoint of VideoMAE's code of a width that it never published.
            decoder_heads: the same of its decoder.
        """
        if out.exists():
            raise UserError(f"--out {out}: is there already; name another one")
        # Before the model is read and traced, which takes minutes.
        make_folder(out.absolute().parent)
        from safetensors import SafetensorError

        from mam2.engine.checkpoints.export import decoder_is_videomaes, write_hugging_face, write_videomae
        from mam2.engine.checkpoints.load import class_names, encoder_of, load_model
        from mam2.engine.checkpoints.traced import write_onnx, write_torch
        from mam2.engine.model.classifier import Classifier
        from mam2.engine.model.videomae import VideoMAE

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
        clip = ", ".join(str(n * side) for n, side in zip(encoder.grid, encoder.patch_size, strict=True))
        print(f"{out}: {written}, for clips [B, 3, {clip}] (frames, height, width)")
        if isinstance(model, VideoMAE) and to in ("huggingface", "videomae") and not decoder_is_videomaes(model):
            print(
                "without the decoder: it does not predict VideoMAE's pixels "
                f"(target {model.target}, pixel_normalize {model.normalize or 'none'})"
            )
        if classes:
            first = ", ".join(f"{number} {name}" for number, name in enumerate(classes[:SHOWN]))
            print(f"classes, in the order of the logits: {first}{', …' * (len(classes) > SHOWN)} ({len(classes)})")
        return 0

    return tyro.cli(export, args=arguments, prog="mam2 export")
