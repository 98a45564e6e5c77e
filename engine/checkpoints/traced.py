"""Exports a model as a graph of standard operators, for programs without this project: torch.export's .pt2, and ONNX.

    video [B, C, T, H, W] uint8 -> tokens [B, N, D], or logits [B, V] of a classifier; any batch B >= 1, float32

The graph contains the normalization and the cutting into tokens. The names of a classifier's classes, in the order of
its logits, are stored in the file as JSON: in .pt2 as the extra file `classes.json`, in ONNX as the metadata property
`classes`. B clips, C channels, T frames, N tokens, D width, V classes.
"""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from mam2.engine.checkpoints.load import encoder_of
from mam2.engine.errors import UserError
from mam2.engine.files import write_whole
from mam2.engine.model.classifier import Classifier
from mam2.engine.model.encoder import Encoder

ONNX_NEEDS = ("onnx", "onnxscript")
CLASSES_FILE, CLASSES_PROPERTY = "classes.json", "classes"
"""Names of the classes' entries in a .pt2 and an ONNX file."""
LARGEST_FILE = 2**31
"""Maximum bytes of a protocol buffer; larger weights go into a separate file."""


class Plain(nn.Module):
    """An encoder or a classifier that uses only standard operators."""

    mean: Tensor
    std: Tensor
    index: Tensor

    def __init__(self, model: Encoder | Classifier) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(encoder_of(model).mean), persistent=False)
        self.register_buffer("std", torch.tensor(encoder_of(model).std), persistent=False)
        self.register_buffer("index", torch.arange(len(encoder_of(model).positions)), persistent=False)

    def forward(self, video: Tensor) -> Tensor:
        encoder = encoder_of(self.model)
        t, h, w = encoder.patch_size
        pixels = rearrange(video, "b c (nt t) (nh h) (nw w) -> b (nt nh nw) (t h w) c", t=t, h=h, w=w).float() / 255
        tokens = encoder(((pixels - self.mean) / self.std).flatten(2), self.index[None])
        if isinstance(self.model, Classifier):
            return self.model.head(self.model.norm(tokens.mean(1)))
        return tokens


def write_torch(model: Encoder | Classifier, path: Path, classes: tuple[str, ...] = ()) -> None:
    """Writes a program of torch.export, for `torch.export.load(path).module()(video)`.

    `torch.export.load(path, extra_files=files)` with `files = {"classes.json": ""}` fills in the names of the classes.
    """
    # on a full disk, torch.export.save to a file raises a RuntimeError without the reason
    buffer = io.BytesIO()
    torch.export.save(_program(model), buffer, extra_files={CLASSES_FILE: json.dumps(classes)} if classes else None)
    write_whole(path, buffer.getbuffer())


def write_onnx(model: Encoder | Classifier, path: Path, classes: tuple[str, ...] = ()) -> None:
    """Writes an ONNX file, input `video`, output `tokens` or `logits`.

    Weights of almost 2 GiB or more go to `<path>.data`. Raises UserError if a package that torch's exporter needs is
    missing.
    """
    missing = [name for name in ONNX_NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"export to ONNX needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    output = "logits" if isinstance(model, Classifier) else "tokens"
    program = torch.onnx.export(
        _program(model),
        input_names=["video"],
        output_names=[output],
        dynamic_shapes={"video": {0: "batch"}},  # the program already has this dimension, without its name
        dynamo=True,
        verbose=False,
    )
    assert program is not None  # never None with dynamo=True
    if classes:
        program.model.metadata_props[CLASSES_PROPERTY] = json.dumps(classes)
    program.save(path, external_data=sum(t.nbytes for t in model.state_dict().values()) > 0.9 * LARGEST_FILE)


def _program(model: Encoder | Classifier) -> torch.export.ExportedProgram:
    encoder = encoder_of(model)
    frames, height, width = (tokens * side for tokens, side in zip(encoder.grid, encoder.patch_size, strict=True))
    # Two clips, because torch.export treats a batch of one as a fixed size.
    video = torch.zeros(2, encoder.channels, frames, height, width, dtype=torch.uint8)
    with torch.no_grad():
        return torch.export.export(Plain(model).eval(), (video,), dynamic_shapes=({0: torch.export.Dim("batch")},))
