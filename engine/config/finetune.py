"""What a fine-tuning run is: the tables of its recipes, beside those that pre-training has as well."""

from __future__ import annotations

from dataclasses import dataclass, field

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
from mam2.engine.config.pretrain import DataConfig, OptimConfig, RunConfig, TokenGrid, check_training
from mam2.engine.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Of the encoder that is fine-tuned. The checkpoint decides; the values serve where there is none (`--scratch`)."""

    patch: int = limited(16, COUNT)
    """Height and width of a patch in pixels."""
    tubelet: int = limited(2, COUNT)
    """Frames a token spans."""
    width: int = limited(768, COUNT)
    """Embedding width."""
    depth: int = limited(12, COUNT)
    """Blocks."""
    heads: int = limited(12, COUNT)
    """Attention heads."""
    mlp_ratio: float = limited(4.0, POSITIVE)
    """Hidden width of the MLPs over the embedding width."""
    layer_scale: float = limited(0.0, NOT_NEGATIVE)
    """First value of LayerScale, see `ModelConfig`; any but 0 where the checkpoint has it. 0: no LayerScale."""
    frames: int = limited(0, COUNT_OR_NONE)
    """Frames of the clips that it was pre-trained on: its positions at another size are resampled from theirs; 0: as
    `data.frames`."""
    size: int = limited(0, COUNT_OR_NONE)
    """Height and width of those clips in pixels; 0: as `data.size`."""
    classes: int = limited(0, COUNT_OR_NONE)
    """Classes that the head tells apart; the training videos decide."""
    text_width: int = limited(0, COUNT_OR_NONE)
    """Values of a text embedding, 0 for a linear head; the embeddings decide."""


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    dropout: float = limited(0.0, BELOW_ONE)
    """Share of the pooled features that a step leaves out, 0 to 1."""
    text_embeddings: str = ""
    """File with a text embedding for every class, which become the classifier: .npy or .safetensors, see
    `mam2.engine.model.text_head`. Empty: a linear head, drawn at random."""
    text_encoder: str = ""
    """Folder of a text encoder of transformers that embeds the class names instead."""
    prompt: str = "a video of a person {}."
    """What the text encoder reads, with the class name for {}."""
    frozen: bool = True
    """Keep the text embeddings as they are; false trains them too."""
    temperature: float = limited(0.01, POSITIVE)
    """Cosines are divided by it, at first; learned from there."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Beside crop and mirroring, which [data] has. Drawn for each clip, the same for all of its frames."""

    operations: int = limited(4, COUNT_OR_NONE)
    """RandAugment's n: operations in a row, each drawn anew; 0 turns RandAugment off."""
    magnitude: float = limited(7.0, Limits(at_least=0, at_most=10))
    """RandAugment's m, 0 to 10."""
    magnitude_std: float = limited(0.5, NOT_NEGATIVE)
    """Deviation of the normal distribution, around `magnitude`, that each operation's is drawn from."""
    share: float = limited(0.5, SHARE)
    """Chance that a drawn operation is carried out, 0 to 1."""
    erase: float = limited(0.25, SHARE)
    """Chance that a box of the clip is replaced by noise, 0 to 1."""
    mixup: float = limited(0.8, NOT_NEGATIVE)
    """Alpha of the Beta distribution of mixup's weight; 0 turns it off."""
    cutmix: float = limited(1.0, NOT_NEGATIVE)
    """Alpha of that of cutmix's share of the frame; 0 turns it off. With both on, each has half of the pairs."""
    label_smoothing: float = limited(0.1, SHARE)
    """Share of the target that goes to all classes evenly, 0 to 1."""

    @property
    def mixes(self) -> bool:
        """Whether clips are mixed in pairs."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True, kw_only=True)
class FinetuneOptimConfig(OptimConfig):
    epochs: float = 100
    """Passes over the data set; each shows every video once, in `data.views` views."""
    warmup_epochs: float = 5
    """Linear warm-up of the learning rate from 0."""
    base_lr: float = 1e-3
    """Peak learning rate for a batch of 256 clips, views counted; scaled linearly with the batch."""
    min_lr: float = 1e-6
    """Learning rate at the end of the cosine for a batch of 256 clips; scaled likewise."""
    beta2: float = 0.999
    """AdamW's second beta; the first is 0.9."""
    layer_decay: float = limited(0.75, Limits(above=0, at_most=1))
    """Each block's learning rate over that of the block above it; the head has the full one."""
    drop_path: float = limited(0.1, BELOW_ONE)
    """Chance that the last block's branches are left out for a clip; falls linearly to 0 at the first block."""
    ema: float = limited(0.0, BELOW_ONE)
    """Decay of the moving average of the weights that validation and RUN/best then use; 0 for none."""


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """Validation shows each video's middle clip in one view; `mam2 evaluate` shows these many."""

    every: float = limited(1.0, POSITIVE)
    """Epochs between two validations of a fine-tuning run; there is always one at the end."""
    temporal: int = limited(5, COUNT, resumable=True)
    """Clips of a video: dense ones evenly from its start to its end, uniform ones interleaved."""
    spatial: int = limited(3, COUNT, resumable=True)
    """Square crops of a clip at full short side, evenly along the longer side."""
    batch: int = limited(0, COUNT_OR_NONE, resumable=True)
    """Most clips in a forward pass; 0: as many as a training pass has, in `mam2 evaluate` 32."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TokenGrid):
    data: DataConfig = field(default_factory=DataConfig)
    model: EncoderConfig = field(default_factory=EncoderConfig, metadata={RESUMABLE: True})
    """A resumed run reads this table from its checkpoint."""
    head: HeadConfig = field(default_factory=HeadConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: FinetuneOptimConfig = field(default_factory=FinetuneOptimConfig)
    test: ViewsConfig = field(default_factory=ViewsConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def clips_per_group(self) -> int:
        """Clips that must be in one pass: the views of a video, or of two that are mixed."""
        return self.data.views * (2 if self.augment.mixes else 1)

    def check(self) -> None:
        """Raises UserError for values that are out of range or cannot work together, naming key and remedy."""
        model, head = self.model, self.head
        check_training(self, model.patch, model.tubelet)
        if model.width % model.heads:
            raise UserError(f"model.width {model.width} is not a multiple of model.heads {model.heads}")
        if head.text_embeddings and head.text_encoder:
            raise UserError("head.text_embeddings and head.text_encoder both give the text embeddings: name one")
        if head.text_encoder and "{}" not in head.prompt:
            raise UserError(f"head.prompt needs {{}} where the class name goes, found {head.prompt!r}")
