"""The engine's Python API: every verb of the command line is a function with the same name and options.

    from mam2.engine import embed, load_encoder, load_recipe, pretrain

    result = pretrain(load_recipe("mam2-fast"), "videos/", "runs/first")
    encoder = load_encoder("runs/first")              # or VideoMAE's .pth, or a Hugging Face folder
    features = encoder.encode(video).mean(1)          # video [B, 3, T, H, W] uint8 -> [B, D]

Functions return results as objects, raise `UserError` for errors of the user, and never end the process. Names are
imported at their first use. docs/python.md describes them; `examples/` has scripts that use them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mam2.engine.checkpoints.exporting import export
    from mam2.engine.checkpoints.load import load_encoder, load_model
    from mam2.engine.config.finetune import FinetuneConfig
    from mam2.engine.config.pretrain import PretrainConfig
    from mam2.engine.config.recipe import load_recipe
    from mam2.engine.data.indexing import index
    from mam2.engine.data.transcode import transcode
    from mam2.engine.data.video import Skipped
    from mam2.engine.errors import UserError
    from mam2.engine.evaluation.classification import evaluate
    from mam2.engine.evaluation.embedding import embed
    from mam2.engine.evaluation.neighbors import neighbors
    from mam2.engine.evaluation.plots import plot
    from mam2.engine.evaluation.prediction import Prediction, Predictor, predict
    from mam2.engine.evaluation.probing import probe
    from mam2.engine.evaluation.visualize import visualize
    from mam2.engine.finetune_planning import plan_finetuning
    from mam2.engine.model.classifier import Classifier
    from mam2.engine.model.encoder import Encoder
    from mam2.engine.model.mam2 import MAM2
    from mam2.engine.model.videomae import VideoMAE
    from mam2.engine.planning import plan
    from mam2.engine.tokenizer.from_videos import train_tokenizer
    from mam2.engine.tokenizer.precompute import tokenize
    from mam2.engine.train.finetune import finetune
    from mam2.engine.train.pretrain import pretrain

__all__ = [
    "MAM2",
    "Classifier",
    "Encoder",
    "FinetuneConfig",
    "Prediction",
    "Predictor",
    "PretrainConfig",
    "Skipped",
    "UserError",
    "VideoMAE",
    "embed",
    "evaluate",
    "export",
    "finetune",
    "index",
    "load_encoder",
    "load_model",
    "load_recipe",
    "neighbors",
    "plan",
    "plan_finetuning",
    "plot",
    "predict",
    "pretrain",
    "probe",
    "tokenize",
    "train_tokenizer",
    "transcode",
    "visualize",
]

_HOMES = {
    "Classifier": "model.classifier",
    "Encoder": "model.encoder",
    "FinetuneConfig": "config.finetune",
    "MAM2": "model.mam2",
    "Prediction": "evaluation.prediction",
    "Predictor": "evaluation.prediction",
    "PretrainConfig": "config.pretrain",
    "Skipped": "data.video",
    "UserError": "errors",
    "VideoMAE": "model.videomae",
    "embed": "evaluation.embedding",
    "evaluate": "evaluation.classification",
    "export": "checkpoints.exporting",
    "finetune": "train.finetune",
    "index": "data.indexing",
    "load_encoder": "checkpoints.load",
    "load_model": "checkpoints.load",
    "load_recipe": "config.recipe",
    "neighbors": "evaluation.neighbors",
    "plan": "planning",
    "plan_finetuning": "finetune_planning",
    "plot": "evaluation.plots",
    "predict": "evaluation.prediction",
    "pretrain": "train.pretrain",
    "probe": "evaluation.probing",
    "tokenize": "tokenizer.precompute",
    "train_tokenizer": "tokenizer.from_videos",
    "transcode": "data.transcode",
    "visualize": "evaluation.visualize",
}
"""The module below `mam2.engine` that defines each name."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
