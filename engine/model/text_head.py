"""Text embeddings of class names: from a file, or from a local transformers text encoder.

Shapes: V classes, E values of an embedding.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mam2.engine.errors import UserError

TENSOR = "embeddings"
NAMES = "classes"


def read_text_embeddings(path: str | Path, classes: Sequence[str]) -> Tensor:
    """Reads embeddings [V, E] float32 in the order of `classes`.

    path: .npy, an array [V, E], with the classes' names, one per line, in a file of the same name with the suffix .txt;
        or .safetensors, the tensor "embeddings" [V, E], with the names as a JSON list under "classes" in the metadata.
        Without names the rows must be in the order of the labels.
    Raises UserError if the file cannot be read, or lacks a class.
    """
    path = Path(path)
    table, names = _read_npy(path) if path.suffix == ".npy" else _read_safetensors(path)
    if table.ndim != 2 or not table.isfinite().all():
        raise UserError(f"{path}: expected finite embeddings [classes, values], found {tuple(table.shape)}")
    if not names:
        if len(table) != len(classes):
            raise UserError(f"{path}: {len(table)} embeddings without names, for {len(classes)} classes")
        return table
    if len(names) != len(table):
        raise UserError(f"{path}: {len(names)} names for {len(table)} embeddings")
    rows = {name: row for row, name in enumerate(names)}
    absent = [name for name in classes if name not in rows]
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise UserError(f"{path}: no embedding for the class {absent[0]!r}{more}; it names {names[0]!r}, …")
    return table[[rows[name] for name in classes]]


def _read_npy(path: Path) -> tuple[Tensor, list[str]]:
    try:
        table = torch.from_numpy(np.load(path, allow_pickle=False).astype(np.float32))
        names = path.with_suffix(".txt")
        return table, names.read_text(encoding="utf-8").splitlines() if names.exists() else []
    except (OSError, ValueError) as error:
        raise UserError(f"text embeddings {path}: cannot be read: {error}") from None


def _read_safetensors(path: Path) -> tuple[Tensor, list[str]]:
    try:
        with safe_open(path, framework="pt") as file:
            names = json.loads((file.metadata() or {}).get(NAMES, "[]"))
            return file.get_tensor(TENSOR).float(), names
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"text embeddings {path}: expected .npy, or .safetensors with the tensor {TENSOR!r}: {error}"
        ) from None


@torch.no_grad()
def embed_classes(folder: str | Path, classes: Sequence[str], prompt: str) -> Tensor:
    """Computes embeddings [V, E] float32 of the class names with a text encoder.

    folder: a model and its tokenizer as saved by transformers; nothing is downloaded. For CLIP and similar models the
        embeddings are the projected text features, for other encoders the mean over the tokens.
    prompt: input text with the name in place of {}; underscores in names become spaces.
    Raises UserError if transformers is not installed or the folder contains no text encoder.
    """
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError:
        raise UserError(
            "head.text_encoder needs transformers: pip install transformers, or use head.text_embeddings"
        ) from None
    if not Path(folder).is_dir():
        raise UserError(f"head.text_encoder {folder}: no such folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"head.text_encoder {folder}: not a text encoder: {str(error).splitlines()[0]}") from None
    texts = [prompt.format(name.replace("_", " ")) for name in classes]
    words = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    if hasattr(model, "get_text_features"):
        features = model.get_text_features(**words)
        return (features if isinstance(features, Tensor) else features.pooler_output).float()
    output = model(**words)
    if getattr(output, "text_embeds", None) is not None:
        return output.text_embeds.float()
    real = words["attention_mask"][..., None].float()
    return ((output.last_hidden_state * real).sum(1) / real.sum(1)).float()
