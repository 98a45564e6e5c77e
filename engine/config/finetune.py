"""The config of a fine-tuning run: the tables of its recipes that pre-training does not have."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mam2.engine.config.limits import (
    BELOW_ONE,
    COUNT,
    COUNT_OR_NONE,
    NOT_NEGATIVE,
    POSITIVE,
    RESUMABLE,
    SHARE,
    Limits,
    limited,
)
from mam2.engine.config.training import DataConfig, OptimConfig, RunConfig, TokenGrid, check_training
from mam2.engine.errors import UserError

HeadTask = Literal["classes", "multi-label", "regression"]


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The fine-tuned encoder. The checkpoint sets these values; without a checkpoint (`--scratch`) they apply."""

    patch: int = limited(16, COUNT)
    """Height and width of a patch in pixels."""
    tubelet: int = limited(2, COUNT)
    """Frames per token."""
    width: int = limited(768, COUNT)
    """Embedding width."""
    depth: int = limited(12, COUNT)
    """Number of blocks."""
    heads: int = limited(12, COUNT)
    """Attention heads."""
    mlp_ratio: float = limited(4.0, POSITIVE)
    """Hidden width of the MLPs, divided by the embedding width."""
    layer_scale: float = limited(0.0, NOT_NEGATIVE)
    """Initial value of LayerScale, see `ModelConfig`; any value but 0 if the checkpoint has it. 0: no LayerScale."""
    frames: int = limited(0, COUNT_OR_NONE)
    """Frames of the clips in pre-training, from whose positions those of another size are resampled; 0: as
    `data.frames`."""
    size: int = limited(0, COUNT_OR_NONE)
    """Height and width of those clips in pixels; 0: as `data.size`."""
    classes: int = limited(0, COUNT_OR_NONE)
    """Number of classes; the training videos determine it."""
    text_width: int = limited(0, COUNT_OR_NONE)
    """Values per text embedding, 0 for a linear head; the embeddings determine it."""
    target_mean: float = limited(0.0, Limits())
    """Mean of the numbers to predict in regression; the training videos determine it."""
    target_std: float = limited(1.0, POSITIVE)
    """Their standard deviation, likewise."""


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    task: HeadTask = "classes"
    """What the labels are. `classes`: one class per video (softmax, cross-entropy); `multi-label`: several classes per
    video, separated by `;` (sigmoid, binary cross-entropy, mean average precision); `regression`: a number."""
    loss: Literal["mse", "mae"] = "mse"
    """Loss of regression on standardized numbers: the mean squared or the mean absolute error."""
    class_weights: Literal["none", "balanced"] = "none"
    """Weight of each training clip in the loss: `balanced` is inverse to the number of training videos of its class,
    with a mean of 1 over the videos."""
    dropout: float = limited(0.0, BELOW_ONE)
    """Dropout probability of the pooled features, 0 to 1."""
    standardize: bool = True
    """Start with features of mean 0 and variance 1 over 256 training clips, by the weights of the LayerNorm before the
    head. An encoder from an early stage of pre-training otherwise learns slowly. VideoMAE does not do it."""
    text_embeddings: str = ""
    """File with a text embedding per class, used as the classifier's weights: .npy or .safetensors, see
    `mam2.engine.model.text_head`. Empty: a randomly initialized linear head."""
    text_encoder: str = ""
    """Folder of a transformers text encoder that computes the embeddings of the class names instead."""
    prompt: str = "a video of a person {}."
    """Input of the text encoder, with the class name in place of {}."""
    frozen: bool = True
    """Keep the text embeddings fixed; false trains them too."""
    temperature: float = limited(0.01, POSITIVE)
    """Initial divisor of the cosines; it is learned."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    rank: int = limited(0, COUNT_OR_NONE)
    """Rank of the low-rank adapters (LoRA) of all linear layers of the blocks; 0: none. With adapters the encoder is
    frozen, and only adapters and head are trained. Needs the package peft."""
    alpha: float = limited(16.0, POSITIVE)
    """Numerator of the adapters' scale alpha / rank."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Augmentations in addition to crop and mirroring (in [data]). Drawn per clip, the same for all its frames."""

    operations: int = limited(4, COUNT_OR_NONE)
    """RandAugment's n: number of successive operations, drawn independently; 0 turns RandAugment off."""
    magnitude: float = limited(7.0, Limits(at_least=0, at_most=10))
    """RandAugment's m, 0 to 10."""
    magnitude_std: float = limited(0.5, NOT_NEGATIVE)
    """Standard deviation of the normal distribution around `magnitude` from which each magnitude is drawn."""
    share: float = limited(0.5, SHARE)
    """Probability that a drawn operation is applied, 0 to 1."""
    erase: float = limited(0.25, SHARE)
    """Probability that a box of the clip is replaced by noise, 0 to 1."""
    mixup: float = limited(0.8, NOT_NEGATIVE)
    """Alpha of the Beta distribution of mixup's weight; 0 turns mixup off."""
    cutmix: float = limited(1.0, NOT_NEGATIVE)
    """Alpha of the Beta distribution of cutmix's area; 0 turns cutmix off. With both, each gets half of the pairs."""
    label_smoothing: float = limited(0.1, SHARE)
    """Share of the target that is distributed evenly over all classes, 0 to 1; in `multi-label` each 0 or 1 moves by
    this share toward 0.5. Not used in `regression`."""

    @property
    def mixes(self) -> bool:
        """Returns whether clips are mixed in pairs."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True, kw_only=True)
class FinetuneOptimConfig(OptimConfig):
    epochs: float = 100
    """Passes over the data set; each shows every video once, in `data.views` views."""
    warmup_epochs: float = 5
    """Linear warm-up of the learning rate from 0."""
    base_lr: float = 1e-3
    """Peak learning rate for a batch of 256 clips, including views; scaled linearly with the batch."""
    min_lr: float = 1e-6
    """Learning rate at the end of the decay for a batch of 256 clips; scaled likewise."""
    beta2: float = 0.999
    """AdamW's second beta; the first is 0.9."""
    layer_decay: float = limited(0.75, Limits(above=0, at_most=1))
    """Learning rate of a block divided by that of the next block; the head has the full learning rate."""
    train_last: int = limited(-1, Limits(at_least=-1))
    """Number of last blocks that are trained, besides the head; -1: the whole encoder. The blocks below and the patch
    embedding are frozen: no gradients, optimizer state, weight decay or stochastic depth."""
    drop_path: float = limited(0.1, BELOW_ONE)
    """Probability that the last block's branches are dropped for a clip; decreases linearly to 0 at the first block."""
    ema: float = limited(0.0, BELOW_ONE)
    """Decay of the moving average of the weights, which validation and RUN/best use; 0: no average."""


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """Views of `mam2 evaluate`. Validation uses only one view of each video's middle clip."""

    every: float = limited(1.0, POSITIVE)
    """Epochs between two validations of a fine-tuning run; there is always one at the end."""
    best: Literal["top1", "mean_class"] = "top1"
    """Measure whose best validation RUN/best keeps; `multi-label` always keeps the best mean average precision,
    `regression` the best R². For classes: top-1 accuracy, or the mean of the classes' top-1 accuracies
    (balanced accuracy), to which each class contributes equally however many videos it has."""
    temporal: int = limited(5, COUNT, resumable=True)
    """Clips per video: dense clips evenly from its start to its end, uniform clips interleaved."""
    spatial: int = limited(3, COUNT, resumable=True)
    """Square crops per clip, with the full shorter side, evenly along the longer side."""
    batch: int = limited(0, COUNT_OR_NONE, resumable=True)
    """Maximum clips per forward pass; 0: as many as in a training pass (with `optim.micro_batch auto` at most 64), in
    `mam2 evaluate` 32."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TokenGrid):
    data: DataConfig = field(default_factory=DataConfig)
    model: EncoderConfig = field(default_factory=EncoderConfig, metadata={RESUMABLE: True})
    """A resumed run reads this table from its checkpoint."""
    head: HeadConfig = field(default_factory=HeadConfig)
    adapters: AdapterConfig = field(default_factory=AdapterConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: FinetuneOptimConfig = field(default_factory=FinetuneOptimConfig)
    test: ViewsConfig = field(default_factory=ViewsConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def frozen_blocks(self) -> int:
        """Returns the number of frozen blocks, the first ones of the encoder."""
        return 0 if self.optim.train_last < 0 else max(self.model.depth - self.optim.train_last, 0)

    @property
    def clips_per_group(self) -> int:
        """Returns the number of clips that must be in one pass.

        The views of a video, or of two videos that are mixed.
        """
        return self.data.views * (2 if self.augment.mixes else 1)

    def check(self) -> None:
        """Raises UserError for values that are out of range or contradict each other.

        The error names key and remedy.
        """
        model, head = self.model, self.head
        check_training(self, model.patch, model.tubelet)
        if self.data.sets or self.data.weights:
            raise UserError("data.sets, data.weights: only pre-training takes several data sets; pass one with --data")
        if model.width % model.heads:
            raise UserError(f"model.width {model.width} is not a multiple of model.heads {model.heads}")
        if head.text_embeddings and head.text_encoder:
            raise UserError("head.text_embeddings and head.text_encoder both provide the text embeddings: set only one")
        if self.adapters.rank and self.optim.train_last >= 0:
            raise UserError(
                f"optim.train_last {self.optim.train_last}: adapters.rank {self.adapters.rank} freezes the whole "
                "encoder; set optim.train_last -1, or adapters.rank 0"
            )
        if head.text_encoder and "{}" not in head.prompt:
            raise UserError(f"head.prompt: expected {{}} in place of the class name, found {head.prompt!r}")
        if head.task != "classes":
            for key, value, default in (
                ("head.class_weights", head.class_weights, "none"),
                ("test.best", self.test.best, "top1"),
            ):
                if value != default:
                    raise UserError(f"{key} {value}: needs head.task classes, found head.task {head.task}")
        if head.task == "regression" and (head.text_embeddings or head.text_encoder):
            raise UserError(
                "head.task regression: has no classes to embed; remove head.text_embeddings and text_encoder"
            )
