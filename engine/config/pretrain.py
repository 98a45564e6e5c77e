"""The config of pre-training: frozen, keyword-only dataclasses, read from a recipe (recipe.py), overridden by flags."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from mam2.engine.config.limits import (
    BATCH,
    COUNT,
    COUNT_OR_NONE,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    Limits,
    limited,
    resumable,
)
from mam2.engine.config.training import DataConfig, OptimConfig, RunConfig, TokenGrid, check_training
from mam2.engine.errors import UserError


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    kind: Literal["tube", "random", "motion"] = "tube"
    """`tube`: the same patches in every time slot; `random`: anywhere in space and time; `motion`: tubes that cover
    moving patches more often."""
    ratio: float = limited(0.9, SHARE)
    """Share of masked tokens: int(ratio * patches) per slot, with `random` int(ratio * tokens) per clip."""
    strength: float = limited(0.5, SHARE)
    """Effect of motion with `motion`: from 0 (the same masks as `tube`) to 1 (only motion decides)."""
    decoded: float = limited(1.0, Limits(above=0, at_most=1))
    """Share of the masked tokens that regressor and decoders predict, int(decoded * masked) per clip. Below 1, a step
    costs less and has fewer predictions (VideoMAE v2's dual masking). The encoder's input stays the same."""
    decoded_kind: Literal["cell", "random"] = "cell"
    """Choice of the predicted tokens: `cell` rotates through each cell of 2×2 patches from slot to slot, which covers
    space and time evenly; `random` draws them for each clip, independent of their position."""


@dataclass(frozen=True, kw_only=True)
class RegressorConfig:
    depth: int = limited(4, COUNT_OR_NONE)
    """Number of cross-attention blocks. 0: no regressor; the decoders get visible latents and mask tokens instead."""
    width: int = limited(768, COUNT)
    """Embedding width; a width that differs from the encoder's adds a linear projection."""
    heads: int = limited(12, COUNT)
    """Attention heads."""
    keys: Literal["all", "visible"] = "all"
    """Keys and values: `all` visible latents and the current masked states (CAE), or only the `visible` latents. No
    effect at depth 0."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    depth: int = limited(4, COUNT_OR_NONE)
    """Number of self-attention blocks per decoder."""
    width: int = limited(768, COUNT)
    """Embedding width. For MAM2 it must equal the regressor's width."""
    heads: int = limited(12, COUNT)
    """Attention heads."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    objective: Literal["mam2", "videomae", "joint"] = "mam2"
    """Prediction targets: `mam2`: codes and motion; `videomae`: pixels; `joint` (MAE-DFER): the first frame of each
    tubelet and the later frames' differences to it, with VideoMAE's single decoder."""
    patch: int = limited(16, COUNT)
    """Height and width of a patch in pixels."""
    tubelet: int = limited(2, COUNT)
    """Frames a token spans."""
    width: int = limited(768, COUNT)
    """Embedding width of the encoder."""
    depth: int = limited(12, COUNT)
    """Number of blocks of the encoder."""
    heads: int = limited(12, COUNT)
    """Attention heads of the encoder."""
    mlp_ratio: float = limited(4.0, POSITIVE)
    """Hidden width of all MLPs, divided by the embedding width."""
    layer_scale: float = limited(0.0, NOT_NEGATIVE)
    """Initial value of LayerScale, a learned vector that multiplies the branches of every block; CAE uses 0.1.
    0: no LayerScale."""
    residual: Literal["float32", "bfloat16"] = "float32"
    """Type of the residual stream of regressor and decoders in a bfloat16 run; that of the encoder is float32.
    `bfloat16` moves and holds fewer bytes; the error of its gradients is in docs/numerics.md."""
    projection_norm: bool = False
    """Add a LayerNorm after the projection from the encoder's to the regressor's width, as in CAE."""
    regressor: RegressorConfig = field(default_factory=RegressorConfig)
    """The regressor of MAM2."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """Each of MAM2's two decoders, or the single decoder of the other objectives."""
    frames: int = limited(0, COUNT_OR_NONE, resumable=True)
    """Frames of the clips that the weights of `--checkpoint` were trained on, which sets it: positions are resampled
    from theirs. 0: as `data.frames`."""
    size: int = limited(0, COUNT_OR_NONE, resumable=True)
    """Height and width of those clips in pixels; 0: as `data.size`."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    path: str = ""
    """File of a VQGAN: taming-transformers' `last.ckpt`, or safetensors. Empty: first train a small one on the data."""
    cache: str = resumable("")
    """Folder of codes, with `--clips` also of clips, that `mam2 tokenize` wrote for this data, config and tokenizer.
    Empty: the step computes the codes, and videos are decoded."""
    frames: Literal["first", "all"] = "first"
    """Codes per token: only those of its `first` frame, or those of `all` its frames; all of them are predicted."""
    codes_per_patch: int = limited(1, COUNT)
    """Codes per patch of a frame, all of them predicted: each further code names what those before it leave (residual
    quantization), from a codebook of its own. Must be that of `path`."""
    codes: int = limited(512, Limits(at_least=2))
    """Codebook size of the tokenizer that the run trains."""
    channels: int = limited(32, COUNT)
    """Base channels of the tokenizer that the run trains."""
    steps: int = limited(1000, COUNT)
    """Training steps of the tokenizer that the run trains."""
    batch: int = limited(16, BATCH)
    """Frames per training step of the tokenizer that the run trains."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    appearance: float = limited(1.0, NOT_NEGATIVE)
    """Weight of the appearance loss."""
    motion: float = limited(1.0, NOT_NEGATIVE)
    """Weight of the motion loss."""
    alignment: float = limited(0.0, NOT_NEGATIVE)
    """Weight of CAE's latent alignment (2 in CAE); needs a second pass of the encoder, on the masked tokens."""
    balance: Literal["fixed", "gradient"] = "fixed"
    """`gradient` rescales the appearance gradient at the regressor's output in every step to `appearance / motion`
    times the norm of the motion gradient there; `fixed` uses the weights unchanged. With several passes per step
    (`optim.micro_batch`) each pass has a factor of its own, from the clips that all processes have in it."""
    label_smoothing: float = limited(0.0, SHARE)
    """Label smoothing of the codes' cross-entropy, 0 to 1."""
    appearance_target: Literal["codes", "pixels", "latents", "none"] = "codes"
    """`codes` of the tokenizer; `pixels` as in VideoMAE, without a tokenizer; `latents`: features of a teacher, which
    is a moving average of the encoder and sees the whole clip (V-JEPA); `none`: neither tokenizer nor appearance
    decoder."""
    visible: float = limited(0.0, NOT_NEGATIVE)
    """With `latents`: weight of the loss at the visible tokens, which the appearance decoder then gets and predicts
    too; that at the masked tokens has weight 1."""
    teacher_blocks: int = limited(1, COUNT)
    """With `latents`: number of the teacher's last blocks whose standardized outputs are averaged (data2vec); 1: only
    its output (V-JEPA)."""
    teacher_momentum: float = limited(0.998, SHARE)
    """With `latents`: the teacher's momentum at the first step: each step keeps this share of its weights and adds the
    rest from the encoder. V-JEPA's 0.998 is for 90,000 steps; a run of 1000 steps needs about 0.99."""
    teacher_momentum_end: float = limited(1.0, SHARE)
    """The momentum at the last step; it changes linearly in between."""
    motion_target: Literal["adjacent", "intra", "hog", "flow", "none"] = "adjacent"
    """`adjacent`: RGB difference to the next sampled frame; `intra`: the same within each tubelet; `hog`: histograms of
    gradients of the difference; `flow`: optical flow (needs opencv-python-headless, runs on the CPU); `none`: no motion
    decoder."""
    motion_normalize: Literal["channel", "patch", "none"] = "channel"
    """Divisor of an RGB difference: the standard deviation of its pixel cube per `channel`, of the whole `patch`, or
    `none`."""
    motion_eps: float = limited(0.05, NOT_NEGATIVE)
    """Added to that standard deviation, for pixels from 0 to 1 (0.05: 13 gray levels); with `patch` added to the
    variance, where 0.0025 is equivalent; with `hog` added to the norm of a histogram. VideoMAE's formula has 1e-6, with
    which a patch of one color that changes by one gray level dominates the loss."""
    pixel_normalize: Literal["channel", "patch", "none"] = "channel"
    """Normalization of pixels as a target (of VideoMAE or of appearance): standardized per cube and `channel`
    (VideoMAE), per `patch` (MAE, mae_st), or `none`."""


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Use of the held-out videos of `mam2 pretrain --val`; the training is identical with and without them."""

    every: float = limited(1.0, POSITIVE, resumable=True)
    """Epochs between two measurements of the held-out losses; there is always one at the end."""
    videos: int = limited(512, COUNT_OR_NONE, resumable=True)
    """Maximum number of videos, evenly spaced in the list; 0: all."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TokenGrid):
    data: DataConfig = field(default_factory=DataConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    @property
    def masked_tokens(self) -> int:
        """Returns the number of masked tokens per clip."""
        slots, rows, columns = self.grid
        if self.mask.kind == "random":
            return int(self.mask.ratio * slots * rows * columns)
        return slots * int(self.mask.ratio * rows * columns)

    @property
    def decoded_tokens(self) -> int:
        """Hidden tokens of a clip that are predicted in training."""
        return int(self.mask.decoded * self.masked_tokens)

    @property
    def clip_sizes(self) -> str:
        """Returns the sizes of a clip as a plan and a log show them."""
        tokens, data = math.prod(self.grid), self.data
        predicted = f", {self.decoded_tokens} predicted" * (self.mask.decoded < 1)
        visible = tokens - self.masked_tokens
        return f"{data.frames} frames of {data.size}²: {tokens} tokens, {visible} visible{predicted}"

    @property
    def needs_codes(self) -> bool:
        """Returns whether codes of a tokenizer are predicted."""
        return self.model.objective == "mam2" and self.loss.appearance_target == "codes"

    @property
    def needs_teacher(self) -> bool:
        """Returns whether features of a teacher are predicted."""
        return self.model.objective == "mam2" and self.loss.appearance_target == "latents"

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Returns the shape of one token's codes: () for one code of its first frame, else (K,).

        K is the number of its frames that have codes, times the codes per patch.
        """
        frames, codes = self.coded_frames, self.tokenizer.codes_per_patch
        return () if self.tokenizer.frames == "first" and codes == 1 else (frames * codes,)

    @property
    def coded_frames(self) -> int:
        """Returns the number of a token's frames that have codes."""
        return self.model.tubelet if self.tokenizer.frames == "all" else 1

    @property
    def tokenized_frames(self) -> int:
        """Returns the number of frames per clip that the tokenizer encodes."""
        return self.grid[0] * self.coded_frames

    @property
    def clips_per_group(self) -> int:
        """Returns the number of clips that must be in one pass: the views of a video."""
        return self.data.views


def check(config: PretrainConfig) -> None:
    """Raises UserError for values that are out of range or contradict each other: key, expectation and remedy."""
    data, mask, model = config.data, config.mask, config.model
    check_training(config, model.patch, model.tubelet)
    if model.frames % model.tubelet or model.size % model.patch:
        raise UserError(
            f"model.frames {model.frames}, model.size {model.size}: expected multiples of model.tubelet "
            f"{model.tubelet} and model.patch {model.patch}; leave both out, --checkpoint sets them"
        )
    tokens = math.prod(config.grid)
    if not 0 < config.masked_tokens < tokens:
        raise UserError(
            f"mask.ratio {mask.ratio} masks {config.masked_tokens} of {tokens} tokens; "
            "it must mask at least one and leave at least one visible"
        )
    if not config.decoded_tokens:
        raise UserError(
            f"mask.decoded {mask.decoded} leaves none of {config.masked_tokens} hidden tokens to predict; "
            f"it must be at least {1 / config.masked_tokens:.2g}"
        )
    parts: dict[str, Any] = {"model": model, "model.regressor": model.regressor, "model.decoder": model.decoder}
    for name, part in parts.items():
        if part.width % part.heads:
            raise UserError(f"{name}.width {part.width} is not a multiple of {name}.heads {part.heads}")
    if model.objective == "mam2" and model.decoder.width != model.regressor.width:
        raise UserError(
            f"model.decoder.width {model.decoder.width} differs from model.regressor.width {model.regressor.width}; "
            "for MAM2 both must be equal"
        )
    motion = config.loss.motion_target
    if motion in ("intra", "hog", "flow") and model.tubelet < 2:
        raise UserError(f"loss.motion_target {motion!r} needs model.tubelet of at least 2; 'adjacent' does not")
    if motion in ("hog", "flow") and model.patch % 4:
        raise UserError(
            f"loss.motion_target {motion!r} needs a model.patch that is a multiple of 4, found {model.patch}"
        )
    if model.objective == "joint" and model.tubelet < 2:
        raise UserError("model.objective 'joint' needs model.tubelet of at least 2; 'videomae' does not")
    appearance = config.loss.appearance_target
    if model.objective == "mam2" and appearance == motion == "none":
        raise UserError(
            "loss.appearance_target and loss.motion_target are both 'none': there is no loss; "
            "set one of them to another value"
        )
    if model.objective == "mam2" and model.regressor.depth == 0 and config.loss.alignment:
        raise UserError(
            f"loss.alignment {config.loss.alignment:g} needs the latents of a regressor, but model.regressor.depth "
            "is 0: set loss.alignment 0, or model.regressor.depth to at least 1"
        )
    if config.loss.visible and appearance != "latents":
        raise UserError(
            f"loss.visible {config.loss.visible:g} weights the latents of visible tokens, but loss.appearance_target "
            f"is {appearance!r}: set loss.visible 0, or loss.appearance_target 'latents'"
        )
    if appearance == "latents" and config.loss.teacher_blocks > model.depth:
        raise UserError(
            f"loss.teacher_blocks {config.loss.teacher_blocks} averages more blocks than the encoder has: expected at "
            f"most model.depth {model.depth}"
        )
    if config.loss.balance == "gradient" and appearance == "none":
        raise UserError(
            "loss.balance 'gradient' rescales the appearance gradient, but loss.appearance_target is 'none': "
            "set loss.balance 'fixed'"
        )
    if config.loss.balance == "gradient" and (config.loss.motion <= 0 or motion == "none"):
        raise UserError(
            "loss.balance 'gradient' uses the motion gradient: it needs loss.motion above 0 and a motion "
            "target; otherwise set loss.balance 'fixed'"
        )
    if config.tokenizer.channels % 8:
        raise UserError(f"tokenizer.channels {config.tokenizer.channels}: expected a multiple of 8")
    if config.tokenizer.cache and not data.recorded:
        raise UserError("tokenizer.cache contains codes of recorded augmentations: set data.recorded to their number")
