"""Groups of flags: the fields of a class are parameters, with the same defaults, of the API functions of its verbs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class EncoderFlags:
    """A frozen encoder: its model and clips, and how they are computed (probe, neighbors, embed)."""

    recipe: str = ""
    """pre-training recipe with the model and clips of the checkpoint `random`."""
    stride: int = 0
    """distance of two sampled frames; default: the checkpoint's."""
    frames: int | None = None
    """frames per clip; needed if the checkpoint does not state them, else overrides them."""
    size: int | None = None
    """height and width of the clips in pixels, likewise."""
    heads: int | None = None
    """attention heads, for a checkpoint of VideoMAE's code whose width was never published."""
    batch: int = 32
    """clips per forward pass."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto uses a GPU if there is one."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """auto is bfloat16 autocast on a GPU and on x86 CPUs with bfloat16 instructions, else float32."""


@dataclass(frozen=True, kw_only=True)
class ClassifierFlags:
    """A classifier on views of videos: its model, the views, and how they are computed (evaluate, predict)."""

    temporal: int = 0
    """clips per video; 0: as in the recipe."""
    spatial: int = 0
    """crops per clip; 0: as in the recipe."""
    batch: int = 0
    """maximum clips per forward pass; 0: as in the recipe, or 32."""
    frames: int | None = None
    """frames per clip; needed if the checkpoint does not state them, else overrides them."""
    size: int | None = None
    """height and width of the clips in pixels, likewise."""
    heads: int | None = None
    """attention heads, for a checkpoint of VideoMAE's code whose width was never published."""
    classes: Path | None = None
    """text file with one class name per line in the order of the logits, for a checkpoint without names."""
    threads: int = 0
    """decoding threads; 0: one per core that this process may use."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto uses a GPU if there is one."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """auto is bfloat16 autocast on a GPU and on x86 CPUs with bfloat16 instructions, else float32."""

    def arguments(self) -> dict[str, Any]:
        """Returns the parameters of `evaluate` and `predict`, with the file of class names read. Raises UserError."""
        from mam2.engine.commands.options import read_class_names

        values = dataclasses.asdict(self)
        values["names"] = read_class_names(values.pop("classes"))
        return values


@dataclass(frozen=True, kw_only=True)
class TokenizerFlags:
    """A VQ model, the frames it is trained on, and its training (train-tokenizer)."""

    codes: int = 1024
    """codebook size."""
    codes_per_patch: int = 1
    """codes per patch: each further one names what those before it leave; pass the same to pre-training."""
    channels: int = 32
    """base width of the network, a multiple of 8."""
    factor: int = 16
    """pixels per code along height and width, a power of two; use the patch size of pre-training."""
    size: int = 224
    """height and width of the training frames, a multiple of `factor`."""
    steps: int = 2000
    """training steps."""
    batch: int = 16
    """frames per step."""
    gradient_weight: float = 0.0
    """weight of the error of differences between neighboring pixels, next to the squared error; 0: without it."""
    flip: bool = True
    """mirror half of the frames."""
    image_channels: int = 3
    """channels of the frames: 3, 1 for gray, or those of arrays."""
    value_range: tuple[float, float] | None = None
    """the two values that become 0 and 1, as data.value_range; default: by the type of the values."""
    seed: int = 0
    """seed of weights, frames and crops."""
    threads: int = 0
    """decoding threads; 0: one per core that this process may use."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto uses a GPU if there is one."""


ENCODER, CLASSIFIER, TOKENIZER = EncoderFlags(), ClassifierFlags(), TokenizerFlags()
