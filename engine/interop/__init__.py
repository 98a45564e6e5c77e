"""Weights in and out: MAM2's own, VideoMAE's, VideoMAE v2's and Hugging Face's; graphs for programs without it."""

from mam2.engine.interop.load import load_encoder, load_model

__all__ = ["load_encoder", "load_model"]
