"""The engine from Python: pre-train, load what was trained here or elsewhere, look at features.

    from mam2.engine import load_encoder, load_recipe, pretrain

    result = pretrain(load_recipe("mam2-fast"), "videos/", "runs/first")
    encoder = load_encoder("runs/first")              # or VideoMAE's .pth, or a Hugging Face folder
    features = encoder.encode(video).mean(1)          # video [B, 3, T, H, W] uint8 -> [B, D]

`examples/pretrain_probe_plot.py` goes this way to an accuracy and a picture. Names are imported when they are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mam2.engine.checkpoints.load import load_encoder, load_model
    from mam2.engine.config.recipe import load_recipe
    from mam2.engine.model.classifier import Classifier
    from mam2.engine.model.encoder import Encoder
    from mam2.engine.model.mam2 import MAM2
    from mam2.engine.model.videomae import VideoMAE
    from mam2.engine.train.pretrain import pretrain

__all__ = ["MAM2", "Classifier", "Encoder", "VideoMAE", "load_encoder", "load_model", "load_recipe", "pretrain"]

_HOMES = {
    "Classifier": "model.classifier",
    "Encoder": "model.encoder",
    "MAM2": "model.mam2",
    "VideoMAE": "model.videomae",
    "load_encoder": "checkpoints.load",
    "load_model": "checkpoints.load",
    "load_recipe": "config.recipe",
    "pretrain": "train.pretrain",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
